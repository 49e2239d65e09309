"""The messages between rank and agent, and how they become bytes.

On the wire a message is a little-endian 32-bit length and a msgpack array: a message code and the
fields in the order of the class. File descriptors travel beside the first byte of the message that
counts them. Nothing received is ever unpickled; every field is checked before it is used, so a
message that has been decoded is valid in form.

::

    rank -> agent                         agent -> rank
    -------------                         -------------
    Hello      who, and which chunks      Progress   still waiting, for whom
    Learned    dtype of an array          Slots      regions of memory, with descriptors
    Look       chunks lie in their slots  Start      the arrays asked for, with shared pages
    HeldUp     no slot free               Free       a slot, for a rank that was held up
    Advance    nothing older will come    Orphaned   the analytics has gone, another may come
    Close      the end                    Fail       the session is over, and why
    Abort      the end, after an error    Later      look again, this run is over
    Ending     one of the two will follow

    reader -> agent                       agent -> reader
    ---------------                       ---------------
    Attach     map the chunk memory       Slots, then Attached

    analytics -> agent of its node        agent -> analytics
    ------------------------------        ------------------
    Follow     I am here until I hang up  Journal    memory for what has been handled
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import msgpack
import numpy as np

from deisa.ray._state.dtypes import shareable
from deisa.ray._state.events import BridgeStats
from deisa.ray._state.layout import (
    ArrayDescription,
    ChunkDescription,
    Shape,
    check_place,
)
from deisa.ray._transport.limits import MemoryLimit
from deisa.ray.errors import ProtocolError

PROTOCOL_VERSION = 5
MAX_CALLBACKS = 100_000
MAX_LIMITS = 64
MAX_MESSAGE_BYTES = 16 * 2**20
MAX_CHUNKS_PER_MESSAGE = 100_000
MAX_TEXT = 2_000  # characters of an error that is passed on
MAX_DIMENSIONS = 64  # NumPy's
_LENGTH = struct.Struct("<I")
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """Where the slots of one chunk lie.

    The chunk at slot ``s`` starts at byte ``base + s * slot_bytes`` of descriptor number
    `segment`, with the given strides (bytes): a chunk may lie inside a larger box.
    """

    region: int
    segment: int
    base: int
    slot_bytes: int
    slots: int
    shape: Shape
    strides: Shape
    dtype: np.dtype


@dataclass(frozen=True, slots=True)
class WantedArray:
    """An array that a callback asks for.

    Its row on the board starts at 64-bit word `row`: the number of turns that have a slot, then the slot
    of turn ``n`` at place ``n % slots``.

    Attributes
    ----------
    regions : tuple of int
        This bridge's chunks of the array.
    row, slots : int
    tally, bridges, own : int
        The array's row on the tally starts at word `tally` and has one word for each of so many bridges;
        `own` is this bridge's word.
    """

    regions: tuple[int, ...]
    row: int
    slots: int
    tally: int
    bridges: int
    own: int


class Message:
    """Base of all messages; `code` is its number on the wire."""

    code: ClassVar[int]


@dataclass(frozen=True, slots=True)
class Hello(Message):
    code: ClassVar[int] = 1
    version: int
    session: str
    bridge_id: int
    world_size: int
    arrays: tuple[ArrayDescription, ...]
    limits: tuple[MemoryLimit, ...]


@dataclass(frozen=True, slots=True)
class Learned(Message):
    code: ClassVar[int] = 2
    array: str
    dtype: np.dtype
    limits: tuple[MemoryLimit, ...]


@dataclass(frozen=True, slots=True)
class Look(Message):
    """There is something in the outboxes of this node: the rank was the last one to hand a timestep over."""

    code: ClassVar[int] = 3


@dataclass(frozen=True, slots=True)
class HeldUp(Message):
    code: ClassVar[int] = 4
    region: int
    timestep: int


@dataclass(frozen=True, slots=True)
class Advance(Message):
    code: ClassVar[int] = 5
    timestep: int


@dataclass(frozen=True, slots=True)
class Close(Message):
    code: ClassVar[int] = 6
    stats: BridgeStats


@dataclass(frozen=True, slots=True)
class Abort(Message):
    """The rank ends because of an error."""

    code: ClassVar[int] = 8
    reason: str


@dataclass(frozen=True, slots=True)
class Ending(Message):
    """The rank's process is about to end and sends nothing more; its exit status decides on `Close` or `Abort`."""

    code: ClassVar[int] = 25


@dataclass(frozen=True, slots=True)
class Attach(Message):
    """A reader wants to map the chunk memory, apart from the first `mapped` segments."""

    code: ClassVar[int] = 7
    version: int
    mapped: int


@dataclass(frozen=True, slots=True)
class Follow(Message):
    """The analytics, which exists for as long as this connection does, wants a journal for so many callbacks."""

    code: ClassVar[int] = 9
    version: int
    driver_id: str
    callbacks: int


@dataclass(frozen=True, slots=True)
class Progress(Message):
    code: ClassVar[int] = 16
    text: str


@dataclass(frozen=True, slots=True)
class Slots(Message):
    """Regions of memory; their `segment` numbers count the descriptors that come along, of the given sizes."""

    code: ClassVar[int] = 17
    sizes: tuple[int, ...]
    regions: tuple[RegionSpec, ...]


@dataclass(frozen=True, slots=True)
class Start(Message):
    """The session has started.

    Attributes
    ----------
    pages : tuple of int
        Sizes of the board, the tally and the bridge's outbox, whose descriptors come along; empty where no
        callback asks for any of the bridge's arrays.
    arrays : dict of str to WantedArray
    """

    code: ClassVar[int] = 18
    pages: tuple[int, ...]
    arrays: dict[str, WantedArray]


@dataclass(frozen=True, slots=True)
class Free(Message):
    """A rank that was held up can go on: one of the region's slots is marked free."""

    code: ClassVar[int] = 19
    region: int


@dataclass(frozen=True, slots=True)
class Fail(Message):
    code: ClassVar[int] = 20
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Orphaned(Message):
    """The analytics has gone, as the text says; without a text, there is one again."""

    code: ClassVar[int] = 22
    text: str


@dataclass(frozen=True, slots=True)
class Journal(Message):
    """One 64-bit word for each callback, in memory of so many bytes whose descriptor comes along."""

    code: ClassVar[int] = 23
    nbytes: int


@dataclass(frozen=True, slots=True)
class Attached(Message):
    """Everything is mapped.

    Attributes
    ----------
    agent_id : str
    analytics : str
        Whether the agent's analytics is ``"here"``, ``"gone"``, or ``"quiet"`` for `quiet_s`.
    quiet_s : float
    holder : str
        The analytics' process, in words.
    """

    code: ClassVar[int] = 21
    agent_id: str
    analytics: str
    quiet_s: float
    holder: str


@dataclass(frozen=True, slots=True)
class Later(Message):
    """The rank has to look again: as the text says, it does not belong to the run that this agent serves."""

    code: ClassVar[int] = 24
    text: str


MESSAGES: dict[int, type[Message]] = {
    cls.code: cls
    for cls in (
        Hello, Learned, Look, HeldUp, Advance, Close, Abort, Ending, Attach, Follow,
        Progress, Slots, Start, Free, Fail, Attached, Orphaned, Journal, Later,
    )
}  # fmt: skip


def encode(message: Message) -> bytes:
    """Turn a message into a frame: length, code, fields."""
    fields = [_plain(getattr(message, f.name)) for f in dataclasses.fields(message)]  # type: ignore[arg-type]
    body: bytes = msgpack.packb([message.code, *fields])
    if len(body) > MAX_MESSAGE_BYTES:
        raise ProtocolError(
            f"a message of {len(body)} bytes is larger than the limit of {MAX_MESSAGE_BYTES}; "
            "the bridge describes too many chunks"
        )
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes | memoryview) -> Message:
    """Turn the bytes of one message into a checked message.

    Raises
    ------
    ProtocolError
        For anything that is not exactly one well-formed message.
    """
    try:
        count = _Counter()
        payload = msgpack.unpackb(
            body, use_list=True, raw=False, strict_map_key=True, list_hook=count, object_hook=count
        )
    except Exception as exc:  # msgpack raises many kinds; all of them mean the same here
        raise ProtocolError(f"received bytes that are no message: {shorten(exc)}") from exc
    if not isinstance(payload, list) or not payload or not isinstance(payload[0], int):
        raise ProtocolError("received bytes that are no message: expected a code and fields")
    cls = MESSAGES.get(payload[0])
    if cls is None:
        raise ProtocolError(f"received a message with unknown code {payload[0]}")
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if len(payload) - 1 != len(names):
        raise ProtocolError(f"{cls.__name__} has {len(names)} fields, received {len(payload) - 1}")
    try:
        return cls(*[_READ[cls.__name__, n](v) for n, v in zip(names, payload[1:], strict=True)])
    except Exception as exc:  # NumPy, too, raises many kinds, for descriptions of dtypes
        raise ProtocolError(f"received a malformed {cls.__name__}: {shorten(exc)}") from exc


def shorten(text: object) -> str:
    """Cut a text that may quote what a peer has sent; what is sent or logged has to stay small."""
    text = str(text)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."


class _Counter:
    """Counts the lists and maps of a message: empty ones take a byte each there, and seventy here."""

    __slots__ = ("_left",)

    def __init__(self) -> None:
        self._left = 8 * MAX_CHUNKS_PER_MESSAGE

    def __call__(self, container: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ValueError("it has too many lists")
        return container


class FrameBuffer:
    """Cuts a stream of bytes into messages, holding at most one unfinished message."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Add received bytes and yield every message that is whole."""
        self._pending += data
        start = 0
        try:
            while len(self._pending) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._pending, start)
                if length > MAX_MESSAGE_BYTES:
                    raise ProtocolError(
                        f"a message of {length} bytes exceeds the limit of {MAX_MESSAGE_BYTES}"
                    )
                end = start + _LENGTH.size + length
                if len(self._pending) < end:
                    break
                body = bytes(self._pending[start + _LENGTH.size : end])
                start = end
                yield decode(body)
        finally:
            del self._pending[:start]


# Writing: dataclasses become lists of their fields, dtypes their NumPy description.


def _plain(value: Any) -> Any:
    if isinstance(value, np.dtype):
        return _plain(np.lib.format.dtype_to_descr(value))
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return [_plain(getattr(value, f.name)) for f in dataclasses.fields(value)]
    return value


# Reading: one small function for each kind of field.


def _integer(value: Any) -> int:
    if type(value) is not int or value not in _INT64:
        raise TypeError(f"expected an integer, got {value!r:.60}")
    return value


def _natural(value: Any) -> int:
    if _integer(value) < 0:
        raise ValueError(f"expected a number of at least 0, got {value}")
    return value


def _callbacks(value: Any) -> int:
    if _natural(value) > MAX_CALLBACKS:
        raise ValueError(f"expected at most {MAX_CALLBACKS} callbacks, got {value}")
    return value


def _seconds(value: Any) -> float:
    if type(value) is not float or not value >= 0:
        raise TypeError(f"expected seconds, got {value!r:.60}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"expected a string, got {value!r:.60}")
    return value


def _items(value: Any) -> list[Any]:
    if type(value) is not list or len(value) > MAX_CHUNKS_PER_MESSAGE:
        raise TypeError(f"expected a list of at most {MAX_CHUNKS_PER_MESSAGE} items")
    return value


def _naturals(value: Any) -> tuple[int, ...]:
    return tuple(map(_natural, _items(value)))


def _integers(value: Any) -> tuple[int, ...]:
    return tuple(map(_integer, _items(value)))


def _fields(value: Any, count: int) -> list[Any]:
    if len(_items(value)) != count:
        raise ValueError(f"expected {count} fields, got {len(value)}")
    return value


def _dtype(value: Any) -> np.dtype:
    return shareable("received", np.lib.format.descr_to_dtype(_descr(value, depth=0)))


def _descr(value: Any, depth: int) -> Any:
    """Give a dtype's description back the tuples that msgpack turned into lists."""
    if type(value) is str:
        return value
    if depth > 8:
        raise ValueError("a dtype is nested too deeply")
    items = _items(value)
    if len(items) == 2 and type(items[1]) is list and all(type(n) is int for n in items[1]):
        return (_descr(items[0], depth + 1), tuple(map(_natural, items[1])))  # a subarray
    described = []
    for item in items:
        name, *rest = _items(item)
        title = tuple(map(_text, name)) if type(name) is list else _text(name)
        if not 1 <= len(rest) <= 2:
            raise ValueError("a dtype's field needs a name, a type and perhaps a shape")
        described.append((title, _descr(rest[0], depth + 1), *(_naturals(s) for s in rest[1:])))
    return described


def _optional(read: Any) -> Any:
    return lambda value: None if value is None else read(value)


def _chunk(value: Any) -> ChunkDescription:
    shape, position, offset = _fields(value, 3)
    return ChunkDescription(_naturals(shape), _optional(_naturals)(position), _optional(_naturals)(offset))


def _array(value: Any) -> ArrayDescription:
    name, dtype, global_shape, grid, chunks = _fields(value, 5)
    described = ArrayDescription(
        _text(name),
        _optional(_dtype)(dtype),
        _optional(_naturals)(global_shape),
        _optional(_naturals)(grid),
        tuple(map(_chunk, _items(chunks))),
    )
    for chunk in described.chunks:
        if len(chunk.shape) > MAX_DIMENSIONS:
            raise ValueError(f"a chunk has {len(chunk.shape)} dimensions, NumPy {MAX_DIMENSIONS} at most")
        placed = [p for p in (chunk.position, chunk.offset) if p is not None]
        shapes = [s for s in (described.global_shape, described.grid, *placed) if s is not None]
        if 0 in chunk.shape or any(len(s) != len(chunk.shape) for s in shapes):
            raise ValueError(f"array {described.name!r:.60}: a chunk's position does not fit its shape")
        check_place(described.name, chunk, described.global_shape, described.grid)
    return described


def _region(value: Any) -> RegionSpec:
    region, segment, base, slot_bytes, slots, shape, strides, dtype = _fields(value, 8)
    return RegionSpec(
        _natural(region), _natural(segment), _natural(base), _natural(slot_bytes), _natural(slots),
        _naturals(shape), _integers(strides), _dtype(dtype),
    )  # fmt: skip


def _limits(value: Any) -> tuple[MemoryLimit, ...]:
    if len(_items(value)) > MAX_LIMITS:
        raise ValueError(f"expected at most {MAX_LIMITS} memory limits, got {len(value)}")
    return tuple(map(_limit, value))


def _limit(value: Any) -> MemoryLimit:
    group, path, limit, available = _fields(value, 4)
    return MemoryLimit(_natural(group), shorten(_text(path)), _natural(limit), _natural(available))


def _stats(value: Any) -> BridgeStats:
    chunks, handed_over, held_up_s = _fields(value, 3)
    return BridgeStats(_natural(chunks), _natural(handed_over), _seconds(held_up_s))


def _wanted_arrays(value: Any) -> dict[str, WantedArray]:
    if type(value) is not dict:
        raise TypeError("expected a map of arrays")
    return {_text(name): _wanted(fields) for name, fields in value.items()}


def _wanted(value: Any) -> WantedArray:
    regions, *places = _fields(value, 6)
    return WantedArray(_naturals(regions), *map(_natural, places))


_READ: dict[tuple[str, str], Any] = {
    ("Hello", "version"): _integer,
    ("Hello", "session"): _text,
    ("Hello", "bridge_id"): _integer,
    ("Hello", "world_size"): _integer,
    ("Hello", "arrays"): lambda value: tuple(map(_array, _items(value))),
    ("Hello", "limits"): _limits,
    ("Learned", "array"): _text,
    ("Learned", "dtype"): _dtype,
    ("Learned", "limits"): _limits,
    ("HeldUp", "region"): _natural,
    ("HeldUp", "timestep"): _integer,
    ("Advance", "timestep"): _integer,
    ("Close", "stats"): _stats,
    ("Abort", "reason"): _text,
    ("Attach", "version"): _integer,
    ("Attach", "mapped"): _natural,
    ("Follow", "version"): _integer,
    ("Follow", "driver_id"): _text,
    ("Follow", "callbacks"): _callbacks,
    ("Progress", "text"): _text,
    ("Slots", "sizes"): _naturals,
    ("Slots", "regions"): lambda value: tuple(map(_region, _items(value))),
    ("Start", "pages"): _naturals,
    ("Start", "arrays"): _wanted_arrays,
    ("Free", "region"): _natural,
    ("Fail", "kind"): _text,
    ("Fail", "text"): _text,
    ("Orphaned", "text"): _text,
    ("Journal", "nbytes"): _natural,
    ("Attached", "agent_id"): _text,
    ("Attached", "analytics"): _text,
    ("Attached", "quiet_s"): _seconds,
    ("Attached", "holder"): _text,
    ("Later", "text"): _text,
}
