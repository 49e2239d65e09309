"""The leaves of a graph: chunks that lie in a node's slots, and results kept where they were made.

Both are ordinary Dask tasks whose function knows how to get the value, so any scheduler can run
them; the bundle scheduler also reads from them *where* the value is.

A chunk's leaf says in which box it lies, which is the same at all timesteps, and takes the slots of its
timestep as an input: a graph that has been cut into bundles once serves for other timesteps too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from deisa.ray._graph._dask import DataNode, GraphNode, Task
from deisa.ray._state.descriptions import Shape
from deisa.ray._transport.reader import attach


class Leaf(Task):
    """A task without inputs that Dask's optimisations leave alone: inside a fused task nobody would find it."""

    __slots__ = ()

    @property
    def block_fusion(self) -> bool:
        """Whether Dask must not fuse it with its users."""
        return True


class Lease:
    """Keeps the slots of one (array, timestep) from being used again, for as long as anyone has it.

    Parameters
    ----------
    on_end : callable
        Called once when the last reference goes, from any thread and at any moment: it must
        only put a note somewhere (``queue.SimpleQueue.put`` is made for that).
    """

    __slots__ = ("__weakref__", "_on_end", "array", "timestep")

    def __init__(self, array: str, timestep: int, on_end: Callable[[str, int], None]) -> None:
        self.array = array
        self.timestep = timestep
        self._on_end = on_end

    def __del__(self) -> None:
        self._on_end(self.array, self.timestep)


@dataclass(frozen=True, slots=True)
class AgentAddress:
    """An agent, for a reader on its host, and the node it serves."""

    node_id: str
    agent_id: str
    address: str


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """A box on a node, or a part of it; in which slot, the timestep says.

    Attributes
    ----------
    agent : AgentAddress
    box : int
        The region under which the agent's readers find the box.
    nbytes : int
    within : tuple of slice or None
        Cuts out the part; None is the whole box.
    dropped : tuple of int
        Dimensions of one element that the chunk does not have.
    shape : tuple of int or None
        Elements along each dimension, for whoever places tasks; it is not pickled.
    """

    agent: AgentAddress
    box: int
    nbytes: int
    within: tuple[slice, ...] | None
    dropped: tuple[int, ...] = ()
    shape: Shape | None = field(default=None, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        bounds = None if self.within is None else tuple((s.start, s.stop) for s in self.within)
        return (_restore_place, (self.agent, self.box, self.nbytes, bounds, self.dropped))


def _restore_place(
    agent: AgentAddress,
    box: int,
    nbytes: int,
    bounds: tuple[tuple[int, int], ...] | None,
    dropped: tuple[int, ...],
) -> ChunkPlace:
    within = None if bounds is None else tuple(slice(*b) for b in bounds)
    return ChunkPlace(agent, box, nbytes, within, dropped)


@dataclass(frozen=True, slots=True)
class StepSlots:
    """In which slot each node has one timestep of an array.

    The lease stays in the process that made this: it is not pickled.
    """

    slots: Mapping[str, int]
    lease: Lease | None

    def on(self, node_id: str | None) -> StepSlots:
        """The part that a bundle on a node needs; whoever runs the bundle holds the lease."""
        return StepSlots({node: slot for node, slot in self.slots.items() if node == node_id}, None)

    @property
    def borrowed(self) -> StepSlots:
        """The same for a bundle in this process; whoever runs the bundle holds the lease."""
        return StepSlots(self.slots, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return (StepSlots, (dict(self.slots), None))

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return (dict(self.slots), id(self.lease))


def read_chunk(place: ChunkPlace, step: StepSlots) -> np.ndarray:
    """Return a chunk as a read-only view of its slot; no bytes are copied.

    Where the slots come with their lease, nobody holds that for what is returned: another scheduler than ours has
    taken the graph as it is. It gets a copy.

    Raises
    ------
    SessionEndedError
        Away from the chunk's node, or after the session.
    """
    agent = place.agent
    box = attach(agent.address, agent.agent_id, place.box).chunk(place.box, step.slots[agent.node_id])
    chunk = box if place.within is None else box[place.within]
    if place.dropped:
        chunk = chunk.squeeze(axis=place.dropped)
    return chunk if step.lease is None else chunk.copy()


class Handle(Protocol):
    """One group of values that a bundle returned, wherever it is kept."""

    def fetch(self) -> Sequence[Any]:
        """Bring the group's values into this process."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupHere:
    """A group of values in this process."""

    values: Sequence[Any]

    def fetch(self) -> Sequence[Any]:
        """Return them."""
        return self.values


@dataclass(frozen=True, slots=True)
class KeptResult:
    """The value number `index` of a group that stays where its bundle ran."""

    handle: Handle
    index: int
    node_id: str | None


def fetch_kept(result: KeptResult) -> Any:
    """Return the value of a kept result, fetching it if need be."""
    return result.handle.fetch()[result.index]


def chunk_of(task: GraphNode) -> ChunkPlace | None:
    """Return the chunk that a task reads, if it is such a leaf."""
    if isinstance(task, Task) and task.func is read_chunk:
        return task.args[0]
    return None


def step_of(task: GraphNode) -> StepSlots | None:
    """Return the slots that a graph's node stands for, if it does."""
    if isinstance(task, DataNode) and isinstance(task.value, StepSlots):
        return task.value
    return None


def kept_of(task: GraphNode) -> KeptResult | None:
    """Return the kept result that a task fetches, if it is such a leaf."""
    if isinstance(task, Task) and task.func is fetch_kept:
        return task.args[0]
    return None
