"""The rank's end: find the agent, get slots, hand chunks over."""

from __future__ import annotations

import logging
import math
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from deisa.ray._state.events import BridgeStats
from deisa.ray._state.layout import ArrayDescription
from deisa.ray._transport import messages
from deisa.ray._transport.address import (
    agent_address,
    check_same_user,
    check_socket_path,
    other_agents,
    shown,
)
from deisa.ray._transport.descriptors import receive_with_descriptors
from deisa.ray._transport.fork import close_in_children
from deisa.ray._transport.limits import own_limits
from deisa.ray._transport.memory import map_segments, prefer_huge_pages, slot_view, touch
from deisa.ray._transport.messages import FrameBuffer, Message
from deisa.ray._transport.peers import has_ended, open_process
from deisa.ray._transport.rank_pages import (
    COUNTERS,
    RING,
    SLOT_TABLE,
    CountersEntry,
    RingWriter,
    SlotTableRow,
    map_page,
    must_notify,
)
from deisa.ray.config import Settings
from deisa.ray.errors import (
    MEMORY_MONITOR,
    AnalyticsLostError,
    ClosedError,
    ConfigurationError,
    DeisaError,
    LayoutError,
    NoAnalyticsError,
    ProtocolError,
    WaitTimeoutError,
    named_error,
)

try:
    from deisa.ray._transport._ending import decide_by_exit_status
except ImportError:
    decide_by_exit_status = None  # type: ignore[assignment]

logger = logging.getLogger("deisa.ray.bridge")

MAX_REASON = 500  # characters
FIRST_RETRY_S, LAST_RETRY_S = 0.01, 0.25
REFUSAL_S = 2.0  # that a rank whose description is refused looks for somebody to tell
LONGEST_WAIT_S = 0.5  # for a slot, before the rank looks at its connection again
ANALYTICS_BUSY = "the analytics (slower than the simulation, or keeping arrays alive)"
PAGES = (SLOT_TABLE, COUNTERS, RING)  # that come along with a start
_NOTIFY = messages.encode(messages.Notify())


class SendState:
    """What a bridge has handed over.

    Attributes
    ----------
    timestep : int or None
        The newest timestep that anything was sent for, or that the rank has advanced to.
    before : int or None
        The timestep before that one.
    moving : bool
        Whether the agent has not been told yet that the rank has left `before`.
    chunks, nbytes : int
        Handed over.
    """

    __slots__ = ("before", "chunks", "moving", "nbytes", "timestep")

    def __init__(self) -> None:
        self.timestep: int | None = None
        self.before: int | None = None
        self.moving = False
        self.chunks = 0
        self.nbytes = 0


class ArrayState:
    """What a bridge has handed over of an array.

    Attributes
    ----------
    chunks : int
        That this bridge has of the array.
    timestep : int or None
        The newest timestep that a chunk was handed over for.
    submitted : int
        Chunks handed over for that timestep.
    whole : int
        Timesteps handed over whole.
    """

    __slots__ = ("chunks", "entry", "submitted", "timestep", "whole")

    def __init__(self, chunks: int, entry: CountersEntry) -> None:
        self.chunks = chunks
        self.entry = entry
        self.timestep: int | None = None
        self.submitted = 0
        self.whole = 0

    def is_whole(self, timestep: int | None) -> bool:
        """Whether all chunks were handed over for a timestep."""
        return self.timestep == timestep and self.submitted == self.chunks


@dataclass(frozen=True, slots=True)
class _HandOver:
    """What the states say once a chunk is handed over.

    Noted before, so that an exception between any two steps of `ChunkWriter.put`, such as Ctrl-C raises, leaves a
    chunk that is handed over or one that is not, and nothing in between.
    """

    submitted: int  # by the bridge, this chunk included
    writer: ChunkWriter
    sequence: int
    timestep: int
    of_timestep: int
    whole: int
    chunks: int
    nbytes: int

    def note(self, state: SendState) -> None:
        self.writer.sequence = self.sequence
        self.writer.newest = self.timestep
        array = self.writer.state
        array.timestep = self.timestep
        array.submitted = self.of_timestep
        array.whole = self.whole
        state.chunks = self.chunks
        state.nbytes = self.nbytes


class ChunkWriter:
    """Where one chunk of this rank is handed over, timestep after timestep.

    Attributes
    ----------
    region : int
    sequence : int
        The next sequence number, which is the number of timesteps handed over.
    newest : int or None
        The last timestep handed over.
    state : ArrayState
        Shared by the chunks of an array.
    memory : tuple of numpy.ndarray or None
        By slot; None until the dtype of the array is known.
    """

    def __init__(
        self, channel: RankChannel, array: str, region: int, row: SlotTableRow, state: ArrayState
    ) -> None:
        self._channel = channel
        self._array = array
        self._row = row
        self.region = region
        self.sequence = 0
        self.newest: int | None = None
        self.state = state
        self.memory: tuple[np.ndarray, ...] | None = None

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype of the slots; None before `RankChannel.declare` where no bridge has declared it."""
        return self.memory[0].dtype if self.memory is not None else None

    def has_sent(self, timestep: int) -> bool:
        """Whether this was the last timestep handed over."""
        return self.newest == timestep

    def free_slot(self, timestep: int) -> np.ndarray:
        """Return the memory for the next chunk, waiting for it if need be; the same until `put`.

        Raises
        ------
        WaitTimeoutError, AnalyticsLostError
        """
        assert self.memory is not None
        if not self._row.has_slot(self.sequence):
            self._channel.wait_for_slot(self.region, self._row, self.sequence, self._describe_wait(timestep))
        return self.memory[self._row.slot_of(self.sequence)]

    def _describe_wait(self, timestep: int) -> str:
        return (
            f"all {self._row.slots} slots of array {self._array!r} are in use: timestep {timestep} waits for"
        )

    def put(self, timestep: int, nbytes: int) -> None:
        """Hand the filled slot over; wakes the agent only when every rank of its node has done so.

        Raises
        ------
        AnalyticsLostError, DeisaError
            When the agent has gone, or has said that the session is over.
        """
        channel, array = self._channel, self.state
        of_timestep = array.submitted + 1 if array.timestep == timestep else 1
        noted = channel.under_way = _HandOver(
            submitted=channel.ring.submitted + 1,
            writer=self,
            sequence=self.sequence + 1,
            timestep=timestep,
            of_timestep=of_timestep,
            whole=array.whole + (of_timestep == array.chunks),
            chunks=channel.state.chunks + 1,
            nbytes=channel.state.nbytes + nbytes,
        )
        channel.ring.submit(self.region, timestep)  # from here on it is handed over
        noted.note(channel.state)
        is_last = array.is_whole(timestep) and array.entry.count_whole(array.whole)
        channel.under_way = None
        if is_last:
            channel.notify()
        channel.hear()


class _Patience:
    """Waits of a rank: warned of now and then, and ended after a while.

    Parameters
    ----------
    settings : Settings
    timeout_s : float
    setting : str
        The variable that sets it.
    """

    def __init__(self, settings: Settings, timeout_s: float, setting: str) -> None:
        self._started = self._said = time.monotonic()
        self._warn_every_s = settings.warn_every_s
        self._timeout_s = timeout_s
        self._setting = setting

    def left(self, waiting: str, analytics_down: str) -> float:
        """Return for how many seconds to wait before coming here again.

        Raises
        ------
        WaitTimeoutError
        """
        now = time.monotonic()
        waited = now - self._started
        if waited >= self._timeout_s:
            raise WaitTimeoutError(
                f"{waiting}; gave up after {self._timeout_s:g} s ({self._setting} sets how long)"
            )
        if now - self._said >= self._warn_every_s:
            self._said = now
            down = f"; {analytics_down}, and no other has come yet" if analytics_down else ""
            logger.warning("%s (%.0f s so far)%s", waiting, waited, down)
        return min(self._timeout_s - waited, self._warn_every_s)


class RankChannel:
    """A rank's connection to the agent of its host, and the memory it got from it.

    Not thread-safe: `Bridge` holds a lock around it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._address = agent_address(settings)
        self._frames = FrameBuffer()
        self._descriptors: list[int] = []
        self._memory: dict[int, tuple[np.ndarray, ...]] = {}  # slots by region, until their writers are there
        self._started = False
        self._writers: dict[str, tuple[ChunkWriter, ...]] = {}  # until the bridge has taken them
        self._arrays: tuple[ArrayState, ...] = ()
        self._declared: set[str] = set()  # arrays whose dtype the agent has been told
        self.under_way: _HandOver | None = None
        self.state = SendState()
        self._counters = memoryview(b"")
        self._ring: RingWriter | None = None
        self.held_up_s = 0.0
        self._welcomed = False
        self._sent_away = False
        self._progress = ""  # whom the analytics waits for
        self._later = ""  # why this rank has to look again
        self._analytics_down = ""  # why, while it is
        self._failure: DeisaError | None = None
        self._socket: socket.socket | None = None
        self._agent: int | None = None  # its process, see `open_process`
        self._poll = select.poll()
        close_in_children(self)

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
            self._connect(deadline)
            try:
                self._send(
                    messages.encode(
                        messages.Hello(
                            messages.PROTOCOL_VERSION,
                            self._settings.session,
                            bridge_id,
                            world_size,
                            tuple(arrays),
                            own_limits(),
                        )
                    )
                )
                self._wait_until_started()
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
        hello = messages.Hello(
            messages.PROTOCOL_VERSION, self._settings.session, bridge_id, world_size, (), ()
        )
        abort = messages.Abort(f"{type(error).__name__}: {error}"[:MAX_REASON])
        with suppress(DeisaError, OSError):
            self._connect(time.monotonic() + min(REFUSAL_S, self._settings.connect_timeout_s))
            self._send(messages.encode(hello) + messages.encode(abort))
        self._drop_connection()

    def _no_analytics(self) -> NoAnalyticsError:
        tried = (
            f"(tried {shown(self._address)} for {self._settings.connect_timeout_s:g} s; "
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

    def _connect(self, deadline: float) -> None:
        started = said = time.monotonic()
        pause = FIRST_RETRY_S
        while True:
            if self._settings.socket_path:
                check_socket_path(self._address)
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(self._address)
                agent = open_process(check_same_user(connection))
                if not has_ended(agent):
                    break
                if agent is not None:
                    os.close(agent)
                connection.close()
            except (ConnectionRefusedError, FileNotFoundError, BlockingIOError, ProcessLookupError):
                connection.close()
            except PermissionError as exc:
                connection.close()
                if isinstance(exc, DeisaError):
                    raise
                raise ConfigurationError(
                    f"cannot connect to the agent at {shown(self._address)}: {exc.strerror}; give a path that this "
                    "user may write to, the same on both sides (DEISA_RAY_SOCKET_PATH)"
                ) from exc
            except BaseException:
                connection.close()
                raise
            now = time.monotonic()
            if now >= deadline:
                raise self._no_analytics()
            if now - said >= self._settings.warn_every_s:
                said = now
                logger.warning(
                    "waiting for the analytics of session %r (%.0f s so far)",
                    self._settings.session,
                    now - started,
                )
            time.sleep(pause)
            pause = min(pause * 2, LAST_RETRY_S)
        self._drop_connection()
        self._socket = connection
        self._frames = FrameBuffer()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._agent = agent
        if agent is not None:
            self._poll.register(agent, select.POLLIN)

    def _wait_until_started(self) -> None:
        self._wait(
            lambda: self._started,
            lambda: self._progress or "waiting for the agent's answer",
        )

    def _wait(self, done: Callable[[], bool], describe: Callable[[], str]) -> None:
        """Wait for messages."""
        patience = _Patience(self._settings, self._settings.start_timeout_s, "DEISA_RAY_START_TIMEOUT_S")
        while not done():
            self._poll.poll(1000 * patience.left(describe(), self._analytics_down))
            self.receive()

    @property
    def ring(self) -> RingWriter:
        """Where chunks are submitted, from the start on."""
        assert self._ring is not None
        return self._ring

    def take_writers(self) -> dict[str, tuple[ChunkWriter, ...]]:
        """Where chunks are handed over, by array, for those that callbacks ask for; theirs who takes them."""
        writers, self._writers = self._writers, {}
        return writers

    def settle(self) -> None:
        """Bring the states and pages up to date after an exception in the middle of a call."""
        noted = self.under_way
        if noted is not None:
            if self.ring.submitted == noted.submitted:
                noted.note(self.state)
                array = noted.writer.state
                array.entry.count_whole(array.whole)
            self.under_way = None

    def receive(self) -> None:
        """Handle what the agent has sent, without waiting; raises what it says has failed."""
        if self._failure is not None:
            raise type(self._failure)(
                str(self._failure)
            )  # itself it would keep the frames that it went through
        if self._socket is None:
            raise AnalyticsLostError("the connection to the agent is closed")
        while True:
            try:
                data, descriptors = receive_with_descriptors(self._socket, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if has_ended(self._agent):  # and a child of it keeps the connection open
                    raise self._lost() from None
                return
            except OSError as exc:
                raise self._lost() from exc
            self._descriptors += descriptors
            if not data:
                raise self._lost()
            for message in self._frames.feed(data):
                self._handle(message)

    def _lost(self) -> DeisaError:
        error = AnalyticsLostError(
            f"the agent of session {self._settings.session!r} on this host has gone; the analytics has ended or died, "
            f"or the node's memory is nearly full ({MEMORY_MONITOR})"
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
        received = self._descriptors[: len(message.sizes)]
        del self._descriptors[: len(message.sizes)]
        memory = map_segments(received, message.sizes, writable=True)
        for segment in memory:
            prefer_huge_pages(segment)
        for spec in message.regions:
            slots = tuple(slot_view(memory[spec.segment], spec, slot) for slot in range(spec.slots))
            for slot in slots:
                touch(slot)
            self._memory[spec.region] = slots

    def _provide(self, writers: Iterable[ChunkWriter]) -> bool:
        """Give writers the slots that have come for them; whether all have theirs."""
        for writer in writers:
            if writer.memory is None and writer.region in self._memory:
                writer.memory = self._memory.pop(writer.region)
        return all(writer.memory is not None for writer in writers)

    def _begin(self, start: messages.Start) -> None:
        self._started = True
        self._progress = ""
        if not start.pages:
            return
        table, self._counters, ring = self._map_pages(start.pages)
        self._ring = RingWriter(ring, start.capacity)
        arrays = []
        for wanted in start.arrays:
            row = SlotTableRow(table, wanted.table_row, wanted.slots)
            entry = CountersEntry(self._counters, wanted.counters_row, wanted.bridges, wanted.entry)
            array = ArrayState(len(wanted.regions), entry)
            arrays.append(array)
            self._writers[wanted.name] = tuple(
                ChunkWriter(self, wanted.name, region, row, array) for region in wanted.regions
            )
            self._provide(self._writers[wanted.name])
        self._arrays = tuple(arrays)

    def _map_pages(self, sizes: Sequence[int]) -> list[memoryview]:
        received, self._descriptors = self._descriptors[: len(PAGES)], self._descriptors[len(PAGES) :]
        if not len(received) == len(sizes) == len(PAGES):
            for descriptor in received:
                os.close(descriptor)
            raise ProtocolError(
                "the agent's pages did not all come along; is the limit on open files (ulimit -n) too small?"
            )
        return [map_page(*page) for page in zip(received, sizes, PAGES, strict=True)]

    def declare(self, array: str, writers: Sequence[ChunkWriter], dtype: np.dtype) -> None:
        """Tell the agent the dtype of an array, once, and wait for the slots of its writers here."""
        if array not in self._declared:
            self._declared.add(array)
            self._send(messages.encode(messages.DeclareDtype(array, dtype, own_limits())))
        self._wait(
            lambda: self._provide(writers),
            lambda: f"waiting for the memory of array {array!r}",
        )

    def wait_for_slot(self, region: int, row: SlotTableRow, number: int, waiting: str) -> None:
        """Say that a chunk has no slot for its next sequence number, and wait until it has one."""
        started = time.perf_counter()
        self._progress = ""
        patience = _Patience(self._settings, self._settings.send_timeout_s, "DEISA_RAY_SEND_TIMEOUT_S")
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
            self._send(_NOTIFY)

    def hear(self) -> None:
        """Look whether the agent has sent anything, or has gone."""
        if self._failure is not None or self._poll.poll(0):
            self.receive()

    def advance(self, timestep: int) -> None:
        """Say that nothing older than `timestep` will come."""
        state = self.state
        if timestep == state.timestep and not state.moving:
            return
        if not state.moving:
            state.before = state.timestep
            state.moving = True
        state.timestep = timestep
        if self._ring is not None:
            self._ring.move_on(timestep)
            if state.before is not None:
                missed = [array for array in self._arrays if not array.is_whole(state.before)]
                if any([array.entry.move_on(timestep) for array in missed]):  # all of them, each time
                    self.notify()
        state.moving = False

    def close(self, stats: BridgeStats) -> None:
        """End in order; what was handed over stays with the agent."""
        if self._socket is None:
            return
        frame = messages.encode(messages.Close(stats))
        try:
            if self._failure is None:
                self._send(frame)
            else:  # an analytics that takes over wants to know, and the rank has been told of the failure
                with suppress(OSError):
                    self._socket.sendall(frame)
        finally:
            self._drop_connection()

    def close_with_process(self, stats: BridgeStats, otherwise: str) -> None:
        """End in order if the process does: if its exit status is 0; else as `abort` does, with that reason."""
        if self._socket is not None and decide_by_exit_status is not None and self._failure is None:
            self._send(messages.encode(messages.Ending()))
            decide_by_exit_status(
                os.dup(self._socket.fileno()),  # for the rest of the process's life
                messages.encode(messages.Close(stats)),
                messages.encode(messages.Abort(otherwise)),
            )
            self._drop_connection()
        else:
            self.close(stats)

    def abort(self, reason: str = "") -> None:
        """End because of an error, whose text the analytics reports; without one, as a dying rank does."""
        if self._socket is not None and reason:
            with suppress(OSError):
                self._socket.sendall(messages.encode(messages.Abort(reason[:MAX_REASON])))
        self._drop_connection()

    def interrupt(self, reason: str) -> None:
        """Abort as far as possible while another thread may wait here, which gets an error; then comes `abort`."""
        connection = self._socket
        self._failure = ClosedError(f"another thread has ended the bridge: {reason}")
        if connection is not None:
            with suppress(OSError):
                connection.send(messages.encode(messages.Abort(reason[:MAX_REASON])), socket.MSG_DONTWAIT)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _send(self, frame: bytes) -> None:
        if self._socket is None:
            raise AnalyticsLostError("the connection to the agent is closed")
        try:
            self._socket.sendall(frame)
            return
        except OSError:
            pass  # the agent has gone; it may have said why
        self.receive()
        raise self._lost()

    def close_in_child(self) -> None:
        """Close a child's copies of the descriptors, and let go of the memory."""
        self._drop_connection()

    def _drop_connection(self) -> None:
        if self._agent is not None:
            os.close(self._agent)
            self._agent = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._memory.clear()
        self._started = False
        self._writers = {}
        self._arrays = ()
        self._ring = None
        self._counters = memoryview(b"")
        self.under_way = None
