"""What a simulation rank calls: describe chunks once, send them at each timestep.

Importing this module imports NumPy, neither Ray nor Dask.
"""

from __future__ import annotations

import logging
import operator
import os
import threading
import weakref
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Never, Protocol

import numpy as np

from deisa.ray._handoff import _native
from deisa.ray._handoff.ending import forget, is_orderly_end, program_has_left, reason_of, watch
from deisa.ray._handoff.fork import OwnProcess, close_in_children
from deisa.ray._state.descriptions import ArrayDescription, ChunkDescription, Shape, describe_arrays
from deisa.ray._state.dtypes import conversion, dtype_of, dtype_text, same_values, shareable
from deisa.ray._state.halos import local_shape, wrong_shape
from deisa.ray._state.labels import plain_coordinate
from deisa.ray._state.questions import check_key, check_timestep, check_wait
from deisa.ray._state.stats import BridgeStats
from deisa.ray._state.times import physical_time
from deisa.ray._state.values import decode_value
from deisa.ray.compliance import implements
from deisa.ray.config import OnAnalyticsLost, Settings, disabled_by_environment
from deisa.ray.errors import (
    BridgeIdError,
    ChunkDtypeError,
    ChunkShapeError,
    ConfigurationError,
    ConfigurationTypeError,
    DeisaError,
    DescriptionError,
    DescriptionTypeError,
    DeviceMemoryError,
    ForkedProcessError,
    LayoutError,
    TimestepError,
)

logger = logging.getLogger("deisa.ray.bridge")

_FIRST_TIMESTEP, _LAST_TIMESTEP = -(2**63) + 1, 2**63 - 1
_BAD_STATUS = "its process ended without close(), and its exit status was not 0"
_LEVELS = (logging.INFO, logging.WARNING)  # by number, as the client says them
_DLPACK_HOST_DEVICES = {1, 3, 11}  # kDLCPU, kDLCUDAHost, kDLROCMHost


class Communicator(Protocol):
    """What a Bridge needs of an MPI communicator, as mpi4py's has it."""

    def Get_rank(self) -> int: ...  # noqa: D102
    def Get_size(self) -> int: ...  # noqa: D102


class _OwnChunk:
    """One chunk that this bridge owns, and where it is handed over."""

    __slots__ = (
        "_scratch",
        "_views",
        "array",
        "described",
        "dtype",
        "index",
        "lent_for",
        "native",
        "own_memory",
    )

    def __init__(self, array: str, index: int, described: ChunkDescription, native: _native.Chunk) -> None:
        self.array = array
        self.index = index
        self.described = described
        self.native = native
        self.dtype: np.dtype | None = None
        self.lent_for: int | None = None  # the timestep that the slot was asked for which is given out
        self._views: dict[int, np.ndarray] = {}
        self.own_memory: np.ndarray | None = None  # with a halo around it, what `_scratch` is the chunk of
        self._scratch: np.ndarray | None = None

    def settle(self, dtype: np.dtype) -> None:
        """Take chunks of this dtype from now on."""
        self.dtype = self.native.dtype = dtype

    def slot_at(self, memory: _native.Memory, offset: int, strides: Shape) -> np.ndarray:
        """Give out the slot at an offset of the memory."""
        view = self._views.get(offset)
        if view is None:
            view = self._views[offset] = np.ndarray(
                self.described.shape, self.dtype, memoryview(memory), offset, strides
            )
        self.native.lent = lent = view.view()
        return lent

    def take_back(self) -> None:
        """Take back the slot that was given out: whoever still has it can write into it no more."""
        lent, self.native.lent = self.native.lent, None
        if lent is not None:
            lent.flags.writeable = False

    def scratch(self) -> np.ndarray:
        """Return memory to compute into where no slot takes the chunk as it is, the same every time."""
        if self._scratch is None:
            shape, halo = self.described.shape, self.described.halo
            self.own_memory = np.empty(local_shape(shape, halo), self.dtype)
            self._scratch = self.own_memory if halo is None else self.own_memory[halo.inside(shape)]
        return self._scratch

    def given_instead(self, chunk: Any) -> np.ndarray | None:
        """Return the local array where a chunk is what `slot` has given out in place of one; else None."""
        return self.own_memory if chunk is self._scratch else None

    def let_go(self) -> None:
        """Drop the slots: their memory is unmapped as soon as nobody else has a view of it."""
        self.native.lent = None
        self._views.clear()


class Bridge:
    """A rank's bridge to the analytics.

    Creating one announces the rank's chunks and waits until the bridges of all ranks have done so
    and the analytics runs ``execute_callbacks``. From then on `send` costs about one copy of the
    chunk. Every rank that will ever send data needs a Bridge of its own.

    Parameters
    ----------
    comm : Communicator, optional
        An mpi4py communicator, or anything with ``Get_rank`` and ``Get_size``. Gives `bridge_id`
        and the number of bridges; the alternative is `bridge_id` with `system_metadata`.
    arrays_metadata : mapping
        Array name to the description of the chunk that this rank owns, or to a list of
        descriptions for several chunks (an empty list, or leaving the array out, for none):

        - ``chunk_shape`` (elements), with ``chunk_position`` in the grid of chunks and
          ``nb_chunks_per_dim`` and/or ``global_shape``. Chunks may differ in shape so long as rows
          and columns of the grid line up;
        - or ``global_shape``, ``offset`` (elements) and ``chunk_shape``: any tiling by boxes;
        - ``dtype``, a fixed-size NumPy dtype; if left out, that of the first chunk sent;
        - ``halo``, the ghost cells around the chunk in the array that the rank computes on and sends: one width for
          all sides, ``(before, after)`` for all dimensions, or a width or such a pair for each dimension. They are
          not handed over;
        - ``dims``, names of the dimensions; ``coords``, values along them: an array for the chunk or for the whole
          array, ``{"start": a, "step": b}``, or ``(dimension, values, attributes)``; ``attrs``, attributes such as
          ``units``. Bridges may leave out what others say.

        ``nb_chunks_of_node`` is accepted and not needed.
    system_metadata : mapping, optional
        ``world_size``, the number of bridges; ``master_address`` and ``master_port`` are accepted
        and not needed.
    bridge_id : int, optional
        Unique id, 0 to ``world_size - 1``.
    session : str, optional
        Name of the session, ``"default"`` unless ``DEISA_RAY_SESSION`` says otherwise.
    on_analytics_lost : {"wait", "continue", "raise"}, optional
        What to do when the analytics dies, or another rank, or the agent of this host: with "wait", the default,
        go on as long as there are slots and wait for another analytics that takes the session over; with
        "continue" go on without: nothing that is sent goes anywhere any more; with "raise" raise at the next call.
        The loss of a rank or an agent is final: then "wait" raises too.
    enabled : bool, optional
        False makes this bridge do nothing, so that a simulation runs without any analytics; by default as
        ``DEISA_RAY_DISABLED`` says.
    settings : Settings, optional
        Timeouts and the rest; by default from the environment.

    Raises
    ------
    DescriptionError, LayoutError
        When this description, or all bridges' descriptions together, do not make whole arrays.
    NoAnalyticsError, WaitTimeoutError
        When no agent answers on this host, or others do not come in time.

    Examples
    --------
    >>> bridge = Bridge(
    ...     bridge_id=0,
    ...     arrays_metadata={
    ...         "temperature": {
    ...             "chunk_shape": (64, 64),
    ...             "nb_chunks_per_dim": (2, 2),
    ...             "chunk_position": (0, 0),
    ...             "dtype": float,
    ...         }
    ...     },
    ...     system_metadata={"world_size": 4},
    ... )  # doctest: +SKIP
    """

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
        self._disabled = disabled_by_environment() if enabled is None else not enabled
        options = _options(self._id, self._world_size, settings, disabled=self._disabled)
        try:
            arrays = _describe(self._id, self._world_size, arrays_metadata)
        except LayoutError as error:
            if not self._disabled:  # the analytics, and the other ranks, would wait for it
                _native.refuse(f"{type(error).__name__}: {error}", **options, arrays=())
            raise
        implements("IBridge", Bridge)
        self._process = OwnProcess()
        self._opened_by = weakref.ref(threading.current_thread())
        self._settling = threading.Lock()
        self._own: dict[str, list[_OwnChunk]] = {}
        self._client = _native.Client(**options, arrays=tuple(map(_plain, arrays)))
        self._own = {
            described.name: [
                _OwnChunk(described.name, index, chunk, native)
                for index, (chunk, native) in enumerate(zip(described.chunks, natives, strict=True))
            ]
            for described, natives in zip(arrays, self._client.chunks, strict=True)
        }
        self._senders: dict[tuple[str, int | None], Any] = {}
        for described in arrays:
            if described.dtype is not None:
                self._take_chunks(described.name, described.dtype)
        if not self._client.detached:
            close_in_children(self)
            watch(self)

    def _take_chunks(self, array: str, dtype: np.dtype) -> None:
        """Have chunks of an array go straight to the client from now on, if they are of this dtype."""
        chunks = self._own[array]
        for own in chunks:
            own.settle(dtype)
            self._senders[array, own.index if len(chunks) > 1 else None] = own.native.send
            self._senders[array, own.index] = own.native.send

    @property
    def bridge_id(self) -> int:
        """The bridge's id."""
        return self._id

    @property
    def node_id(self) -> str:
        """The name of this bridge's host: the same for all bridges of a node."""
        return os.uname().nodename

    @property
    def stats(self) -> BridgeStats:
        """Chunks and bytes handed over so far, and the time spent waiting for free slots."""
        return BridgeStats(*self._client.stats)

    def send(
        self,
        array_name: str,
        chunk: Any,
        timestep: int,
        *,
        time: float | None = None,
        chunk_index: int | None = None,
    ) -> None:
        """Hand one chunk over; afterwards the caller may overwrite its buffer.

        Waits only when the analytics is more than ``max_simulation_ahead`` timesteps behind. An
        array that no callback asks for is not copied.

        Parameters
        ----------
        array_name : str
        chunk : array_like
            A NumPy array of the announced shape and dtype (any strides), anything with
            ``__array__`` or ``__dlpack__`` on the CPU, or the array that `slot` gave out,
            which is handed over without a copy. Where a ``halo`` is declared, the local array
            with its ghost cells, of which only the interior is copied.
        timestep : int
            At least that of the last `send`.
        time : float, optional
            The physical time of the timestep, the same for all chunks of the array. The analytics finds it as
            ``array.time``.
        chunk_index : int, optional
            Which of this bridge's chunks of the array, where it has several.

        Raises
        ------
        ContractError
            `UnknownArrayError`, `ChunkShapeError`, `ChunkDtypeError`, `DeviceMemoryError`, `TimestepError`,
            `PhysicalTimeError`, `DuplicateChunkError` or `ChunkIndexError`; nothing has been sent.
        ClosedError
            After `close`.
        ForkedProcessError
            In a forked child of the process that has opened the bridge; so does every other call.
        WaitTimeoutError
            When no slot becomes free in time.
        AnalyticsLostError
            When the analytics has ended.
        """
        is_index = chunk_index is None or type(chunk_index) is int  # 0.0 and False would be found as 0
        try:
            send = self._senders.get((array_name, chunk_index)) if is_index else None
        except TypeError:  # of a name that has no hash
            send = None
        if send is None or not send(chunk, timestep, time):
            self._send_unusual(array_name, chunk, timestep, time, chunk_index)

    def _send_unusual(
        self, array_name: str, chunk: Any, timestep: Any, time: Any, chunk_index: int | None
    ) -> None:
        """Send what is no array exactly as described, or say what is wrong with it."""
        client = self._client
        if client.detached and not client.closed:
            return
        own = self._find(array_name, chunk_index)
        step = self._check_timestep(timestep, f"array {array_name!r}")
        own.native.check(step)
        time = physical_time(time, f"bridge {self._id}, array {array_name!r}, timestep {step}")
        if chunk is not None and chunk is own.native.lent:
            own.native.commit(step, time)
            return
        instead = own.given_instead(chunk)
        if instead is not None:
            own.native.put(instead, step, time)
            return
        data = chunk if type(chunk) is np.ndarray else _on_host(array_name, chunk)
        shape, halo = own.described.shape, own.described.halo
        if data.shape != local_shape(shape, halo):
            raise ChunkShapeError(
                f"bridge {self._id}, array {array_name!r}, timestep {step}: {wrong_shape(shape, halo, data.shape)}"
            )
        dtype = own.dtype
        if dtype is None:
            dtype = self._settle_dtype(own, data, chunk, step)
        if data.dtype is not dtype and not same_values(data.dtype, dtype):
            convert = conversion(chunk, data, dtype)
            raise ChunkDtypeError(
                f"bridge {self._id}, array {array_name!r}, timestep {step}: declared dtype {dtype}, "
                f"got {data.dtype}; {f'send {convert} or ' if convert else ''}declare the other dtype"
            )
        if data.dtype != dtype:  # fields of structured elements that lie elsewhere
            data = data.astype(dtype)
        own.native.put(data, step, time)

    def slot(self, array_name: str, timestep: int, *, chunk_index: int | None = None) -> np.ndarray:
        """Give out the memory that the next `send` of a chunk will hand over, to compute into directly.

        Fill it and pass it to `send` as `chunk`: nothing is copied then. It holds old values at first
        and becomes read-only when it is sent. A chunk has one at a time: a call for a later timestep
        takes back one that was not sent, which becomes read-only, too.

        Returns
        -------
        numpy.ndarray
            Of the announced chunk shape and dtype, without ghost cells where a ``halo`` is declared.

        Raises
        ------
        ContractError, ClosedError, WaitTimeoutError, AnalyticsLostError
            As `send` does.
        """
        own = self._find(array_name, chunk_index)
        step = self._check_timestep(timestep, f"array {array_name!r}")
        lent = own.native.lent
        if lent is not None or own.dtype is None:
            own.native.check(step)
        if lent is not None and own.lent_for == step:
            return lent
        if own.dtype is None:
            raise ChunkDtypeError(
                f"bridge {self._id}, array {array_name!r}: a slot needs the dtype; declare it in arrays_metadata"
            )
        given = own.native.slot(step)
        own.take_back()  # where it was asked for another timestep, which is over: the memory is the same
        own.lent_for = step
        # Where no callback asks for the chunk as it is, or nobody is there any more, any memory will do.
        return own.scratch() if given is None else own.slot_at(*given)

    def advance(self, timestep: int) -> None:
        """Say that this rank sends nothing older than `timestep` any more, without sending anything.

        A `send` says the same. A rank that sends rarely calls this where others send often, if a callback
        looks at both their arrays: until every rank has passed a timestep, what was sent for it waits in
        its slots, and in the end the others' ``send`` does.

        Raises
        ------
        TimestepError, ClosedError, AnalyticsLostError
        """
        client = self._client
        if client.closed or client.detached:
            client.advance(_FIRST_TIMESTEP)  # refused after `close`, else nothing
        else:
            client.advance(self._check_timestep(timestep, "advance()"))

    def get(
        self, key: str, timestep: int | None = None, default: Any = None, *, wait: float | None = None
    ) -> Any:
        """Return what the analytics has set with ``Deisa.set`` for a key and a timestep, else `default`.

        All bridges of all nodes get the same answer to the same question: if one had its default, the value
        can no longer be set. That takes no message, and some microseconds. With `wait`, two runs also get
        the same answers.

        Parameters
        ----------
        key : str
        timestep : int, optional
            Without it, all values of the key that are kept. What has been set by now depends on
            the moment, so bridges may see different ones.
        default : Any
        wait : float, optional
            Seconds to wait until the analytics has set the key for the timestep, or has finished with the
            timestep: every callback has run that can run for it or for an earlier one. Send what they look at
            first. The bridge's other threads wait as well, as they do in `send`.

        Returns
        -------
        Any
            A new object for each call, with lists for tuples. Without a timestep a `collections.deque` of pairs
            ``(timestep, value)``, in the order of timesteps.

        Raises
        ------
        WaitTimeoutError
            When the `wait` is over: a default would depend on the moment.
        FeedbackDroppedError
            When the analytics has set newer ones since and keeps no more (``feedback_queue_size``).
        FeedbackError
            For a key or a timestep that cannot be one.
        ClosedError, AnalyticsLostError
            As `send` does.

        Examples
        --------
        >>> if bridge.get("stop", timestep=t, default=False, wait=60):  # doctest: +SKIP
        ...     break
        """
        who = f"bridge {self._id}, get()"
        check_key(key, who)
        wait_s = check_wait(wait, timestep, who)
        if timestep is None:
            queue = self._client.get_queue(key)
            return default if queue is None else deque((t, decode_value(value)) for t, value in queue)
        value = self._client.get(key, check_timestep(timestep, who), wait_s)
        return default if value is None else decode_value(value)

    def close(self, timestep: int | None = None) -> None:
        """Say that this rank sends nothing more. What it sent stays with the agent; closing twice is fine.

        Parameters
        ----------
        timestep : int, optional
            The timestep at which the simulation ended; only checked.
        """
        newest = self._client.newest
        if (
            not self._client.closed
            and timestep is not None
            and newest is not None
            and self._check_timestep(timestep, "close()") < newest
        ):
            logger.warning(
                "bridge %d closes at timestep %d, having sent timestep %d", self._id, timestep, newest
            )
        try:
            self._client.close()
        finally:
            if self._client.closed:
                self._let_go()

    def _let_go(self) -> None:
        for chunks in self._own.values():
            for own in chunks:
                own.let_go()
        forget(self)

    def lose(self, reason: str) -> None:
        """End as a dying rank does; a thread that waits in a call gets an error. Not for users."""
        self._client.abort(reason)
        if self._client.closed:
            self._let_go()

    def end_with_process(self, *, in_order: bool = False) -> None:
        """Close when the process ends in order, as its exit status says if that is not sure. Not for users."""
        client = self._client
        try:
            if not client.closed and in_order:
                logger.warning("bridge %d is still open as its process ends, and closes now", self._id)
                client.close()
            elif not client.closed:
                if not client.detached:
                    logger.warning(
                        "bridge %d is still open as its process ends: with exit status 0 it counts as closed, with any "
                        "other as lost; call close(), or use it in a with block",
                        self._id,
                    )
                client.close_with_process(_BAD_STATUS)
        except DeisaError as error:
            logger.warning("bridge %d: %s", self._id, error)
        self._let_go()

    def close_in_child(self) -> None:
        """Close a forked child's copies of descriptors. Not for users."""
        self._client.close_in_child()

    @property
    def opened_by(self) -> threading.Thread | None:
        """The thread that has created this bridge, as long as it lives. Not for users."""
        return self._opened_by()

    def __del__(self) -> None:
        """Close: nobody can any more."""
        client: _native.Client | None = getattr(self, "_client", None)  # without, the creation has failed
        if client is None or client.closed or client.detached or not self._process.is_this:
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

    def __enter__(self) -> Bridge:
        if not self._disabled:
            self._process.check(f"bridge {self._id}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close in order; after an exception, end as a dying rank does, so that the analytics knows.

        ``SystemExit`` with status 0, and the end of a generator, are no errors. A forked child that leaves the block
        does nothing.
        """
        if not self._process.is_this:
            return
        if error is None or is_orderly_end(error):
            self.close()
        else:
            self.lose(reason_of(error))

    def __repr__(self) -> str:
        state = "closed" if self._client.closed else "open"
        return f"<Bridge {self._id} of {self._world_size}, {state}, arrays: {', '.join(self._own) or 'none'}>"

    def _find(self, array_name: str, chunk_index: Any) -> _OwnChunk:
        _, index = self._client.find(array_name, chunk_index)
        return self._own[array_name][index]

    def _check_timestep(self, timestep: Any, what: str) -> int:
        try:
            step = None if isinstance(timestep, bool) else int(operator.index(timestep))
        except TypeError:
            step = None
        if step is None:
            raise TimestepError(f"bridge {self._id}, {what}: timesteps are integers, got {timestep!r}")
        if not _FIRST_TIMESTEP <= step <= _LAST_TIMESTEP:
            raise TimestepError(f"bridge {self._id}, {what}: timestep {step} exceeds 64 bits")
        return step

    def _settle_dtype(self, own: _OwnChunk, data: np.ndarray, sent: Any, timestep: int) -> np.dtype:
        """Make the dtype of the first chunk that is sent that of the array, whose description left it open."""
        try:
            dtype = shareable(own.array, data.dtype)
        except DescriptionError as exc:
            raise ChunkDtypeError(f"bridge {self._id}, {exc}") from exc
        if own.native.wanted:
            declared = own.native.declare_dtype(dtype_text(dtype))
            if declared is not None:
                known = dtype_of(declared)
                if not same_values(dtype, known):
                    convert = conversion(sent, data, known)
                    raise ChunkDtypeError(
                        f"bridge {self._id}, array {own.array!r}, timestep {timestep}: other bridges declared dtype "
                        f"{known}, this one declared none and sends {dtype}{f'; send {convert}' if convert else ''}"
                    )
                dtype = known
        with self._settling:
            self._take_chunks(own.array, dtype)
        return dtype


implements("IBridge", Bridge)


def _options(bridge_id: int, world_size: int, settings: Settings, *, disabled: bool) -> dict[str, Any]:
    """Return what the client wants to know, apart from the arrays."""
    return {
        "session": settings.session,
        "socket_path": settings.socket_path,
        "bridge_id": bridge_id,
        "world_size": world_size,
        "connect_timeout_s": settings.connect_timeout_s,
        "start_timeout_s": settings.start_timeout_s,
        "send_timeout_s": settings.send_timeout_s,
        "warn_every_s": settings.warn_every_s,
        "on_lost": settings.on_analytics_lost,
        "disabled": disabled,
        "say": _say,
    }


def _say(level: int, text: str) -> None:
    logger.log(_LEVELS[level], "%s", text)


def _plain(described: ArrayDescription) -> tuple[Any, ...]:
    """Write a description as the client takes it."""
    dtype = dtype_text(described.dtype) if described.dtype is not None else None
    ndim = len(described.chunks[0].shape) if described.chunks else 0
    chunks = tuple(
        (
            chunk.shape,
            chunk.position,
            chunk.offset,
            None if chunk.halo is None else chunk.halo.flat,
            tuple(map(plain_coordinate, chunk.coords)),
        )
        for chunk in described.chunks
    )
    labels = described.dims, tuple(described.attrs.items())
    return described.name, dtype, ndim, described.global_shape, described.grid, chunks, *labels


def _identity(
    comm: Communicator | None, bridge_id: int | None, system_metadata: Mapping[str, Any] | None
) -> tuple[int, int]:
    """Return this bridge's id and the number of bridges."""
    if comm is not None:
        try:
            rank, size = comm.Get_rank(), comm.Get_size()
        except AttributeError as exc:
            raise ConfigurationTypeError(
                f"comm must have Get_rank() and Get_size(), as mpi4py's communicators do; got {type(comm).__name__}"
            ) from exc
        if bridge_id is not None and bridge_id != rank:
            raise BridgeIdError(f"bridge_id is {bridge_id}, but comm says rank {rank}; give one of them")
        return int(rank), int(size)
    if bridge_id is None or system_metadata is None:
        raise ConfigurationError(
            "who is this bridge? Give comm=, or bridge_id= and system_metadata={'world_size': ...}"
        )
    if not isinstance(system_metadata, Mapping) or "world_size" not in system_metadata:
        raise ConfigurationError("system_metadata must be a dict with 'world_size'")
    try:
        identity, world_size = (
            int(operator.index(bridge_id)),
            int(operator.index(system_metadata["world_size"])),
        )
    except TypeError as exc:
        raise ConfigurationTypeError("bridge_id and world_size must be integers") from exc
    if world_size < 1:
        raise ConfigurationError(f"world_size is {world_size}; it must be at least 1")
    return identity, world_size


def _describe(
    bridge_id: int, world_size: int, arrays_metadata: Mapping[str, Any] | None
) -> Sequence[ArrayDescription]:
    """Check what a rank says about itself and its chunks."""
    if not 0 <= bridge_id < world_size:
        raise BridgeIdError(
            f"bridge_id {bridge_id} lies outside 0..{world_size - 1} (world_size is {world_size})"
        )
    if arrays_metadata is None:
        raise DescriptionTypeError("arrays_metadata is missing: describe the chunks this rank will send")
    return describe_arrays(arrays_metadata)


def _on_host(array_name: str, chunk: Any) -> np.ndarray:
    """Turn what is not exactly a NumPy array into one, if it lies in host memory."""
    if isinstance(chunk, np.ma.MaskedArray):
        raise ChunkDtypeError(
            f"array {array_name!r}: a masked array would lose its mask; send chunk.filled(), where its fill_value "
            "stands for what is masked, or chunk.data where nothing ever is"
        )
    if isinstance(chunk, np.ndarray):
        return np.asarray(chunk)
    on_device = hasattr(chunk, "__cuda_array_interface__")
    if not on_device and hasattr(chunk, "__dlpack_device__"):
        on_device = int(chunk.__dlpack_device__()[0]) not in _DLPACK_HOST_DEVICES
    if on_device:
        raise DeviceMemoryError(
            f"array {array_name!r}: the chunk ({type(chunk).__name__}) lies in the memory of an accelerator; copy it "
            "to the host first (CuPy: chunk.get(), PyTorch: chunk.cpu(), JAX: jax.device_get(chunk))"
        )
    if hasattr(chunk, "__array__") or hasattr(chunk, "__array_interface__"):
        return np.asarray(chunk)
    if hasattr(chunk, "__dlpack__"):
        return np.from_dlpack(chunk)
    if isinstance(chunk, bool | int | float | complex | list | tuple):
        return np.asarray(chunk)
    raise ChunkDtypeError(
        f"array {array_name!r}: a chunk must be a NumPy array or offer __array__ or __dlpack__, "
        f"got {type(chunk).__name__}"
    )
