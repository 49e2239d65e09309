"""Messages as bytes: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import contextlib
import dataclasses
import struct
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from deisa.ray._state.events import BridgeStats
from deisa.ray._state.layout import ArrayDescription, ChunkDescription, describe_arrays
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
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)

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
def described_arrays(draw: st.DrawFn) -> ArrayDescription:
    """What `describe_arrays` may give."""
    ndim = draw(st.integers(0, 4))
    box = st.tuples(*[st.integers(1, 2**40)] * ndim)
    dtype = draw(st.none() | DTYPES)
    chunks = []
    shape = draw(box)
    by_offset = draw(st.booleans())
    for _ in range(draw(st.integers(0, 3))):
        size = tuple(draw(st.integers(1, n)) for n in shape)
        if by_offset:
            offset = tuple(draw(st.integers(0, n - s)) for n, s in zip(shape, size, strict=True))
            chunks.append(ChunkDescription(size, None, offset))
        else:
            chunks.append(ChunkDescription(size, tuple(draw(st.integers(0, 9)) for _ in range(ndim)), None))
    grid = draw(st.none() | st.just((10,) * ndim)) if not by_offset else None
    return ArrayDescription(draw(NAME), dtype, shape, grid, tuple(chunks))


REGIONS = st.builds(
    RegionSpec,
    **{
        f.name: {"shape": NATURALS, "strides": st.lists(INTEGER, max_size=4).map(tuple), "dtype": DTYPES}.get(
            f.name, NATURAL
        )
        for f in dataclasses.fields(RegionSpec)
    },
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
    "text": TEXT,
    "kind": TEXT,
    "reason": TEXT,
    "agent_id": TEXT,
    "analytics": TEXT,
    "holder": TEXT,
    "quiet_s": SECONDS,
    "sizes": NATURALS,
    "driver_id": TEXT,
    "callbacks": st.integers(0, messages.MAX_CALLBACKS),
}


def strategy(cls: type[Message]) -> st.SearchStrategy[Message]:
    fields = {f.name: FIELDS.get(f.name, NATURAL) for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if cls is messages.Slots:
        fields["regions"] = st.lists(REGIONS, max_size=3).map(tuple)
    if cls is messages.Start:
        wanted = st.builds(messages.WantedArray, NATURALS, *[NATURAL] * 5)
        fields["pages"] = NATURALS
        fields["arrays"] = st.dictionaries(TEXT, wanted, max_size=3)
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
    (learned,) = all_of(encode(messages.Learned("a", dtype, ())))
    assert isinstance(learned, messages.Learned)
    assert learned.dtype == dtype
    assert learned.dtype.itemsize == dtype.itemsize


def test_descriptions_travel_as_a_bridge_makes_them() -> None:
    described = describe_arrays(
        {
            "a": {"chunk_shape": np.array([2, 3]), "chunk_position": (0, True), "global_shape": (2, 6)},
            "b": [],
            "c": {"chunk_shape": (), "global_shape": (), "offset": (), "dtype": [("x", ">f4", (2,))]},
        }
    )
    assert all_of(encode(messages.Hello(1, "s", 0, 1, described, ())))[0].arrays == described  # type: ignore[attr-defined]


def test_codes_are_unique_and_every_field_is_read() -> None:
    # By name: a dataclass with slots is a second class, and the first one lingers until it is collected.
    assert {cls.__name__ for cls in MESSAGES.values()} == {
        c.__name__ for c in messages.Message.__subclasses__()
    }
    for cls in MESSAGES.values():
        for field in dataclasses.fields(cls):  # type: ignore[arg-type]
            assert (cls.__name__, field.name) in messages._READ


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
    sent = [messages.HeldUp(1, -2), messages.Progress("waiting"), messages.Advance(2**63 - 1)]
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


PLAIN = st.recursive(
    st.none() | st.booleans() | INTEGER | st.floats() | TEXT | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=12,
)


@given(st.sampled_from(sorted(MESSAGES)), st.data())
def test_any_fields_give_a_message_or_a_protocol_error(code: int, data: st.DataObject) -> None:
    fields = len(dataclasses.fields(MESSAGES[code]))  # type: ignore[arg-type]
    payload = [code, *(data.draw(PLAIN) for _ in range(fields))]
    with contextlib.suppress(ProtocolError):
        assert type(decode(msgpack.packb(payload))) is MESSAGES[code]


@given(ANY, st.data())
def test_a_damaged_message_gives_a_message_or_a_protocol_error(message: Message, data: st.DataObject) -> None:
    body = bytearray(encode(message)[4:])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(1, len(body)))] if data.draw(st.booleans()) else body
    with contextlib.suppress(ProtocolError):
        decode(bytes(body))


def hello(**change: Any) -> list[Any]:
    """Plain fields of a Hello with one array, of which one chunk differs from what is allowed."""
    chunk = change.pop("chunk", [[4], None, [0]])
    array = {"name": "a", "dtype": "<f8", "global_shape": [4], "grid": None, **change}
    return [1, 1, "s", 0, 1, [[*array.values(), [chunk]]], []]


def test_the_plain_hello_is_fine() -> None:
    assert isinstance(decode(msgpack.packb(hello())), messages.Hello)


@pytest.mark.parametrize(
    "payload",
    [
        [],
        [99],
        ["Hello"],
        {"code": 1},
        None,
        [3, 1],
        [3, 1, 2, 3],
        [3, -1, 0],
        [3, True, 0],
        [3, 1.0, 0],
        [3, 2**63, 0],
        [6, [1, 2, float("nan")]],
        [6, [1, 2, -1.0]],
        [2, "a", "O", []],
        [2, "a", "|O8", []],
        [2, "a", "(,)f8", []],
        [2, "a", "f8,,(", []],
        [2, "a", "nonsense", []],
        [2, "a", "", []],
        [2, "a", "<U0", []],
        [2, "a", [], []],
        [2, "a", [["x"]], []],
        [2, "a", [["x", "<f8"], ["x", "<f8"]], []],
        [2, "a", ["<f8", [2**62, 2**62]], []],
        [2, "a", [[[[["x"]]]]], []],
        [2, b"a", "<f8", []],
        [2, "a", "<f8", [[1, "/", 2]]],
        [2, "a", "<f8", [[1, "/", 2, -1]]],
        [2, "a", "<f8", [[1, "/", 2, 3]] * 65],
        [18, 0, {"a": 3}],
        [18, 0, {"a": [[1], 0]}],
        [18, 0, {"a": [[1], 0, -1]}],
        [18, 0, [["a", [[1], 0, 1]]]],
        [18, {}],
        hello(chunk=[[0], None, [0]]),
        hello(chunk=[[4], None, [1]]),
        hello(chunk=[[4], None, None]),
        hello(chunk=[[4], [0], [0]]),
        hello(chunk=[[4], None, [0, 0]]),
        hello(chunk=[[4, 4], None, [0, 0]]),
        hello(global_shape=None),
        hello(global_shape=None, chunk=[[4], [0], None]),
        hello(grid=[2], chunk=[[4], [2], None]),
    ],
    ids=repr,
)
def test_refused(payload: Any) -> None:
    with pytest.raises(ProtocolError):
        decode(msgpack.packb(payload))


def test_trailing_bytes_are_refused() -> None:
    with pytest.raises(ProtocolError, match="no message"):
        decode(encode(messages.Advance(1))[4:] + b"\0")


def test_what_was_whole_before_the_garbage_is_still_delivered() -> None:
    feed = FrameBuffer().feed(encode(messages.Advance(1)) + b"\x01\0\0\0\xc1")
    assert next(feed) == messages.Advance(1)
    with pytest.raises(ProtocolError):
        next(feed)


def test_too_large_a_message_is_refused_before_it_is_gathered() -> None:
    length = struct.pack("<I", MAX_MESSAGE_BYTES + 1)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=f"{MAX_MESSAGE_BYTES + 1} bytes exceeds the limit"):
            all_of(length)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_too_large_a_message_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="larger than the limit"):
        encode(messages.Progress("x" * (MAX_MESSAGE_BYTES + 1)))


def test_nested_too_deeply() -> None:
    body = b"\x91" * 100_000 + b"\xc0"
    with pytest.raises(ProtocolError):
        decode(body)
    dtype: Any = "<f8"
    for _ in range(12):
        dtype = [["x", dtype]]
    with pytest.raises(ProtocolError, match="nested too deeply"):
        decode(msgpack.packb([2, "a", dtype, []]))
