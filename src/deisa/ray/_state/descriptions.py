"""What one bridge says of its arrays: chunks by grid position or by offset, with dtypes, halos and labels.

`describe_arrays` checks what one bridge can check by itself; `layout` checks what all of them say together. A rank
imports this module, and pays for all that it imports.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deisa.ray._state.dtypes import shareable
from deisa.ray._state.halos import Halo, read_halo
from deisa.ray._state.labels import LABEL_KEYS, Coordinate, Described, Place, describe_labels
from deisa.ray._state.values import Encoded
from deisa.ray.errors import DescriptionError, DescriptionTypeError

Shape = tuple[int, ...]

ACCEPTED_KEYS = frozenset(
    {
        "global_shape",
        "chunk_shape",
        "chunk_position",
        "nb_chunks_per_dim",
        "nb_chunks_of_node",
        "offset",
        "dtype",
        "halo",
        *LABEL_KEYS,
    }
)
STAYS = {"stays": True}  # metadata of a field that is not part of messages
MAX_DIMENSIONS = 64  # NumPy's


@dataclass(frozen=True, slots=True)
class ChunkDescription:
    """One chunk as its bridge describes it: a shape at a grid position or at an offset, and coordinates.

    The halo concerns nobody but the bridge, and does not travel.
    """

    shape: Shape
    position: Shape | None = None
    offset: Shape | None = None
    coords: tuple[Coordinate, ...] = ()
    halo: Halo | None = field(default=None, metadata=STAYS)


@dataclass(frozen=True, slots=True)
class ArrayDescription:
    """One array as one bridge describes it.

    Attributes
    ----------
    name : str
    dtype : numpy.dtype or None
        None when the bridge learns it with the first ``send``.
    global_shape, grid : tuple of int or None
        Elements and chunks along each dimension, where the bridge says so.
    chunks : tuple of ChunkDescription
        The chunks that this bridge owns, in the order of ``chunk_index``.
    dims : tuple of str or None
        Names of the dimensions, where the bridge says so.
    attrs : dict of str to Encoded
    """

    name: str
    dtype: np.dtype | None
    global_shape: Shape | None
    grid: Shape | None
    chunks: tuple[ChunkDescription, ...]
    dims: tuple[str, ...] | None = None
    attrs: dict[str, Encoded] = field(default_factory=dict)


def describe_arrays(arrays_metadata: Mapping[str, Any]) -> tuple[ArrayDescription, ...]:
    """Check one bridge's ``arrays_metadata`` and turn it into descriptions.

    Parameters
    ----------
    arrays_metadata : mapping
        Array name to a mapping (one chunk) or to a sequence of mappings (any number of chunks).

    Raises
    ------
    DescriptionError
        Naming the array and the key at fault.
    """
    if not isinstance(arrays_metadata, Mapping):
        raise DescriptionTypeError(
            f"arrays_metadata must map array names to descriptions, got {type(arrays_metadata).__name__}"
        )
    return tuple(_describe_array(name, metadata) for name, metadata in arrays_metadata.items())


def _is_utf8(text: str) -> bool:
    return text.encode(errors="ignore").decode() == text


def _describe_array(name: object, metadata: Any) -> ArrayDescription:
    if not isinstance(name, str) or not name:
        kind = DescriptionError if isinstance(name, str) else DescriptionTypeError
        raise kind(f"array names must be non-empty strings, got {name!r}")
    if "\0" in name or not _is_utf8(name):
        raise DescriptionError(f"array names must be UTF-8 without zeros, got {name!r}")
    entries: Sequence[Any] = [metadata] if isinstance(metadata, Mapping) else metadata
    if not isinstance(entries, list | tuple):
        raise DescriptionTypeError(
            f"array {name!r}: describe it by a dict, or by a list of dicts for several chunks; "
            f"got {type(metadata).__name__}"
        )
    parts = [_describe_chunk(name, entry) for entry in entries]
    if not parts:
        return ArrayDescription(name, None, None, None, ())
    first, labels = parts[0], parts[0][4]
    for other in parts[1:]:
        for label, mine, theirs in zip(("dtype", "global_shape", "grid"), first, other, strict=False):
            if mine != theirs:
                raise DescriptionError(
                    f"array {name!r}: two chunks of one bridge disagree on {label}: {mine} and {theirs}"
                )
        labels = labels.joined(name, other[4])
    chunks = tuple(replace(chunk, coords=of_chunk.coords) for _, _, _, chunk, of_chunk in parts)
    return ArrayDescription(name, *first[:3], chunks, labels.dims, labels.attrs)


def _describe_chunk(
    name: str, entry: Any
) -> tuple[np.dtype | None, Shape | None, Shape | None, ChunkDescription, Described]:
    if not isinstance(entry, Mapping):
        raise DescriptionTypeError(
            f"array {name!r}: a chunk is described by a dict, got {type(entry).__name__}"
        )
    unknown = sorted(map(str, entry.keys() - ACCEPTED_KEYS))
    if unknown:
        raise DescriptionError(
            f"array {name!r}: unknown keys {', '.join(unknown)}; known are {', '.join(sorted(ACCEPTED_KEYS))}"
        )
    if "chunk_shape" not in entry:
        raise DescriptionError(f"array {name!r}: 'chunk_shape' is missing")
    shape = _shape(name, "chunk_shape", entry["chunk_shape"], minimum=1)
    rank = len(shape)
    if rank > MAX_DIMENSIONS:
        raise DescriptionError(
            f"array {name!r}: 'chunk_shape' has {rank} dimensions, NumPy's arrays have {MAX_DIMENSIONS} at most"
        )

    def same_rank(key: str, minimum: int) -> Shape | None:
        if entry.get(key) is None:
            return None
        value = _shape(name, key, entry[key], minimum)
        if len(value) != rank:
            raise DescriptionError(
                f"array {name!r}: 'chunk_shape' {shape} has {rank} dimensions, {key!r} {value} has {len(value)}"
            )
        return value

    global_shape = same_rank("global_shape", 1)
    grid = same_rank("nb_chunks_per_dim", 1)
    position = same_rank("chunk_position", 0)
    offset = same_rank("offset", 0)
    if "nb_chunks_of_node" in entry:
        _index(name, "nb_chunks_of_node", entry["nb_chunks_of_node"], minimum=0)
    halo = read_halo(name, entry.get("halo"), shape)
    chunk = ChunkDescription(shape, position, offset, halo=halo)
    check_place(name, chunk, global_shape, grid)
    places = [
        Place(size, *(of[d] if of is not None else None for of in (offset, position, global_shape)))
        for d, size in enumerate(shape)
    ]
    labels = describe_labels(name, entry, places)
    return _dtype(name, entry.get("dtype")), global_shape, grid, chunk, labels


def check_place(name: str, chunk: ChunkDescription, global_shape: Shape | None, grid: Shape | None) -> None:
    """Raise `DescriptionError` where a chunk's place is not said, or lies outside of its array."""
    shape, position, offset = chunk.shape, chunk.position, chunk.offset
    if (position is None) == (offset is None):
        raise DescriptionError(
            f"array {name!r}: say where the chunk lies by either 'chunk_position' or 'offset' "
            f"({'both' if position is not None else 'neither'} given)"
        )
    if offset is not None:
        if global_shape is None:
            raise DescriptionError(f"array {name!r}: 'offset' needs 'global_shape' beside it")
        if any(o + s > g for o, s, g in zip(offset, shape, global_shape, strict=True)):
            raise DescriptionError(
                f"array {name!r}: chunk of shape {shape} at offset {offset} reaches beyond global_shape {global_shape}"
            )
    elif position is not None:
        if grid is None and global_shape is None:
            raise DescriptionError(
                f"array {name!r}: 'chunk_position' needs 'nb_chunks_per_dim' or 'global_shape' beside it"
            )
        if grid is not None and any(p >= n for p, n in zip(position, grid, strict=True)):
            raise DescriptionError(
                f"array {name!r}: chunk_position {position} lies outside nb_chunks_per_dim {grid}"
            )
        if global_shape is not None and any(s > g for s, g in zip(shape, global_shape, strict=True)):
            raise DescriptionError(
                f"array {name!r}: chunk_shape {shape} is larger than global_shape {global_shape}"
            )


def _shape(name: str, key: str, value: Any, minimum: int) -> Shape:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise DescriptionTypeError(f"array {name!r}: {key!r} must be a tuple of integers, got {value!r}")
    return tuple(_index(name, key, item, minimum) for item in value)


def _index(name: str, key: str, value: Any, minimum: int) -> int:
    try:
        number = int(operator.index(value))  # bool is an index, too
    except TypeError as exc:
        raise DescriptionTypeError(f"array {name!r}: {key!r} must hold integers, got {value!r}") from exc
    if number < minimum:
        hint = "; a bridge without a chunk of it leaves the array out" if key == "chunk_shape" else ""
        raise DescriptionError(f"array {name!r}: {key!r} holds {number}, at least {minimum} is needed{hint}")
    return number


def _dtype(name: str, value: Any) -> np.dtype | None:
    if value is None:
        return None
    try:
        dtype = np.dtype(value)
    except (TypeError, ValueError) as exc:
        raise DescriptionError(f"array {name!r}: {value!r} is not a NumPy dtype") from exc
    return shareable(name, dtype)
