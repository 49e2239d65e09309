"""The messages between an agent and the processes of its node, and how they become bytes.

A message on the wire is its *length* (32 bits, of what follows), its *code* (16 bits), and the fields of its
class in order, as `codec` writes them. File descriptors travel beside the first byte of the message that counts
them. ``docs/protocol.md`` says what each side may assume.

::

    rank -> agent                          agent -> rank
    -------------                          -------------
    Hello         who, and which chunks    Progress       still waiting, for whom
    CannotJoin    in its place, and why    Slots          regions of memory, with descriptors
    DeclareDtype  of an array              Start          the arrays asked for, with the pages
    Notify        look at the pages        AnalyticsDown  it has gone, another one may come
    Ending        the process is ending    AnalyticsUp    it has come
    Close         the end                  Fail           the session is over, and why
    Abort         the end, after an error  Later          look again, this run is over

    reader -> agent                        agent -> reader
    ---------------                        ---------------
    Attach        map the chunk memory     Slots, then Attached

    analytics -> agent of its node         agent -> analytics
    ------------------------------         ------------------
    Follow        I am here                Journal        memory for what has been handled
    Release       leases have ended        Events         what has happened
    Propose       a value, to be set       Judged         whether it can be
    Settle        whether it is
    Finish        with a timestep
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from deisa.ray._state import events
from deisa.ray._state.descriptions import MAX_DIMENSIONS, ArrayDescription, Shape, check_place
from deisa.ray._state.events import Event
from deisa.ray._state.labels import check_labels
from deisa.ray._state.stats import BridgeStats
from deisa.ray._transport.codec import (
    Natural,
    Numbers,
    Reader,
    check_when_read,
    read_fields,
    write_fields,
)
from deisa.ray._transport.limits import MemoryLimit
from deisa.ray.errors import LayoutError, ProtocolError

PROTOCOL_VERSION = 7
MAX_CALLBACKS = 100_000
MAX_LIMITS = 64
MAX_MESSAGE_BYTES = 16 * 2**20
MAX_TEXT = 2_000  # characters of an error that is passed on
_LENGTH, _CODE = struct.Struct("<I"), struct.Struct("<H")


@dataclass(frozen=True, slots=True)
class RegionSpec:
    """Where the slots of one chunk lie.

    The chunk at slot ``s`` starts at byte ``base + s * slot_bytes`` of descriptor number
    `segment`, with the given strides (bytes): a chunk may lie inside a larger box.
    """

    region: Natural
    segment: Natural
    base: Natural
    slot_bytes: Natural
    slots: Natural
    shape: tuple[Natural, ...]
    strides: tuple[int, ...]
    dtype: np.dtype
    itemsize: Natural


@dataclass(frozen=True, slots=True)
class WantedPart:
    """What is wanted of one chunk: `shape` elements from `start` on, `step` from one to the next along each axis."""

    chunk: Natural
    region: Natural
    start: tuple[Natural, ...]
    step: tuple[Natural, ...]
    shape: tuple[Natural, ...]


@dataclass(frozen=True, slots=True)
class WantedStream:
    """What callbacks ask for of an array, and its places on the pages (`pages`), in words.

    Attributes
    ----------
    array : str
    every : int
        Only timesteps that are multiples of it.
    parts : tuple of WantedPart
        What is wanted of this bridge's chunks; a chunk that is not among them is not wanted.
    slots : int
        Of each part.
    table_row : int
        Where its row of the slot table starts.
    counters_row, bridges : int
        Where its row of the arrival counters starts, and how many bridges have an entry there.
    entry : int
        Where the entry of this bridge starts.
    """

    array: str
    every: Natural
    parts: tuple[WantedPart, ...]
    slots: Natural
    table_row: Natural
    counters_row: Natural
    bridges: Natural
    entry: Natural


class Message:
    """Base of all messages; `code` is its number on the wire, `most_bytes` how long it may be."""

    code: ClassVar[int]
    most_bytes: ClassVar[int] = MAX_MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """A bridge says who it is, which chunks it owns, and which memory limits it is under."""

    code: ClassVar[int] = 1
    version: int
    session: str
    bridge_id: int
    world_size: int
    arrays: tuple[ArrayDescription, ...]
    limits: tuple[MemoryLimit, ...]


@dataclass(frozen=True, slots=True)
class DeclareDtype(Message):
    """The dtype of an array that was described without one, with its first chunk."""

    code: ClassVar[int] = 2
    array: str
    dtype: np.dtype
    limits: tuple[MemoryLimit, ...]


@dataclass(frozen=True, slots=True)
class Notify(Message):
    """The pages have changed so that the agent should look: a timestep is complete, or passed, on this node."""

    code: ClassVar[int] = 3


@dataclass(frozen=True, slots=True)
class Close(Message):
    """The bridge sends nothing more."""

    code: ClassVar[int] = 4
    stats: BridgeStats


@dataclass(frozen=True, slots=True)
class Abort(Message):
    """The bridge ends because of an error."""

    code: ClassVar[int] = 5
    reason: str


@dataclass(frozen=True, slots=True)
class Ending(Message):
    """The rank's process is ending with the bridge still open; `Close` or `Abort` comes with its exit status."""

    code: ClassVar[int] = 6


@dataclass(frozen=True, slots=True)
class CannotJoin(Message):
    """In place of `Hello`: the rank has refused its own description, so that the session cannot start."""

    code: ClassVar[int] = 13
    version: int
    session: str
    bridge_id: int
    reason: str


@dataclass(frozen=True, slots=True)
class Attach(Message):
    """A reader wants to map the chunk memory, apart from the first `mapped` segments."""

    code: ClassVar[int] = 7
    version: int
    mapped: Natural


@dataclass(frozen=True, slots=True)
class Follow(Message):
    """The analytics, which exists for as long as this connection does, wants a journal, and perhaps events.

    Attributes
    ----------
    version : int
    driver_id : str
    callbacks : int
        That the journal has words for.
    listens : int
        Whether events are to come on this connection from now on (1), and not in answers to polls (0).
    """

    code: ClassVar[int] = 8
    version: int
    driver_id: str
    callbacks: Natural
    listens: Natural


@dataclass(frozen=True, slots=True)
class ReleasedStep:
    """An array at a timestep."""

    array: str
    timestep: int


@dataclass(frozen=True, slots=True)
class Release(Message):
    """The leases of a consumer have ended."""

    code: ClassVar[int] = 9
    consumer: str
    steps: tuple[ReleasedStep, ...]


@dataclass(frozen=True, slots=True)
class Propose(Message):
    """The analytics asks whether a value can be set for the simulation; as `_state.feedback.Proposal`."""

    code: ClassVar[int] = 10
    number: Natural
    key: str
    timestep: int
    value: bytes
    final: Natural
    last_accepted: Natural


@dataclass(frozen=True, slots=True)
class Settle(Message):
    """The value of a proposal counts (1), or does not."""

    code: ClassVar[int] = 11
    number: Natural
    accepted: Natural


@dataclass(frozen=True, slots=True)
class Finish(Message):
    """The analytics has finished with a timestep, and those before."""

    code: ClassVar[int] = 12
    timestep: int


@dataclass(frozen=True, slots=True)
class Progress(Message):
    """The rank still has to wait, as the text says: before the start, or for a slot."""

    code: ClassVar[int] = 16
    text: str


@dataclass(frozen=True, slots=True)
class Slots(Message):
    """Regions of memory; their `segment` numbers count the descriptors that come along, of the given sizes."""

    code: ClassVar[int] = 17
    sizes: tuple[Natural, ...]
    regions: tuple[RegionSpec, ...]


@dataclass(frozen=True, slots=True)
class Start(Message):
    """The session has started.

    Attributes
    ----------
    pages : tuple of int
        Bytes of the slot table, the arrival counters and the bridge's submission ring, whose descriptors come
        along; empty where no callback asks for any of the bridge's arrays.
    capacity : int
        Entries of the ring.
    streams : tuple of WantedStream
    if_lost : str
        What may have happened, besides the end of the analytics, if the agent goes without a word; empty for nothing.
    feedback : tuple of int
        Bytes of the feedback page and of the questions page, whose descriptors come along behind those of `pages`.
    questions : int
        Where the row of this bridge starts on the questions page.
    """

    code: ClassVar[int] = 18
    pages: tuple[Natural, ...]
    capacity: Natural
    streams: tuple[WantedStream, ...]
    if_lost: str = ""
    feedback: tuple[Natural, ...] = ()
    questions: Natural = 0


@dataclass(frozen=True, slots=True)
class Fail(Message):
    """The session is over for this peer; `kind` names the class of the error to raise."""

    code: ClassVar[int] = 19
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class AnalyticsDown(Message):
    """The analytics has gone, as the text says, and another one may come."""

    code: ClassVar[int] = 20
    text: str


@dataclass(frozen=True, slots=True)
class AnalyticsUp(Message):
    """There is an analytics again."""

    code: ClassVar[int] = 21


@dataclass(frozen=True, slots=True)
class Later(Message):
    """The rank has to look again: as the text says, it does not belong to the run that this agent serves."""

    code: ClassVar[int] = 22
    text: str


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

    code: ClassVar[int] = 24
    agent_id: str
    analytics: str
    quiet_s: float
    holder: str


@dataclass(frozen=True, slots=True)
class Journal(Message):
    """One 64-bit word for each callback, in memory of so many bytes whose descriptor comes along; and whose it is."""

    code: ClassVar[int] = 25
    nbytes: Natural
    agent_id: str


@dataclass(frozen=True, slots=True)
class Judged(Message):
    """What the node says of a proposal; as `_state.feedback.Verdict`, with its `asked` in two parts."""

    code: ClassVar[int] = 27
    number: Natural
    asked_by: int | None
    asked: int | None
    known: Natural
    refusal: str


NumberedEvent = Annotated[
    Event,
    Numbers(
        {
            1: events.BridgeJoined,
            2: events.DtypeDeclared,
            3: events.StepComplete,
            4: events.OwnersPassed,
            5: events.StepTorn,
            6: events.SendersBlocked,
            7: events.BridgeClosed,
            8: events.BridgeLost,
            9: events.AgentLost,
            10: events.TimesDiffer,
            11: events.FeedbackAwaited,
        }
    ),
]


@dataclass(frozen=True, slots=True)
class Events(Message):
    """What has happened on the node since the last message of this kind, oldest first; may repeat a `Hello`."""

    code: ClassVar[int] = 26
    most_bytes: ClassVar[int] = 2 * MAX_MESSAGE_BYTES
    events: tuple[NumberedEvent, ...]


MESSAGES: dict[int, type[Message]] = {
    cls.code: cls
    for cls in (
        Hello, CannotJoin, DeclareDtype, Notify, Close, Abort, Ending, Attach, Follow, Release,
        Propose, Settle, Finish,
        Progress, Slots, Start, Fail, AnalyticsDown, AnalyticsUp, Later, Attached, Journal, Events, Judged,
    )
}  # fmt: skip


def encode(message: Message) -> bytes:
    """Turn a message into a frame: length, code, fields."""
    frame = bytearray(_LENGTH.size)
    frame += _CODE.pack(message.code)
    write_fields(frame, message)
    length = len(frame) - _LENGTH.size
    if length > message.most_bytes:
        raise ProtocolError(
            f"a message of {length} bytes is larger than the limit of {message.most_bytes}; "
            "the bridge describes too many chunks"
        )
    _LENGTH.pack_into(frame, 0, length)
    return bytes(frame)


def decode(body: bytes | memoryview) -> Message:
    """Turn the bytes of one message, without their length, into a checked message.

    Raises
    ------
    ProtocolError
        For anything that is not exactly one well-formed message.
    """
    reader = Reader(body)
    try:
        code = reader.number(_CODE)
    except ValueError as exc:
        raise ProtocolError("received bytes that are no message: they are too few for a code") from exc
    cls = MESSAGES.get(code)
    if cls is None:
        raise ProtocolError(f"received bytes that are no message: nothing has code {code}")
    try:
        message: Message = read_fields(cls, reader)
    except (ValueError, LayoutError) as exc:
        raise ProtocolError(f"received a malformed {cls.__name__}: {shorten(exc)}") from exc
    return message


def shorten(text: object) -> str:
    """Cut a text that may quote what a peer has sent; what is sent or logged has to stay small."""
    text = str(text)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."


class FrameBuffer:
    """Cuts received bytes into messages of at most so many bytes.

    Raises
    ------
    ProtocolError
        From `feed`, as soon as a length exceeds the limit, or for anything `decode` refuses.
    """

    def __init__(self, most_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._most_bytes = most_bytes
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """Add received bytes and yield the messages that are complete now."""
        self._pending += data
        start = 0
        try:
            while len(self._pending) - start >= _LENGTH.size:
                (length,) = _LENGTH.unpack_from(self._pending, start)
                if length > self._most_bytes:
                    raise ProtocolError(
                        f"a message of {length} bytes was announced, which exceeds the limit of {self._most_bytes}"
                    )
                end = start + _LENGTH.size + length
                if len(self._pending) < end:
                    break
                body = bytes(self._pending[start + _LENGTH.size : end])
                start = end
                yield decode(body)
        finally:
            del self._pending[:start]


# What the types of fields do not say.


def _check_array(array: ArrayDescription) -> None:
    for chunk in array.chunks:
        if len(chunk.shape) > MAX_DIMENSIONS:
            raise ValueError(f"a chunk has {len(chunk.shape)} dimensions, NumPy {MAX_DIMENSIONS} at most")
        placed = [p for p in (chunk.position, chunk.offset) if p is not None]
        shapes: list[Shape] = [s for s in (array.global_shape, array.grid, *placed) if s is not None]
        if min(chunk.shape, default=1) < 1 or any(
            len(s) != len(chunk.shape) or min(s, default=0) < 0 for s in shapes
        ):
            raise ValueError(f"array {array.name!r:.60}: a chunk's position does not fit its shape")
        check_place(array.name, chunk, array.global_shape, array.grid)
        check_labels(array.dims, chunk.coords, array.attrs, chunk.shape)


def _check_region(region: RegionSpec) -> None:
    if len(region.strides) != len(region.shape) or region.itemsize != region.dtype.itemsize:
        raise ValueError("a region's strides or itemsize do not fit its shape and dtype")


def _check_hello(hello: Hello) -> None:
    _check_limits(hello.limits)


def _check_dtype(declared: DeclareDtype) -> None:
    _check_limits(declared.limits)


def _check_limits(limits: tuple[MemoryLimit, ...]) -> None:
    if len(limits) > MAX_LIMITS:
        raise ValueError(f"expected at most {MAX_LIMITS} memory limits, got {len(limits)}")


def _check_limit(limit: MemoryLimit) -> None:
    if min(limit.group, limit.limit, limit.available) < 0 or len(limit.path) > MAX_TEXT:
        raise ValueError("a memory limit makes no sense")


def _check_stats(stats: BridgeStats) -> None:
    if min(stats.chunks, stats.bytes_handed_over, stats.bytes_left_out) < 0 or not stats.held_up_s >= 0:
        raise ValueError("a bridge's figures make no sense")


def _check_attached(attached: Attached) -> None:
    if not attached.quiet_s >= 0:
        raise ValueError(f"expected seconds, got {attached.quiet_s}")


def _check_follow(follow: Follow) -> None:
    if follow.callbacks > MAX_CALLBACKS:
        raise ValueError(f"expected at most {MAX_CALLBACKS} callbacks, got {follow.callbacks}")


check_when_read(ArrayDescription, _check_array)
check_when_read(RegionSpec, _check_region)
check_when_read(Hello, _check_hello)
check_when_read(DeclareDtype, _check_dtype)
check_when_read(MemoryLimit, _check_limit)
check_when_read(BridgeStats, _check_stats)
check_when_read(Attached, _check_attached)
check_when_read(Follow, _check_follow)
