"""What goes over an agent's connections: messages become events of the node, its effects become messages.

Not thread-safe: `AgentServer` holds a lock around it. Nothing a peer sends can block the caller: what does not fit into
a socket waits in a queue.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

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
from deisa.ray._state.events import AgentLost
from deisa.ray._state.feedback import Proposal, Setting
from deisa.ray._state.node import Newcomer, Node
from deisa.ray._state.plan import NodePlan, StartPlan
from deisa.ray._state.streams import Parts, by_bridge
from deisa.ray._transport import messages
from deisa.ray._transport.address import agent_address, shown
from deisa.ray._transport.connections import Connection, Connections, Ready
from deisa.ray._transport.descriptors import RECEIVE_BYTES
from deisa.ray._transport.messages import Message
from deisa.ray._transport.store import Owner, Post, Store, known_dtypes
from deisa.ray.config import Settings
from deisa.ray.errors import ConfigurationError, DeisaError, ProtocolError

logger = logging.getLogger("deisa.ray.agent")

MOST_UNREAD = 1000  # messages that wait for a peer which does not read
MOST_LAST_READS = 64  # of what a process that has ended said before
MOST_EVENTS = 1000  # in one message


class Exchange:
    """Carries between the node's decisions, its memory and its connections.

    Parameters
    ----------
    settings : Settings
    agent_id : str
    node : Node
    store : Store
    connections : Connections
    end : callable
        Ends the session on this node; ranks that are still there learn the error.
    wake : callable
        Wakes whoever waits for events.
    """

    def __init__(
        self,
        settings: Settings,
        agent_id: str,
        node: Node,
        store: Store,
        connections: Connections,
        end: Callable[[DeisaError | None], None],
        wake: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._agent_id = agent_id
        self._node = node
        self._store = store
        self._connections = connections
        self._end = end
        self._wake_callers = wake
        self._parts: Parts = {}  # that streams take of the node's chunks, once it is started
        self._full = False  # no connection could be accepted, for want of descriptors

    def serve(self, ready: Iterable[tuple[Ready, Connection | None]]) -> None:
        """Handle what connections have to say, look at the pages, and draw conclusions."""
        for what, peer in ready:
            if peer is None:
                self._accept()
            elif what is Ready.ENDED:
                self._see_off(peer)
            elif what is Ready.TO_WRITE:
                self._try_to_flush(peer)
            else:
                self.receive(peer)
        for connection in self._connections.stuck:
            self._try_to_flush(connection)
        now = time.monotonic()
        self.look()
        self.report_losses()
        self._node.answer_newcomers(now)
        self._node.look_over(now)
        self.carry_out()
        self.tell_subscribers()

    def tell_subscribers(self) -> None:
        """Hand events over: to the connections of those that listen, to calls that wait for the others."""
        for subscriber in self._node.subscribers:
            if not subscriber.has_news(self._node.log):
                continue
            line = self._connections.get(subscriber.line) if subscriber.line is not None else None
            if line is None or not subscriber.listens:
                self._wake_callers()
                continue
            # One that does not read gets a message, and later what has gathered by then.
            while subscriber.has_news(self._node.log) and line in self._connections and not line.outgoing:
                self._post(line, messages.Events(tuple(self._node.hear(subscriber, MOST_EVENTS))))

    def look(self) -> None:
        """Look into every ring."""
        if self._store.counters is not None:
            self._store.counters.begin_look()
        if self._store.feedback is not None and self._store.feedback.is_waited_for:
            self._node.await_feedback()
        for bridge_id in self._node.bridges:
            connection = self._rank(bridge_id)
            if connection is not None:
                try:
                    self._collect(connection)
                except ProtocolError as error:
                    text = messages.shorten(error)
                    logger.warning("refused bridge %s (pid %d): %s", bridge_id, connection.pid, text)
                    self.refuse(connection, error)

    def _collect(self, connection: Connection) -> None:
        """Take what a rank has written since the last look."""
        bridge_id = self._node.sender(connection.number)
        ring = self._store.rings.get(bridge_id) if bridge_id is not None else None
        if bridge_id is not None and ring is not None:
            seen = ring.look()
            self._node.submitted(bridge_id, seen.entries, seen.passed, seen.blocked, time.monotonic())

    def report_losses(self) -> None:
        """Report the bridges that were lost, after all that the others had sent by then."""
        while lost := self._node.take_losses():
            for connection in self._connections:
                self.receive(connection)
            self.look()
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
            if connection not in self._connections or not self.receive(connection):
                break
        self.drop(connection, "its process ended without close()")

    def receive(self, connection: Connection) -> bool:
        """Handle what a peer has sent; whether there was anything."""
        if connection not in self._connections:
            return False
        try:
            return self._receive_some(connection)
        except DeisaError as error:
            logger.warning("refused a peer (pid %d): %s", connection.pid, messages.shorten(error))
            self.refuse(connection, error)
        except OSError as error:
            self.drop(connection, f"its connection failed ({error})")
        return False

    def _receive_some(self, connection: Connection) -> bool:
        try:
            data = connection.socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return False
        except ConnectionResetError:  # it left without having read everything
            data = b""
        if not data:
            self.drop(connection, "its process ended without close()")
            return False
        for message in connection.frames.feed(data):
            if connection in self._connections:  # not dropped by the message before
                self._handle(connection, message)
                self.carry_out()
                if len(connection.outgoing) > MOST_UNREAD:
                    raise ProtocolError("it does not read what it is sent")
        return True

    def start(self, plan: StartPlan, here: NodePlan) -> None:
        """Create memory and pages, and let the ranks go."""
        node, store, boxes = self._node, self._store, here.boxes
        self._parts = here.parts
        node.start(plan, here.parts)
        self.carry_out()
        owners = self.owners(here.parts)
        for owner in owners:
            for post in store.provide(owner, known_dtypes(plan, without=boxes), plan.slots):
                self._queue(owner.bridge_id, post)
        for name in boxes:
            for bridge_id, post in store.provide_boxes(owners, name, boxes, plan):
                self._queue(bridge_id, post)
        for bridge_id, post in store.create_pages(here.parts, list(node.bridges), plan):
            self._queue(bridge_id, post)
            connection = self._rank(bridge_id)
            if connection is not None:
                self._try_to_flush(connection)

    def owners(self, parts: Parts) -> list[Owner]:
        """The bridges that are connected, with what streams take of their chunks."""
        own = by_bridge(parts)
        return [
            Owner(bridge_id, own.get(bridge_id, {}), connection.limits)
            for bridge_id in self._node.bridges
            if (connection := self._rank(bridge_id)) is not None
        ]

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
                self._node.release(consumer, [(step.array, step.timestep) for step in steps])
            case messages.Propose() | messages.Settle() | messages.Finish():
                self._steer(connection, message)
            case messages.CannotJoin(version, session, bridge_id, reason):
                self._check_address(version, bridge_id, session)
                self._node.cannot_join(bridge_id, messages.shorten(reason))
                self.drop(connection, "")
            case messages.Abort(reason) if (
                self._node.plan is None and self._node.bridge_of(connection.number) is not None
            ):
                self.drop(connection, messages.shorten(reason))
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
                self.drop(connection, messages.shorten(reason))
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

    def _check_address(self, version: int, bridge_id: int, session: str) -> None:
        self._check_version(version)
        if session != self._settings.session:
            raise ConfigurationError(
                f"bridge {bridge_id} of session {session!r:.70} came to the agent of session "
                f"{self._settings.session!r} at {shown(agent_address(self._settings))}: give both sides the same "
                "session name (DEISA_RAY_SESSION), or each session a path of its own (DEISA_RAY_SOCKET_PATH)"
            )

    def _welcome(self, connection: Connection, hello: messages.Hello) -> None:
        self._check_address(hello.version, hello.bridge_id, hello.session)
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
        owners = {o.bridge_id: o for o in self.owners(self._parts) if o.bridge_id in waiting}
        dtypes = self._node.dtypes_of(message.array, message.dtype)
        self._store.check_declared(owners[bridge_id], owners.values(), message.array, dtypes, plan.slots)
        self._node.declare(bridge_id, message.array, message.dtype)

    def _attach(self, connection: Connection, mapped: int) -> None:
        for message, descriptors in self._store.for_readers(mapped):
            self._post(connection, message, descriptors)
        now, presence = time.monotonic(), self._node.subscribers[0].presence
        self._post(connection, messages.Attached(self._agent_id, *presence.state(now), presence.holder))
        self._node.step_aside(now)

    def _follow(self, connection: Connection, follow: messages.Follow) -> None:
        """Give an analytics of this node a journal; its connection shows that it is there."""
        self._check_version(follow.version)
        subscriber = self._node.subscriber_of(follow.driver_id) if follow.driver_id else None
        if subscriber is None or self._node.bridge_of(connection.number) is not None:
            raise ProtocolError("only the analytics itself may follow its agent")
        self._node.connect(subscriber, connection.number, follow.callbacks, listens=follow.listens != 0)
        self._post(connection, *self._store.journal(subscriber.name, follow.callbacks, self._agent_id))

    def _steer(
        self, connection: Connection, message: messages.Propose | messages.Settle | messages.Finish
    ) -> None:
        """Pass on what the analytics of this node says of values for the simulation."""
        feedback = self._store.feedback
        if feedback is None or all(s.line != connection.number for s in self._node.subscribers):
            raise ProtocolError("only an analytics that follows its agent may steer, once it has started")
        match message:
            case messages.Propose(number, key, timestep, value, final, last_accepted):
                setting = Setting(key, timestep, value)
                verdict = feedback.propose(Proposal(number, setting, bool(final), last_accepted))
                by, asked = (
                    (verdict.asked.bridge_id, verdict.asked.timestep) if verdict.asked else (None, None)
                )
                self._post(
                    connection, messages.Judged(number, by, asked, int(verdict.known), verdict.refusal)
                )
            case messages.Settle(number, is_accepted):
                feedback.settle(number, is_accepted=bool(is_accepted))
            case messages.Finish(timestep):
                feedback.finish(timestep)

    # What the node wants done.

    def carry_out(self) -> None:
        """Do what the node wants done."""
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
                    self.refuse(connection, error)
            case GiveUp(peer, reason):
                self._hang_up(peer, reason)
            case CreateMemory(bridge_id, dtypes):
                (owner,) = (o for o in self.owners(self._parts) if o.bridge_id == bridge_id)
                assert self._node.plan is not None
                for post in self._store.provide(owner, dtypes, self._node.plan.slots):
                    self._say(self._node.bridges[bridge_id], *post)
            case GrantSlot(array, number, slot):
                if self._store.table is not None:
                    self._store.table.grant(array, number, slot)
            case EndNode(error):
                if error is not None:
                    logger.warning("%s; the agent ends", error)
                self._end(error)

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
            self.drop(connection, f"nothing could be sent to it ({error})")

    def refuse(self, connection: Connection, error: DeisaError) -> None:
        """Tell a peer an error, and hang up."""
        if not self._node.has_closed(connection.number):
            # One that has not read what came before will not read this either: nobody waits for it.
            self._post(connection, messages.Fail(type(error).__name__, messages.shorten(error)))
        self.drop(connection, messages.shorten(error))

    def _hang_up(self, peer: int, reason: str) -> None:
        connection = self._connections.get(peer)
        if connection is not None:
            self.drop(connection, reason)

    def drop(self, connection: Connection, reason: str) -> None:
        """Hang up."""
        if connection not in self._connections:
            return
        self._connections.hang_up(connection)
        self._wake(connection)
        with suppress(ProtocolError):  # what a rank submitted before it died counts
            self._collect(connection)
        self._node.gone(connection.number, reason, time.monotonic())
        self.carry_out()
        self._wake_callers()
