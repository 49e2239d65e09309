"""Cutting graphs into bundles: which tasks go together, what passes between them, and how many there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
from dask._task_spec import Alias, DataNode, GraphNode, Task, TaskRef
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deisa.ray._graph.bundles import ANYWHERE, CALLER, DRIVER, Partition, partition
from deisa.ray._graph.leaves import (
    ChunkPlace,
    KeptResult,
    Lease,
    StepSlots,
    chunk_of,
    fetch_kept,
    kept_of,
    read_chunk,
    step_of,
)
from deisa.ray._graph.scheduler import BundleScheduler
from deisa.ray._transport import reader
from tests.scheduler.cluster import (
    NodeGroup,
    PretendedExecutor,
    PretendedMemory,
    address,
    array_on_nodes,
    pretend_nodes,
)

NODES = ("n0", "n1", "n2")
Graph = dict[Hashable, GraphNode]


def combine(*values: Any) -> int:
    return int(sum((i + 2) * int(v) for i, v in enumerate(values)) + len(values)) % 1_000_003


@st.composite
def graphs(draw: st.DrawFn, kept: bool = False) -> tuple[Graph, list[Hashable]]:
    """A graph with chunks on random nodes, constants, aliases and tasks; and the keys wanted of it."""
    graph: Graph = {}
    steps: Graph = {
        f"step {t}": DataNode(
            f"step {t}",
            StepSlots({node: draw(st.integers(0, 3)) for node in NODES}, Lease("x", t, lambda *_: None)),
        )
        for t in range(3)
    }
    kinds = ["chunk", "task", "task", "task", "alias", "constant", "free"] + ["kept"] * kept
    for i in range(draw(st.integers(1, 40))):
        key: Hashable = ("x", i) if i % 2 else f"y{i}"
        kind = draw(st.sampled_from(kinds))
        earlier = sorted(graph, key=str)
        if kind in ("task", "alias") and not earlier:
            kind = "chunk"
        if kind == "chunk":
            node, nbytes = draw(st.sampled_from(NODES)), draw(st.sampled_from([8, 1000, 10**6]))
            step = TaskRef(draw(st.sampled_from(sorted(steps, key=str))))
            graph[key] = Task(key, read_chunk, ChunkPlace(address(node), i, nbytes, None), step)
        elif kind == "kept":
            node_id = draw(st.sampled_from([*NODES, None]))
            import cloudpickle

            graph[key] = Task(
                key, fetch_kept, KeptResult(NodeGroup(cloudpickle.dumps([i, i + 1])), i % 2, node_id)
            )
        elif kind == "constant":
            graph[key] = DataNode(key, i)
        elif kind == "free":
            graph[key] = Task(key, combine, i)
        elif kind == "alias":
            graph[key] = Alias(key, draw(st.sampled_from(earlier)))
        else:
            needed = draw(st.lists(st.sampled_from(earlier), min_size=1, max_size=5))
            graph[key] = Task(key, combine, *map(TaskRef, needed))
    keys = draw(st.lists(st.sampled_from(sorted(graph, key=str)), min_size=1, max_size=5))
    return graph | steps, keys


@pytest.fixture(scope="module", autouse=True)
def pretended_nodes() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for node_id in NODES:
            patch.setitem(reader._attached, address(node_id).agent_id, PretendedMemory())
        yield


def given_in(graph: Mapping[Hashable, GraphNode]) -> dict[Hashable, str | None]:
    kept = {key: kept.node_id for key, task in graph.items() if (kept := kept_of(task)) is not None}
    return kept | {key: ANYWHERE for key, task in graph.items() if step_of(task) is not None}


def needed_by(graph: Mapping[Hashable, GraphNode], keys: list[Hashable]) -> set[Hashable]:
    known = given_in(graph)
    needed: set[Hashable] = set()
    stack = list(keys)
    while stack:
        key = stack.pop()
        if key not in needed and key not in known:
            needed.add(key)
            stack += graph[key].dependencies
    return needed


def views_in(graph: Mapping[Hashable, GraphNode]) -> set[Hashable]:
    """Chunks, and other names for them."""
    views = {key for key, task in graph.items() if chunk_of(task) is not None}
    while more := {k for k, t in graph.items() if isinstance(t, Alias) and t.dependencies <= views} - views:
        views |= more
    return views


def check(graph: Mapping[Hashable, GraphNode], keys: list[Hashable], parts: Partition) -> None:
    known = given_in(graph)
    bundles = parts.bundles
    made = [{task.key for task in bundle.tasks} for bundle in bundles]
    times = Counter(key for keys_made in made for key in keys_made)
    assert times.keys() == needed_by(graph, keys), "every needed task, and no other"
    views = views_in(graph)
    assert all(count == 1 or key in views for key, count in times.items()), "only views are made again"
    returned_by = [[key for group in bundle.outputs for key in group] for bundle in bundles]
    home = {
        key: number
        for number in range(len(bundles))
        for key in made[number] - views | set(returned_by[number])
    }
    node_of = {key: bundle.node_id for bundle, here in zip(bundles, made, strict=True) for key in here}
    for bundle, here in zip(bundles, made, strict=True):
        assert len(here) == len(bundle.tasks)
        assert all(node_of[key] == bundle.node_id for key in here), "a view is made again on its node only"
        used = {key for task in bundle.tasks for key in task.dependencies}
        assert here <= used | {key for group in bundle.outputs for key in group}, "nothing is made in vain"

    users: dict[Hashable, set[int]] = {key: set() for key in times}
    for number, bundle in enumerate(bundles):
        assert bundle.tasks and bundle.outputs, "no bundle is idle"
        at_hand = {key for taken in bundle.inputs for key in taken.keys} | set(bundle.given)
        assert len(at_hand) == sum(len(taken.keys) for taken in bundle.inputs) + len(bundle.given), (
            "nothing twice"
        )
        for taken in bundle.inputs:
            assert taken.bundle < number, "bundles depend on earlier ones only"
            assert bundles[taken.bundle].outputs[taken.group] == taken.keys
        outside = {key for task in bundle.tasks for key in task.dependencies} - made[number]
        assert at_hand == outside, "a bundle gets what it needs and nothing else"
        done = set(at_hand)
        for task in bundle.tasks:
            assert task.dependencies <= done, "tasks come in topological order"
            done.add(task.key)
        for key in outside - known.keys():
            users[key].add(number)
        chunks = [chunk for task in bundle.tasks if (chunk := chunk_of(task))]
        assert {chunk.agent.node_id for chunk in chunks} <= {bundle.node_id}
        assert bundle.leaves == len(chunks)
        assert bundle.leaf_bytes == sum(chunk.nbytes for chunk in chunks)
        for group, takers in zip(bundle.outputs, bundle.takers, strict=True):
            taking = {n for n, other in enumerate(bundles) for i in other.inputs if i.keys == group}
            elsewhere = {bundles[n].node_id for n in taking} - {bundle.node_id}
            assert takers == elsewhere | ({CALLER} if set(group) & set(keys) else set())
    for key in set(keys) - known.keys():
        users[key].add(DRIVER)

    # What is returned, and in which company.
    assert Counter(key for returned in returned_by for key in returned) == Counter(
        k for k in users if users[k]
    )
    for number, bundle in enumerate(bundles):
        assert set(returned_by[number]) <= made[number]
        for group in bundle.outputs:
            assert len({frozenset(users[key]) for key in group}) == 1
        assert len({frozenset(users[group[0]]) for group in bundle.outputs}) == len(bundle.outputs)
    assert parts.results.keys() == set(keys) - known.keys()
    for key, (number, group, index) in parts.results.items():
        assert bundles[number].outputs[group][index] == key

    # The rule of levels: same node and same level, same bundle.
    level: dict[Hashable, int] = {}

    def level_of(key: Hashable) -> int:
        if key not in level:
            needed = graph[key].dependencies - known.keys()
            level[key] = max((level_of(d) + (node_of[d] != node_of[key]) for d in needed), default=0)
        return level[key]

    marks = {(node_of[key], level_of(key)): number for key, number in home.items()}
    assert len(marks) == len(bundles)
    assert all(marks[node_of[key], level_of(key)] == number for key, number in home.items())

    # A task beside leaves goes where most of its bytes are.
    for key in home:
        inputs = [chunk_of(graph[d]) for d in graph[key].dependencies]
        if inputs and all(inputs):
            held: Counter[str] = Counter()
            for chunk in inputs:
                assert chunk is not None
                held[chunk.agent.node_id] += chunk.nbytes
            node_id = node_of[key]
            assert node_id is not None and held[node_id] == max(held.values())


@given(graphs())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_graph_is_cut_properly(drawn: tuple[Graph, list[Hashable]]) -> None:
    graph, keys = drawn
    check(graph, keys, partition(graph, keys, lambda: NODES, given_in(graph)))


@given(graphs(kept=True))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_graph_with_kept_values_is_cut_properly(drawn: tuple[Graph, list[Hashable]]) -> None:
    graph, keys = drawn
    check(graph, keys, partition(graph, keys, lambda: NODES, given_in(graph)))


@given(graphs(kept=True), st.sampled_from([1, 3]))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_bundles_compute_what_dask_computes(drawn: tuple[Graph, list[Hashable]], threads: int) -> None:
    graph, keys = drawn
    expected = dask.get(graph, keys)
    computed = BundleScheduler(PretendedExecutor(NODES, threads))(graph, keys)
    assert [int(v) for v in computed] == [int(v) for v in expected]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("split_every", [4, 16])
@pytest.mark.parametrize(("chunks", "nodes"), [(16, 1), (100, 4), (1000, 10), (1024, 32)])
def test_a_mean_takes_one_bundle_for_each_node_and_a_few_more(
    monkeypatch: pytest.MonkeyPatch, chunks: int, nodes: int, split_every: int, threads: int
) -> None:
    node_of_chunk = [f"m{i * nodes // chunks}" for i in range(chunks)]
    pretend_nodes(monkeypatch, sorted(set(node_of_chunk)), (5,), np.float64)
    executor = PretendedExecutor(NODES, threads)
    x = array_on_nodes(node_of_chunk, 5)
    with dask.config.set({"optimization.fuse.active": False, "split_every": split_every}):
        mean = x.mean().compute(scheduler=BundleScheduler(executor))
    assert mean == (chunks - 1) / 2
    levels = int(np.ceil(np.log(chunks) / np.log(split_every)))
    # Where the blocks that are combined straddle two nodes, each border adds one.
    assert len(executor.bundles) <= 2 * nodes + 2 * levels
    assert sum(not bundle.inputs for bundle in executor.bundles) == nodes


@pytest.mark.parametrize("fuse", [None, True])
def test_fused_leaves_keep_their_node_and_their_lease(
    monkeypatch: pytest.MonkeyPatch, fuse: bool | None
) -> None:
    """Dask's own optimisation, as it is outside of callbacks, must not hide chunks inside of other tasks."""
    node_of_chunk = ["m0", "m0", "m1", "m1"]
    pretend_nodes(monkeypatch, ["m0", "m1"], (5,), np.float64)
    executor = PretendedExecutor(["elsewhere"])
    lease = Lease("x", 0, lambda *_: None)
    x = array_on_nodes(node_of_chunk, 5, lease)
    with dask.config.set({"optimization.fuse.active": fuse}):
        assert (x + 1).sum().compute(scheduler=BundleScheduler(executor)) == 5 * (0 + 1 + 2 + 3 + 4)
        assert x[7].compute(scheduler=BundleScheduler(executor)) == 1
    first = [bundle for bundle in executor.bundles if not bundle.inputs]
    assert {bundle.node_id for bundle in first} == {"m0", "m1"}
    held = [steps for bundle, steps in zip(executor.bundles, executor.held, strict=True) if not bundle.inputs]
    assert all([step.lease for step in steps.values()] == [lease] for steps in held)


def test_what_depends_on_no_chunk_is_spread_over_the_nodes() -> None:
    executor = PretendedExecutor(NODES)
    x = da.arange(900, chunks=10)
    assert (x + 1).sum().compute(scheduler=BundleScheduler(executor)) == 900 * 901 // 2
    tasks = Counter({node: 0 for node in NODES})
    for bundle in executor.bundles:
        tasks[bundle.node_id] += len(bundle.tasks)  # type: ignore[index]
    assert min(tasks.values()) > 0.5 * max(tasks.values())
    assert len(executor.bundles) <= 12


def test_what_depends_on_no_chunk_goes_beside_its_users(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nodes(monkeypatch, ["m0", "m1"], (5,), np.float64)
    x = array_on_nodes(["m0", "m1"], 5)
    executor = PretendedExecutor(["elsewhere"])
    total = (x * da.arange(10, chunks=5)).sum()
    assert total.compute(scheduler=BundleScheduler(executor)) == 5 + 6 + 7 + 8 + 9
    assert {bundle.node_id for bundle in executor.bundles} == {"m0", "m1"}
    assert len(executor.bundles) <= 3


def test_a_task_goes_to_the_node_with_most_of_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nodes(monkeypatch, ["m0", "m1"], (5,), np.float64)
    x = array_on_nodes(["m0", "m1", "m1"], 5)
    executor = PretendedExecutor(["elsewhere"])
    joined = x.rechunk(15)
    np.testing.assert_array_equal(
        joined.compute(scheduler=BundleScheduler(executor)), np.repeat([0.0, 1, 2], 5)
    )
    assert [bundle.node_id for bundle in executor.bundles] == [
        "m0",
        "m1",
    ]  # what m1 has, the second one reads


def test_parts_cut_out_weigh_what_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A halo is small: what needs a chunk and its neighbours' edges stays with the chunk."""
    pretend_nodes(monkeypatch, ["m0", "m1", "m2"], (50,), np.float64)
    x = array_on_nodes(["m0", "m1", "m2"], 50)
    executor = PretendedExecutor(["elsewhere"])
    smoothed = x.map_overlap(lambda block: block + block.size, depth=1, boundary="nearest", dtype=float)
    np.testing.assert_array_equal(
        smoothed.compute(scheduler=BundleScheduler(executor)), np.repeat([0.0, 1, 2], 50) + 52
    )
    overlapping = {
        bundle.node_id for bundle in executor.bundles for task in bundle.tasks if "overlap" in str(task.key)
    }
    assert overlapping == {"m0", "m1", "m2"}
    chunks = {task.key for bundle in executor.bundles for task in bundle.tasks if chunk_of(task) is not None}
    assert not chunks & {key for bundle in executor.bundles for group in bundle.outputs for key in group}


def test_only_what_is_wanted_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nodes(monkeypatch, ["m0", "m1"], (5,), np.float64)
    x = array_on_nodes(["m0"] * 50 + ["m1"] * 50, 5)
    executor = PretendedExecutor(["elsewhere"])
    x[:7].sum().compute(scheduler=BundleScheduler(executor))
    assert {bundle.node_id for bundle in executor.bundles} == {"m0"}
    assert sum(chunk_of(task) is not None for bundle in executor.bundles for task in bundle.tasks) == 2


def test_a_cycle_is_refused() -> None:
    graph: Graph = {"a": Task("a", combine, TaskRef("b")), "b": Task("b", combine, TaskRef("a"))}
    with pytest.raises(ValueError, match="cycle"):
        partition(graph, ["a"], lambda: NODES, {})


def test_a_missing_key_is_named() -> None:
    with pytest.raises(KeyError, match="gone"):
        partition({"a": Task("a", combine, TaskRef("gone"))}, ["a"], lambda: NODES, {})


def test_deep_graphs_are_no_problem() -> None:
    graph: Graph = {0: DataNode(0, 1)}
    graph |= {i: Task(i, combine, TaskRef(i - 1)) for i in range(1, 20_000)}  # type: ignore[arg-type]
    parts = partition(graph, [19_999], lambda: NODES, {})
    assert len(parts.bundles) == 1
