"""The leaves of a graph: chunks that lie in a node's slots, and results kept where they were made.

Both are ordinary Dask tasks whose function knows how to get the value, so any scheduler can run
them; the bundle scheduler also reads from them *where* the value is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from dask._task_spec import GraphNode, Task

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
class ChunkRef:
    """One slot of one region, or a part of it.

    `within` cuts out the part; None is the whole chunk. The lease stays in the process that made
    the reference: it is not pickled.
    """

    agent: AgentAddress
    region: int
    slot: int
    nbytes: int
    within: tuple[slice, ...] | None
    lease: Lease | None = field(repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore_chunk, (self.agent, self.region, self.slot, self.nbytes, _bounds(self.within)))

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return (self.agent.agent_id, self.region, self.slot, id(self.lease), _bounds(self.within))


def _bounds(within: tuple[slice, ...] | None) -> tuple[tuple[int, int], ...] | None:
    return None if within is None else tuple((s.start, s.stop) for s in within)


def _restore_chunk(
    agent: AgentAddress, region: int, slot: int, nbytes: int, bounds: tuple[tuple[int, int], ...] | None
) -> ChunkRef:
    within = None if bounds is None else tuple(slice(*b) for b in bounds)
    return ChunkRef(agent, region, slot, nbytes, within, None)


def read_chunk(ref: ChunkRef) -> np.ndarray:
    """Return a chunk as a read-only view of its slot; no bytes are copied.

    Raises
    ------
    SessionEndedError
        Away from the chunk's node, or after the session.
    """
    memory = attach(ref.agent.address, ref.agent.agent_id, ref.region)
    chunk = memory.chunk(ref.region, ref.slot)
    return chunk if ref.within is None else chunk[ref.within]


class Handle(Protocol):
    """One group of values that a bundle returned, wherever it is kept."""

    def fetch(self) -> Sequence[Any]:
        """Bring the group's values into this process."""


@dataclass(frozen=True, slots=True)
class KeptResult:
    """The value number `index` of a group that stays where its bundle ran."""

    handle: Handle
    index: int
    node_id: str | None


def fetch_kept(result: KeptResult) -> Any:
    """Return the value of a kept result, fetching it if need be."""
    return result.handle.fetch()[result.index]


def chunk_of(task: GraphNode) -> ChunkRef | None:
    """Return the chunk that a task reads, if it is such a leaf."""
    if isinstance(task, Task) and task.func is read_chunk:
        return task.args[0]
    return None


def kept_of(task: GraphNode) -> KeptResult | None:
    """Return the kept result that a task fetches, if it is such a leaf."""
    if isinstance(task, Task) and task.func is fetch_kept:
        return task.args[0]
    return None
