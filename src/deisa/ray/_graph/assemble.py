"""From slots to one Dask array: each cell of an array's tiling becomes a leaf, once somebody looks at it."""

from __future__ import annotations

import itertools
import math
import uuid
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import dask.array as da
import numpy as np

from deisa.ray._graph._dask import (
    DataNode,
    GraphNode,
    HighLevelGraph,
    Layer,
    MaterializedLayer,
    Task,
    TaskRef,
    bind,
    clone_key,
)
from deisa.ray._graph.leaves import AgentAddress, ChunkPlace, Leaf, StepSlots, read_chunk
from deisa.ray._state.boxes import Tiling
from deisa.ray._state.descriptions import Shape

Key = Hashable
T = TypeVar("T")
_PROCESS, _numbers = (
    uuid.uuid4().hex[:16],
    itertools.count(),
)  # a random token for each would wait for the kernel


def _token() -> str:
    """Return what no other name has, in the form in which Dask writes it."""
    return f"{_PROCESS}{next(_numbers):016x}"


@dataclass(frozen=True, eq=False)
class ArrayHome:
    """Where an array lies, the same at every timestep.

    Parameters
    ----------
    name : str
    shape : tuple of int
    dtype : numpy.dtype
    tiling : Tiling
    homes : sequence of (AgentAddress, int)
        For each box of the tiling, the agent, and the region under which its readers find the box.
    dropped : tuple of int
        Dimensions of one element that readers do not see.
    """

    name: str
    shape: Shape
    dtype: np.dtype
    tiling: Tiling
    homes: Sequence[tuple[AgentAddress, int]]
    dropped: tuple[int, ...] = ()
    uid: str = field(default_factory=_token)

    def assemble(self, step: StepSlots) -> da.Array:
        """Build the whole array at one timestep; its cost does not depend on the number of chunks."""
        name = f"{self.name}-{_token()}"  # no timestep in it: names are alike but for their tokens
        graph = HighLevelGraph({name: StepLayer(name, self, step)}, {name: set()})
        return da.Array(
            graph, name, self._seen(self.tiling.cuts), dtype=self.dtype, shape=self._seen(self.shape)
        )

    def _seen(self, by_dimension: Sequence[T]) -> tuple[T, ...]:
        """Leave out the dimensions that readers do not see."""
        return tuple(value for d, value in enumerate(by_dimension) if d not in self.dropped)

    @property
    def places(self) -> Mapping[tuple[int, ...], ChunkPlace]:
        """Where each cell lies; made at the first look."""
        if not self._places:
            self._places.update(self._find_places())
        return self._places

    _places: dict[tuple[int, ...], ChunkPlace] = field(default_factory=dict, init=False, repr=False)

    def _find_places(self) -> Iterator[tuple[tuple[int, ...], ChunkPlace]]:
        cuts = self.tiling.cuts
        starts = [list(itertools.accumulate(sizes, initial=0)) for sizes in cuts]
        for position in np.ndindex(self.tiling.cells.shape):
            number = int(self.tiling.cells[position])
            box = self.tiling.boxes[number]
            shape = tuple(sizes[i] for sizes, i in zip(cuts, position, strict=True))
            within = None
            if shape != box.shape or self.dropped:
                corner = [at[i] - o for at, i, o in zip(starts, position, box.offset, strict=True)]
                within = tuple(slice(start, start + n) for start, n in zip(corner, shape, strict=True))
            agent, region = self.homes[number]
            nbytes = math.prod(shape) * self.dtype.itemsize
            place = ChunkPlace(agent, region, nbytes, within, self.dropped, self._seen(shape))
            yield self._seen(position), place

    @property
    def grid(self) -> Shape:
        """How many cells readers see along each dimension."""
        return self._seen(self.tiling.cells.shape)


def tiling_of(array: da.Array) -> Tiling | None:
    """How an array of a simulation lies in memory; None for what was computed from one."""
    layer = array.dask.layers.get(array.name)
    return layer.home.tiling if isinstance(layer, StepLayer) else None


class StepLayer(Layer):
    """The leaves of one timestep of an array, and the slots that they all depend on.

    Its tasks are made when they are asked for: where a plan is reused, never.
    """

    def __init__(self, name: str, home: ArrayHome, step: StepSlots) -> None:
        super().__init__()
        self.name = name
        self.home = home
        self.step = step
        self._tasks: dict[Key, GraphNode] = {}

    @property
    def step_key(self) -> str:
        """The key of the slots."""
        return f"slots-of-{self.name}"

    def _materialize(self) -> dict[Key, GraphNode]:
        if not self._tasks:
            self._tasks[self.step_key] = DataNode(self.step_key, self.step)
            slots = TaskRef(self.step_key)
            for position, place in self.home.places.items():
                key = (self.name, *position)
                self._tasks[key] = Leaf(key, read_chunk, place, slots)
        return self._tasks

    def __getitem__(self, key: Key) -> GraphNode:
        return self._materialize()[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._materialize())

    def __len__(self) -> int:
        return self.home.tiling.cells.size + 1

    def is_materialized(self) -> bool:
        """Whether the leaves have been made."""
        return bool(self._tasks)

    def get_output_keys(self) -> set[Key]:
        """The keys of the leaves; their slots are nobody else's."""
        return {(self.name, *position) for position in np.ndindex(self.home.grid)}

    def clone(self, keys: set[Key], seed: Hashable, bind_to: Key | None = None) -> tuple[Layer, bool]:
        """Rename the leaves among `keys`; with `bind_to` they are handed on only once that is there.

        Dask's own way renames the tasks, but not what they depend on.
        """
        if bind_to is None and self.get_output_keys() <= keys:
            return StepLayer(clone_key(self.name, seed), self.home, self.step), False
        tasks: dict[Key, GraphNode] = dict(self._materialize())
        for key in self.get_output_keys() & keys:
            new, leaf = clone_key(key, seed), tasks.pop(key)
            if bind_to is None:
                tasks[new] = leaf.substitute({}, key=new)
            else:
                read = (f"read-{new[0]}", *new[1:])
                tasks[read] = leaf.substitute({}, key=read)
                tasks[new] = Task(new, bind, TaskRef(read), TaskRef(bind_to))
        return MaterializedLayer(tasks), bind_to is not None

    def cull(self, keys: set[Key], all_hlg_keys: Collection[Key]) -> tuple[Layer, Mapping[Key, set[Key]]]:
        """Leave out what `keys`, some of them of other layers, do not need; nothing here depends on those."""
        tasks = self._materialize()
        own = keys & tasks.keys()
        if not own:
            return MaterializedLayer({}), {}
        if len(own) < len(tasks) - 1:
            needed: dict[Key, Any] = {self.step_key: tasks[self.step_key]}
            needed.update((key, tasks[key]) for key in own)
            return MaterializedLayer(needed), {key: set() for key in needed}
        return self, {key: set() for key in tasks}
