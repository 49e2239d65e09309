"""Labels of an array, as one bridge says them: names of dimensions, coordinates along them, attributes.

A bridge may say nothing, or only some of it: `agreement` joins what all of them say. Attributes and values stay as
bytes until then, which are the same where the values are. Of a coordinate of the whole array only the bridge of the
first chunk passes on all, for those that give none. The others pass on the part of their chunk, which has to agree
with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from deisa.ray._state.values import Encoded, decode_value, encode_value
from deisa.ray.errors import DescriptionError, UnsupportedValueError

Shape = tuple[int, ...]

LABEL_KEYS = frozenset({"dims", "coords", "attrs"})
RESERVED = ("time", "timestep")  # the coordinates that every timestep has
MAX_ATTRS_BYTES = 64 * 1024
MAX_COORDS_BYTES = 8 * 2**20
_KINDS = "biufcmMSU"


@dataclass(frozen=True, slots=True)
class Coordinate:
    """What a bridge says of a coordinate along one dimension, beside one of its chunks.

    Attributes
    ----------
    name : str
    dimension : int
    first : int or None
        The position in the whole array of the first of the values; None where they are those of the chunk.
    length : int or None
        How many values the whole array has, where the bridge was given all.
    values : Encoded
        An array of one dimension; or a dict of ``start`` and ``step``, for all positions of the whole array.
    attrs : dict of str to Encoded
    """

    name: str
    dimension: int
    first: int | None
    length: int | None
    values: Encoded
    attrs: dict[str, Encoded] = field(default_factory=dict)


def plain_coordinate(said: Coordinate) -> tuple[Any, ...]:
    """Write a coordinate as the client takes it."""
    place = said.first or 0, said.length or 0
    return said.name, said.dimension, *place, said.values, tuple(said.attrs.items())


class Described(NamedTuple):
    """The labels that a bridge gives beside one chunk."""

    dims: tuple[str, ...] | None
    attrs: dict[str, Encoded]
    coords: tuple[Coordinate, ...]

    def joined(self, array: str, other: Described) -> Described:
        """Return what holds for both of two chunks of a bridge; coordinates are each one's own.

        Raises
        ------
        DescriptionError
            Where they disagree.
        """
        both = f"array {array!r}: two chunks of one bridge disagree on"
        if None not in (self.dims, other.dims) and self.dims != other.dims:
            raise DescriptionError(f"{both} 'dims': {self.dims} and {other.dims}")
        for name, value in other.attrs.items():
            known = self.attrs.get(name, value)
            if known != value:
                raise DescriptionError(
                    f"{both} the attribute {name!r}: {decode_value(known)!r:.200} and {decode_value(value)!r:.200}"
                )
        return Described(self.dims or other.dims, {**self.attrs, **other.attrs}, ())


class Place(NamedTuple):
    """What a bridge knows of where a chunk lies along one dimension.

    Attributes
    ----------
    size : int
    offset, position : int or None
        One of them is given: in elements, or in chunks.
    length : int or None
        Of the whole array, where it is said.
    """

    size: int
    offset: int | None
    position: int | None
    length: int | None

    @property
    def is_first(self) -> bool:
        """Whether the chunk lies at the beginning."""
        return 0 in (self.offset, self.position)

    def offset_in(self, length: int) -> int:
        """Where the chunk starts in an array of so many elements; of a position, where it would with equal chunks."""
        if self.offset is not None:
            return self.offset
        return min((self.position or 0) * self.size, length - self.size)


def describe_labels(array: str, entry: Mapping[str, Any], places: Sequence[Place]) -> Described:
    """Check the labels in one description of a chunk.

    Parameters
    ----------
    array : str
    entry : mapping
        With ``dims``, ``coords`` and ``attrs``, where they are given.
    places : sequence of Place
        Of the chunk, for each dimension.

    Raises
    ------
    DescriptionError
        Naming the array and the label at fault.
    """
    dims = _dims(array, entry.get("dims"), len(places))
    attrs = _attrs(f"array {array!r}: 'attrs'", entry.get("attrs"))
    coords = entry.get("coords")
    if coords is None:
        return Described(dims, attrs, ())
    if not isinstance(coords, Mapping):
        raise DescriptionError(
            f"array {array!r}: 'coords' must map names to values, got {type(coords).__name__}"
        )
    if dims is None:
        raise DescriptionError(
            f"array {array!r}: 'coords' needs 'dims' beside it, the names of the dimensions"
        )
    found = tuple(_coordinate(array, name, given, dims, places) for name, given in coords.items())
    nbytes = sum(len(coordinate.values) for coordinate in found)
    if nbytes > MAX_COORDS_BYTES:
        raise DescriptionError(
            f"array {array!r}: the coordinates take {nbytes} bytes, at most {MAX_COORDS_BYTES} are passed on; give "
            "those with equal steps as {'start': ..., 'step': ...}"
        )
    return Described(dims, attrs, found)


def _check_name(what: str, name: Any) -> str:
    if not isinstance(name, str) or not name or "\0" in name or name.encode(errors="ignore").decode() != name:
        raise DescriptionError(f"{what} must be non-empty strings of UTF-8 without zeros, got {name!r:.60}")
    return name


def _check_not_reserved(what: str, name: str) -> str:
    if name in RESERVED:
        raise DescriptionError(
            f"{what} cannot be called {name!r}: the analytics has the timestep and the physical time under these names"
        )
    return name


def _dims(array: str, given: Any, ndim: int) -> tuple[str, ...] | None:
    if given is None:
        return None
    what = f"array {array!r}: 'dims'"
    names = [given] if isinstance(given, str) and ndim == 1 else given
    if not isinstance(names, list | tuple):
        raise DescriptionError(f"{what} must be a list of names, got {given!r:.60}")
    dims = tuple(_check_not_reserved(what, _check_name(what, name)) for name in names)
    if len(dims) != ndim:
        raise DescriptionError(f"{what} {dims} has {len(dims)} names, 'chunk_shape' has {ndim} dimensions")
    if len(set(dims)) < ndim:
        raise DescriptionError(f"{what} {dims} names two dimensions alike")
    return dims


def _attrs(what: str, given: Any) -> dict[str, Encoded]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise DescriptionError(f"{what} must map names to values, got {type(given).__name__}")
    attrs = {}
    for name, value in given.items():
        _check_name(f"{what}: names", name)
        try:
            attrs[name] = encode_value(value)
        except UnsupportedValueError as exc:
            raise DescriptionError(f"{what}: {name!r}: {exc}") from exc
    nbytes = sum(map(len, attrs.values()))
    if nbytes > MAX_ATTRS_BYTES:
        raise DescriptionError(
            f"{what} take {nbytes} bytes, at most {MAX_ATTRS_BYTES} are passed on; send what is large as an array"
        )
    return attrs


def check_labels(
    dims: tuple[str, ...] | None, coords: Sequence[Coordinate], attrs: Mapping[str, Encoded], shape: Shape
) -> None:
    """Check the labels beside a chunk of some shape that a client in another language may have written.

    Raises
    ------
    DescriptionError
    """
    _dims("", dims, len(shape))
    if sum(map(len, attrs.values())) > MAX_ATTRS_BYTES:
        raise DescriptionError(f"attributes take more than {MAX_ATTRS_BYTES} bytes")
    if coords and dims is None:
        raise DescriptionError("coordinates need names of the dimensions")
    for coordinate in coords:
        what = f"coordinate {coordinate.name!r:.60}"
        _check_not_reserved("a coordinate", _check_name("names of coordinates", coordinate.name))
        if not 0 <= coordinate.dimension < len(shape):
            raise DescriptionError(f"{what}: there is no dimension {coordinate.dimension}")
        if dims is not None and coordinate.name in dims and dims[coordinate.dimension] != coordinate.name:
            raise DescriptionError(f"{what} has the name of another dimension than its own")
        given = decode_value(coordinate.values)
        if isinstance(given, dict):
            _even(what, given)
            continue
        if not isinstance(given, np.ndarray):
            raise DescriptionError(f"{what}: values are an array, or 'start' and 'step'")
        count = len(_values(what, given))
        first, length = coordinate.first, coordinate.length
        if first is None and length is None:
            fits = count == shape[coordinate.dimension]
        else:
            fits = first is not None and length is not None and 0 <= first <= first + count <= length
        if not fits:
            raise DescriptionError(f"{what}: {count} values do not fit their place")


# Coordinates.


def _coordinate(
    array: str, name: Any, given: Any, dims: tuple[str, ...], places: Sequence[Place]
) -> Coordinate:
    _check_not_reserved(
        f"array {array!r}: a coordinate", _check_name(f"array {array!r}: names of coordinates", name)
    )
    what = f"array {array!r}: coordinate {name!r}"
    along, values, attrs = _parts(what, name, given, dims)
    dimension = dims.index(along)
    encoded_attrs = _attrs(f"{what}: attributes", attrs)
    if isinstance(values, Mapping):
        encoded = encode_value(_even(what, values))
        return Coordinate(name, dimension, None, None, encoded, encoded_attrs)
    one_d = _values(what, values)
    is_origin = all(place.is_first for place in places)
    first, length, own = _cut(what, along, one_d, places[dimension], is_origin)
    return Coordinate(name, dimension, first, length, encode_value(own), encoded_attrs)


def _parts(what: str, name: str, given: Any, dims: tuple[str, ...]) -> tuple[str, Any, Any]:
    """Return the dimension along which a coordinate lies, its values, and its attributes."""
    if not (isinstance(given, tuple) and given and isinstance(given[0], str | tuple | list)):
        if name not in dims:
            raise DescriptionError(
                f"{what}: no dimension has this name, the dimensions are {', '.join(map(repr, dims))}; along another "
                f"one, give (dimension, values), as in {name!r}: ({(*dims, 'x')[0]!r}, values)"
            )
        return name, given, None
    along, *rest = given
    along = along[0] if not isinstance(along, str) and len(along) == 1 else along
    if not isinstance(along, str):
        raise DescriptionError(
            f"{what}: a coordinate lies along one dimension, got {given[0]!r:.60}; send one of several dimensions as "
            "an array of its own"
        )
    if along not in dims:
        raise DescriptionError(
            f"{what}: there is no dimension {along!r}, the dimensions are {', '.join(map(repr, dims))}; give values "
            "that are strings as a list"
        )
    if name in dims and name != along:
        raise DescriptionError(
            f"{what}: a coordinate with the name of a dimension lies along it, not along {along!r}"
        )
    if len(rest) not in (1, 2):
        raise DescriptionError(f"{what}: give (dimension, values) or (dimension, values, attributes)")
    return along, rest[0], rest[1] if len(rest) == 2 else None


def _values(what: str, given: Any) -> np.ndarray:
    if isinstance(given, np.ma.MaskedArray):
        raise DescriptionError(f"{what}: a masked array would lose its mask; give its filled()")
    try:
        values = np.asarray(given)
    except (TypeError, ValueError) as exc:
        raise DescriptionError(f"{what}: {given!r:.60} is no array of values: {exc}") from exc
    if values.dtype.kind not in _KINDS or values.dtype.names is not None:
        hint = ', for dates with np.array(..., dtype="datetime64[ns]")' if values.dtype.kind == "O" else ""
        raise DescriptionError(
            f"{what}: values must be numbers, datetime64, timedelta64 or strings of fixed width{hint}; got dtype "
            f"{values.dtype}"
        )
    if values.ndim != 1:
        raise DescriptionError(
            f"{what}: values must have one dimension, got shape {values.shape}; what is the same everywhere is an "
            "attribute, and a coordinate of several dimensions is an array of its own"
        )
    return values


def _cut(
    what: str, dim: str, values: np.ndarray, place: Place, is_origin: bool
) -> tuple[int | None, int | None, np.ndarray]:
    """Return the part of a coordinate to pass on: where it starts, the length of the whole, and the values."""
    count, size = len(values), place.size
    if count == place.length if place.length is not None else count > size:
        if is_origin and values.nbytes <= MAX_COORDS_BYTES:
            return 0, count, values
        first = place.offset_in(count)
        return first, count, values[first : first + size]
    if count == size:
        return None, None, values
    whole = f", and the whole array {place.length}" if place.length is not None else ""
    raise DescriptionError(
        f"{what} has {count} values; the chunk has {size} elements along {dim!r}{whole}: give one for each of either"
    )


def _even(what: str, given: Mapping[Any, Any]) -> dict[str, Any]:
    if set(given) != {"start", "step"}:
        raise DescriptionError(
            f"{what}: equal steps are given as {{'start': ..., 'step': ...}}, got the keys "
            f"{', '.join(map(repr, given))}"
        )
    start, step = given["start"], given["step"]
    for key, number in given.items():
        kind = np.asarray(number).dtype.kind if np.ndim(number) == 0 else "O"
        if kind not in "iufmM" or (kind == "f" and not math.isfinite(number)):
            raise DescriptionError(f"{what}: {key!r} must be a finite number, got {number!r:.60}")
    try:
        even_values(start, step, 2)
    except (TypeError, ValueError, OverflowError) as exc:
        raise DescriptionError(
            f"{what}: {step!r} cannot be added to {start!r} again and again: {exc}"
        ) from exc
    return {"start": start, "step": step}


def even_values(start: Any, step: Any, length: int) -> np.ndarray:
    """Return ``start + step * index`` for each of so many elements.

    Raises
    ------
    OverflowError
        Where the last one is too large for its dtype.
    """
    with np.errstate(all="ignore"):
        values: np.ndarray = np.asarray(start + step * np.arange(length))
    if values.dtype.kind == "f":
        exceeds = not np.all(np.isfinite(values[-1:]))
    else:
        one = np.asarray(step)
        if values.dtype.kind in "mM":  # in the unit of the values
            one = one.astype(np.dtype(f"m8[{np.datetime_data(values.dtype)[0]}]")).astype(np.int64)
        exact = values.view(np.int64) if values.dtype.kind in "mM" else values
        exceeds = int(exact[0]) + int(one) * (length - 1) != int(exact[-1])
    if exceeds:
        raise OverflowError(f"{start} + {step} * {length - 1} is too large")
    return values
