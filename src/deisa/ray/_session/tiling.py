"""Where the chunks of an array lie, and which of them share memory."""

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


@dataclass(frozen=True, slots=True)
class PlacedArray:
    """An array whose chunks have their places.

    Attributes
    ----------
    layout : ArrayLayout
    nodes : tuple of str
        The node of each chunk.
    regions : tuple of int
        The number of each chunk on its node.
    tiling : Tiling
    """

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
        return ArrayHome(self.layout.name, self.layout.shape, dtype, self.tiling, homes)


def place_array(
    layout: ArrayLayout,
    bridges: Bridges,
    plan: StartPlan | None,
    merge_chunks_beyond: int,
    cpus: Callable[[], Mapping[str, int]],
    cuts: Sequence[Sequence[int]] | None = None,
) -> PlacedArray:
    """Find an array's chunks on their nodes, and decide which of them share memory.

    Parameters
    ----------
    layout : ArrayLayout
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
    regions = tuple(bridges.region(chunk.bridge_id, layout.name, chunk.index) for chunk in layout.chunks)
    if plan is not None:
        tiling = plan.merged.get(layout.name) or separate(layout, nodes)
    elif layout.dtype is None or len(layout.chunks) <= merge_chunks_beyond:
        tiling = separate(layout, nodes, cuts)
    else:
        of_node = cpus()
        tiling = merge(layout, nodes, {node_id: of_node.get(node_id, 1) for node_id in set(nodes)})
    return PlacedArray(layout, nodes, regions, tiling)
