"""Values of users in messages: attributes of arrays, and what the analytics sets for a simulation to get.

A value says by one byte, its *tag*, what it is, and so does each value inside of it:

===  ============================  ============================================================
tag  value                         bytes that follow, in little-endian order
===  ============================  ============================================================
0    ``None``
1    ``False`` or ``True``         0 or 1 (8 bits)
2    an integer                    64 bits, two's complement
3    a ``float``                   64 bits, IEEE 754
4    a ``complex``                 two of them: real and imaginary part
5    a ``str``                     a count of bytes (32 bits), and as many bytes of UTF-8
6    ``bytes``                     a count (32 bits), and the bytes
7    a list                        a count of items (32 bits), and the items
8    a dict whose keys are texts   a count of pairs (32 bits), and the pairs: a text and an item
9    a NumPy array                 its dtype as a text, its lengths as integers behind a count,
                                   its bytes in C order behind a count
===  ============================  ============================================================

Keys, dtypes, lengths and bytes have no tags of their own. A number of NumPy is an array of no dimensions, and is read
as a number of NumPy again. A tuple becomes a list. Nothing is ever executed or unpickled, and what is read is bounded:
by its bytes, its depth, and its number of items.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from deisa.ray._state.dtypes import dtype_of, dtype_text, shareable
from deisa.ray.errors import DescriptionError, UnsupportedValueError

MAX_VALUE_DEPTH = 32
MAX_VALUE_ITEMS = 100_000  # of all lists and dicts of a value together
MAX_VALUE_DIMENSIONS = 64  # NumPy's

NONE, BOOL, INT, FLOAT, COMPLEX, TEXT, BYTES, LIST, DICT, ARRAY = range(10)
TAGS = {
    "NONE": NONE, "BOOL": BOOL, "INT": INT, "FLOAT": FLOAT, "COMPLEX": COMPLEX, "TEXT": TEXT, "BYTES": BYTES,
    "LIST": LIST, "DICT": DICT, "ARRAY": ARRAY,
}  # fmt: skip

_U8, _U32, _I64, _F64 = map(struct.Struct, ("<B", "<I", "<q", "<d"))
_MOST_BYTES = 2**32 - 1


class Encoded(bytes):
    """The bytes of a value."""


def encode_value(value: Any) -> Encoded:
    """Write a value.

    Raises
    ------
    UnsupportedValueError
        For what no value can be, naming it and the way to it: ``['units'][0]``.
    """
    out = bytearray()
    write_value(out, value)
    return Encoded(out)


def write_value(out: bytearray, value: Any) -> None:
    """Append a value; it raises as `encode_value` does, and then has written some of it."""
    _Writer(out).put(value, "", 0)


class _Writer:
    """Appends one value."""

    def __init__(self, out: bytearray) -> None:
        self._out = out
        self._items = 0

    def put(self, value: Any, where: str, depth: int) -> None:
        out = self._out
        if depth > MAX_VALUE_DEPTH:
            raise UnsupportedValueError(f"a value is nested more than {MAX_VALUE_DEPTH} deep")
        match value:
            case None:
                out += _U8.pack(NONE)
            case np.generic() | np.ndarray():  # before Python's numbers: some of NumPy's are such, too
                out += _U8.pack(ARRAY)
                self._put_array(value, where)
            case bool():
                out += _U8.pack(BOOL) + _U8.pack(value)
            case int():
                if not -(2**63) <= value < 2**63:
                    raise UnsupportedValueError(f"{_at(where)}the integer {value} exceeds 64 bits")
                out += _U8.pack(INT) + _I64.pack(value)
            case float():
                out += _U8.pack(FLOAT) + _F64.pack(value)
            case complex():
                out += _U8.pack(COMPLEX) + _F64.pack(value.real) + _F64.pack(value.imag)
            case str():
                out += _U8.pack(TEXT)
                self._put_text(value, where)
            case bytes() | bytearray() | memoryview():
                out += _U8.pack(BYTES)
                self._put_bytes(bytes(value), where)
            case list() | tuple():
                out += _U8.pack(LIST)
                self._count(len(value))
                for number, item in enumerate(value):
                    self.put(item, f"{where}[{number}]", depth + 1)
            case Mapping():
                out += _U8.pack(DICT)
                self._count(len(value))
                for key, item in value.items():
                    if not isinstance(key, str):
                        raise UnsupportedValueError(f"{_at(where)}keys must be strings, got {key!r:.60}")
                    self._put_text(key, where)
                    self.put(item, f"{where}[{key!r}]", depth + 1)
            case _:
                raise UnsupportedValueError(
                    f"{_at(where)}{type(value).__name__} is not supported; use None, numbers, strings, bytes, NumPy "
                    "arrays, and lists and dicts of these"
                )

    def _count(self, items: int) -> None:
        self._items += items
        if self._items > MAX_VALUE_ITEMS:
            raise UnsupportedValueError(
                f"a value has more than {MAX_VALUE_ITEMS} items in its lists and dicts; use a NumPy array"
            )
        self._out += _U32.pack(items)

    def _put_bytes(self, data: bytes, where: str) -> None:
        if len(data) > _MOST_BYTES:
            raise UnsupportedValueError(f"{_at(where)}{len(data)} bytes are more than {_MOST_BYTES}")
        self._out += _U32.pack(len(data))
        self._out += data

    def _put_text(self, text: str, where: str) -> None:
        try:
            encoded = text.encode()
        except UnicodeEncodeError as exc:
            raise UnsupportedValueError(f"{_at(where)}{text!r:.60} cannot be written in UTF-8") from exc
        self._put_bytes(encoded, where)

    def _put_array(self, value: np.generic | np.ndarray, where: str) -> None:
        if isinstance(value, np.ma.MaskedArray):
            raise UnsupportedValueError(f"{_at(where)}a masked array would lose its mask; use its filled()")
        array = np.asarray(value)
        try:
            dtype = shareable("value", array.dtype)
        except DescriptionError as exc:
            raise UnsupportedValueError(
                f"{_at(where)}an array of dtype {array.dtype} is not supported; use one with a fixed size"
            ) from exc
        self._put_text(dtype_text(dtype), where)
        self._out += _U32.pack(array.ndim)
        for length in array.shape:
            self._out += _I64.pack(length)
        self._put_bytes(np.ascontiguousarray(array, dtype).tobytes(), where)


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def decode_value(data: bytes | memoryview) -> Any:
    """Read a value that takes all of the bytes.

    Raises
    ------
    ValueError, TypeError
        For anything that is not exactly one value.
    """
    value, end = read_value(data)
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes follow the value")
    return value


def read_value(data: bytes | memoryview) -> tuple[Any, int]:
    """Read the value that bytes start with; returns how many it takes as well.

    Raises
    ------
    ValueError, TypeError
    """
    reader = _Reader(memoryview(data))
    return reader.value(0), reader.at


class _Reader:
    """A place in the bytes of one value."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self.at = 0
        self._items = 0

    def value(self, depth: int) -> Any:
        if depth > MAX_VALUE_DEPTH:
            raise ValueError(f"a value is nested more than {MAX_VALUE_DEPTH} deep")
        tag = self._number(_U8)
        if tag == LIST:
            return [self.value(depth + 1) for _ in range(self._count())]
        if tag == DICT:
            return {self._text(): self.value(depth + 1) for _ in range(self._count())}
        read = _READ.get(tag)
        if read is None:
            raise ValueError(f"no value has tag {tag}")
        return read(self)

    def _take(self, nbytes: int) -> memoryview:
        start = self.at
        if nbytes > len(self._data) - start:
            raise ValueError(f"it ends in the middle of a value of {nbytes} bytes")
        self.at = start + nbytes
        return self._data[start : self.at]

    def _number(self, form: struct.Struct) -> Any:
        return form.unpack(self._take(form.size))[0]

    def _count(self) -> int:
        items: int = self._number(_U32)
        self._items += items
        if self._items > MAX_VALUE_ITEMS:
            raise ValueError(f"expected at most {MAX_VALUE_ITEMS} items in a value")
        return items

    def _text(self) -> str:
        return str(self._take(self._number(_U32)), "utf-8")

    def _bool(self) -> bool:
        number = self._number(_U8)
        if number not in (0, 1):
            raise ValueError(f"expected 0 or 1, got {number}")
        return bool(number)

    def _array(self) -> Any:
        dtype = dtype_of(self._text())
        ndim = self._number(_U32)
        if ndim > MAX_VALUE_DIMENSIONS:
            raise ValueError(f"an array has {ndim} dimensions, NumPy {MAX_VALUE_DIMENSIONS} at most")
        shape = tuple(self._number(_I64) for _ in range(ndim))
        data = self._take(self._number(_U32))
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} and dtype {dtype} has {len(data)} bytes")
        array: np.ndarray = np.ndarray(shape, dtype, bytearray(data))
        return array if ndim else array[()]


_READ: dict[int, Callable[[_Reader], Any]] = {
    NONE: lambda reader: None,
    BOOL: _Reader._bool,
    INT: lambda reader: reader._number(_I64),
    FLOAT: lambda reader: reader._number(_F64),
    COMPLEX: lambda reader: complex(reader._number(_F64), reader._number(_F64)),
    TEXT: _Reader._text,
    BYTES: lambda reader: bytes(reader._take(reader._number(_U32))),
    ARRAY: _Reader._array,
}
