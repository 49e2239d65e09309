"""What is handed over of an array: some of its elements, at some of its timesteps, as some dtype.

A *stream* is what windows ask for that want the same of an array. Arrays of which everything is wanted have one stream,
which is the array itself. A rank copies into the slots of a stream only the part of its chunk that the stream takes,
and nothing at timesteps that the stream leaves out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from deisa.ray._state.descriptions import Shape
from deisa.ray._state.layout import ArrayLayout, Chunk


@dataclass(frozen=True, slots=True)
class Stream:
    """What windows want of an array.

    Attributes
    ----------
    name : str
        Unique in a session; that of the array where everything is wanted.
    array : str
    every : int
        Only timesteps that are multiples of it.
    start, step, shape : tuple of int
        The first element along each dimension, the distance to the next one, and how many there are.
    dropped : tuple of int
        Dimensions that the windows do not have: one position of each was asked for.
    dtype : numpy.dtype or None
        As which elements are handed over; None is the array's own.
    """

    name: str
    array: str
    every: int = 1
    start: Shape = ()
    step: Shape = ()
    shape: Shape = ()
    dropped: tuple[int, ...] = ()
    dtype: np.dtype | None = None

    def takes(self, timestep: int) -> bool:
        """Whether it has a timestep."""
        return timestep % self.every == 0

    @property
    def index(self) -> tuple[slice | int, ...]:
        """Which elements of the array the windows have, as NumPy takes it."""
        along = zip(self.start, self.step, self.shape, strict=True)
        slices = [slice(start, start + (n - 1) * step + 1, step) for start, step, n in along]
        return tuple(s.start if d in self.dropped else s for d, s in enumerate(slices))


def whole(layout: ArrayLayout) -> Stream:
    """Return the stream that takes everything of an array."""
    ndim = len(layout.shape)
    return Stream(layout.name, layout.name, 1, (0,) * ndim, (1,) * ndim, layout.shape)


@dataclass(frozen=True, slots=True)
class Part:
    """What a stream takes of one chunk on a node.

    Attributes
    ----------
    bridge_id, chunk : int
        The chunk: its bridge, and its index there.
    region : int
        Its number on the node.
    start, step, shape : tuple of int
        Its first element along each dimension of the chunk, the distance to the next one, and how many there are.
    """

    bridge_id: int
    chunk: int
    region: int
    start: Shape
    step: Shape
    shape: Shape


Parts = Mapping[str, Sequence[Part]]  # by stream, on one node


def by_bridge(parts: Parts) -> dict[int, dict[str, list[Part]]]:
    """Sort the parts on a node by their bridges, and those of each bridge by stream."""
    found: dict[int, dict[str, list[Part]]] = defaultdict(lambda: defaultdict(list))
    for name, of_stream in parts.items():
        for part in of_stream:
            found[part.bridge_id][name].append(part)
    return found


def cut(layout: ArrayLayout, stream: Stream) -> ArrayLayout:
    """Return the layout of what a stream takes of an array; chunks of which it takes nothing are left out.

    Offsets count the elements that are taken. `Chunk.start` says where each begins in its bridge's chunk.
    """
    dtype = stream.dtype if stream.dtype is not None and layout.dtype is not None else layout.dtype
    chunks: list[Chunk] = []
    kept: dict[int, int] = {}  # from the array's chunks to those of the stream
    for number, chunk in enumerate(layout.chunks):
        ranges = [
            _taken(o, o + n, stream, d)
            for d, (o, n) in enumerate(zip(chunk.offset, chunk.shape, strict=True))
        ]
        if all(first < end for first, end in ranges):
            kept[number] = len(chunks)
            starts = tuple(
                stream.start[d] + first * stream.step[d] - chunk.offset[d]
                for d, (first, _) in enumerate(ranges)
            )
            offset, shape = tuple(first for first, _ in ranges), tuple(end - first for first, end in ranges)
            chunks.append(replace(chunk, offset=offset, shape=shape, start=starts))
    cuts, positions = [], []
    for d, sizes in enumerate(layout.cuts):
        ends = np.cumsum(sizes)
        taken = [_taken(int(end) - size, int(end), stream, d) for end, size in zip(ends, sizes, strict=True)]
        positions.append([i for i, (first, end) in enumerate(taken) if first < end])
        cuts.append(tuple(end - first for first, end in taken if first < end))
    numbers = layout.cells[np.ix_(*positions)] if positions else layout.cells
    translated = np.full(len(layout.chunks), -1, dtype=np.int32)
    translated[list(kept)] = list(kept.values())
    cells = np.asarray(translated[numbers])
    labels = layout.labels.part(stream.index)
    return ArrayLayout(stream.name, dtype, stream.shape, tuple(chunks), tuple(cuts), cells, labels)


def _taken(start: int, stop: int, stream: Stream, d: int) -> tuple[int, int]:
    """Which of a stream's elements along a dimension lie from `start` up to `stop` of the array."""
    first, step, count = stream.start[d], stream.step[d], stream.shape[d]
    low = -((first - start) // step)  # rounded up
    high = -((first - stop) // step)
    return min(max(low, 0), count), min(max(high, 0), count)


def number_regions(
    layouts: Iterable[ArrayLayout], node_of: Callable[[int], str]
) -> dict[str, tuple[int, ...]]:
    """Number the chunks of all streams on each node; `node_of` is a bridge's node."""
    next_on: dict[str, int] = defaultdict(int)
    regions = {}
    for layout in layouts:
        numbers = []
        for chunk in layout.chunks:
            node_id = node_of(chunk.bridge_id)
            numbers.append(next_on[node_id])
            next_on[node_id] += 1
        regions[layout.name] = tuple(numbers)
    return regions
