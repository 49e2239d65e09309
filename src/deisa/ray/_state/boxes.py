"""Which chunks share memory: a box of its own for each chunk, or neighbours on one node merged into one.

Dask's cost follows the number of its chunks, and a simulation has as many as it has ranks. Chunks of one
node that lie side by side can share a box, in which each rank writes its own part; Dask then sees about
as many chunks as the analytics has CPUs.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deisa.ray._state.descriptions import Shape
from deisa.ray._state.layout import MAX_CELLS, ArrayLayout, tile


@dataclass(frozen=True, slots=True)
class Box:
    """A part of an array that lies in one piece of memory of one node.

    `chunks` are positions in the layout's chunks.
    """

    node_id: str
    offset: Shape
    shape: Shape
    chunks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tiling:
    """The boxes of an array, and the grid of cells that Dask will see.

    Attributes
    ----------
    boxes : tuple of Box
    cuts : tuple of tuple of int
        Sizes of the cells along each dimension, as in ``dask.array.Array.chunks``.
    cells : numpy.ndarray of int32
        For each cell of the grid, the position in `boxes` of the box it lies in.
    """

    boxes: tuple[Box, ...]
    cuts: tuple[tuple[int, ...], ...]
    cells: np.ndarray


def separate(
    layout: ArrayLayout, nodes: Sequence[str], cuts: Sequence[Sequence[int]] | None = None
) -> Tiling:
    """Give every chunk a box of its own.

    Parameters
    ----------
    layout : ArrayLayout
    nodes : sequence of str
        Where each chunk is.
    cuts : sequence of sequence of int, optional
        Sizes of cells along each dimension, to which the boxes are cut besides.
    """
    boxes = tuple(
        Box(node_id, chunk.offset, chunk.shape, (number,))
        for number, (node_id, chunk) in enumerate(zip(nodes, layout.chunks, strict=True))
    )
    if cuts is None or tuple(map(tuple, cuts)) == layout.cuts:
        return Tiling(boxes, layout.cuts, layout.cells)
    edges = [(d, edge) for d, sizes in enumerate(cuts) for edge in itertools.accumulate(sizes)]
    tiled = tile([(box.offset, box.shape) for box in boxes], layout.shape, MAX_CELLS, edges)
    return Tiling(boxes, layout.cuts, layout.cells) if tiled is None else Tiling(boxes, *tiled)


def merge(layout: ArrayLayout, nodes: Sequence[str], parts: Mapping[str, int]) -> Tiling:
    """Merge the chunks of each node into as few boxes as a sweep along each dimension finds.

    Parameters
    ----------
    layout : ArrayLayout
    nodes : sequence of str
        Where each chunk of the layout is.
    parts : mapping of str to int
        Into how many cells, at least, each box of a node is to be cut where it is large enough.

    Returns
    -------
    Tiling
        With no more cells than the layout has: that of `separate` where merging would not help.
    """
    by_node: dict[str, list[int]] = defaultdict(list)
    for number, node_id in enumerate(nodes):
        by_node[node_id].append(number)
    boxes = [
        box
        for node_id, numbers in by_node.items()
        for box in _merge_on(
            node_id, [(layout.chunks[n].offset, layout.chunks[n].shape, (n,)) for n in numbers]
        )
    ]
    for wanted in (parts, dict.fromkeys(parts, 1)):
        edges = [edge for box in boxes for edge in _inner_edges(box, wanted[box.node_id])]
        tiled = tile([(box.offset, box.shape) for box in boxes], layout.shape, layout.cells.size, edges)
        if tiled is not None:
            return Tiling(tuple(boxes), *tiled)
    return separate(layout, nodes)


_Part = tuple[Shape, Shape, tuple[int, ...]]  # offset, shape, chunks


def _merge_on(node_id: str, parts: list[_Part]) -> Iterable[Box]:
    """Join parts that touch and agree in every other dimension, one dimension after the other."""
    before = 0
    while len(parts) != before:
        before = len(parts)
        for d in reversed(range(len(parts[0][0]))):
            parts = _join_along(d, parts)
    return (Box(node_id, *part) for part in parts)


def _join_along(d: int, parts: list[_Part]) -> list[_Part]:
    def rest(part: _Part) -> tuple[Shape, Shape]:
        offset, shape, _ = part
        return offset[:d] + offset[d + 1 :], shape[:d] + shape[d + 1 :]

    joined: list[_Part] = []
    for part in sorted(parts, key=lambda part: (rest(part), part[0][d])):
        if joined:
            offset, shape, chunks = joined[-1]
            if rest(joined[-1]) == rest(part) and offset[d] + shape[d] == part[0][d]:
                longer = (*shape[:d], shape[d] + part[1][d], *shape[d + 1 :])
                joined[-1] = (offset, longer, chunks + part[2])
                continue
        joined.append(part)
    return joined


def _inner_edges(box: Box, parts: int) -> Iterable[tuple[int, int]]:
    """Cut a box into `parts` along its first dimension that is long enough; yields (dimension, edge)."""
    for d, length in enumerate(box.shape):
        if length >= parts:
            return [(d, box.offset[d] + length * k // parts) for k in range(1, parts)]
    return []
