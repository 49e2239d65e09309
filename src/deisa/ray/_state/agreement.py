"""What all bridges together say of an array's labels: whether they agree, and what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deisa.ray._state.labels import Coordinate, Shape, even_values
from deisa.ray._state.naming import name_bridges
from deisa.ray._state.values import DICT, Encoded, decode_value
from deisa.ray.errors import DescriptionError, DescriptionMismatchError


@dataclass(frozen=True, eq=False)
class LabelledCoordinate:
    """A coordinate of a whole array along one of its dimensions.

    Attributes
    ----------
    name : str
    dim : str or None
        None where it is of one position, whose dimension the array does not have any more.
    values : numpy.ndarray
        One for each position along the dimension.
    attrs : mapping of str to object
    """

    name: str
    dim: str | None
    values: np.ndarray
    attrs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Labels:
    """The labels of a whole array.

    Attributes
    ----------
    dims : tuple of str or None
        None where no bridge has named the dimensions.
    coords : tuple of LabelledCoordinate
    attrs : mapping of str to object
    """

    dims: tuple[str, ...] | None = None
    coords: tuple[LabelledCoordinate, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)

    def part(self, index: Sequence[slice | int]) -> Labels:
        """Return the labels of a part of the array: for each dimension a slice, or the position that is left of it."""
        if self.dims is None:
            return self
        along = dict(zip(self.dims, index, strict=True))
        kept = tuple(dim for dim in self.dims if isinstance(along[dim], slice))
        coords = []
        for c in self.coords:
            values = c.values if c.dim is None else np.asarray(c.values[along[c.dim]])
            coords.append(LabelledCoordinate(c.name, c.dim if c.dim in kept else None, values, c.attrs))
        return Labels(kept, tuple(coords), self.attrs)


@dataclass(frozen=True, slots=True)
class SaidOfChunk:
    """What a bridge says beside a chunk, and where that lies.

    Attributes
    ----------
    bridge_id : int
    dims : tuple of str or None
    attrs : mapping of str to Encoded
    offset, shape : tuple of int
    coords : tuple of Coordinate
    """

    bridge_id: int
    dims: tuple[str, ...] | None
    attrs: Mapping[str, Encoded]
    offset: Shape
    shape: Shape
    coords: tuple[Coordinate, ...]


def resolve_labels(array: str, said: Sequence[SaidOfChunk], shape: Shape) -> Labels:
    """Join what the bridges say of the labels of an array.

    Raises
    ------
    DescriptionMismatchError
        Where bridges disagree, naming them and what each says.
    DescriptionError
        Where some positions of a coordinate are left unsaid.
    """
    dims = _resolve_dims(array, said)
    attrs = _resolve_attrs(f"array {array!r}", ((s.bridge_id, s.attrs) for s in said))
    by_name: dict[str, list[tuple[SaidOfChunk, Coordinate]]] = {}
    for of_chunk in said:
        for coordinate in of_chunk.coords:
            by_name.setdefault(coordinate.name, []).append((of_chunk, coordinate))
    if dims is None:  # nobody has coordinates either
        return Labels(None, (), attrs)
    order = [name for name in dims if name in by_name] + [name for name in by_name if name not in dims]
    coords = tuple(_resolve_coordinate(array, name, by_name[name], said, dims, shape) for name in order)
    return Labels(dims, coords, attrs)


def _resolve_dims(array: str, said: Sequence[SaidOfChunk]) -> tuple[str, ...] | None:
    by_dims: dict[tuple[str, ...], list[int]] = {}
    for of_chunk in said:
        if of_chunk.dims is not None:
            by_dims.setdefault(of_chunk.dims, []).append(of_chunk.bridge_id)
    if len(by_dims) > 1:
        told = "; ".join(f"{name_bridges(ids)}: {dims}" for dims, ids in by_dims.items())
        raise DescriptionMismatchError(f"array {array!r}: the 'dims' differ between bridges: {told}")
    return next(iter(by_dims), None)


def _resolve_attrs(what: str, said: Iterable[tuple[int, Mapping[str, Encoded]]]) -> dict[str, Any]:
    """Join attributes key by key."""
    found: dict[str, tuple[int, Encoded]] = {}
    for bridge_id, attrs in said:
        for name, value in attrs.items():
            first, known = found.setdefault(name, (bridge_id, value))
            if known != value:
                raise DescriptionMismatchError(
                    f"{what}: the attribute {name!r} differs between bridges: {name_bridges([first])}: "
                    f"{decode_value(known)!r:.200}; {name_bridges([bridge_id])}: {decode_value(value)!r:.200}"
                )
    return {name: decode_value(value) for name, (_, value) in found.items()}


# Coordinates.


@dataclass(frozen=True, slots=True)
class _Part:
    """Values that a bridge gives for some positions."""

    bridge_id: int
    first: int
    values: np.ndarray


def _resolve_coordinate(
    array: str,
    name: str,
    said: Sequence[tuple[SaidOfChunk, Coordinate]],
    chunks: Sequence[SaidOfChunk],
    dims: tuple[str, ...],
    shape: Shape,
) -> LabelledCoordinate:
    what = f"array {array!r}: coordinate {name!r}"
    dimension = said[0][1].dimension
    for of_chunk, coordinate in said:
        if coordinate.dimension != dimension:
            raise DescriptionMismatchError(
                f"{what} lies along different dimensions: {name_bridges([said[0][0].bridge_id])}: {dims[dimension]!r}; "
                f"{name_bridges([of_chunk.bridge_id])}: {dims[coordinate.dimension]!r}"
            )
    dim, length = dims[dimension], shape[dimension]
    attrs = _resolve_attrs(what, ((of_chunk.bridge_id, c.attrs) for of_chunk, c in said))
    parts = _parts(what, dim, said, dimension, length)
    values, owners = _join(f"{what} along {dim!r}", parts, length)
    if np.any(owners < 0):
        raise _gap(what, dim, owners, chunks, dimension)
    values.flags.writeable = False
    return LabelledCoordinate(name, dim, values, attrs)


def _parts(
    what: str, dim: str, said: Sequence[tuple[SaidOfChunk, Coordinate]], dimension: int, length: int
) -> list[_Part]:
    """Return the values that bridges give; the same for the same positions only once."""
    found: dict[tuple[int, Encoded], _Part] = {}
    for of_chunk, coordinate in said:
        bridge_id = of_chunk.bridge_id
        if coordinate.length is not None and coordinate.length != length:
            raise DescriptionMismatchError(
                f"{what}: bridge {bridge_id} gives {coordinate.length} values for the whole array, which has {length} "
                f"elements along {dim!r}; give one for each, or for each element of the bridge's own chunk"
            )
        is_even = coordinate.values[0] == DICT
        first = of_chunk.offset[dimension] if coordinate.first is None else coordinate.first
        key = (0 if is_even else first, coordinate.values)
        if key not in found:
            values = decode_value(coordinate.values)
            try:
                values = even_values(**values, length=length) if is_even else values
            except OverflowError as exc:
                raise DescriptionError(f"{what}: bridge {bridge_id}: {exc}") from exc
            found[key] = _Part(bridge_id, key[0], values)
    return list(found.values())


def _join(what: str, parts: Sequence[_Part], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the values, and for each position which part it is from, or -1."""
    dtype = parts[0].values.dtype
    for part in parts[1:]:
        if _group(part.values.dtype) != _group(dtype):
            raise DescriptionMismatchError(
                f"{what} has values of different kinds: bridge {parts[0].bridge_id}: dtype {parts[0].values.dtype}; "
                f"bridge {part.bridge_id}: dtype {part.values.dtype}"
            )
        dtype = np.result_type(dtype, part.values.dtype)
    values, owners = np.empty(length, dtype), np.full(length, -1)
    for number, part in enumerate(parts):
        place = slice(part.first, part.first + len(part.values))
        mine, theirs = part.values.astype(dtype), values[place]
        differ = (owners[place] >= 0) & ~_same(mine, theirs)
        if np.any(differ):
            at = int(np.argmax(differ))
            other = parts[owners[part.first + at]]
            raise DescriptionMismatchError(
                f"{what} differs between bridges at position {part.first + at}: bridge {other.bridge_id}: "
                f"{_shown(theirs[at])}; bridge {part.bridge_id}: {_shown(mine[at])}"
            )
        values[place] = mine
        owners[place] = np.where(owners[place] < 0, number, owners[place])
    return values, owners


def _group(dtype: np.dtype) -> str:
    """Which dtypes can be joined."""
    return "number" if dtype.kind in "biufc" else dtype.kind


def _same(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether values are equal, not-a-number and not-a-time included."""
    same: np.ndarray = one == other
    return same | ((one != one) & (other != other)) if one.dtype.kind in "fcmM" else same


def _shown(value: Any) -> str:
    return str(value) if value.dtype.kind in "mM" else repr(value.item())


def _gap(
    what: str, dim: str, owners: np.ndarray, chunks: Sequence[SaidOfChunk], dimension: int
) -> DescriptionError:
    unsaid = np.flatnonzero(owners < 0)
    first = int(unsaid[0])
    said_later = np.flatnonzero(owners[first:] >= 0)
    last = first + int(said_later[0]) - 1 if len(said_later) else len(owners) - 1
    there = [
        s.bridge_id
        for s in chunks
        if s.offset[dimension] <= last and s.offset[dimension] + s.shape[dimension] > first
    ]
    return DescriptionError(
        f"{what}: no bridge gives the values at positions {first} to {last} of {len(owners)} along "
        f"{dim!r}, where {name_bridges(there)} {'has a chunk' if len(set(there)) == 1 else 'have chunks'}; have every "
        "bridge give those of its own chunk, or have the one with the first chunk give those of the whole array, or "
        "{'start': ..., 'step': ...}"
    )
