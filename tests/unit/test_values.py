"""Values of users: what goes in comes out, and nothing else is let in."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from deisa.ray._state.values import MAX_VALUE_DEPTH, MAX_VALUE_ITEMS, decode_value, encode_value
from deisa.ray.errors import UnsupportedValueError
from tests.unit.test_messages import SCALAR_DTYPES

TEXTS = st.text(st.characters(codec="utf-8"), max_size=9)
ARRAYS = st.one_of(
    npst.arrays(npst.floating_dtypes() | npst.integer_dtypes(endianness="?"), npst.array_shapes(min_side=0)),
    npst.arrays(
        npst.datetime64_dtypes() | npst.unicode_string_dtypes(min_len=1), npst.array_shapes(max_dims=1)
    ),
)
PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.complex_numbers(),
    TEXTS,
    st.binary(max_size=9),
    ARRAYS,
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=9
)


def same(one: Any, other: Any) -> bool:
    """Whether two values are of one type and equal, NaNs included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray | np.generic):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other))
    return repr(one) == repr(other)


@given(VALUES)
def test_a_value_comes_out_as_it_went_in(value: Any) -> None:
    assert same(decode_value(encode_value(value)), value)


@given(st.data())
def test_numbers_of_numpy_stay_such(data: st.DataObject) -> None:
    number = data.draw(npst.arrays(data.draw(SCALAR_DTYPES), 1))[0]
    assert same(decode_value(encode_value(number)), number)


def test_what_is_much_the_same_becomes_the_plain_kind() -> None:
    value = {
        "tuple": (1, 2),
        "array": np.array(1.5),
        "order": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "buffer": bytearray(b"x"),
    }
    found = decode_value(encode_value(value))
    assert found["tuple"] == [1, 2] and found["buffer"] == b"x"
    assert type(found["array"]) is np.float64 and found["array"] == 1.5
    assert found["order"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert decode_value(encode_value(np.str_(""))) == ""
    found["order"][0, 0] = 7  # it is the reader's own


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (object(), "object is not supported"),
        ({"a": [1, {2, 3}]}, r"\['a'\]\[1\]: set is not supported"),
        ({1: 2}, "keys must be strings, got 1"),
        (2**63, "exceeds 64 bits"),
        (-(2**63) - 1, "exceeds 64 bits"),
        ("\ud800", "UTF-8"),
        ({"\ud800": 1}, "UTF-8"),
        (np.array([object()]), "dtype object is not supported"),
        (np.ma.masked_array([1, 2], [True, False]), "filled"),
        ([None] * (MAX_VALUE_ITEMS + 1), "use a NumPy array"),
    ],
    ids=lambda given: given if isinstance(given, str) and given.isprintable() else "",
)
def test_what_no_value_can_be_is_refused(value: Any, says: str) -> None:
    with pytest.raises(UnsupportedValueError, match=says):
        encode_value(value)


def test_deep_nesting_is_refused_on_both_sides() -> None:
    value: Any = None
    for _ in range(MAX_VALUE_DEPTH):
        value = [value]
    assert same(decode_value(encode_value(value)), value)
    with pytest.raises(UnsupportedValueError, match="nested"):
        encode_value([value])
    with pytest.raises(ValueError, match="nested"):
        decode_value(b"\x07\x01\x00\x00\x00" * (MAX_VALUE_DEPTH + 1) + b"\x00")


def test_nothing_is_made_of_more_items_than_a_value_may_have() -> None:
    """Each item takes a byte only, and more as an object."""
    half = b"\x07" + struct.pack("<I", MAX_VALUE_ITEMS // 2) + b"\x00" * (MAX_VALUE_ITEMS // 2)
    with pytest.raises(ValueError, match="at most"):
        decode_value(b"\x07\x02\x00\x00\x00" + half + half)


def array_bytes(dtype: bytes, shape: tuple[int, ...], data: bytes) -> bytes:
    lengths = b"".join(struct.pack("<q", length) for length in shape)
    head = b"\x09" + struct.pack("<I", len(dtype)) + dtype + struct.pack("<I", len(shape))
    return head + lengths + struct.pack("<I", len(data)) + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a",
        b"\xff",
        b"\x01\x02",
        b"\x02\x00",
        b"\x00\x00",
        b"\x05\x04\x00\x00\x00\xff\xff\xff\xff",
        b"\x06\xff\xff\xff\xff",
        b"\x07\x01\x00\x00\x00",
        b"\x08\x01\x00\x00\x00\x00\x00\x00\x00",
        array_bytes(b"|O", (1,), bytes(8)),
        array_bytes(b"<f8", (2,), bytes(8)),
        array_bytes(b"<f8", (-1, -1), bytes(8)),
        array_bytes(b"<f8", (0, 2**62, 2**62), b""),
        array_bytes(b"<f8", (1,) * 65, bytes(8)),
        array_bytes(b"no dtype", (1,), bytes(8)),
    ],
    ids=repr,
)
def test_bytes_that_are_no_value_are_refused(data: bytes) -> None:
    with pytest.raises((ValueError, TypeError)):
        decode_value(data)


@given(VALUES, st.data())
def test_whatever_comes_is_read_or_refused(value: Any, data: st.DataObject) -> None:
    encoded = bytearray(encode_value(value))
    for _ in range(data.draw(st.integers(1, 3))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode_value(bytes(encoded))
    except (ValueError, TypeError, SyntaxError):
        return
