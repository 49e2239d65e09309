"""What an array is: boxes that tile a global shape, and the ways to say so.

Each bridge describes its chunks by grid position (rows and columns of the grid must line up,
their sizes may differ) or by offset. `describe_arrays` checks what one bridge can check by itself;
`resolve_layout` checks the whole and turns positions into offsets.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deisa.ray._state.agreement import Labels, SaidOfChunk, resolve_labels
from deisa.ray._state.dtypes import shareable
from deisa.ray._state.halos import Halo, read_halo
from deisa.ray._state.labels import LABEL_KEYS, Coordinate, Described, Place, describe_labels
from deisa.ray._state.naming import SHOWN_CULPRITS, name_bridges
from deisa.ray._state.values import Encoded
from deisa.ray.errors import (
    BridgeIdError,
    DescriptionError,
    DescriptionMismatchError,
    DescriptionTypeError,
    HoleError,
    LayoutError,
    OverlapError,
    WorldSizeError,
)

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
MAX_CELLS = 10_000_000
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


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of an array, owned by one bridge; `index` counts within that bridge's chunks.

    Where only a part of the bridge's chunk is meant, `start` says where that begins; None is its first element.
    """

    bridge_id: int
    index: int
    offset: Shape
    shape: Shape
    start: Shape | None = None


@dataclass(frozen=True)
class ArrayLayout:
    """A whole array: every chunk, and the grid of cells that Dask will see.

    Where the chunks form a grid, a cell is a chunk; where they do not, a cell is the part
    of one chunk between two neighbouring cuts of each dimension.

    Attributes
    ----------
    shape : tuple of int
        Elements along each dimension.
    chunks : tuple of Chunk
    cuts : tuple of tuple of int
        Sizes of the cells along each dimension, as in ``dask.array.Array.chunks``.
    cells : numpy.ndarray of int32
        For each cell of the grid, the position in `chunks` of the chunk that holds it.
    labels : Labels
        Names of dimensions, coordinates and attributes.
    """

    name: str
    dtype: np.dtype | None
    shape: Shape
    chunks: tuple[Chunk, ...]
    cuts: tuple[tuple[int, ...], ...]
    cells: np.ndarray = field(repr=False)
    labels: Labels = field(default_factory=Labels, repr=False)


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


def check_bridge_ids(bridges: Sequence[tuple[int, int]]) -> None:
    """Check ``(bridge_id, world_size)`` pairs of the bridges that have registered so far.

    Raises
    ------
    WorldSizeError
        When the bridges announce different world sizes.
    BridgeIdError
        When an id is taken twice or lies outside ``0 .. world_size - 1``.
    """
    by_size: dict[int, list[int]] = defaultdict(list)
    for bridge_id, world_size in bridges:
        by_size[world_size].append(bridge_id)
    if len(by_size) > 1:
        said = "; ".join(f"{name_bridges(ids)} said {size}" for size, ids in sorted(by_size.items()))
        raise WorldSizeError(f"bridges disagree on world_size: {said}")
    for world_size, ids in by_size.items():
        duplicates = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
        if duplicates:
            raise BridgeIdError(
                f"bridge_id {duplicates[0]} was registered {ids.count(duplicates[0])} times; "
                "every Bridge needs an id of its own (usually the rank)"
            )
        outside = sorted(i for i in ids if not 0 <= i < world_size)
        if outside:
            raise BridgeIdError(
                f"bridge_id {outside[0]} lies outside 0..{world_size - 1} (world_size is {world_size})"
            )


def resolve_layout(
    registrations: Mapping[int, Sequence[ArrayDescription]],
) -> dict[str, ArrayLayout]:
    """Check that the descriptions of all bridges make whole arrays, and place every chunk.

    Parameters
    ----------
    registrations : mapping of int to sequence of ArrayDescription
        What each bridge announced, by bridge id.

    Raises
    ------
    LayoutError
        `DescriptionMismatchError`, `OverlapError` or `HoleError`, naming bridges and positions.
    """
    by_array: dict[str, list[tuple[int, ArrayDescription]]] = defaultdict(list)
    for bridge_id in sorted(registrations):
        for description in registrations[bridge_id]:
            if description.chunks:
                by_array[description.name].append((bridge_id, description))
    return {name: _resolve_array(name, described) for name, described in by_array.items()}


def _resolve_array(name: str, described: Sequence[tuple[int, ArrayDescription]]) -> ArrayLayout:
    dtype = _agreed(name, "dtype", [(b, d.dtype) for b, d in described])
    global_shape = _agreed(name, "global_shape", [(b, d.global_shape) for b, d in described])
    grid = _agreed(name, "nb_chunks_per_dim", [(b, d.grid) for b, d in described])
    _agreed(name, "number of dimensions", [(b, len(d.chunks[0].shape)) for b, d in described])
    _agreed(
        name,
        "way to place chunks (chunk_position or offset)",
        [
            (b, "chunk_position" if c.position is not None else "offset")
            for b, d in described
            for c in d.chunks
        ],
    )
    owned = [(b, i, c) for b, d in described for i, c in enumerate(d.chunks)]
    if owned[0][2].position is not None:
        layout = _from_positions(name, dtype, global_shape, grid, owned)
    else:
        layout = _from_offsets(name, dtype, global_shape, owned)
    by_bridge = dict(described)
    said = [
        SaidOfChunk(b, by_bridge[b].dims, by_bridge[b].attrs, chunk.offset, chunk.shape, c.coords)
        for (b, _, c), chunk in zip(owned, layout.chunks, strict=True)
    ]
    return replace(layout, labels=resolve_labels(name, said, layout.shape))


def _agreed(name: str, what: str, said: Sequence[tuple[int, Any]]) -> Any:
    values: dict[Any, list[int]] = defaultdict(list)
    for bridge_id, value in said:
        values[value].append(bridge_id)
    if len(values) > 1:
        told = "; ".join(f"{name_bridges(ids)}: {value}" for value, ids in values.items())
        raise DescriptionMismatchError(f"array {name!r}: the {what} differs between bridges: {told}")
    return next(iter(values))


_Owned = tuple[int, int, ChunkDescription]


def _from_positions(
    name: str, dtype: np.dtype | None, global_shape: Shape | None, grid: Shape | None, owned: Sequence[_Owned]
) -> ArrayLayout:
    rank = len(owned[0][2].shape)
    positions = [c.position or () for _, _, c in owned]
    if grid is None:
        grid = tuple(max(p[d] for p in positions) + 1 for d in range(rank))
    owner_at: dict[Shape, int] = {}
    for (bridge_id, _, _), position in zip(owned, positions, strict=True):
        if position in owner_at:
            raise OverlapError(
                f"array {name!r}: chunk position {position} belongs to both bridge {owner_at[position]} "
                f"and bridge {bridge_id}"
            )
        owner_at[position] = bridge_id
    count = math.prod(grid)
    if len(owner_at) != count:
        absent = list(itertools.islice((p for p in _positions(grid) if p not in owner_at), SHOWN_CULPRITS))
        raise HoleError(
            f"array {name!r}: no bridge owns chunk position{'s' if count - len(owner_at) > 1 else ''} "
            f"{', '.join(map(str, absent))}"
            f"{' ...' if count - len(owner_at) > len(absent) else ''} of grid {grid}: "
            f"{len(owner_at)} of {count} chunks are described"
        )
    sizes: list[list[int]] = [[0] * n for n in grid]
    first_at: list[dict[int, int]] = [{} for _ in grid]
    for (bridge_id, _, chunk), position in zip(owned, positions, strict=True):
        for d in range(rank):
            known = sizes[d][position[d]]
            if known and known != chunk.shape[d]:
                raise DescriptionMismatchError(
                    f"array {name!r}: chunks at index {position[d]} of dimension {d} must have one size there: "
                    f"bridge {first_at[d][position[d]]} says {known}, bridge {bridge_id} says {chunk.shape[d]}"
                )
            sizes[d][position[d]] = chunk.shape[d]
            first_at[d].setdefault(position[d], bridge_id)
    shape = tuple(sum(s) for s in sizes)
    if global_shape is not None and shape != global_shape:
        raise (HoleError if any(s < g for s, g in zip(shape, global_shape, strict=True)) else OverlapError)(
            f"array {name!r}: the chunks make an array of shape {shape}, global_shape is {global_shape}"
        )
    starts = [list(itertools.accumulate(s, initial=0)) for s in sizes]
    chunks = tuple(
        Chunk(bridge_id, index, tuple(starts[d][position[d]] for d in range(rank)), chunk.shape)
        for (bridge_id, index, chunk), position in zip(owned, positions, strict=True)
    )
    cells = np.empty(grid, dtype=np.int32)
    for number, position in enumerate(positions):
        cells[position] = number
    return ArrayLayout(name, dtype, shape, chunks, tuple(map(tuple, sizes)), cells)


def _positions(grid: Shape) -> Iterator[Shape]:
    """Walk over a grid of any size; `itertools.product` would write every dimension out first."""
    for number in itertools.takewhile(math.prod(grid).__gt__, itertools.count()):
        position = []
        for n in reversed(grid):
            number, index = divmod(number, n)
            position.append(index)
        yield tuple(reversed(position))


def _from_offsets(
    name: str, dtype: np.dtype | None, shape: Shape | None, owned: Sequence[_Owned]
) -> ArrayLayout:
    chunks = tuple(Chunk(bridge_id, index, c.offset or (), c.shape) for bridge_id, index, c in owned)
    shape = shape or ()
    edges = _edges([(c.offset, c.shape) for c in chunks], shape)
    grid = tuple(len(e) - 1 for e in edges)
    if math.prod(grid) > MAX_CELLS:
        raise LayoutError(
            f"array {name!r}: {len(chunks)} chunks cut the array into {math.prod(grid)} cells, more than "
            f"{MAX_CELLS}; align the chunks' edges"
        )
    cells = np.full(grid, -1, dtype=np.int32)
    for number, chunk in enumerate(chunks):
        region = _cells_of(edges, chunk.offset, chunk.shape)
        taken = cells[region]
        if np.any(taken >= 0):
            other = chunks[int(np.max(taken))]
            raise OverlapError(
                f"array {name!r}: bridge {other.bridge_id}'s chunk at offset {other.offset} of shape {other.shape} "
                f"overlaps bridge {chunk.bridge_id}'s at offset {chunk.offset} of shape {chunk.shape}"
            )
        cells[region] = number
    if np.any(cells < 0):
        hole = np.argwhere(cells < 0)[0]
        start = tuple(int(e[h]) for e, h in zip(edges, hole, strict=True))
        stop = tuple(int(e[h + 1]) for e, h in zip(edges, hole, strict=True))
        raise HoleError(
            f"array {name!r}: no chunk covers elements {start} to {stop} of global_shape {shape} "
            f"({name_bridges(c.bridge_id for c in chunks)} described {len(chunks)} chunks)"
        )
    return ArrayLayout(name, dtype, shape, chunks, _sizes(edges), cells)


def tile(
    boxes: Sequence[tuple[Shape, Shape]],
    shape: Shape,
    max_cells: int,
    inner_edges: Sequence[tuple[int, int]] = (),
) -> tuple[tuple[tuple[int, ...], ...], np.ndarray] | None:
    """Find the grid of cells in which each cell lies in one box.

    Parameters
    ----------
    boxes : sequence of (offset, shape)
        They tile the array exactly.
    shape : tuple of int
    max_cells : int
    inner_edges : sequence of (dimension, edge)
        Where to cut besides.

    Returns
    -------
    cuts, cells
        The cells' sizes along each dimension, and for each cell the position of its box; None when there would
        be more than `max_cells`.
    """
    edges = _edges(boxes, shape, inner_edges)
    grid = tuple(len(e) - 1 for e in edges)
    if math.prod(grid) > max_cells:
        return None
    cells = np.empty(grid, dtype=np.int32)
    for number, (offset, box_shape) in enumerate(boxes):
        cells[_cells_of(edges, offset, box_shape)] = number
    return _sizes(edges), cells


def _edges(
    boxes: Sequence[tuple[Shape, Shape]], shape: Shape, inner_edges: Sequence[tuple[int, int]] = ()
) -> list[np.ndarray]:
    found: list[set[int]] = [{0, length} for length in shape]
    for offset, box_shape in boxes:
        for d, (start, length) in enumerate(zip(offset, box_shape, strict=True)):
            found[d] |= {start, start + length}
    for d, edge in inner_edges:
        found[d].add(edge)
    return [np.array(sorted(edges)) for edges in found]


def _cells_of(edges: Sequence[np.ndarray], offset: Shape, shape: Shape) -> tuple[slice, ...]:
    return tuple(
        slice(*np.searchsorted(e, (start, start + length)))
        for e, start, length in zip(edges, offset, shape, strict=True)
    )


def _sizes(edges: Sequence[np.ndarray]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in np.diff(e)) for e in edges)
