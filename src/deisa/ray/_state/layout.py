"""What an array is: boxes that tile a global shape.

`resolve_layout` checks what all bridges say together (`descriptions`), and turns positions in the grid of chunks, whose
rows and columns must line up, into offsets.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deisa.ray._state.agreement import Labels, SaidOfChunk, resolve_labels
from deisa.ray._state.descriptions import ArrayDescription, ChunkDescription, Shape
from deisa.ray._state.naming import SHOWN_CULPRITS, name_bridges
from deisa.ray.errors import (
    BridgeIdError,
    DescriptionMismatchError,
    HoleError,
    LayoutError,
    OverlapError,
    WorldSizeError,
)

MAX_CELLS = 10_000_000


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
