"""The agent's end: serves the ranks and readers of one node.

One thread waits on all sockets. The analytics calls the public methods from other threads; one
lock guards the account of arrivals and the connections. Nothing a peer sends can block the
thread: sockets are non-blocking, and what does not fit into a socket waits in a queue.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deisa.ray._state.arrivals import FINISHED, NodeArrivals
from deisa.ray._state.events import AgentLost, BridgeJoined, DtypeDeclared, Event, SendersBlocked
from deisa.ray._state.layout import Shape
from deisa.ray._state.newcomers import Run, answer_newcomer
from deisa.ray._state.plan import Boxes, StartPlan
from deisa.ray._state.presence import Presence, State
from deisa.ray._state.takeover import NOTHING_HANDLED, NodeState
from deisa.ray._transport import messages
from deisa.ray._transport.address import agent_address, shown
from deisa.ray._transport.connections import Blocked, Connection, Connections, Ready
from deisa.ray._transport.descriptor_limit import check_descriptors
from deisa.ray._transport.descriptors import RECEIVE_BYTES
from deisa.ray._transport.limits import MemoryLimit, check_limits
from deisa.ray._transport.listening import listen
from deisa.ray._transport.memory import check_fits, create_segment, lay_out, slot_size, within
from deisa.ray._transport.messages import Message, RegionSpec
from deisa.ray._transport.pages import (
    DESCRIPTORS_PER_PAGE,
    RING_SCAN_S,
    ArrivalCounters,
    Page,
    RingReader,
    SlotTable,
)
from deisa.ray.config import Settings
from deisa.ray.errors import (
    AnalyticsLostError,
    BridgeIdError,
    ConfigurationError,
    DeisaError,
    ProtocolError,
    SessionEndedError,
    SessionInUseError,
)

logger = logging.getLogger("deisa.ray.agent")

DESCRIPTORS_PER_MESSAGE = 64
TICK_S = 0.5
ENDING_S = 5.0  # that a process may take to end once it has said so, while others wait for it
BLOCKED_S = (
    0.25  # that ranks wait before the analytics hears of it: nothing, where it is merely slower than they
)
PROGRESS_S = 1.0  # that a rank waits before it hears for whom
MOST_UNREAD = 1000  # messages that wait for a peer which does not read
MOST_LAST_READS = 64  # of what a process that has ended said before


def yield_to_ranks() -> None:
    """Have the calling thread never interrupt another one when it wakes up.

    A rank wakes its agent by the very message it sends: on a busy node the kernel would let the agent run
    in the rank's place, in the middle of ``send``. As a batch thread the agent waits for a free core, or
    for its turn.
    """
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


@dataclass(slots=True)
class _Segment:
    descriptor: int
    nbytes: int
    regions: list[RegionSpec]  # as readers see them


class AgentServer:
    """The memory, the sockets and the account of arrivals of one node.

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
        self._run_id = run_id
        self.agent_id = f"{run_id}:{node_id}"
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._arrivals = NodeArrivals()
        self._bridges: dict[int, Connection] = {}
        self._segments: list[_Segment] = []
        self._table: SlotTable | None = None
        self._counters: ArrivalCounters | None = None
        self._lost: list[tuple[int, str]] = []  # bridges, and why; still to be reported
        self._blocked: dict[
            str, dict[int, int]
        ] = {}  # by array what was reported last: bridges, and timesteps
        self._plan: StartPlan | None = None
        self._progress = "the analytics is up but has not called execute_callbacks() yet"
        self._joined: list[Event] = []
        self._newcomers: dict[
            Connection, tuple[messages.Hello, float]
        ] = {}  # whose place is taken; since when
        self._presence = Presence(driver_id, holder, time.monotonic(), ends_alone=ends_alone)
        self._driver: Connection | None = None  # the analytics', if it is on this node
        self._host = socket.gethostname()
        self._dismissed: DeisaError | None = None  # what the analytics told the ranks when it ended the run
        self._journal: Page | None = None
        self._callbacks = 0  # that it has a word for
        self._declared: list[Event] = []
        self._full = False  # no connection could be accepted, for want of descriptors
        self.closed = threading.Event()
        listener = listen(settings, run_id)
        self.serving = listener is not None
        self._connections = Connections(listener)
        self._thread = threading.Thread(target=self._serve, name="deisa-agent", daemon=True)
        self._thread.start()

    # What the analytics calls.

    def call(self, driver_id: str, method: str, arguments: Sequence[Any]) -> Any:
        """Call a method for an analytics.

        Raises
        ------
        SessionInUseError
            When another one has taken over in the meantime: this one had been given up.
        """
        with self._lock:
            if driver_id != self._presence.driver_id:
                raise SessionInUseError(
                    f"session {self._settings.session!r} has been taken over by {self._presence.holder}, because this "
                    "analytics did not answer"
                )
            if method != "close":
                return getattr(self, method)(*arguments)
        self.close(*arguments)  # it waits for a thread that needs the lock
        return None

    def poll(self, timeout_s: float) -> list[Event]:
        """Wait for events for at most `timeout_s`; also the analytics' sign of life."""
        with self._changed:
            presence = self._presence
            if presence.begin_poll():
                self._tell_of_analytics()
            driver_id = presence.driver_id
            deadline = time.monotonic() + timeout_s
            events: list[Event] = []
            try:
                while presence.driver_id == driver_id and not presence.reason:
                    events = self._take_events()
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
            if self.closed.is_set():
                raise SessionEndedError(f"agent {self.agent_id} has ended")
            return (*self._presence.state(time.monotonic()), self._presence.holder)

    def abandon(self, reason: str) -> None:
        """The analytics goes, and another one may take over."""
        with self._lock:
            if self._presence.leave(messages.shorten(reason), time.monotonic()):
                self._tell_of_analytics()
                self._changed.notify_all()

    def _tell_of_analytics(self) -> None:
        reason = self._presence.reason
        for connection in self._bridges.values():
            if connection in self._connections and not connection.closed:
                self._post(connection, messages.AnalyticsDown(reason) if reason else messages.AnalyticsUp())

    def take_over(self, driver_id: str, holder: str = "another analytics") -> NodeState:
        """Serve another analytics from now on, and tell it where the last one was.

        Raises
        ------
        SessionEndedError
            When the agent was just ending.
        """
        with self._lock:
            if self.closed.is_set():
                raise SessionEndedError(f"agent {self.agent_id} has ended")
            last, self._driver = self._driver, None
            self._presence.connected = False
            if last is not None:
                self._drop(last, "")
            if self._presence.follow(driver_id, holder, time.monotonic()):
                self._tell_of_analytics()
            for connection in list(self._connections):  # a rank that has died is to be known as lost
                self._receive(connection)
            self._collect_all()
            self._report_losses()
            self._changed.notify_all()
            held = self._arrivals.held()
            joined = [c.joined for c in self._bridges.values() if c.joined is not None]
            since: list[Event] = [*self._declared, *self._arrivals.lasting_events, *self._waiting()]
            self._joined.clear()
            self._arrivals.take_events()
            return NodeState(self.agent_id, self._plan, tuple(joined), held, tuple(since), self._handled())

    def _waiting(self) -> list[Event]:
        return [SendersBlocked(array, timesteps) for array, timesteps in self._blocked_now().items()]

    def _blocked_now(self, longer_than_s: float = 0.0) -> dict[str, dict[int, int]]:
        """The bridges that wait for a slot of each array, and with which timesteps, unless one has just come."""
        now = time.monotonic()
        found: dict[str, dict[int, int]] = {}
        newest: dict[str, float] = {}
        for bridge_id, connection in sorted(self._bridges.items()):
            blocked = connection.blocked
            if blocked is not None and connection in self._connections:
                found.setdefault(blocked.array, {})[bridge_id] = blocked.timestep
                newest[blocked.array] = max(newest.get(blocked.array, blocked.since), blocked.since)
        return {array: who for array, who in found.items() if now - newest[array] >= longer_than_s}

    def _take_events(self) -> list[Event]:
        joined, self._joined = self._joined, []
        return [*joined, *self._arrivals.take_events()]

    def report_progress(self, text: str) -> None:
        """Pass on what the analytics waits for: to all ranks before the start, then to those that have no slot."""
        with self._lock:
            self._progress = text = messages.shorten(text)
            if self._plan is None:
                for connection in self._bridges.values():
                    self._post(connection, messages.Progress(text))
            else:
                self._tell_blocked()

    def positions(self) -> dict[int, float]:
        """The timestep that each bridge is at which has not closed."""
        with self._lock:
            return self._arrivals.positions()

    def dismiss(self, error: DeisaError) -> None:
        """The analytics ends the run: tell the ranks; what has arrived stays until `close`."""
        with self._lock:
            self._dismissed = error
            for connection in [c for c in self._connections if c.bridge_id is not None]:
                self._fail(connection, error)

    def bound_bytes(self, plan: StartPlan, boxes: Boxes) -> int:
        """Chunk memory this node needs for `plan`.

        Raises
        ------
        MemoryBoundError
            When that is more than the node may give.
        DescriptorLimitError
            When the memory of so many bridges takes more descriptors than this process may have.
        """
        with self._lock:
            separate = _known_dtypes(plan, without=boxes)
            own = {b: lay_out(self._chunks(c, separate, plan.slots))[1] for b, c in self._bridges.items()}
            needed = sum(own.values()) + sum(_lay_out_boxes(name, boxes, plan)[1] for name in boxes)
            touched = [
                (b, own[b] + self._bytes_in_boxes(connection, boxes, plan), connection.limits)
                for b, connection in self._bridges.items()
            ]
            descriptors = len(boxes) + sum(_descriptors_of(c, plan, boxes) for c in self._bridges.values())
        check_fits(needed, self._settings.memory_fraction, f"session {self._settings.session!r}")
        check_limits(touched, self._settings.memory_fraction, f"session {self._settings.session!r}: ")
        check_descriptors(descriptors, len(touched))
        return needed

    def _bytes_in_boxes(self, connection: Connection, boxes: Boxes, plan: StartPlan) -> int:
        """What a bridge touches of memory that it shares with others."""
        merged = {name: dtype for name in boxes if (dtype := plan.dtypes[name]) is not None}
        return sum(
            math.prod(shape) * dtype.itemsize * slots
            for _, shape, dtype, slots in self._chunks(connection, merged, plan.slots)
        )

    def start(self, plan: StartPlan, boxes: Boxes) -> None:
        """Create the slots and let the ranks go."""
        with self._lock:
            self._plan = plan
            self._progress = ""
            for connection in list(self._connections):
                named = connection.bridge_id
                if named is not None and self._bridges.get(named) is not connection:  # too late to be noticed
                    self._fail(connection, BridgeIdError(f"bridge_id {named} is taken"))
            self._arrivals.subscribe(plan.slots, plan.consumers)
            self._table = table = SlotTable(f"deisa-{self._settings.session}-table", plan.slots)
            for connection in self._bridges.values():
                self._provide(connection, _known_dtypes(plan, without=boxes))
            for name in boxes:
                self._provide_boxes(name, boxes, plan)
            self._let_all_go(plan, table)
            self._connections.wake()  # from now on the thread looks into the rings

    def _let_all_go(self, plan: StartPlan, table: SlotTable) -> None:
        """Give every rank its places on the shared pages."""
        owners: dict[str, list[int]] = {}
        for bridge_id in self._bridges:
            for name, regions in self._arrivals.regions_of(bridge_id).items():
                if name in plan.slots and regions:
                    owners.setdefault(name, []).append(bridge_id)
        prefix = f"deisa-{self._settings.session}"
        counted = {name: len(bridges) for name, bridges in owners.items()}
        self._counters = counters = ArrivalCounters(f"{prefix}-counters", counted)
        for bridge_id, connection in self._bridges.items():
            wanted = tuple(
                messages.WantedArray(
                    name,
                    tuple(regions),
                    plan.slots[name],
                    table.rows[name],
                    counters.rows[name],
                    counted[name],
                    counters.entry(name, owners[name].index(bridge_id)),
                )
                for name, regions in self._arrivals.regions_of(bridge_id).items()
                if name in plan.slots and regions
            )
            if not wanted:
                self._post(connection, messages.Start((), 0, ()))
                continue
            capacity = sum(len(array.regions) * array.slots for array in wanted)
            connection.ring = RingReader(f"{prefix}-ring", capacity)
            pages = (table.page, counters.page, connection.ring.page)
            start = messages.Start(tuple(page.nbytes for page in pages), capacity, wanted)
            self._post(connection, start, [page.descriptor for page in pages])

    def release(self, consumer: str, steps: Sequence[tuple[str, int]]) -> None:
        """End a consumer's leases on (array, timestep) pairs, and give free slots back to the ranks."""
        with self._lock:
            table = self._table
            if self.closed.is_set() or table is None:
                return  # the memory has gone
            for array, timestep in steps:
                grant = self._arrivals.release(consumer, array, timestep)
                if grant is not None:
                    table.grant(array, grant.number, grant.slot)

    def close(self, error: DeisaError | None = None) -> None:
        """End the session on this node: tell the ranks why, close every socket, free the memory."""
        with self._lock:
            if self.closed.is_set():
                return
            if error is not None:
                for connection in [c for c in self._connections if c.bridge_id is not None]:
                    self._fail(connection, error)
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
                ready = self._connections.wait(TICK_S if self._plan is None else RING_SCAN_S)
                with self._lock:
                    if not self.closed.is_set():
                        for what, peer in ready:
                            self._serve_one(what, peer)
                        for connection in self._connections.stuck:
                            self._try_to_flush(connection)
                        self._collect_all()
                        self._report_losses()
                        self._answer_newcomers()
                        self._mind_blocked()
                        self._mind_endings()
                        self._check_driver()
        except Exception as error:
            logger.exception("the agent has failed")
            with self._lock:
                self._joined.append(AgentLost(f"{type(error).__name__}: {error}"))
            raise
        finally:
            self._shut()

    def _serve_one(self, what: Ready, connection: Connection | None) -> None:
        if connection is None:
            self._accept()
        elif what is Ready.ENDED:
            self._see_off(connection)
        elif what is Ready.TO_WRITE:
            self._try_to_flush(connection)
        else:
            self._receive(connection)

    def _collect_all(self) -> None:
        """Look into every ring, and tell the analytics if anything has become complete."""
        if self._counters is not None:
            self._counters.begin_look()
        for connection in list(self._bridges.values()):
            if connection in self._connections and not connection.closed:
                try:
                    self._collect(connection)
                except ProtocolError as error:
                    logger.warning(
                        "refused bridge %s (pid %d): %s",
                        connection.bridge_id,
                        connection.pid,
                        messages.shorten(error),
                    )
                    self._fail(connection, error)
        if self._joined or self._arrivals.has_events:
            self._changed.notify_all()

    def _collect(self, connection: Connection) -> None:
        """Account for what a rank has handed over since the last look."""
        if connection.ring is None:
            return
        bridge_id = connection.bridge_id
        assert bridge_id is not None
        submitted = connection.ring.look()
        for entry in submitted.entries:
            self._arrivals.put(bridge_id, *entry)
        if submitted.passed is not None:
            self._arrivals.advance(bridge_id, submitted.passed)
        waits, region = None, submitted.blocked
        if region is not None and self._arrivals.must_wait(bridge_id, region):
            waits = (self._arrivals.array_of(region), int(self._arrivals.at(bridge_id)))
        if waits is None:
            connection.blocked = None
        elif connection.blocked is None or (connection.blocked.array, connection.blocked.timestep) != waits:
            connection.blocked = Blocked(*waits, time.monotonic())

    def _mind_blocked(self) -> None:
        """Report once which bridges wait for slots, and tell them for whom."""
        for array, timesteps in self._blocked_now(BLOCKED_S).items():
            if self._blocked.get(array) != timesteps:
                self._blocked[array] = timesteps
                self._joined.append(SendersBlocked(array, timesteps))
                self._changed.notify_all()
        self._tell_blocked()

    def _tell_blocked(self) -> None:
        now = time.monotonic()
        for connection in self._bridges.values():
            blocked = connection.blocked
            if blocked is not None and now - blocked.since >= PROGRESS_S and blocked.told != self._progress:
                blocked.told = self._progress
                self._post(connection, messages.Progress(self._progress))

    def _mind_endings(self) -> None:
        """Wait no longer for a bridge whose process is ending and does not: it may wait for the other ranks."""
        now = time.monotonic()
        for bridge_id, connection in self._bridges.items():
            since = connection.ending_since
            if since is None or now - since < ENDING_S or connection.closed:
                continue
            if connection in self._connections and self._arrivals.owes(bridge_id):
                self._drop(
                    connection,
                    f"it was not closed, and its process has been ending for {now - since:.0f} s: MPI_Finalize waits "
                    "for the other ranks. Call close() on all ranks, or start them with `python -m mpi4py`",
                )
            elif connection in self._connections:
                self._arrivals.advance(bridge_id, FINISHED)  # ranks of other nodes may wait for it

    def _report_losses(self) -> None:
        """Report the bridges that were lost, after all that the others had sent by then."""
        while self._lost:
            lost, self._lost = self._lost, []
            for connection in list(self._connections):
                self._receive(connection)
            self._collect_all()
            for bridge_id, reason in lost:
                self._arrivals.lose(bridge_id, reason)
                if self._plan is None:
                    del self._bridges[bridge_id]
                    self._arrivals.leave(bridge_id)
            self._changed.notify_all()

    def _receive(self, connection: Connection) -> bool:
        """Handle what a peer has sent; whether there was anything."""
        try:
            return self._receive_some(connection)
        except DeisaError as error:
            logger.warning("refused a peer (pid %d): %s", connection.pid, messages.shorten(error))
            self._fail(connection, error)
        except OSError as error:
            self._drop(connection, f"its connection failed ({error})")
        return False

    def _accept(self) -> None:
        try:
            accepted = self._connections.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and not self._full:
                self._full = True
                self._joined.append(AgentLost(f"it cannot accept any more connections: {error} (ulimit -n)"))
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
                if len(connection.outgoing) > MOST_UNREAD:
                    raise ProtocolError("it does not read what it is sent")
        return True

    def _handle(self, connection: Connection, message: Message) -> None:
        match message:
            case messages.Hello():
                self._welcome(connection, message)
                return
            case messages.Attach(version, mapped):
                self._check_version(version)
                self._attach(connection, mapped)
                return
            case messages.Follow():
                self._follow(connection, message)
                return
            case messages.Abort(reason) if connection.bridge_id is not None and self._plan is None:
                self._drop(connection, messages.shorten(reason))  # its description was refused
                return
        bridge_id = connection.bridge_id
        if bridge_id is None or connection.closed or self._plan is None:
            raise ProtocolError(f"a {type(message).__name__} is out of place here")
        self._collect(connection)  # it was handed over before the message was sent
        match message:
            case messages.Notify():
                pass  # all rings are looked into after every round
            case messages.DeclareDtype(array, dtype, limits):
                self._declare(connection, array, dtype, limits)
            case messages.Abort(reason):
                self._drop(connection, messages.shorten(reason))
            case messages.Ending():
                connection.ending_since = time.monotonic()
            case messages.Close(stats):
                connection.closed = True
                connection.blocked = None
                self._arrivals.close(bridge_id, stats)
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
        if connection.bridge_id is not None or connection in self._newcomers:
            raise ProtocolError("a bridge said hello twice")
        self._newcomers[connection] = (hello, time.monotonic())
        self._answer_newcomer(connection)

    def _answer_newcomer(self, connection: Connection) -> None:
        hello, since = self._newcomers[connection]
        now = time.monotonic()
        same, bridges = self._bridges.get(hello.bridge_id), self._bridges.values()
        run = Run(
            self._settings.session,
            started=self._plan is not None,
            ends=self._dismissed is not None,
            analytics=self._presence.state(now)[0],
            gone=self._presence.reason,
            lost=any(c not in self._connections and not c.closed for c in bridges),
            closed=all(c.closed for c in bridges),
            owner=f"pid {same.pid} on this host ({self._host})" if same is not None else "",
        )
        answer, text = answer_newcomer(hello.bridge_id, connection.pid, now - since, run)
        match answer:
            case "join":
                del self._newcomers[connection]
                self._join(connection, hello)
            case "later":
                self._post(connection, messages.Later(text))
                self._drop(connection, "")
            case "refuse":
                self._fail(connection, BridgeIdError(text))

    def _answer_newcomers(self) -> None:
        for connection in list(self._newcomers):
            try:
                self._answer_newcomer(connection)
            except ProtocolError as error:
                self._fail(connection, error)

    def _join(self, connection: Connection, hello: messages.Hello) -> None:
        names = [described.name for described in hello.arrays]
        if len(set(names)) < len(names):
            raise ProtocolError("a bridge described an array twice")
        connection.bridge_id = hello.bridge_id
        connection.limits = hello.limits
        self._post(connection, messages.Progress(self._progress))
        if self._presence.reason:
            self._post(connection, messages.AnalyticsDown(self._presence.reason))
        if hello.bridge_id in self._bridges:  # the analytics will find it twice, and tell every rank
            where = (connection.pid, self._host)
            self._joined.append(BridgeJoined(hello.bridge_id, hello.world_size, (), {}, *where))
            return
        connection.arrays = {described.name: described for described in hello.arrays}
        self._bridges[hello.bridge_id] = connection
        counts = {name: len(described.chunks) for name, described in connection.arrays.items()}
        regions = self._arrivals.join(hello.bridge_id, counts)
        connection.joined = BridgeJoined(
            hello.bridge_id, hello.world_size, hello.arrays, regions, connection.pid, self._host
        )
        self._joined.append(connection.joined)

    def _declare(
        self, connection: Connection, array: str, dtype: np.dtype, limits: tuple[MemoryLimit, ...]
    ) -> None:
        bridge_id = connection.bridge_id
        assert bridge_id is not None and self._plan is not None
        regions = self._arrivals.regions_of(bridge_id).get(array, ())
        has_memory = {spec.region for segment in self._segments for spec in segment.regions}
        declared = self._plan.dtypes.get(array) is not None
        if array not in self._plan.slots or declared or not regions or regions[0] in has_memory:
            raise ProtocolError(f"bridge {bridge_id} need not tell the dtype of array {array!r:.60}")
        chunks = connection.arrays[array].chunks
        slots = self._plan.slots[array]
        needed = sum(slot_size(c.shape, dtype) for c in chunks) * slots
        check_fits(needed, self._settings.memory_fraction, f"array {array!r} of bridge {bridge_id}")
        connection.limits = limits
        groups = {limit.group for limit in limits}
        touched = [  # by this one, and by others under the same limit whose turn is still to come
            (b, sum(slot_size(c.shape, dtype) for c in peer.arrays[array].chunks) * slots, limits)
            for b, peer in self._bridges.items()
            if array in peer.arrays
            and groups & {limit.group for limit in peer.limits}
            and has_memory.isdisjoint(self._arrivals.regions_of(b)[array])
        ]
        check_limits(touched, self._settings.memory_fraction, f"array {array!r}: ")
        declared_event = DtypeDeclared(bridge_id, array, dtype)
        self._declared.append(declared_event)
        self._joined.append(declared_event)
        self._provide(connection, {array: dtype})
        self._try_to_flush(connection)

    def _provide(self, connection: Connection, arrays: Mapping[str, np.dtype]) -> None:
        """Create one segment with the slots of a bridge's chunks of some arrays, to go with the next `_post`."""
        assert connection.bridge_id is not None and self._plan is not None
        chunks = self._chunks(connection, arrays, self._plan.slots)
        if not chunks:
            return
        segment = self._add_segment(*lay_out(chunks))
        connection.queue(messages.Slots((segment.nbytes,), tuple(segment.regions)), [segment.descriptor])

    def _add_segment(self, regions: list[RegionSpec], nbytes: int) -> _Segment:
        segment = _Segment(create_segment(f"deisa-{self._settings.session}", nbytes), nbytes, regions)
        self._segments.append(segment)
        return segment

    def _provide_boxes(self, array: str, boxes: Boxes, plan: StartPlan) -> None:
        """Create one segment with the slots of all boxes of an array, whose places go with the next `_post`s."""
        segment = self._add_segment(*_lay_out_boxes(array, boxes, plan))
        places = {
            region: (whole, offset)
            for whole, box in zip(segment.regions, boxes[array], strict=True)
            for region, offset in box.chunks
        }
        for bridge_id, connection in self._bridges.items():
            regions = self._arrivals.regions_of(bridge_id).get(array, ())
            if regions:
                shapes = [chunk.shape for chunk in connection.arrays[array].chunks]
                own = [within(places[r][0], r, places[r][1], s) for r, s in zip(regions, shapes, strict=True)]
                connection.queue(messages.Slots((segment.nbytes,), tuple(own)), [segment.descriptor])

    def _chunks(
        self, connection: Connection, dtypes: Mapping[str, np.dtype], slots: Mapping[str, int]
    ) -> list[tuple[int, Shape, np.dtype, int]]:
        """List a bridge's chunks of some arrays as `lay_out` wants them."""
        assert connection.bridge_id is not None
        regions = self._arrivals.regions_of(connection.bridge_id)
        return [
            (region, chunk.shape, dtype, slots[name])
            for name, dtype in dtypes.items()
            if name in regions
            for region, chunk in zip(regions[name], connection.arrays[name].chunks, strict=True)
        ]

    def _attach(self, connection: Connection, mapped: int) -> None:
        for start in range(mapped, len(self._segments), DESCRIPTORS_PER_MESSAGE):
            batch = self._segments[start : start + DESCRIPTORS_PER_MESSAGE]
            regions = [replace(r, segment=i) for i, segment in enumerate(batch) for r in segment.regions]
            sizes = tuple(segment.nbytes for segment in batch)
            self._post(connection, messages.Slots(sizes, tuple(regions)), [s.descriptor for s in batch])
        state, quiet_s = self._presence.state(time.monotonic())
        self._post(connection, messages.Attached(self.agent_id, state, quiet_s, self._presence.holder))
        if (
            self._plan is None and state == "gone"
        ):  # nobody reads yet: it is another agent, which wants the address
            self._step_aside()

    def _step_aside(self) -> None:
        """End in favour of another agent; there is no data yet, and the ranks look for that one."""
        text = f"the analytics of session {self._settings.session!r} has ended before the start"
        for connection in [c for c in self._connections if c.bridge_id is not None or c in self._newcomers]:
            self._post(connection, messages.Later(text))
        self.close()

    def _follow(self, connection: Connection, follow: messages.Follow) -> None:
        """Give the analytics of this node a journal; its connection shows that it is there."""
        self._check_version(follow.version)
        if (
            not follow.driver_id
            or follow.driver_id != self._presence.driver_id
            or connection.bridge_id is not None
        ):
            raise ProtocolError("only the analytics itself may follow its agent")
        self._driver = connection
        self._presence.connected = True
        handled = [*self._handled(), *[NOTHING_HANDLED] * follow.callbacks]
        if self._journal is not None:
            self._journal.close()
        self._callbacks = follow.callbacks
        self._journal = journal = Page(f"deisa-{self._settings.session}-journal", follow.callbacks)
        for callback in range(follow.callbacks):
            journal.words[callback] = handled[callback]
        self._post(connection, messages.Journal(journal.nbytes), [journal.descriptor])

    def _handled(self) -> tuple[int, ...]:
        return tuple(self._journal.words[: self._callbacks]) if self._journal is not None else ()

    def _check_driver(self) -> None:
        now, session = time.monotonic(), self._settings.session
        if self._presence.fall_silent(f"the analytics of session {session!r} does not answer", now):
            self._tell_of_analytics()
        quiet_s = self._presence.quiet_s(now)
        if self._dismissed is not None and self._presence.reason:
            self.close(self._dismissed)
        elif quiet_s > self._settings.driver_timeout_s:
            why = self._presence.reason or f"the analytics of session {session!r} has gone"
            error = AnalyticsLostError(
                f"{why}, and no other has taken over in {quiet_s:.0f} s (DEISA_RAY_DRIVER_TIMEOUT_S sets how long)"
            )
            logger.warning("%s; the agent ends", error)
            self._joined.append(AgentLost(str(error)))
            self.close(error)

    # Sending and dropping.

    def _post(self, connection: Connection, message: Message, descriptors: Sequence[int] = ()) -> None:
        connection.queue(message, descriptors)
        self._try_to_flush(connection)
        self._wake_blocked(connection)

    def _wake_blocked(self, connection: Connection) -> None:
        """Have a rank that waits for a slot look at its connection."""
        ring, table = connection.ring, self._table
        if ring is not None and table is not None and ring.is_blocked:
            table.wake_all()

    def _try_to_flush(self, connection: Connection) -> None:
        try:
            self._connections.flush(connection)
        except OSError as error:
            self._drop(connection, f"nothing could be sent to it ({error})")

    def _fail(self, connection: Connection, error: DeisaError) -> None:
        if not connection.closed:
            # One that has not read what came before will not read this either: nobody waits for it.
            self._post(connection, messages.Fail(type(error).__name__, messages.shorten(error)))
        self._drop(connection, messages.shorten(error))

    def _drop(self, connection: Connection, reason: str) -> None:
        if connection not in self._connections:
            return
        self._connections.hang_up(connection)
        self._wake_blocked(connection)
        self._newcomers.pop(connection, None)
        if connection is self._driver:
            self._driver = None
            self._presence.connected = False
            self.abandon(f"the analytics of session {self._settings.session!r} has died")
            return
        with suppress(ProtocolError):  # what a rank handed over before it died counts
            if not connection.closed:
                self._collect(connection)
        connection.blocked = None
        bridge_id = connection.bridge_id
        if bridge_id is not None and self._bridges.get(bridge_id) is connection and not connection.closed:
            self._lost.append((bridge_id, reason))

    def _shut(self) -> None:
        with self._lock:
            self._connections.close()
            if self._table is not None:
                self._table.wake_all()
            for segment in self._segments:
                os.close(segment.descriptor)
            self._segments.clear()
            pages = [c.ring.page for c in self._bridges.values() if c.ring is not None]
            pages += [shared.page for shared in (self._table, self._counters) if shared is not None]
            pages += [self._journal] if self._journal is not None else []
            self._table = self._counters = None
            for page in pages:
                page.close()
            self.closed.set()
            self._changed.notify_all()


def _known_dtypes(plan: StartPlan, without: Boxes) -> dict[str, np.dtype]:
    """The dtypes of the arrays whose chunks have memory of their own, as far as bridges have declared them."""
    return {name: dtype for name, dtype in plan.dtypes.items() if dtype is not None and name not in without}


def _descriptors_of(connection: Connection, plan: StartPlan, boxes: Boxes) -> int:
    """What will be opened for a bridge: its ring, one segment, and one more for each dtype that comes late."""
    wanted = [name for name, array in connection.arrays.items() if array.chunks and name in plan.slots]
    late = sum(plan.dtypes[name] is None for name in wanted)
    at_once = any(plan.dtypes[name] is not None and name not in boxes for name in wanted)
    return (DESCRIPTORS_PER_PAGE if wanted else 0) + at_once + late


def _lay_out_boxes(array: str, boxes: Boxes, plan: StartPlan) -> tuple[list[RegionSpec], int]:
    dtype = plan.dtypes[array]
    assert dtype is not None
    return lay_out([(box.chunks[0][0], box.shape, dtype, plan.slots[array]) for box in boxes[array]])
