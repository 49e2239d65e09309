"""The rank's end, in Python: find the agent, get slots, hand chunks over."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from deisa.ray._state.descriptions import ArrayDescription
from deisa.ray._state.stats import BridgeStats
from deisa.ray._transport import messages
from deisa.ray._transport.address import shown
from deisa.ray._transport.limits import MemoryLimit
from deisa.ray._transport.memory import map_segments, slot_view
from deisa.ray._transport.messages import Message
from deisa.ray.config import Settings
from deisa.ray.errors import (
    AnalyticsLostError,
    ClosedError,
    DeisaError,
    LayoutError,
    NoAnalyticsError,
    ProtocolError,
    named_error,
)
from tests.oracle.address import other_agents
from tests.oracle.connection import LAST_RETRY_S, Connection, Patience
from tests.oracle.feedback import FEEDBACK, QUESTIONS, Answer, FeedbackReader
from tests.oracle.limits import own_limits
from tests.oracle.memory import prefer_huge_pages, touch
from tests.oracle.pages import (
    COUNTERS,
    RING,
    SLOT_TABLE,
    CountersEntry,
    RingWriter,
    SlotTableRow,
    map_page,
    must_notify,
)
from tests.oracle.writer import ChunkWriter, HandOver, PartWriter, SendState, StreamState

logger = logging.getLogger("deisa.ray.bridge")

MAX_REASON = 2_000  # characters
REFUSAL_S = 2.0  # that the only rank looks for somebody to tell that its description is refused
LONGEST_WAIT_S = 0.5  # for a slot, before the rank looks at its connection again
ANALYTICS_BUSY = "the analytics (slower than the simulation, or keeping arrays alive)"
PAGES = (SLOT_TABLE, COUNTERS, RING)  # that come along with a start
FEEDBACK_PAGES = (FEEDBACK, QUESTIONS)  # likewise


class RankChannel:
    """A rank's connection to the agent of its host, and the memory it got from it.

    Not thread-safe: `Bridge` holds a lock around it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._connection = Connection(settings)
        self._memory: dict[int, tuple[np.ndarray, ...]] = {}  # slots by region, until their writers are there
        self._started = False
        self._writers: dict[str, dict[int, ChunkWriter]] = {}  # by index, until the bridge has taken them
        self._streams: tuple[StreamState, ...] = ()
        self._declared: dict[str, np.dtype] = {}  # arrays whose dtype the agent has been told
        self.under_way: HandOver | None = None
        self.state = SendState()
        self._counters = memoryview(b"")
        self._ring: RingWriter | None = None
        self._feedback: FeedbackReader | None = None
        self.held_up_s = 0.0
        self._welcomed = False
        self._sent_away = False
        self._progress = ""  # whom the analytics waits for
        self._later = ""  # why this rank has to look again
        self._if_lost = ""  # what may have happened if the agent goes
        self._analytics_down = ""  # why, while it is
        self._failure: DeisaError | None = None

    def start(self, bridge_id: int, world_size: int, arrays: Sequence[ArrayDescription]) -> None:
        """Announce the bridge and wait until the analytics starts the session.

        Raises
        ------
        NoAnalyticsError
            When no agent answers on this host.
        WaitTimeoutError
            When the analytics, or other bridges, do not come in time.
        LayoutError
            When the bridges' descriptions do not fit together.
        """
        deadline, said = time.monotonic() + self._settings.connect_timeout_s, -math.inf
        while True:
            self._connection.open(deadline, self._no_analytics)
            try:
                self._send(self._hello(bridge_id, world_size, arrays, own_limits()))
                self._wait(lambda: self._started, lambda: self._progress or "waiting for the agent's answer")
                return
            except AnalyticsLostError:
                # An agent of an earlier run; the next one may be on its way.
                now = time.monotonic()
                if self._welcomed:
                    raise
                if self._sent_away:  # after it had waited there
                    self._sent_away = False
                    deadline = now + self._settings.connect_timeout_s
                if now > deadline:
                    raise self._no_analytics() from None
                if self._later and now - said >= self._settings.warn_every_s:
                    said = now
                    logger.warning("%s; waiting for the next analytics", self._later)
                time.sleep(LAST_RETRY_S)

    def refuse(self, bridge_id: int, world_size: int, error: LayoutError) -> None:
        """Come only to say why this rank cannot: the analytics, and the other ranks, would wait for it."""
        reason = f"{type(error).__name__}: {error}"
        with suppress(DeisaError, OSError):
            self._connect_to_refuse(bridge_id, world_size, reason)
            version, session = messages.PROTOCOL_VERSION, self._settings.session
            self._send(messages.CannotJoin(version, session, bridge_id, reason[:MAX_REASON]))
        self._drop_connection()

    def _connect_to_refuse(self, bridge_id: int, world_size: int, reason: str) -> None:
        started, timeout_s = time.monotonic(), self._settings.connect_timeout_s
        with suppress(NoAnalyticsError):
            self._connection.open(started, self._no_analytics)
            return
        if world_size <= 1:
            timeout_s = min(REFUSAL_S, timeout_s)
        elif timeout_s > 0:
            logger.warning(
                "bridge %d cannot join: %s; it waits up to %g s for the analytics of session %r, so that the other "
                "ranks hear of it (DEISA_RAY_CONNECT_TIMEOUT_S sets how long)",
                bridge_id,
                reason,
                timeout_s,
                self._settings.session,
            )
        self._connection.open(started + timeout_s, self._no_analytics)

    def _hello(
        self,
        bridge_id: int,
        world_size: int,
        arrays: Sequence[ArrayDescription],
        limits: tuple[MemoryLimit, ...],
    ) -> messages.Hello:
        session, version = self._settings.session, messages.PROTOCOL_VERSION
        return messages.Hello(version, session, bridge_id, world_size, tuple(arrays), limits)

    def _no_analytics(self) -> NoAnalyticsError:
        tried = (
            f"(tried {shown(self._connection.address)} for {self._settings.connect_timeout_s:g} s; "
            "DEISA_RAY_CONNECT_TIMEOUT_S sets how long)"
        )
        session = self._settings.session
        if self._later:
            return NoAnalyticsError(
                f"{self._later}, and no other analytics of session {session!r} has come {tried}"
            )
        return NoAnalyticsError(
            f"no analytics on this host for session {session!r}: is Ray running here and the analytics started? {tried}"
            f"{other_agents(self._settings)}"
        )

    def _wait(self, done: Callable[[], bool], describe: Callable[[], str]) -> None:
        """Wait for messages."""
        patience = Patience(self._settings, self._settings.start_timeout_s, "DEISA_RAY_START_TIMEOUT_S")
        while not done():
            self._connection.wait(patience.left(describe(), self._analytics_down))
            self.receive()

    @property
    def ring(self) -> RingWriter:
        """Where chunks are submitted, from the start on."""
        assert self._ring is not None
        return self._ring

    @property
    def submitted(self) -> int:
        """Chunks submitted so far."""
        return self._ring.submitted if self._ring is not None else 0

    def take_writers(self) -> dict[str, dict[int, ChunkWriter]]:
        """Where chunks are handed over, by array and index, if callbacks ask for them; theirs who takes them."""
        writers, self._writers = self._writers, {}
        return writers

    def settle(self) -> None:
        """Bring the states and pages up to date after an exception in the middle of a call."""
        noted = self.under_way
        if noted is not None:
            if self.submitted == noted.submitted:
                noted.note(self.state)
                noted.count()
            self.under_way = None

    def receive(self) -> None:
        """Handle what the agent has sent, without waiting; raises what it says has failed."""
        if self._failure is not None:
            raise type(self._failure)(
                str(self._failure)
            )  # itself it would keep the frames that it went through
        try:
            for message in self._connection.received():
                self._handle(message)
        except OSError as exc:
            if isinstance(exc, DeisaError):
                raise
            raise self._lost() from exc

    def _lost(self) -> DeisaError:
        error = AnalyticsLostError(
            f"the agent of session {self._settings.session!r} on this host has gone; the analytics has ended or died"
            f"{', or ' if self._if_lost else ''}{self._if_lost}"
        )
        if self._analytics_down:
            error = AnalyticsLostError(
                f"{self._analytics_down}; then its agent on this host has ended as well"
            )
        if self._welcomed:
            self._failure = AnalyticsLostError(str(error))
        return error

    def _handle(self, message: Message) -> None:
        match message:
            case messages.Progress(text):
                self._welcomed, self._progress = True, text
            case messages.Later(text):
                self._sent_away = self._welcomed
                self._later, self._welcomed, self._analytics_down = text, False, ""
                raise AnalyticsLostError(text)
            case messages.AnalyticsDown(text):
                self._miss_analytics(text)
            case messages.AnalyticsUp():
                self._analytics_down = ""
                logger.warning("another analytics has taken over")
            case messages.Slots():
                self._map(message)
            case messages.Start():
                self._begin(message)
            case messages.Fail(kind, text):
                self._failure = named_error(kind, text)
                raise named_error(kind, text)
            case _:
                raise ProtocolError(
                    f"the agent sent a {type(message).__name__}, which a rank does not expect"
                )

    def _miss_analytics(self, text: str) -> None:
        self._analytics_down = text
        if self._settings.on_analytics_lost != "wait":
            self._failure = AnalyticsLostError(text)
            raise AnalyticsLostError(text)
        logger.warning("%s; waiting for another one", text)

    def _map(self, message: messages.Slots) -> None:
        memory = map_segments(self._connection.take(len(message.sizes)), message.sizes, writable=True)
        for segment in memory:
            prefer_huge_pages(segment)
        for spec in message.regions:
            slots = tuple(slot_view(memory[spec.segment], spec, slot) for slot in range(spec.slots))
            for slot in slots:
                touch(slot)
            self._memory[spec.region] = slots

    def _provide(self, parts: Sequence[PartWriter]) -> bool:
        """Give parts of chunks the slots that have come for them; whether all have theirs."""
        for part in parts:
            if part.memory is None and part.region in self._memory:
                part.memory = self._memory.pop(part.region)
        return all(part.memory is not None for part in parts)

    def _begin(self, start: messages.Start) -> None:
        self._started = True
        self._progress = ""
        self._if_lost = start.if_lost
        if start.pages:
            self._begin_to_send(start)
        if start.feedback:
            page, questions = self._map_pages(start.feedback, FEEDBACK_PAGES)
            self._feedback = FeedbackReader(page, questions, start.questions)

    def _begin_to_send(self, start: messages.Start) -> None:
        table, self._counters, ring = self._map_pages(start.pages, PAGES)
        self._ring = RingWriter(ring, start.capacity)
        streams = []
        for wanted in start.streams:
            row = SlotTableRow(table, wanted.table_row, wanted.slots)
            entry = CountersEntry(self._counters, wanted.counters_row, wanted.bridges, wanted.entry)
            stream = StreamState(len(wanted.parts), wanted.every, row, entry)
            streams.append(stream)
            writers = self._writers.setdefault(wanted.array, {})
            for said in wanted.parts:
                part = PartWriter(said, stream)
                self._provide([part])
                writer = writers.setdefault(said.chunk, ChunkWriter(self, wanted.array, ()))
                writer.parts = (*writer.parts, part)
        self._streams = tuple(streams)

    def _map_pages(self, sizes: Sequence[int], pages: Sequence[int]) -> list[memoryview]:
        received = self._connection.take(len(pages))
        if not len(received) == len(sizes) == len(pages):
            for descriptor in received:
                os.close(descriptor)
            raise ProtocolError(
                "the agent's pages did not all come along; is the limit on open files (ulimit -n) too small?"
            )
        return [map_page(*page) for page in zip(received, sizes, pages, strict=True)]

    def declare(self, array: str, writers: Sequence[ChunkWriter], dtype: np.dtype) -> np.dtype:
        """Tell the agent the dtype of an array, once, and wait for the slots here; returns what was declared."""
        parts = [part for writer in writers for part in writer.parts]
        if array not in self._declared and self._provide(parts):
            assert parts[0].memory is not None
            return parts[0].memory[0].dtype
        if array not in self._declared:
            self._declared[array] = dtype
            self._send(messages.DeclareDtype(array, dtype, own_limits()))
        self._wait(
            lambda: self._provide(parts),
            lambda: f"waiting for the memory of array {array!r}",
        )
        return self._declared[array]

    def wait_for_slot(self, region: int, row: SlotTableRow, number: int, waiting: str) -> None:
        """Say that a chunk has no slot for its next sequence number, and wait until it has one."""
        started = time.perf_counter()
        self._progress = ""
        patience = Patience(self._settings, self._settings.send_timeout_s, "DEISA_RAY_SEND_TIMEOUT_S")
        try:
            self.ring.block(region)
            while True:
                wakes = row.wakes()  # first: if the agent comes after that, the wait ends at once
                if row.has_slot(number):
                    break
                self.receive()
                seconds = patience.left(f"{waiting} {self._progress or ANALYTICS_BUSY}", self._analytics_down)
                row.wait(wakes, min(seconds, LONGEST_WAIT_S))
        finally:
            if self._ring is not None:
                self._ring.unblock()
            self.held_up_s += time.perf_counter() - started

    def notify(self) -> None:
        """Have the agent look at the pages, if nobody has."""
        if must_notify(self._counters):
            self._send(messages.Notify())

    def hear(self) -> None:
        """Look whether the agent has sent anything, or has gone."""
        if self._failure is not None or self._connection.wait(0):
            self.receive()

    def check(self) -> None:
        """Raise what has failed, as the agent has said."""
        if self._failure is not None:
            self.receive()

    def move_on(self, timestep: int) -> bool:
        """Say that nothing older than `timestep` will come; whether there is reason to notify the agent."""
        state = self.state
        if timestep == state.timestep and not state.moving:
            return False
        if not state.moving:
            state.before = state.timestep
            state.moving = True
        state.timestep = timestep
        last = False
        if self._ring is not None:
            self._ring.move_on(timestep)
            for stream in self._streams:
                before = state.before
                skipped = before is not None and stream.is_due(before) and not stream.is_whole(before)
                last |= stream.entry.move_on(timestep) and skipped
        state.moving = False
        return last

    def advance(self, timestep: int) -> None:
        """Say that nothing older than `timestep` will come."""
        if self.move_on(timestep):
            self.notify()
        self.hear()

    def ask(self, key: str, timestep: int | None, wait_s: float | None, waiting: str) -> Answer:
        """Return what the analytics has set, which is final; with `wait_s` once it has, or is past the timestep."""
        self.hear()
        assert self._feedback is not None
        feedback, settings = self._feedback, self._settings
        patience = Patience(settings, settings.send_timeout_s, "DEISA_RAY_SEND_TIMEOUT_S")
        if wait_s is not None and timestep is not None:
            patience = Patience(settings, wait_s, "wait=")
            feedback.begin_wait(key, timestep)
        while True:
            wakes = feedback.wakes()
            answer = feedback.ask(key, timestep, waits=wait_s is not None)
            if answer is not None:
                return answer
            seconds = patience.left(waiting, self._analytics_down)
            self.receive()
            feedback.wait(wakes, min(seconds, LONGEST_WAIT_S))

    def close(self, stats: BridgeStats) -> None:
        """End in order; what was handed over stays with the agent."""
        if not self._connection.is_open:
            return
        try:
            if self._failure is None:
                self._send(messages.Close(stats))
            else:  # an analytics that takes over wants to know, and the rank has been told of the failure
                with suppress(OSError):
                    self._connection.send(messages.Close(stats))
        finally:
            self._drop_connection()

    def abort(self, reason: str = "") -> None:
        """End because of an error, whose text the analytics reports; without one, as a dying rank does."""
        if self._connection.is_open and reason:
            with suppress(OSError):
                self._connection.send(messages.Abort(reason[:MAX_REASON]))
        self._drop_connection()

    def interrupt(self, reason: str) -> None:
        """Abort as far as possible while another thread may wait here, which gets an error; then comes `abort`."""
        self._failure = ClosedError(f"another thread has ended the bridge: {reason}")
        if self._connection.is_open:
            with suppress(OSError):
                self._connection.send(messages.Abort(reason[:MAX_REASON]), socket.MSG_DONTWAIT)
            self._connection.shut_down()

    def _send(self, message: Message) -> None:
        try:
            self._connection.send(message)
            return
        except OSError as exc:
            if isinstance(exc, DeisaError):
                raise
        # The agent has gone; it may have said why.
        self.receive()
        raise self._lost()

    def _drop_connection(self) -> None:
        self._connection.drop()
        self._memory.clear()
        self._started = False
        self._writers = {}
        self._streams = ()
        self._ring = None
        self._feedback = None
        self._counters = memoryview(b"")
        self.under_way = None
