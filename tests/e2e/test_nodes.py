"""Three nodes, each with a network of its own: ranks on two of them, the analytics on the head."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import zarr

from tests.support.netns import NamespacedCluster
from tests.support.patience import PATIENCE_S
from tests.support.processes import kill_tree

pytestmark = [pytest.mark.netns, pytest.mark.ray]

PROGRAMS = Path(__file__).parent / "programs"

Run = tuple[list[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def run_on_nodes(netns_cluster: NamespacedCluster, session_name: str) -> Callable[..., Run]:
    """Runs ranks on nodes 1 and 2 and node_analytics.py on node 0; returns what that printed."""

    def run(
        what: str,
        *,
        ranks_per_node: int,
        timesteps: int,
        elements: int,
        printed: list[str] | None = None,
        **settings: object,
    ) -> Run:
        settings = {"session": session_name} | settings
        env = {f"DEISA_RAY_{name.upper()}": str(value) for name, value in settings.items()}
        env["PYTHONPATH"] = ""
        size = 2 * ranks_per_node
        analytics = netns_cluster.run(0, [sys.executable, str(PROGRAMS / "node_analytics.py"), what], env)
        simulation = [
            netns_cluster.run(
                1 + rank // ranks_per_node,
                [
                    sys.executable,
                    str(PROGRAMS / "rank.py"),
                    *map(str, (rank, size, timesteps, elements)),
                    "close" if printed is None else "steered",
                ],
                env,
            )
            for rank in range(size)
        ]
        try:
            for process in simulation:
                output, complaints = process.communicate(timeout=PATIENCE_S)
                assert process.returncode == 0, complaints
                if printed is not None:
                    printed.append(output)
            stdout, complaints = analytics.communicate(timeout=PATIENCE_S)
            assert analytics.returncode == 0, complaints
        finally:
            for process in (analytics, *simulation):
                with process:  # closes its pipes
                    kill_tree(process)
        *timesteps_seen, figures = map(json.loads, stdout.splitlines())
        assert figures["failed"] == 0, complaints
        return timesteps_seen, figures

    return run


@pytest.mark.parametrize(
    ("ranks_per_node", "beyond", "chunks"),
    [(2, 1000, 4), (4, 0, 4)],
    ids=["a chunk for each rank", "merged"],
)
def test_results_are_right_across_nodes(
    run_on_nodes: Callable[..., Run], ranks_per_node: int, beyond: int, chunks: int
) -> None:
    """Merged, each node's ranks fill one box, which Dask sees cut in two, for two CPUs."""
    elements = 1000
    seen, figures = run_on_nodes(
        "all", ranks_per_node=ranks_per_node, timesteps=3, elements=elements, merge_chunks_beyond=beyond
    )
    assert [found["t"] for found in seen] == [0, 1, 2]
    for found in seen:
        whole = np.arange(2.0 * ranks_per_node * elements) + found["t"]
        middle = len(whole) // 2
        assert found["mean"] == pytest.approx(whole.mean())
        assert found["std"] == pytest.approx(whole.std())
        assert found["across"] == whole[middle - 3 : middle + 3].tolist()
        assert found["steps"] == pytest.approx(len(whole))  # the slope is 1 everywhere, at borders too
        assert found["chunks"] == chunks
        assert found["labels"] == [["cell"], "K", "m", found["t"], found["t"] / 4]
        assert found["from_cell"] == pytest.approx(whole[middle:].mean())
        assert found["at_cell"] == whole[middle - 1] + 0.5  # between cells of two nodes
        assert found["persisted"] == whole[::100].sum()
    assert figures["nodes"] == 3


def test_a_mean_moves_next_to_nothing(
    netns_cluster: NamespacedCluster, run_on_nodes: Callable[..., Run]
) -> None:
    """Half a MiB may cross the network for each 32 MiB of data; moving a chunk would be all of it."""

    def transferred() -> int:
        return sum(netns_cluster.bytes_sent(node) for node in range(3))

    before = transferred()
    seen, figures = run_on_nodes("mean", ranks_per_node=1, timesteps=4, elements=2**22)
    moved = transferred() - before
    share = moved / figures["bytes"]
    bundles = [found["bundles"] for found in seen]
    print(
        f"{figures['bytes'] / 2**20:.0f} MiB handed over, {moved / 2**20:.2f} MiB sent by all nodes ({share:.2%}), "
        f"{bundles} bundles"
    )
    assert figures["bytes"] == 4 * 2 * 2**25
    assert [found["mean"] for found in seen] == [2**22 - 0.5 + t for t in range(4)]
    assert share < 0.02
    assert max(bundles) <= 3  # one on each of the two nodes, one to combine


@pytest.mark.slow
def test_every_node_writes_its_own_part(
    netns_cluster: NamespacedCluster, run_on_nodes: Callable[..., Run], tmp_path: Path
) -> None:
    """What is saved does not pass through the analytics: next to nothing crosses the network."""

    def transferred() -> int:
        return sum(netns_cluster.bytes_sent(node) for node in range(3))

    before, elements = transferred(), 2**21
    seen, figures = run_on_nodes(f"save:{tmp_path}", ranks_per_node=1, timesteps=3, elements=elements)
    share = (transferred() - before) / figures["bytes"]
    assert [found["t"] for found in seen] == [0, 1, 2]
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert group["timestep"][:].tolist() == [0, 1, 2]
    for t in range(3):
        whole = np.arange(2.0 * elements) + t
        np.testing.assert_array_equal(group["x"][t], whole)
        with h5py.File(tmp_path / f"out-{t}.h5") as file:
            np.testing.assert_array_equal(file["x"][0], whole)
    assert share < 0.05


@pytest.mark.slow
def test_ranks_of_all_nodes_get_the_same_answers(run_on_nodes: Callable[..., Run]) -> None:
    printed: list[str] = []
    run_on_nodes("steer", ranks_per_node=2, timesteps=40, elements=10, printed=printed)
    assert len(printed) == 4
    assert len(set(printed)) == 1, printed
    answers = [json.loads(line) for line in printed[0].splitlines()]
    assert [answer["mean"] for answer in answers] == [19.5 + t for t in range(40)]
    assert all(answer["early"] in ("default", t) for t, answer in enumerate(answers))
