"""Messages as bytes: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from deisa.ray._state import events
from deisa.ray._state.descriptions import ArrayDescription, ChunkDescription, describe_arrays
from deisa.ray._state.labels import Coordinate
from deisa.ray._state.stats import BridgeStats
from deisa.ray._state.values import encode_value
from deisa.ray._transport import messages
from deisa.ray._transport.limits import MemoryLimit
from deisa.ray._transport.messages import (
    MAX_MESSAGE_BYTES,
    MESSAGES,
    FrameBuffer,
    Message,
    RegionSpec,
    decode,
    encode,
)
from deisa.ray.errors import ProtocolError

NATURAL = st.integers(0, 2**63 - 1)
INTEGER = st.integers(-(2**63), 2**63 - 1)
NATURALS = st.lists(NATURAL, max_size=4).map(tuple)
SECONDS = st.floats(0, allow_nan=False)
TIME = st.none() | st.floats(allow_nan=False)
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)

ATTRIBUTES = st.sampled_from(["K", 1, 2.5, [1, "a"], {"b": None}, np.arange(3), np.float32(1)]).map(
    encode_value
)

SCALAR_DTYPES = st.one_of(
    npst.boolean_dtypes(),
    npst.integer_dtypes(endianness="?"),
    npst.unsigned_integer_dtypes(endianness="?"),
    npst.floating_dtypes(endianness="?"),
    npst.complex_number_dtypes(endianness="?"),
    npst.datetime64_dtypes(endianness="?"),
    npst.timedelta64_dtypes(endianness="?"),
    npst.byte_string_dtypes(endianness="?", min_len=1),
    npst.unicode_string_dtypes(endianness="?", min_len=1),
)
STRUCTURED_DTYPES = npst.nested_dtypes(SCALAR_DTYPES, max_leaves=6, max_itemsize=2000)
FIXED_DTYPES = [
    np.dtype([("x", "<f4"), ("y", ">i2", (2, 3))]),
    np.dtype([("p", [("x", "f8"), ("when", "M8[ns]")], (2,)), ("name", "S7")]),
    np.dtype([("a", "i1"), ("b", "f8")], align=True),
    np.dtype({"names": ["a", "b"], "formats": ["i1", "f4"], "offsets": [3, 8], "itemsize": 20}),
    np.dtype([(("a title", "a"), "f8")]),
    np.dtype("V7"),
    np.dtype("float16"),
    np.dtype("longdouble"),
]
DTYPES = st.one_of(
    SCALAR_DTYPES,
    STRUCTURED_DTYPES.filter(lambda dtype: dtype.itemsize > 0 and dtype.subdtype is None),
    st.sampled_from(FIXED_DTYPES),
)


@st.composite
def labels(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Names of dimensions or none, attributes, and coordinates of a chunk."""
    attrs = draw(st.dictionaries(NAME, ATTRIBUTES, max_size=2))
    dims = draw(st.none() | st.just(tuple(f"dim {d}" for d in range(len(shape)))))
    coords = []
    for d, n in enumerate(shape):
        if dims is not None and draw(st.booleans()):
            kind = draw(st.sampled_from(["own", "part", "even"]))
            values = np.arange(n if kind == "own" else 2)
            first, length = (
                draw(st.tuples(st.integers(0, 9), st.integers(11, 2**40))) if kind == "part" else (None, None)
            )
            said = {"start": 0.5, "step": 2} if kind == "even" else values
            coords.append(Coordinate(dims[d], d, first, length, encode_value(said), attrs))
    return dims, attrs, tuple(coords)


@st.composite
def described_arrays(draw: st.DrawFn) -> ArrayDescription:
    """What `describe_arrays` may give."""
    ndim = draw(st.integers(0, 4))
    box = st.tuples(*[st.integers(1, 2**40) | st.just(2)] * ndim)
    dtype = draw(st.none() | DTYPES)
    chunks = []
    shape = draw(box)
    dims, attrs, coords = draw(labels((2,) * ndim))
    by_offset = draw(st.booleans())
    for _ in range(draw(st.integers(0, 3))):
        size = tuple(draw(st.integers(1, n)) for n in shape)
        if by_offset:
            offset = tuple(draw(st.integers(0, n - s)) for n, s in zip(shape, size, strict=True))
            chunks.append(ChunkDescription(size, None, offset))
        else:
            chunks.append(ChunkDescription(size, tuple(draw(st.integers(0, 9)) for _ in range(ndim)), None))
        if size == (2,) * ndim:
            chunks[-1] = dataclasses.replace(chunks[-1], coords=coords)
    grid = draw(st.none() | st.just((10,) * ndim)) if not by_offset else None
    return ArrayDescription(draw(NAME), dtype, shape, grid, tuple(chunks), dims, attrs)


@st.composite
def regions(draw: st.DrawFn) -> RegionSpec:
    """Any place in memory, with as many strides as dimensions, and the itemsize of its dtype."""
    shape, dtype = draw(NATURALS), draw(DTYPES)
    strides = tuple(draw(st.lists(INTEGER, min_size=len(shape), max_size=len(shape))))
    return RegionSpec(*(draw(NATURAL) for _ in range(5)), shape, strides, dtype, dtype.itemsize)


BRIDGES = st.lists(INTEGER, max_size=3).map(tuple)
EVENTS = st.one_of(
    st.builds(
        events.BridgeJoined,
        INTEGER,
        INTEGER,
        st.lists(described_arrays(), max_size=2).map(tuple),
        INTEGER,
        TEXT,
    ),
    st.builds(events.DtypeDeclared, INTEGER, TEXT, DTYPES),
    st.builds(events.StepComplete, TEXT, INTEGER, INTEGER, TIME),
    st.builds(events.OwnersPassed, TEXT, st.none() | INTEGER),
    st.builds(events.StepTorn, TEXT, INTEGER, BRIDGES),
    st.builds(events.SendersBlocked, TEXT, st.dictionaries(INTEGER, INTEGER, max_size=3)),
    st.builds(events.BridgeClosed, INTEGER, st.builds(BridgeStats, NATURAL, NATURAL, SECONDS)),
    st.builds(events.BridgeLost, INTEGER, st.none() | INTEGER, TEXT),
    st.builds(events.AgentLost, TEXT),
    st.builds(events.TimesDiffer, TEXT, INTEGER, BRIDGES, st.lists(TIME, max_size=3).map(tuple)),
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "array": TEXT,
    "dtype": DTYPES,
    "arrays": st.lists(described_arrays(), max_size=3).map(tuple),
    "stats": st.builds(BridgeStats, NATURAL, NATURAL, SECONDS),
    "version": INTEGER,
    "session": TEXT,
    "limits": st.lists(st.builds(MemoryLimit, NATURAL, TEXT, NATURAL, NATURAL), max_size=3).map(tuple),
    "bridge_id": INTEGER,
    "world_size": INTEGER,
    "timestep": INTEGER,
    "if_lost": TEXT,
    "text": TEXT,
    "kind": TEXT,
    "reason": TEXT,
    "agent_id": TEXT,
    "analytics": TEXT,
    "holder": TEXT,
    "quiet_s": SECONDS,
    "sizes": NATURALS,
    "driver_id": TEXT,
    "consumer": TEXT,
    "key": TEXT,
    "value": st.binary(max_size=100),
    "asked_by": st.none() | INTEGER,
    "asked": st.none() | INTEGER,
    "refusal": TEXT,
    "events": st.lists(EVENTS, max_size=3).map(tuple),
    "callbacks": st.integers(0, messages.MAX_CALLBACKS),
}


def strategy(cls: type[Message]) -> st.SearchStrategy[Message]:
    fields = {f.name: FIELDS.get(f.name, NATURAL) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if cls is messages.Slots:
        fields["regions"] = st.lists(regions(), max_size=3).map(tuple)
    if cls is messages.Start:
        part = st.builds(messages.WantedPart, NATURAL, NATURAL, NATURALS, NATURALS, NATURALS)
        parts = st.lists(part, max_size=3).map(tuple)
        wanted = st.builds(messages.WantedStream, TEXT, NATURAL, parts, *[NATURAL] * 5)
        fields["pages"] = fields["feedback"] = NATURALS
        fields["streams"] = st.lists(wanted, max_size=3).map(tuple)
    if cls is messages.Release:
        released = st.builds(messages.ReleasedStep, TEXT, INTEGER)
        fields["steps"] = st.lists(released, max_size=3).map(tuple)
    return st.builds(cls, **fields)


ANY = st.one_of(*map(strategy, MESSAGES.values()))


def all_of(data: bytes) -> list[Message]:
    return list(FrameBuffer().feed(data))


@pytest.mark.parametrize("cls", MESSAGES.values(), ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_what_goes_in_comes_out(cls: type[Message], data: st.DataObject) -> None:
    message = data.draw(strategy(cls))
    assert all_of(encode(message)) == [message]


@pytest.mark.parametrize("dtype", FIXED_DTYPES, ids=str)
def test_every_fixed_size_dtype_travels(dtype: np.dtype) -> None:
    (declared,) = all_of(encode(messages.DeclareDtype("a", dtype, ())))
    assert isinstance(declared, messages.DeclareDtype)
    assert declared.dtype == dtype
    assert declared.dtype.itemsize == dtype.itemsize


def test_descriptions_travel_as_a_bridge_makes_them() -> None:
    described = describe_arrays(
        {
            "a": {"chunk_shape": np.array([2, 3]), "chunk_position": (0, True), "global_shape": (2, 6)},
            "b": [],
            "c": {"chunk_shape": (), "global_shape": (), "offset": (), "dtype": [("x", ">f4", (2,))]},
        }
    )
    assert all_of(encode(messages.Hello(1, "s", 0, 1, described, ())))[0].arrays == described  # type: ignore[attr-defined]


def test_every_message_has_a_code() -> None:
    # By name: a dataclass with slots is a second class, and the first one lingers until it is collected.
    assert {cls.__name__ for cls in MESSAGES.values()} == {
        c.__name__ for c in messages.Message.__subclasses__()
    }


@given(st.lists(ANY, max_size=6), st.data())
def test_cut_anywhere_the_stream_is_the_same(sent: list[Message], data: st.DataObject) -> None:
    stream = b"".join(map(encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    buffer = FrameBuffer()
    received = [
        message
        for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for message in buffer.feed(stream[start:stop])
    ]
    assert received == sent


def test_byte_by_byte() -> None:
    sent = [messages.Attach(-2, 1), messages.Progress("waiting"), messages.Notify()]
    buffer = FrameBuffer()
    received = [m for byte in b"".join(map(encode, sent)) for m in buffer.feed(bytes([byte]))]
    assert received == sent


@given(st.binary(max_size=200))
def test_any_bytes_give_messages_or_a_protocol_error(data: bytes) -> None:
    for feed in (data, struct.pack("<I", len(data)) + data):
        try:
            received = all_of(feed)
        except ProtocolError:
            continue
        assert all(isinstance(message, Message) for message in received)


@given(ANY, st.data())
def test_a_damaged_message_gives_a_message_or_a_protocol_error(message: Message, data: st.DataObject) -> None:
    body = bytearray(encode(message)[4:])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(1, len(body)))] if data.draw(st.booleans()) else body
    with contextlib.suppress(ProtocolError):
        decode(bytes(body))


ARRAY = ArrayDescription("a", np.dtype("<f8"), (4,), None, (ChunkDescription((4,), None, (0,)),))
CHUNK = ARRAY.chunks[0]
LIMIT = MemoryLimit(1, "/", 2, 3)
REGION = RegionSpec(3, 0, 4096, 8192, 2, (4, 3), (24, 8), np.dtype("f8"), 8)


def hello(array: ArrayDescription = ARRAY, **change: Any) -> messages.Hello:
    """A Hello with one array, of which something may differ from what is allowed."""
    return messages.Hello(6, "s", 0, 1, (dataclasses.replace(array, **change),), ())


def with_chunk(shape: tuple[int, ...], *place: Any, **change: Any) -> messages.Hello:
    return hello(chunks=(ChunkDescription(shape, *place),), **change)


def with_labels(dims: Any = ("x",), **change: Any) -> messages.Hello:
    """A Hello whose chunk has a coordinate, of which something may differ from what is allowed."""
    coordinate = Coordinate("x", 0, None, None, encode_value(np.arange(4)))
    chunk = dataclasses.replace(CHUNK, coords=(dataclasses.replace(coordinate, **change),))
    return hello(dims=dims, chunks=(chunk,))


def test_the_plain_hello_is_fine() -> None:
    assert all_of(encode(hello())) == [hello()]
    assert all_of(encode(with_labels())) == [with_labels()]
    assert all_of(encode(with_labels(first=3, length=7))) == [with_labels(first=3, length=7)]


@pytest.mark.parametrize(
    "message",
    [
        messages.Close(BridgeStats(-1, 2, 0.0)),
        messages.Close(BridgeStats(1, -2, 0.0)),
        messages.Close(BridgeStats(1, 2, float("nan"))),
        messages.Close(BridgeStats(1, 2, -1.0)),
        messages.Attach(6, -1),
        messages.Follow(6, "d", -1, 0),
        messages.Follow(6, "d", messages.MAX_CALLBACKS + 1, 0),
        messages.Attached("a", "here", float("nan"), ""),
        messages.Journal(-1, "run:node"),
        messages.DeclareDtype("a", np.dtype("f8"), (MemoryLimit(1, "/", 2, -1),)),
        messages.DeclareDtype("a", np.dtype("f8"), (MemoryLimit(1, "x" * 2001, 2, 3),)),
        messages.DeclareDtype("a", np.dtype("f8"), (LIMIT,) * 65),
        messages.Start((-1,), 0, ()),
        messages.Start((), -1, ()),
        messages.Start((), 0, (messages.WantedStream("a", 1, (), 1, -8, 8, 1, 8),)),
        messages.Slots((), (dataclasses.replace(REGION, strides=(8,)),)),
        messages.Slots((), (dataclasses.replace(REGION, itemsize=4),)),
        messages.Slots((), (dataclasses.replace(REGION, base=-1),)),
        with_chunk((0,), None, (0,)),
        with_chunk((4,), None, (1,)),
        with_chunk((4,), None, None),
        with_chunk((4,), (0,), (0,)),
        with_chunk((4,), None, (0, 0)),
        with_chunk((4, 4), None, (0, 0)),
        with_chunk((1,) * 65, None, (0,) * 65, global_shape=(1,) * 65),
        hello(global_shape=None),
        with_chunk((4,), (0,), None, global_shape=None),
        with_chunk((4,), (2,), None, grid=(2,)),
        hello(dims=("x", "y")),
        hello(dims=("time",)),
        hello(attrs={str(n): encode_value(bytes(40_000)) for n in range(2)}),
        with_labels(dims=None),
        with_labels(dims=("y",), name="y", dimension=1),
        with_labels(dimension=-1),
        with_labels(name=""),
        with_labels(name="timestep"),
        with_labels(values=encode_value(np.arange(5))),
        with_labels(values=encode_value(np.zeros((4, 1)))),
        with_labels(values=encode_value([0, 1, 2, 3])),
        with_labels(values=encode_value({"start": 0})),
        with_labels(values=encode_value({"start": 0, "step": "1"})),
        with_labels(first=4, length=7),
        with_labels(first=-1, length=7),
        with_labels(first=0),
        with_labels(length=4),
    ],
    ids=repr,
)
def test_what_makes_no_sense_is_refused(message: Message) -> None:
    with pytest.raises(ProtocolError, match=f"malformed {type(message).__name__}"):
        all_of(encode(message))


def raw(code: int, *fields: bytes) -> bytes:
    """The body of a message, made by hand."""
    return b"".join((struct.pack("<H", code), *fields))


def text(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


@pytest.mark.parametrize(
    "dtype",
    ["O", "|O8", "(,)f8", "f8,,(", "nonsense", "", "<U0", "[]", "[('x',)]", "[('x', '<f8'), ('x', '<f8')]", "3", "[",
     "[('x', '<f8', (4611686018427387904, 4611686018427387904))]", "[__import__('os')]", "[" * 100_000,
     "[('x', " * 12 + "'<f8'" + ")]" * 12, "[(" + "'x', " * 30_000 + ")]"],
    ids=lambda dtype: dtype[:40],
)  # fmt: skip
def test_a_dtype_that_no_chunk_may_have_is_refused(dtype: str) -> None:
    with pytest.raises(ProtocolError, match="malformed DeclareDtype: dtype: "):
        decode(raw(2, text(b"a"), text(dtype.encode()), struct.pack("<I", 0)))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\1",
        raw(0),
        raw(99),
        raw(5),
        raw(5, text(b"why")[:-1]),
        raw(5, text(b"\xff")),
        raw(5, struct.pack("<I", 2**32 - 1)),
        raw(18, struct.pack("<I", 100_001), bytes(8 * 100_001)),
        raw(18, struct.pack("<I", 100_000), bytes(8)),
        raw(4, struct.pack("<I", 10), bytes(10)),
        raw(26, struct.pack("<I", 1), struct.pack("<IH", 2, 99)),
    ],
    ids=repr,
)
def test_bytes_that_are_no_message_are_refused(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(body)


@given(ANY, st.binary(min_size=1, max_size=20))
def test_fields_that_a_later_version_has_added_are_skipped(message: Message, more: bytes) -> None:
    assert decode(encode(message)[4:] + more) == message


def test_fields_that_a_later_version_has_added_to_a_structure_are_skipped() -> None:
    stats = struct.pack("<qqdq", 3, 96, 0.5, 7) + b"more"
    assert decode(raw(4, struct.pack("<I", len(stats)), stats)) == messages.Close(BridgeStats(3, 96, 0.5, 7))


def test_what_was_whole_before_the_garbage_is_still_delivered() -> None:
    feed = FrameBuffer().feed(encode(messages.Notify()) + b"\x01\0\0\0\xc1")
    assert next(feed) == messages.Notify()
    with pytest.raises(ProtocolError):
        next(feed)


def test_too_large_a_message_is_refused_before_it_is_gathered() -> None:
    length = struct.pack("<I", MAX_MESSAGE_BYTES + 1)
    tracemalloc.start()
    try:
        with pytest.raises(
            ProtocolError, match=f"{MAX_MESSAGE_BYTES + 1} bytes was announced, which exceeds the limit"
        ):
            all_of(length)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_too_large_a_message_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="larger than the limit"):
        encode(messages.Progress("x" * (MAX_MESSAGE_BYTES + 1)))
