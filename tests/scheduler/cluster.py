"""A pretended cluster: chunks and bundles of several nodes in this process, strictly kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import dask.array as da
import numpy as np
import pytest

from deisa.ray._graph.assemble import ChunkHome, assemble
from deisa.ray._graph.bundles import Bundle
from deisa.ray._graph.execute import run_bundle
from deisa.ray._graph.leaves import AgentAddress, Handle, Lease, chunk_of
from deisa.ray._graph.scheduler import Input
from deisa.ray._state.layout import describe_arrays, resolve_layout
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
    count = len(node_of_chunk)
    description = [
        {"chunk_shape": (chunk_length,), "nb_chunks_per_dim": (count,), "chunk_position": (i,), "dtype": "f8"}
        for i in range(count)
    ]
    layout = resolve_layout({0: describe_arrays({"x": description})})["x"]
    homes = [ChunkHome(address(node_id), number, 0) for number, node_id in enumerate(node_of_chunk)]
    slots = {node_id: (0,) for node_id in node_of_chunk}
    held = lease or Lease("x", 0, lambda *_: None)
    return assemble(layout, np.dtype("f8"), homes, slots, 0, held)


@dataclass(frozen=True, slots=True, eq=False)
class NodeGroup:
    """Values on a node; copies leave it."""

    pickled: bytes

    def fetch(self) -> Sequence[Any]:
        return cloudpickle.loads(self.pickled)


class PretendedExecutor:
    """Runs bundles one after the other, each with nothing but what it was given; keeps them in `bundles`."""

    def __init__(self, node_ids: Sequence[str | None], threads: int = 1) -> None:
        self._node_ids = node_ids
        self._threads = threads
        self.bundles: list[Bundle] = []

    def nodes(self) -> Sequence[str | None]:
        return self._node_ids

    def submit(self, bundle: Bundle, inputs: Sequence[Input]) -> list[Handle]:
        self.bundles.append(bundle)
        for task in bundle.tasks:
            chunk = chunk_of(task)
            assert chunk is None or chunk.agent.node_id == bundle.node_id, "a chunk is read on another node"
        given = {
            key: group[i] for taken in inputs for group in [taken.handle.fetch()] for i, key in taken.picks
        }
        tasks = cloudpickle.loads(cloudpickle.dumps(bundle.tasks))
        groups = run_bundle(tasks, given, bundle.outputs, self._threads)
        return [NodeGroup(cloudpickle.dumps(group)) for group in groups]

    def fetch(self, handles: Sequence[Handle]) -> list[Sequence[Any]]:
        return [handle.fetch() for handle in handles]
