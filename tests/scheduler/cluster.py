"""A pretended cluster: chunks and bundles of several nodes in this process, strictly kept apart."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import dask.array as da
import numpy as np
import pytest

from deisa.ray._graph.assemble import ArrayHome
from deisa.ray._graph.bundles import Bundle
from deisa.ray._graph.execute import Picks, pick, run_bundle
from deisa.ray._graph.leaves import AgentAddress, Handle, Lease, StepSlots, chunk_of
from deisa.ray._state.boxes import separate
from deisa.ray._state.descriptions import describe_arrays
from deisa.ray._state.layout import resolve_layout
from deisa.ray._transport import reader


def address(node_id: str) -> AgentAddress:
    return AgentAddress(node_id, f"agent of {node_id}", "")


class PretendedMemory:
    """What `reader.attach` finds for a node; makes up the chunk of every region and slot."""

    def __init__(self, shape: tuple[int, ...] = (), dtype: Any = np.int64) -> None:
        self._shape = shape
        self._dtype = dtype

    def has(self, region: int) -> bool:
        return True

    def chunk(self, region: int, slot: int) -> np.ndarray:
        chunk = np.full(self._shape, 1000 * slot + region, self._dtype)
        chunk.flags.writeable = False
        return chunk


def pretend_nodes(
    monkeypatch: pytest.MonkeyPatch,
    node_ids: Sequence[str],
    shape: tuple[int, ...] = (),
    dtype: Any = np.int64,
) -> None:
    for node_id in node_ids:
        monkeypatch.setitem(
            reader._attached,
            address(node_id).agent_id,
            PretendedMemory(shape, dtype),  # type: ignore[misc]
        )


def array_on_nodes(node_of_chunk: Sequence[str], chunk_length: int, lease: Lease | None = None) -> da.Array:
    """A one-dimensional array of float64; chunk i is region i of its node, at slot 0."""
    return at_slot(home_on_nodes(node_of_chunk, chunk_length), 0, lease)


def at_slot(home: ArrayHome, slot: int, lease: Lease | None = None) -> da.Array:
    """The timestep of an array that lies in one slot on all nodes."""
    nodes = {agent.node_id for agent, _ in home.homes}
    return home.assemble(StepSlots(dict.fromkeys(nodes, slot), lease or Lease("x", 0, lambda *_: None)))


def home_on_nodes(node_of_chunk: Sequence[str], chunk_length: int) -> ArrayHome:
    """Where such an array lies."""
    count = len(node_of_chunk)
    description = [
        {"chunk_shape": (chunk_length,), "nb_chunks_per_dim": (count,), "chunk_position": (i,), "dtype": "f8"}
        for i in range(count)
    ]
    layout = resolve_layout({0: describe_arrays({"x": description})})["x"]
    homes = [(address(node_id), number) for number, node_id in enumerate(node_of_chunk)]
    return ArrayHome("x", layout.shape, np.dtype("f8"), separate(layout, node_of_chunk), homes)


@dataclass(frozen=True, slots=True, eq=False)
class NodeGroup:
    """Values on a node; copies leave it."""

    pickled: bytes

    def fetch(self) -> Sequence[Any]:
        return cloudpickle.loads(self.pickled)


class PretendedExecutor:
    """Runs bundles one after the other, each with nothing but what it was given; keeps them in `bundles`."""

    ships = True

    def __init__(self, node_ids: Sequence[str | None], threads: int = 1) -> None:
        self._node_ids = node_ids
        self._threads = threads
        self.bundles: list[Bundle] = []
        self.held: list[Mapping[Hashable, StepSlots]] = []  # for each bundle

    def nodes(self) -> Sequence[str | None]:
        return self._node_ids

    def prepare(self, bundle: Bundle, picks: Sequence[Picks]) -> Any:
        for task in bundle.tasks:
            chunk = chunk_of(task)
            assert chunk is None or chunk.agent.node_id == bundle.node_id, "a chunk is read on another node"
        return bundle, picks, cloudpickle.dumps(bundle.tasks)

    def submit(
        self, prepared: Any, groups: Sequence[Handle], steps: Mapping[Hashable, StepSlots]
    ) -> list[Handle]:
        bundle, picks, tasks = prepared
        self.bundles.append(bundle)
        self.held.append(steps)
        values = pick([group.fetch() for group in groups], picks)
        for key, step in steps.items():
            values[key] = cloudpickle.loads(cloudpickle.dumps(step.on(bundle.node_id)))
        returned = run_bundle(cloudpickle.loads(tasks), values, bundle.outputs, self._threads)
        return [NodeGroup(cloudpickle.dumps(group)) for group in returned]

    def runs_here(self, prepared: Any) -> bool:
        return False

    def fetch(self, handles: Sequence[Handle]) -> list[Sequence[Any]]:
        return [handle.fetch() for handle in handles]
