"""From slots to one Dask array: each cell of the layout's grid becomes a leaf."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import dask.array as da
import numpy as np

from deisa.ray._graph.leaves import AgentAddress, ChunkRef, Leaf, Lease, read_chunk
from deisa.ray._state.layout import ArrayLayout, Chunk


@dataclass(frozen=True, slots=True)
class ChunkHome:
    """Where a chunk's slots are: the agent, the region, and its position among the node's regions."""

    agent: AgentAddress
    region: int
    place: int


def assemble(
    layout: ArrayLayout,
    dtype: np.dtype,
    homes: Sequence[ChunkHome],
    slots: Mapping[str, Sequence[int]],
    timestep: int,
    lease: Lease,
) -> da.Array:
    """Build the whole array at one timestep.

    Parameters
    ----------
    layout : ArrayLayout
    dtype : numpy.dtype
    homes : sequence of ChunkHome
        For each chunk of the layout.
    slots : mapping of str to sequence of int
        For each node, the slots of its regions at this timestep, by place.
    timestep : int
        Only used in the array's name.
    lease : Lease
        Held by every leaf, so that the slots live as long as any collection built on them.
    """
    name = f"{layout.name}-t{timestep}-{uuid.uuid4().hex}"
    graph = {}
    for position in np.ndindex(layout.cells.shape):
        number = int(layout.cells[position])
        home = homes[number]
        chunk = layout.chunks[number]
        cell_shape = tuple(layout.cuts[d][i] for d, i in enumerate(position))
        within = None if cell_shape == chunk.shape else _part(layout, chunk, position, cell_shape)
        nbytes = int(np.prod(cell_shape, dtype=np.int64)) * dtype.itemsize
        slot = slots[home.agent.node_id][home.place]
        key = (name, *position)
        graph[key] = Leaf(key, read_chunk, ChunkRef(home.agent, home.region, slot, nbytes, within, lease))
    return da.Array(graph, name, layout.cuts, dtype=dtype, shape=layout.shape)


def _part(
    layout: ArrayLayout, chunk: Chunk, position: tuple[int, ...], cell_shape: tuple[int, ...]
) -> tuple[slice, ...]:
    starts = (sum(layout.cuts[d][:i]) - chunk.offset[d] for d, i in enumerate(position))
    return tuple(slice(start, start + n) for start, n in zip(starts, cell_shape, strict=True))
