"""The agent's end: serves the ranks, the readers and the subscribers of one node.

One thread waits on all sockets. The analytics calls from other threads; one lock guards the node and the
connections. `Node` decides: this class turns messages and words of pages into its events, and its effects into
messages and memory. Nothing a peer sends can block the thread: sockets are non-blocking, and what does not fit into a
socket waits in a queue.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from deisa.ray._state.effects import (
    CreateMemory,
    Effect,
    EndNode,
    GiveUp,
    GrantSlot,
    Refuse,
    SendAway,
    TellAnalytics,
    TellProgress,
)
from deisa.ray._state.events import AgentLost, Event
from deisa.ray._state.node import Newcomer, Node
from deisa.ray._state.plan import Boxes, StartPlan
from deisa.ray._state.presence import Presence, State
from deisa.ray._state.subscriber import Subscriber
from deisa.ray._state.takeover import NodeState
from deisa.ray._transport import messages
from deisa.ray._transport.address import agent_address, shown
from deisa.ray._transport.connections import Connection, Connections, Ready
from deisa.ray._transport.descriptors import RECEIVE_BYTES
from deisa.ray._transport.listening import listen
from deisa.ray._transport.messages import Message
from deisa.ray._transport.pages import RING_SCAN_S
from deisa.ray._transport.store import Owner, Post, Store, known_dtypes
from deisa.ray.config import Settings
from deisa.ray.errors import (
    ConfigurationError,
    DeisaError,
    ProtocolError,
    SessionEndedError,
    SessionInUseError,
)

logger = logging.getLogger("deisa.ray.agent")

CONSUMER = "analytics"
TICK_S = 0.5
MOST_UNREAD = 1000  # messages that wait for a peer which does not read
MOST_LAST_READS = 64  # of what a process that has ended said before
MOST_EVENTS = 1000  # in one message


def yield_to_ranks() -> None:
    """Have the calling thread never interrupt another one when it wakes up.

    A rank wakes its agent by the very message it sends: on a busy node the kernel would let the agent run
    in the rank's place, in the middle of ``send``. As a batch thread the agent waits for a free core, or
    until the rank waits itself.
    """
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class AgentServer:
    """The memory, the sockets and the decisions of one node.

    Parameters
    ----------
    settings : Settings
    run_id, node_id : str
        Which run this agent belongs to, and which node it serves.
    driver_id : str
        The analytics that may `call`, until another one takes over.
    holder : str
        The process of that analytics, in words.
    ends_alone : bool
        Whether it ends when it no longer hears from its analytics; not where both are one process.
    """

    def __init__(
        self,
        settings: Settings,
        run_id: str,
        node_id: str,
        driver_id: str = "",
        holder: str = "another analytics",
        *,
        ends_alone: bool = True,
    ) -> None:
        self._settings = settings
        self.agent_id = f"{run_id}:{node_id}"
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        presence = Presence(driver_id, holder, time.monotonic(), ends_alone=ends_alone)
        self._subscriber = Subscriber(CONSUMER, presence)  # of those who call without saying who they are
        self._node = Node(
            settings.session, socket.gethostname(), [self._subscriber], settings.driver_timeout_s
        )
        self._store = Store(settings.session, settings.memory_fraction)
        self._full = False  # no connection could be accepted, for want of descriptors
        self._calls: Mapping[str, Callable[..., Any]] = {
            "poll": self.poll,
            "abandon": self.abandon,
            "report_progress": self.report_progress,
            "positions": self.positions,
            "dismiss": self.dismiss,
            "bound_bytes": self.bound_bytes,
            "start": self.start,
            "release": self.release,
            "close": self.close,
        }
        self.closed = threading.Event()
        listener = listen(settings, run_id)
        self.serving = listener is not None
        self._connections = Connections(listener)
        self._thread = threading.Thread(target=self._serve, name="deisa-agent", daemon=True)
        self._thread.start()

    # What an analytics calls.

    def call(self, driver_id: str, method: str, arguments: Sequence[Any]) -> Any:
        """Call a method for an analytics.

        Raises
        ------
        SessionInUseError
            When another one has taken over in the meantime: this one had been given up.
        """
        with self._lock:
            if self._node.subscriber_of(driver_id) is None:
                raise SessionInUseError(
                    f"session {self._settings.session!r} has been taken over by {self._subscriber.presence.holder}, "
                    "because this analytics did not answer"
                )
            if method != "close":
                return self._calls[method](*arguments)
        self.close(*arguments)  # it waits for a thread that needs the lock
        return None

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """Wait for events for at most `timeout_s`; also the analytics' sign of life.

        Events that go to a connection do not come here.
        """
        subscriber = self._subscriber
        presence = subscriber.presence
        with self._changed:
            self._node.begin_poll(subscriber)
            self._carry_out()
            driver_id = presence.driver_id
            deadline = time.monotonic() + timeout_s
            events: Sequence[Event] = []
            try:
                while presence.driver_id == driver_id and not presence.reason:
                    if not subscriber.listens:
                        events = self._node.hear(subscriber)
                    remaining = deadline - time.monotonic()
                    if events or self.closed.is_set() or remaining <= 0:
                        break
                    self._changed.wait(remaining)
            finally:
                presence.end_poll(driver_id, time.monotonic())
            return events

    @property
    def driver_presence(self) -> tuple[State, float, str]:
        """What `Presence.state` says of the analytics, and which process it is.

        Raises
        ------
        SessionEndedError
        """
        with self._lock:
            self._check_open()
            presence = self._subscriber.presence
            return (*presence.state(time.monotonic()), presence.holder)

    def _check_open(self) -> None:
        if self.closed.is_set():
            raise SessionEndedError(f"agent {self.agent_id} has ended")

    def abandon(self, reason: str) -> None:
        """The analytics goes, and another one may take over."""
        with self._lock:
            self._node.leave(self._subscriber, messages.shorten(reason), time.monotonic())
            self._carry_out()
            self._changed.notify_all()

    def take_over(self, driver_id: str, holder: str = "another analytics") -> NodeState:
        """Serve another analytics from now on, and tell it where the last one was.

        Raises
        ------
        SessionEndedError
            When the agent was just ending.
        """
        with self._lock:
            self._check_open()
            line = self._subscriber.disconnect()
            last = self._connections.get(line) if line is not None else None
            if last is not None:
                self._drop(last, "")
            self._node.take_over(self._subscriber, driver_id, holder, time.monotonic())
            self._carry_out()
            for connection in self._connections:  # a rank that has died is to be known as lost
                self._receive(connection)
            self._look()
            self._report_losses()
            self._changed.notify_all()
            handled = self._store.handled(self._subscriber.name)
            return self._node.state_for(self._subscriber, self.agent_id, handled)

    def report_progress(self, text: str) -> None:
        """Pass on what the analytics waits for: to all ranks before the start, then to those that have no slot."""
        with self._lock:
            self._node.report_progress(messages.shorten(text), time.monotonic())
            self._carry_out()

    def positions(self) -> dict[int, float]:
        """The timestep that each bridge is at which has not closed."""
        with self._lock:
            return self._node.positions()

    def dismiss(self, error: DeisaError) -> None:
        """The analytics ends the run: tell the ranks; what has arrived stays until `close`."""
        with self._lock:
            self._node.dismiss(error)
            self._carry_out()

    def bound_bytes(self, plan: StartPlan, boxes: Boxes) -> int:
        """Chunk memory this node needs for `plan`; raises as `Store.bound_bytes` does."""
        with self._lock:
            owners = self._owners()
        return self._store.bound_bytes(owners, plan, boxes)

    def _owners(self, bridges: Iterable[int] | None = None) -> list[Owner]:
        """The bridges that are connected, of some or of all, with what they have said of themselves."""
        node = self._node
        return [
            Owner(
                bridge_id,
                {described.name: described for described in node.described(bridge_id)},
                node.arrivals.regions_of(bridge_id),
                connection.limits,
            )
            for bridge_id in (node.bridges if bridges is None else bridges)
            if (connection := self._rank(bridge_id)) is not None
        ]

    def start(self, plan: StartPlan, boxes: Boxes) -> None:
        """Create the slots and let the ranks go."""
        with self._lock:
            node, store = self._node, self._store
            node.start(plan)
            self._carry_out()
            owners = self._owners()
            for owner in owners:
                for post in store.provide(owner, known_dtypes(plan, without=boxes), plan.slots):
                    self._queue(owner.bridge_id, post)
            for name in boxes:
                for bridge_id, post in store.provide_boxes(owners, name, boxes, plan):
                    self._queue(bridge_id, post)
            for bridge_id, post in store.create_pages(node.arrivals, list(node.bridges), plan):
                self._queue(bridge_id, post)
                connection = self._rank(bridge_id)
                if connection is not None:
                    self._try_to_flush(connection)
            self._connections.wake()  # from now on the thread looks into the rings

    def release(self, consumer: str, steps: Sequence[tuple[str, int]]) -> None:
        """End a consumer's leases on (array, timestep) pairs, and give free slots back to the ranks."""
        with self._lock:
            if not self.closed.is_set() and self._store.table is not None:  # else the memory has gone
                self._node.release(consumer, steps)
                self._carry_out()

    def close(self, error: DeisaError | None = None) -> None:
        """End the session on this node: tell the ranks why, close every socket, free the memory."""
        with self._lock:
            if self.closed.is_set():
                return
            if error is not None:
                for connection in self._connections:
                    if self._node.bridge_of(connection.number) is not None:
                        self._refuse(connection, error)
            self.closed.set()
            self._connections.wake()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The thread that serves the sockets.

    def _serve(self) -> None:
        yield_to_ranks()
        try:
            while not self.closed.is_set():
                ready = self._connections.wait(TICK_S if self._node.plan is None else RING_SCAN_S)
                with self._lock:
                    if not self.closed.is_set():
                        self._serve_all(ready)
        except Exception as error:
            logger.exception("the agent has failed")
            with self._lock:
                self._node.report(AgentLost(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._shut()

    def _serve_all(self, ready: Iterable[tuple[Ready, Connection | None]]) -> None:
        for what, peer in ready:
            if peer is None:
                self._accept()
            elif what is Ready.ENDED:
                self._see_off(peer)
            elif what is Ready.TO_WRITE:
                self._try_to_flush(peer)
            else:
                self._receive(peer)
        for connection in self._connections.stuck:
            self._try_to_flush(connection)
        now = time.monotonic()
        self._look()
        self._report_losses()
        self._node.answer_newcomers(now)
        self._node.look_over(now)
        self._carry_out()
        self._tell_subscribers()

    def _tell_subscribers(self) -> None:
        for subscriber in self._node.subscribers:
            if not subscriber.has_news(self._node.log):
                continue
            line = self._connections.get(subscriber.line) if subscriber.line is not None else None
            if line is None or not subscriber.listens:
                self._changed.notify_all()
            elif not line.outgoing:  # one that does not read gets what gathers until then at once
                self._post(line, messages.Events(tuple(self._node.hear(subscriber, MOST_EVENTS))))

    def _look(self) -> None:
        """Look into every ring."""
        if self._store.counters is not None:
            self._store.counters.begin_look()
        for bridge_id in self._node.bridges:
            connection = self._rank(bridge_id)
            if connection is not None:
                try:
                    self._collect(connection)
                except ProtocolError as error:
                    text = messages.shorten(error)
                    logger.warning("refused bridge %s (pid %d): %s", bridge_id, connection.pid, text)
                    self._refuse(connection, error)

    def _collect(self, connection: Connection) -> None:
        """Account for what a rank has written since the last look."""
        bridge_id = self._node.sender(connection.number)
        ring = self._store.rings.get(bridge_id) if bridge_id is not None else None
        if bridge_id is not None and ring is not None:
            seen = ring.look()
            self._node.submitted(bridge_id, seen.entries, seen.passed, seen.blocked, time.monotonic())

    def _report_losses(self) -> None:
        """Report the bridges that were lost, after all that the others had sent by then."""
        while lost := self._node.take_losses():
            for connection in self._connections:
                self._receive(connection)
            self._look()
            for bridge_id, reason in lost:
                self._node.lose(bridge_id, reason)

    def _accept(self) -> None:
        try:
            accepted = self._connections.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and not self._full:
                self._full = True
                self._node.report(AgentLost(f"it cannot accept any more connections: {error} (ulimit -n)"))
            logger.error("cannot accept a connection: %s", error)
            time.sleep(0.05)
            return
        if accepted is not None:
            connection, has_ended = accepted
            if has_ended:
                self._see_off(connection)

    def _see_off(self, connection: Connection) -> None:
        """Hear the last words of a peer whose process has ended, though a child of it may keep the socket open."""
        for _ in range(MOST_LAST_READS):
            if connection not in self._connections or not self._receive(connection):
                break
        self._drop(connection, "its process ended without close()")

    def _receive(self, connection: Connection) -> bool:
        """Handle what a peer has sent; whether there was anything."""
        if connection not in self._connections:
            return False
        try:
            return self._receive_some(connection)
        except DeisaError as error:
            logger.warning("refused a peer (pid %d): %s", connection.pid, messages.shorten(error))
            self._refuse(connection, error)
        except OSError as error:
            self._drop(connection, f"its connection failed ({error})")
        return False

    def _receive_some(self, connection: Connection) -> bool:
        try:
            data = connection.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # it left without having read everything
            data = b""
        if not data:
            self._drop(connection, "its process ended without close()")
            return False
        for message in connection.frames.feed(data):
            if connection in self._connections:  # not dropped by the message before
                self._handle(connection, message)
                self._carry_out()
                if len(connection.outgoing) > MOST_UNREAD:
                    raise ProtocolError("it does not read what it is sent")
        return True

    # What peers say.

    def _handle(self, connection: Connection, message: Message) -> None:
        match message:
            case messages.Hello():
                self._welcome(connection, message)
            case messages.Attach(version, mapped):
                self._check_version(version)
                self._attach(connection, mapped)
            case messages.Follow():
                self._follow(connection, message)
            case messages.Release(consumer, steps):
                if all(s.line != connection.number for s in self._node.subscribers):
                    raise ProtocolError("only an analytics that follows its agent may release")
                self.release(consumer, [(step.array, step.timestep) for step in steps])
            case messages.Abort(reason) if (
                self._node.bridge_of(connection.number) is not None and self._node.plan is None
            ):
                self._drop(connection, messages.shorten(reason))  # its description was refused
            case _:
                self._handle_sender(connection, message)

    def _handle_sender(self, connection: Connection, message: Message) -> None:
        bridge_id = self._node.sender(connection.number)
        if bridge_id is None:
            raise ProtocolError(f"a {type(message).__name__} is out of place here")
        self._collect(connection)  # it was written before the message was sent
        match message:
            case messages.Notify():
                pass  # all rings are looked into after every round
            case messages.DeclareDtype():
                self._declare(bridge_id, message)
            case messages.Abort(reason):
                self._drop(connection, messages.shorten(reason))
            case messages.Ending():
                self._node.begin_end(bridge_id, time.monotonic())
            case messages.Close(stats):
                self._node.close(bridge_id, stats)
            case _:
                raise ProtocolError(f"a {type(message).__name__} is not for an agent")

    @staticmethod
    def _check_version(version: int) -> None:
        if version != messages.PROTOCOL_VERSION:
            raise ProtocolError(
                f"the peer speaks protocol version {version}, this agent {messages.PROTOCOL_VERSION}; "
                "install the same deisa-ray on both sides"
            )

    def _welcome(self, connection: Connection, hello: messages.Hello) -> None:
        self._check_version(hello.version)
        if hello.session != self._settings.session:
            raise ConfigurationError(
                f"bridge {hello.bridge_id} of session {hello.session!r:.70} came to the agent of session "
                f"{self._settings.session!r} at {shown(agent_address(self._settings))}: give both sides the same "
                "session name (DEISA_RAY_SESSION), or each session a path of its own (DEISA_RAY_SOCKET_PATH)"
            )
        connection.limits = hello.limits
        self._node.hello(
            Newcomer(connection.number, connection.pid, hello.bridge_id, hello.world_size, hello.arrays),
            time.monotonic(),
        )

    def _declare(self, bridge_id: int, message: messages.DeclareDtype) -> None:
        waiting = self._node.check_declaration(bridge_id, message.array)
        connection, plan = self._rank(bridge_id), self._node.plan
        assert connection is not None and plan is not None
        connection.limits = message.limits
        owners = {owner.bridge_id: owner for owner in self._owners(waiting)}
        slots = plan.slots[message.array]
        self._store.check_declared(owners[bridge_id], owners.values(), message.array, message.dtype, slots)
        self._node.declare(bridge_id, message.array, message.dtype)

    def _attach(self, connection: Connection, mapped: int) -> None:
        for message, descriptors in self._store.for_readers(mapped):
            self._post(connection, message, descriptors)
        now, presence = time.monotonic(), self._subscriber.presence
        self._post(connection, messages.Attached(self.agent_id, *presence.state(now), presence.holder))
        self._node.step_aside(now)

    def _follow(self, connection: Connection, follow: messages.Follow) -> None:
        """Give an analytics of this node a journal; its connection shows that it is there."""
        self._check_version(follow.version)
        subscriber = self._node.subscriber_of(follow.driver_id) if follow.driver_id else None
        if subscriber is None or self._node.bridge_of(connection.number) is not None:
            raise ProtocolError("only the analytics itself may follow its agent")
        subscriber.connect(connection.number, follow.callbacks, listens=follow.listens != 0)
        self._post(connection, *self._store.journal(subscriber.name, follow.callbacks))

    # What the node wants done.

    def _carry_out(self) -> None:
        while effects := self._node.take_effects():
            for effect in effects:
                self._do(effect)

    def _do(self, effect: Effect) -> None:
        match effect:
            case TellProgress(peer, text):
                self._say(peer, messages.Progress(text))
            case TellAnalytics(peer, reason):
                self._say(peer, messages.AnalyticsDown(reason) if reason else messages.AnalyticsUp())
            case SendAway(peer, reason):
                self._say(peer, messages.Later(reason))
                self._hang_up(peer, "")
            case Refuse(peer, error):
                connection = self._connections.get(peer)
                if connection is not None:
                    self._refuse(connection, error)
            case GiveUp(peer, reason):
                self._hang_up(peer, reason)
            case CreateMemory(bridge_id, array, dtype):
                (owner,) = self._owners([bridge_id])
                assert self._node.plan is not None
                for post in self._store.provide(owner, {array: dtype}, self._node.plan.slots):
                    self._say(self._node.bridges[bridge_id], *post)
            case GrantSlot(array, number, slot):
                if self._store.table is not None:
                    self._store.table.grant(array, number, slot)
            case EndNode(error):
                if error is not None:
                    logger.warning("%s; the agent ends", error)
                self.close(error)

    def _rank(self, bridge_id: int) -> Connection | None:
        return self._connections.get(self._node.bridges[bridge_id])

    def _queue(self, bridge_id: int, post: Post) -> None:
        connection = self._rank(bridge_id)
        if connection is not None:
            connection.queue(*post)

    def _say(self, peer: int, message: Message, descriptors: Sequence[int] = ()) -> None:
        connection = self._connections.get(peer)
        if connection is not None:
            self._post(connection, message, descriptors)

    def _post(self, connection: Connection, message: Message, descriptors: Sequence[int] = ()) -> None:
        connection.queue(message, descriptors)
        self._try_to_flush(connection)
        self._wake(connection)

    def _wake(self, connection: Connection) -> None:
        """Have a rank that waits for a slot look at its connection."""
        bridge_id = self._node.bridge_of(connection.number)
        if bridge_id is not None:
            self._store.wake_if_blocked(bridge_id)

    def _try_to_flush(self, connection: Connection) -> None:
        try:
            self._connections.flush(connection)
        except OSError as error:
            self._drop(connection, f"nothing could be sent to it ({error})")

    def _refuse(self, connection: Connection, error: DeisaError) -> None:
        if not self._node.has_closed(connection.number):
            # One that has not read what came before will not read this either: nobody waits for it.
            self._post(connection, messages.Fail(type(error).__name__, messages.shorten(error)))
        self._drop(connection, messages.shorten(error))

    def _hang_up(self, peer: int, reason: str) -> None:
        connection = self._connections.get(peer)
        if connection is not None:
            self._drop(connection, reason)

    def _drop(self, connection: Connection, reason: str) -> None:
        if connection not in self._connections:
            return
        self._connections.hang_up(connection)
        self._wake(connection)
        with suppress(ProtocolError):  # what a rank submitted before it died counts
            self._collect(connection)
        self._node.gone(connection.number, reason, time.monotonic())
        self._carry_out()
        self._changed.notify_all()

    def _shut(self) -> None:
        with self._lock:
            self._connections.close()
            self._store.close()
            self.closed.set()
            self._changed.notify_all()
