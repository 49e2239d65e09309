"""`Bridge` with a client in Python, as the document of the protocol says it: what the client in C has to do as well.

It has the signature of `deisa.ray.bridge.Bridge`, which also says what the calls mean; and it shares with it what that
does in Python before there is a client.
"""

from __future__ import annotations

import logging
import operator
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, Never

import numpy as np

from deisa.ray._handoff.ending import forget, is_orderly_end, program_has_left, reason_of, watch
from deisa.ray._handoff.fork import OwnProcess
from deisa.ray._state.descriptions import ArrayDescription, ChunkDescription
from deisa.ray._state.dtypes import conversion, same_values, shareable
from deisa.ray._state.halos import local_shape, wrong_shape
from deisa.ray._state.questions import check_key, check_timestep, check_wait
from deisa.ray._state.stats import BridgeStats
from deisa.ray._state.times import physical_time
from deisa.ray._state.values import decode_value
from deisa.ray.bridge import Communicator, _describe, _identity, _on_host
from deisa.ray.config import OnAnalyticsLost, Settings, disabled_by_environment
from deisa.ray.errors import (
    ChunkDtypeError,
    ChunkIndexError,
    ChunkShapeError,
    ClosedError,
    ConfigurationError,
    DeisaError,
    DescriptionError,
    DuplicateChunkError,
    FeedbackDroppedError,
    ForkedProcessError,
    LayoutError,
    LostError,
    MemoryBoundError,
    TimestepError,
    UnknownArrayError,
)
from tests.oracle.client import RankChannel
from tests.oracle.writer import ChunkWriter, PartWriter

logger = logging.getLogger("deisa.ray.bridge")

_FIRST_TIMESTEP, _LAST_TIMESTEP = -(2**63) + 1, 2**63 - 1
_DLPACK_HOST_DEVICES = {1, 3, 11}  # kDLCPU, kDLCUDAHost, kDLROCMHost


class _OwnChunk:
    """One chunk that this bridge owns."""

    __slots__ = (
        "_scratch",
        "array",
        "described",
        "dtype",
        "index",
        "lent",
        "lent_for",
        "lent_part",
        "passed_over",
        "writer",
    )

    def __init__(self, array: str, index: int, described: ChunkDescription, dtype: np.dtype | None) -> None:
        self.array = array
        self.index = index
        self.described = described
        self.dtype = dtype
        self.writer: ChunkWriter | None = None  # where no callback asks for the array
        self.passed_over: int | None = None  # there, the last timestep
        self.lent: np.ndarray | None = None  # the slot that was given out and has not come back
        self.lent_for: int | None = None  # the timestep that it was asked for
        self.lent_part: PartWriter | None = None
        self._scratch: np.ndarray | None = None

    def scratch(self) -> np.ndarray:
        """Return memory to compute into where nothing is handed over, the same every time."""
        if self._scratch is None:
            assert self.dtype is not None
            self._scratch = np.empty(self.described.shape, self.dtype)
        return self._scratch

    def is_given(self, chunk: Any) -> bool:
        """Whether a chunk is what `slot` has given out, which has no halo."""
        return chunk is not None and (chunk is self.lent or chunk is self._scratch)

    def interior(self, data: np.ndarray) -> np.ndarray:
        """Return the part of a local array that is the chunk."""
        halo = self.described.halo
        return data if halo is None else data[halo.inside(self.described.shape)]

    def whole_part(self, timestep: int) -> PartWriter | None:
        """The first part that takes the chunk as it is."""
        if self.writer is None or self.dtype is None:
            return None
        return self.writer.whole_part(self.described.shape, self.dtype, timestep)

    def has_sent(self, timestep: int) -> bool:
        """Whether it was handed over for `timestep`, the newest one."""
        if self.writer is not None:
            return self.writer.has_sent(timestep)
        return self.passed_over == timestep


class OracleBridge:
    """A rank's bridge to the analytics."""

    _open = False

    def __init__(
        self,
        comm: Communicator | None = None,
        arrays_metadata: Mapping[str, Any] | None = None,
        system_metadata: Mapping[str, Any] | None = None,
        *,
        bridge_id: int | None = None,
        session: str | None = None,
        on_analytics_lost: OnAnalyticsLost | None = None,
        enabled: bool | None = None,
        settings: Settings | None = None,
    ) -> None:
        self._id, self._world_size = _identity(comm, bridge_id, system_metadata)
        if settings is None:
            settings = Settings.from_environment(session=session)
        elif session is not None and session != settings.session:
            raise ConfigurationError(f"session={session!r}, but settings.session is {settings.session!r}")
        if on_analytics_lost is not None:
            settings = replace(settings, on_analytics_lost=on_analytics_lost)
        self._goes_on = settings.on_analytics_lost == "continue"
        self._alone = disabled_by_environment() if enabled is None else not enabled
        self._channel = RankChannel(settings)
        try:
            arrays = _describe(self._id, self._world_size, arrays_metadata)
        except LayoutError as error:
            if not self._alone:
                self._channel.refuse(self._id, self._world_size, error)
            raise
        self._own = {
            described.name: [
                _OwnChunk(described.name, index, chunk, described.dtype)
                for index, chunk in enumerate(described.chunks)
            ]
            for described in arrays
        }
        self._newest_of = ""  # what came to the newest timestep first
        self._switched_off = self._alone
        self._process = OwnProcess()
        self._opened_by = weakref.ref(threading.current_thread())
        self._lock = threading.Lock()
        if not self._alone:
            self._start(arrays)
        self._open = True
        if not self._alone:
            watch(self)

    def _start(self, arrays: Sequence[ArrayDescription]) -> None:
        try:
            self._channel.start(self._id, self._world_size, arrays)
        except LostError as error:
            self._channel.abort()
            if not self._goes_on:
                raise
            self._go_on_alone(error)
            return
        except BaseException as error:
            self._channel.abort(reason_of(error) if isinstance(error, MemoryBoundError) else "")
            raise
        for name, writers in self._channel.take_writers().items():
            for index, writer in writers.items():
                self._own[name][index].writer = writer

    @property
    def bridge_id(self) -> int:
        """The bridge's id."""
        return self._id

    @property
    def stats(self) -> BridgeStats:
        """Chunks and bytes handed over so far, and the time spent waiting for free slots."""
        state = self._channel.state
        return BridgeStats(state.chunks, state.nbytes, self._channel.held_up_s, state.left_out)

    @property
    def _timestep(self) -> int | None:
        """The newest timestep that anything was sent for, or that this rank has advanced to."""
        return self._channel.state.timestep

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Keep other threads out."""
        if not self._switched_off:
            self._process.check(
                f"bridge {self._id}"
            )  # before the lock, which another thread of the parent may hold
        with self._lock:
            self._channel.settle()
            try:
                yield
            except LostError as error:
                if not self._goes_on:
                    raise
                self._go_on_alone(error)

    def _go_on_alone(self, error: LostError) -> None:
        """From now on nothing goes anywhere."""
        logger.warning("bridge %d goes on without analytics: %s", self._id, error)
        self._alone = True
        self._let_go()
        self._channel.abort(f"it goes on without analytics: {error}")
        forget(self)

    def send(
        self,
        array_name: str,
        chunk: Any,
        timestep: int,
        *,
        time: float | None = None,
        chunk_index: int | None = None,
    ) -> None:
        """Hand one chunk over; afterwards the caller may overwrite its buffer."""
        with self._exclusively():
            if self._alone and self._open:
                return
            own, timestep = self._check_send(array_name, timestep, chunk_index)
            time = physical_time(time, f"bridge {self._id}, array {array_name!r}, timestep {timestep}")
            data = chunk if type(chunk) is np.ndarray else _on_host(array_name, chunk)
            shape, halo = own.described.shape, own.described.halo
            if not own.is_given(chunk):
                if data.shape != local_shape(shape, halo):
                    raise ChunkShapeError(
                        f"bridge {self._id}, array {array_name!r}, timestep {timestep}: "
                        f"{wrong_shape(shape, halo, data.shape)}"
                    )
                data = own.interior(data)
            if own.dtype is None:
                own.dtype = self._settle_dtype(own, data, chunk, timestep)
            dtype = own.dtype
            if data.dtype is not dtype and not same_values(data.dtype, dtype):
                convert = conversion(chunk, data, dtype)
                raise ChunkDtypeError(
                    f"bridge {self._id}, array {array_name!r}, timestep {timestep}: declared dtype {own.dtype}, "
                    f"got {data.dtype}; {f'send {convert} or ' if convert else ''}declare the other dtype"
                )
            writer = own.writer
            if writer is None:
                own.passed_over = timestep
                self._note_newest(timestep, f"array {array_name!r}")
                self._channel.state.left_out += data.nbytes
                self._channel.advance(timestep)
                return
            self._channel.check()
            self._note_newest(timestep, f"array {array_name!r}")
            must_notify = self._channel.move_on(timestep)
            lent = own.lent
            filled = own.lent_part if lent is chunk else None
            writer.free_slots(writer.due(timestep), timestep)
            if lent is not None:  # whoever still has it must not write into what is handed over
                lent.flags.writeable = False
                own.lent = None
            writer.put(timestep, time, data, filled, must_notify=must_notify)

    def slot(self, array_name: str, timestep: int, *, chunk_index: int | None = None) -> np.ndarray:
        """Give out the memory that the next `send` of a chunk will hand over, to compute into directly."""
        with self._exclusively():
            own, timestep = self._check_send(array_name, timestep, chunk_index)
            lent = own.lent
            if lent is not None and own.lent_for == timestep:
                return lent
            if own.dtype is None:
                raise ChunkDtypeError(
                    f"bridge {self._id}, array {array_name!r}: a slot needs the dtype; declare it in arrays_metadata"
                )
            part = own.whole_part(timestep)
            if own.writer is not None and part is not None:
                self._note_newest(timestep, f"array {array_name!r}")
                self._channel.advance(timestep)
                own.writer.free_slots([part], timestep)
                given = part.slot.view()
                if lent is not None:  # for a timestep that is over: the memory is the same
                    lent.flags.writeable = False
                own.lent, own.lent_for, own.lent_part = given, timestep, part
                return given
        # No callback asks for the array, or nobody is there any more: any memory will do.
        return own.scratch()

    def advance(self, timestep: int) -> None:
        """Say that this rank sends nothing older than `timestep` any more, without sending anything."""
        with self._exclusively():
            self._check_open()
            if not self._alone:
                step = self._check_timestep(timestep, "advance()")
                self._note_newest(step, "advance()")
                self._channel.advance(step)

    def get(
        self, key: str, timestep: int | None = None, default: Any = None, *, wait: float | None = None
    ) -> Any:
        """Return what the analytics has set for a key and a timestep, else `default`."""
        who = f"bridge {self._id}, get()"
        check_key(key, who)
        wait_s = check_wait(wait, timestep, who)
        step = None if timestep is None else check_timestep(timestep, who)
        with self._exclusively():
            if not self._open:
                raise ClosedError(f"bridge {self._id} is closed; nothing can be asked after close()")
            if self._alone:
                return default
            answer = self._channel.ask(key, step, wait_s, self._question(key, step, waits=wait_s is not None))
            if answer.dropped:
                raise FeedbackDroppedError(
                    f"bridge {self._id} asks for {key!r} at timestep {step}, but the values of that key are no longer "
                    "kept for it: the analytics keeps the last ones only. Ask earlier, or have it keep more: "
                    "Deisa(feedback_queue_size=...) counts the values of each key, DEISA_RAY_FEEDBACK_MEMORY_MIB is "
                    "the memory for all"
                )
            values = deque((t, decode_value(value)) for t, value in answer.values)
            if not values:
                return default
            return values if step is None else values[0][1]
        return default  # it goes on alone

    def _question(self, key: str, timestep: int | None, *, waits: bool) -> str:
        if not waits:
            return f"bridge {self._id} waits while the analytics sets {key!r} at timestep {timestep}"
        return (
            f"bridge {self._id} waits for {key!r} at timestep {timestep}, which the analytics has not set, and it has "
            "not finished with that timestep: its callbacks take longer, or an array that they look at was not sent "
            "for it yet (advance() says that nothing more comes)"
        )

    def close(self, timestep: int | None = None) -> None:
        """Say that this rank sends nothing more. What it sent stays with the agent; closing twice is fine."""
        with self._exclusively():
            if not self._open:
                return
            if (
                timestep is not None
                and self._timestep is not None
                and self._integer(timestep, "close()") < self._timestep
            ):
                logger.warning(
                    "bridge %d closes at timestep %d, having sent timestep %d",
                    self._id,
                    timestep,
                    self._timestep,
                )
            stats = self._leave()
            self._channel.close(stats)

    def _leave(self) -> BridgeStats:
        self._open = False
        self._let_go()
        forget(self)
        return self.stats

    def _let_go(self) -> None:
        """Drop the slots: their memory is unmapped as soon as nobody else has a view of it."""
        for chunks in self._own.values():
            for own in chunks:
                own.lent = own.lent_part = None
                own.writer = None

    def lose(self, reason: str) -> None:
        """End as a dying rank does; a thread that waits in a call gets an error. Not for users."""
        if not self._lock.acquire(blocking=False):
            self._channel.interrupt(reason)
            self._lock.acquire()
        try:
            if self._open:
                self._leave()
                self._channel.abort(reason)
        finally:
            self._lock.release()

    def end_with_process(self, *, in_order: bool = False) -> None:
        """Close, whatever the exit status will be: only the client in C can wait for that. Not for users."""
        with self._lock:
            if self._open:
                self._channel.close(self._leave())

    @property
    def opened_by(self) -> threading.Thread | None:
        """The thread that has created this bridge, as long as it lives. Not for users."""
        return self._opened_by()

    def __del__(self) -> None:
        """Close: nobody can any more."""
        if not self._open or self._alone or not self._process.is_this:
            return
        if program_has_left():
            self.end_with_process()
            return
        logger.warning("bridge %d was dropped without close(), and closes now", self._id)
        try:
            self.close()
        except DeisaError as error:
            logger.warning("bridge %d: %s", self._id, error)

    def __reduce__(self) -> Never:
        """Refuse to be sent to another process, as an argument of one, for example."""
        raise ForkedProcessError(
            f"bridge {self._id} belongs to this process and cannot be pickled; create a Bridge in the other process"
        )

    def __enter__(self) -> OracleBridge:
        if not self._switched_off:
            self._process.check(f"bridge {self._id}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close in order; after an exception, end as a dying rank does, so that the analytics knows."""
        if not self._process.is_this:
            return
        if error is None or is_orderly_end(error):
            self.close()
        else:
            self.lose(reason_of(error))

    def __repr__(self) -> str:
        state = "open" if self._open else "closed"
        return f"<Bridge {self._id} of {self._world_size}, {state}, arrays: {', '.join(self._own) or 'none'}>"

    def _check_send(self, array_name: str, timestep: int, chunk_index: int | None) -> tuple[_OwnChunk, int]:
        self._check_open()
        chunks = self._own.get(array_name) if isinstance(array_name, str) else None
        if chunks is None:
            raise UnknownArrayError(
                f"bridge {self._id} described no array {array_name!r}; it has "
                f"{', '.join(map(repr, self._own)) or 'none'}"
            )
        if chunk_index is None and len(chunks) == 1:
            own = chunks[0]
        else:
            own = chunks[self._chunk_index(array_name, len(chunks), chunk_index)]
        step = self._check_timestep(timestep, f"array {array_name!r}")
        if not self._alone and own.has_sent(step):
            raise DuplicateChunkError(
                f"bridge {self._id} has already sent chunk {own.index} of array {array_name!r} for timestep {step}"
            )
        return own, step

    def _check_open(self) -> None:
        if not self._open:
            raise ClosedError(f"bridge {self._id} is closed; nothing can be sent after close()")

    def _integer(self, timestep: Any, what: str) -> int:
        try:
            step = None if isinstance(timestep, bool) else int(operator.index(timestep))
        except TypeError:
            step = None
        if step is None:
            raise TimestepError(f"bridge {self._id}, {what}: timesteps are integers, got {timestep!r}")
        if not _FIRST_TIMESTEP <= step <= _LAST_TIMESTEP:
            raise TimestepError(f"bridge {self._id}, {what}: timestep {step} exceeds 64 bits")
        return step

    def _note_newest(self, timestep: int, what: str) -> None:
        if timestep != self._timestep:
            self._newest_of = what

    def _check_timestep(self, timestep: Any, what: str) -> int:
        step = self._integer(timestep, what)
        if not self._alone and self._timestep is not None and step < self._timestep:
            raise TimestepError(
                f"bridge {self._id}, {what}: timestep {step} comes after timestep {self._timestep} of "
                f"{self._newest_of}; the timesteps of a bridge must not decrease, whatever it sends"
            )
        return step

    def _chunk_index(self, array_name: str, count: int, chunk_index: int | None) -> int:
        if chunk_index is not None and (
            isinstance(chunk_index, bool) or not hasattr(chunk_index, "__index__")
        ):
            raise ChunkIndexError(
                f"bridge {self._id}, array {array_name!r}: chunk_index is an integer, got {chunk_index!r}"
            )
        if chunk_index is None and count > 1:
            raise ChunkIndexError(
                f"bridge {self._id} owns {count} chunks of array {array_name!r}; say which with chunk_index="
            )
        if count == 0 or chunk_index is None or not 0 <= operator.index(chunk_index) < count:
            raise ChunkIndexError(
                f"bridge {self._id} owns {count} chunks of array {array_name!r}, there is no chunk {chunk_index}"
            )
        return int(chunk_index)

    def _settle_dtype(self, own: _OwnChunk, data: np.ndarray, sent: Any, timestep: int) -> np.dtype:
        """Make the dtype of the first chunk that is sent that of the array, whose description left it open."""
        try:
            dtype = shareable(own.array, data.dtype)
        except DescriptionError as exc:
            raise ChunkDtypeError(f"bridge {self._id}, {exc}") from exc
        writers = [chunk.writer for chunk in self._own[own.array] if chunk.writer is not None]
        if writers:
            settled = self._channel.declare(own.array, writers, dtype)
            if not same_values(dtype, settled):
                convert = conversion(sent, data, settled)
                raise ChunkDtypeError(
                    f"bridge {self._id}, array {own.array!r}, timestep {timestep}: other bridges declared dtype "
                    f"{settled}, this one declared none and sends {dtype}"
                    f"{f'; send {convert}' if convert else ''}"
                )
            dtype = settled
        for chunk in self._own[own.array]:
            chunk.dtype = dtype
        return dtype
