"""How messages become bytes: dataclasses whose fields have plain types, in little-endian order without padding.

================  =======================================================================
type              bytes
================  =======================================================================
``int``           64 bits, two's complement
``float``         64 bits, IEEE 754
``str``           a count of bytes (32 bits), and as many bytes of UTF-8
``bytes``         a count (32 bits), and the bytes
``X | None``      0 (8 bits); or 1 (8 bits) and X
``tuple[X, ...]`` a count of items (32 bits), and the items
``dict[K, V]``    a count of pairs (32 bits), and the pairs
dataclass         a count of bytes (32 bits), and the fields in as many bytes
union             as a dataclass, with its number (16 bits) before the fields
``numpy.dtype``   a ``str``: what the header of a ``.npy`` file says of it (`dtype_text`)
``Any``           a user's value, which says itself what it is (`values`)
``Encoded``       the same, whose bytes are wanted
================  =======================================================================

A field whose metadata say that it stays is left out. A reader skips bytes that follow the fields it knows, so that
later versions can add fields.
Nothing that is received is ever executed or unpickled, and every value is checked when it is read.
"""

from __future__ import annotations

import dataclasses
import struct
import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from deisa.ray._state.dtypes import dtype_of, dtype_text
from deisa.ray._state.values import Encoded, read_value, write_value

MAX_ITEMS = 100_000
_U8, _U16, _U32, _I64, _F64 = map(struct.Struct, ("<B", "<H", "<I", "<q", "<d"))

Natural = Annotated[int, "natural"]  # at least 0

Write = Callable[[bytearray, Any], None]
_checks: dict[type, Callable[[Any], None]] = {}


def check_when_read(kind: type, check: Callable[[Any], None]) -> None:
    """Have `check` raise `ValueError` for values of a dataclass that make no sense, whenever one has been read."""
    _checks[kind] = check


class Reader:
    """A place in received bytes; every method moves it on.

    Raises
    ------
    ValueError
        Where the bytes end before the value does.
    """

    __slots__ = ("_at", "_data", "_end")

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = memoryview(data)
        self._at, self._end = 0, len(self._data)

    def _next(self, nbytes: int) -> memoryview:
        start = self._at
        if nbytes > self._end - start:
            raise ValueError(f"it ends in the middle of a value of {nbytes} bytes")
        self._at = start + nbytes
        return self._data[start : self._at]

    def number(self, form: struct.Struct) -> Any:
        """Read a number."""
        return form.unpack(self._next(form.size))[0]

    def count(self) -> int:
        """Read how many items follow."""
        items: int = self.number(_U32)
        if items > MAX_ITEMS:
            raise ValueError(f"expected at most {MAX_ITEMS} items, got {items}")
        return items

    def text(self) -> str:
        """Read a text."""
        return str(self._next(self.number(_U32)), "utf-8")

    def raw(self) -> bytes:
        """Read bytes behind their count."""
        return bytes(self._next(self.number(_U32)))

    def value(self) -> Any:
        """Read a user's value."""
        value, nbytes = read_value(self._data[self._at : self._end])
        self._at += nbytes
        return value

    def encoded(self) -> Encoded:
        """Read a user's value, and leave it as it is."""
        start = self._at
        self.value()
        return Encoded(self._data[start : self._at])

    def part(self) -> Reader:
        """Read a part that says how long it is; what is not read of it is skipped."""
        return Reader(self._next(self.number(_U32)))


Read = Callable[[Reader], Any]


def _write_text(out: bytearray, value: str) -> None:
    encoded = value.encode("utf-8", "replace")
    out += _U32.pack(len(encoded))
    out += encoded


def _write_bytes(out: bytearray, value: bytes) -> None:
    out += _U32.pack(len(value))
    out += value


def _write_part(out: bytearray, fields: Callable[[bytearray], None]) -> None:
    start = len(out)
    out += bytes(_U32.size)
    fields(out)
    _U32.pack_into(out, start, len(out) - start - _U32.size)


def _natural(reader: Reader) -> int:
    value: int = reader.number(_I64)
    if value < 0:
        raise ValueError(f"expected a number of at least 0, got {value}")
    return value


@cache
def _codec(kind: Any) -> tuple[Write, Read]:
    """Return how values of a type are written and read."""
    if kind is int:
        return lambda out, value: out.extend(_I64.pack(value)), lambda reader: reader.number(_I64)
    if kind == Natural:
        return lambda out, value: out.extend(_I64.pack(value)), _natural
    if kind is float:
        return lambda out, value: out.extend(_F64.pack(value)), lambda reader: reader.number(_F64)
    if kind is str:
        return _write_text, Reader.text
    if kind is bytes:
        return _write_bytes, Reader.raw
    if kind is Any:
        return write_value, Reader.value
    if kind is Encoded:
        return lambda out, value: out.extend(value), Reader.encoded
    if kind is np.dtype:
        return (
            lambda out, value: _write_text(out, dtype_text(value)),
            lambda reader: dtype_of(reader.text()),
        )
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return (
            lambda out, value: _write_part(out, lambda part: write_fields(part, value)),
            lambda reader: read_fields(kind, reader.part()),
        )
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType) and type(None) in arguments:
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return _optional(*_codec(inner))
    if origin is tuple:
        return _sequence(*_codec(arguments[0]))
    if origin is dict:
        return _mapping(*_codec(arguments[0]), *_codec(arguments[1]))
    if origin is Annotated:
        return _numbered(arguments[1])
    raise TypeError(f"no message can have a field of type {kind}")


def _optional(write: Write, read: Read) -> tuple[Write, Read]:
    def write_optional(out: bytearray, value: Any) -> None:
        out += _U8.pack(value is not None)
        if value is not None:
            write(out, value)

    def read_optional(reader: Reader) -> Any:
        there = reader.number(_U8)
        if there not in (0, 1):
            raise ValueError(f"expected 0 or 1, got {there}")
        return read(reader) if there else None

    return write_optional, read_optional


def _sequence(write: Write, read: Read) -> tuple[Write, Read]:
    def write_items(out: bytearray, value: Any) -> None:
        out += _U32.pack(len(value))
        for item in value:
            write(out, item)

    return write_items, lambda reader: tuple(read(reader) for _ in range(reader.count()))


def _mapping(write_key: Write, read_key: Read, write: Write, read: Read) -> tuple[Write, Read]:
    def write_pairs(out: bytearray, value: Any) -> None:
        out += _U32.pack(len(value))
        for key, item in value.items():
            write_key(out, key)
            write(out, item)

    return write_pairs, lambda reader: {read_key(reader): read(reader) for _ in range(reader.count())}


def _numbered(numbers: Any) -> tuple[Write, Read]:
    def write_numbered(out: bytearray, value: Any) -> None:
        def fields(part: bytearray) -> None:
            part += _U16.pack(numbers.of[type(value)])
            write_fields(part, value)

        _write_part(out, fields)

    def read_numbered(reader: Reader) -> Any:
        part = reader.part()
        number = part.number(_U16)
        kind = numbers.kinds.get(number)
        if kind is None:
            raise ValueError(f"nothing has number {number} here")
        return read_fields(kind, part)

    return write_numbered, read_numbered


class Numbers:
    """The numbers of the dataclasses in a union, as the second argument of `Annotated`."""

    def __init__(self, kinds: Mapping[int, type]) -> None:
        self.kinds = dict(kinds)
        self.of = {kind: number for number, kind in self.kinds.items()}


@cache
def fields_of(kind: type) -> Mapping[str, Any]:
    """Return the types of those of a dataclass's fields that travel, in order."""
    hints = get_type_hints(kind, include_extras=True)
    travelling = [field.name for field in dataclasses.fields(kind) if "stays" not in field.metadata]
    return {name: hints[name] for name in travelling}


def write_fields(out: bytearray, value: Any) -> None:
    """Append the fields of a dataclass."""
    for name, kind in fields_of(value.__class__).items():
        _codec(kind)[0](out, getattr(value, name))


def read_fields(kind: type, reader: Reader) -> Any:
    """Read a dataclass.

    Raises
    ------
    ValueError, TypeError
        Naming the field.
    """
    values = {}
    for name, field_kind in fields_of(kind).items():
        try:
            values[name] = _codec(field_kind)[1](reader)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as exc:
            raise ValueError(f"{name}: {exc}") from exc
    value = kind(**values)
    if kind in _checks:
        _checks[kind](value)
    return value
