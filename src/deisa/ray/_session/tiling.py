"""Where the chunks of a stream lie, and which of them share memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deisa.ray._graph.assemble import ArrayHome
from deisa.ray._graph.leaves import AgentAddress
from deisa.ray._session.registration import Bridges
from deisa.ray._state.boxes import Tiling, merge, separate
from deisa.ray._state.layout import ArrayLayout
from deisa.ray._state.plan import SharedBox, StartPlan
from deisa.ray._state.streams import Part, Stream


@dataclass(frozen=True, slots=True)
class PlacedArray:
    """A stream whose chunks have their places.

    Attributes
    ----------
    stream : Stream
    layout : ArrayLayout
        Of what the stream takes.
    nodes : tuple of str
        The node of each chunk.
    regions : tuple of int
        The number of each chunk on its node.
    tiling : Tiling
    """

    stream: Stream
    layout: ArrayLayout
    nodes: tuple[str, ...]
    regions: tuple[int, ...]
    tiling: Tiling

    @property
    def is_merged(self) -> bool:
        """Whether chunks share memory."""
        return len(self.tiling.boxes) < len(self.layout.chunks)

    def owners(self) -> dict[str, tuple[int, ...]]:
        """By node, the bridges that own chunks of the array."""
        owners: dict[str, set[int]] = defaultdict(set)
        for chunk, node_id in zip(self.layout.chunks, self.nodes, strict=True):
            owners[node_id].add(chunk.bridge_id)
        return {node_id: tuple(sorted(bridges)) for node_id, bridges in owners.items()}

    def shared_boxes(self) -> dict[str, list[SharedBox]]:
        """By node, the boxes in which chunks lie side by side; none where no chunks share memory."""
        shared: dict[str, list[SharedBox]] = defaultdict(list)
        for box in self.tiling.boxes if self.is_merged else ():
            places = []
            for number in box.chunks:
                corner = zip(self.layout.chunks[number].offset, box.offset, strict=True)
                places.append((self.regions[number], tuple(c - b for c, b in corner)))
            shared[box.node_id].append(SharedBox(box.shape, tuple(places)))
        return shared

    def home(self, dtype: np.dtype, address: Callable[[str], AgentAddress]) -> ArrayHome:
        """Say where readers find the array; `address` is that of a node's agent."""
        homes = [(address(box.node_id), self.regions[box.chunks[0]]) for box in self.tiling.boxes]
        return ArrayHome(self.stream.array, self.layout.shape, dtype, self.tiling, homes, self.stream.dropped)

    def parts(self) -> dict[str, list[Part]]:
        """By node, what the stream takes of each chunk."""
        found: dict[str, list[Part]] = defaultdict(list)
        whole = (0,) * len(self.layout.shape)
        for chunk, node_id, region in zip(self.layout.chunks, self.nodes, self.regions, strict=True):
            start = chunk.start if chunk.start is not None else whole
            part = Part(chunk.bridge_id, chunk.index, region, start, self.stream.step, chunk.shape)
            found[node_id].append(part)
        return found


def place_stream(
    stream: Stream,
    layout: ArrayLayout,
    regions: tuple[int, ...],
    bridges: Bridges,
    plan: StartPlan | None,
    merge_chunks_beyond: int,
    cpus: Callable[[], Mapping[str, int]],
    cuts: Sequence[Sequence[int]] | None = None,
) -> PlacedArray:
    """Find a stream's chunks on their nodes, and decide which of them share memory.

    Parameters
    ----------
    stream : Stream
    layout : ArrayLayout
        Of what the stream takes.
    regions : tuple of int
        The number of each chunk on its node.
    bridges : Bridges
    plan : StartPlan or None
        Where the session has been started already: with this plan, which has decided it.
    merge_chunks_beyond : int
        Chunks of arrays with no more than these stay separate.
    cpus : callable
        The CPUs of each node that bundles may use; not asked where chunks stay separate.
    cuts : sequence of sequence of int, optional
        Sizes of cells along each dimension, to which chunks that stay separate are cut besides.
    """
    nodes = tuple(bridges.node_of(chunk.bridge_id) for chunk in layout.chunks)
    if plan is not None:
        tiling = plan.merged.get(layout.name) or separate(layout, nodes)
    elif layout.dtype is None or len(layout.chunks) <= merge_chunks_beyond:
        tiling = separate(layout, nodes, cuts)
    else:
        of_node = cpus()
        tiling = merge(layout, nodes, {node_id: of_node.get(node_id, 1) for node_id in set(nodes)})
    return PlacedArray(stream, layout, nodes, regions, tiling)
