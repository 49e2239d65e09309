"""Tasks that touch objects of this process run here, fed little by little by bundles on the nodes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest

from deisa.ray._graph import bundles
from deisa.ray._graph.in_caller import AHEAD
from deisa.ray._graph.leaves import Handle
from deisa.ray._graph.scheduler import BundleScheduler
from tests.scheduler.cluster import PretendedExecutor, at_slot, home_on_nodes, pretend_nodes

LENGTH = 50
CHUNKS = 40
NODES = [f"m{i % 4}" for i in range(CHUNKS)]


class CountingExecutor(PretendedExecutor):
    """Knows how many groups of values exist that nobody has fetched yet."""

    def __init__(self) -> None:
        super().__init__(sorted(set(NODES)))
        self.waiting: set[int] = set()
        self.most_waiting = 0
        self.largest = 0

    def submit(self, *arguments: Any) -> list[Handle]:
        handles = super().submit(*arguments)
        self.waiting |= set(map(id, handles))
        self.most_waiting = max(self.most_waiting, len(self.waiting))
        self._all = [*getattr(self, "_all", ()), *handles]  # so that no two have the same id
        return handles

    def fetch(self, handles: Sequence[Handle]) -> list[Sequence[Any]]:
        self.waiting -= set(map(id, handles))
        groups = super().fetch(handles)
        self.largest = max([self.largest, *(sum(getattr(v, "nbytes", 0) for v in group) for group in groups)])
        return groups


@pytest.fixture
def x(monkeypatch: pytest.MonkeyPatch) -> da.Array:
    """An array whose chunks lie on four nodes by turns."""
    pretend_nodes(monkeypatch, sorted(set(NODES)), (LENGTH,), np.float64)
    return at_slot(home_on_nodes(NODES, LENGTH), 1)


@pytest.mark.parametrize(
    "build",
    [
        lambda x: x,
        lambda x: x.map_blocks(lambda b: 2 * b),
        lambda x: x[1:] - x[:-1],
        lambda x: x.rechunk(333),
    ],
    ids=["chunks", "user code", "slices", "rechunked"],
)
def test_what_is_stored_comes_little_by_little(
    x: da.Array, build: Callable[[da.Array], da.Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 3 * 8 * LENGTH
    monkeypatch.setattr(bundles, "FEED_BYTES", most)
    executor = CountingExecutor()
    lazy = build(x)
    expected = lazy.compute(scheduler="sync")
    out = np.full(lazy.shape, np.nan)
    with dask.config.set({"optimization.fuse.active": False}):
        lazy.store(out, scheduler=BundleScheduler(executor), lock=False)
    np.testing.assert_array_equal(out, expected)
    if build(x).numblocks == x.numblocks:  # values that need no others' are never there all at once
        assert executor.most_waiting <= 1 + AHEAD
        assert executor.largest <= most
    assert len(executor.bundles) > len(set(NODES))


def test_values_of_the_caller_go_on_to_nodes(x: da.Array) -> None:
    executor = CountingExecutor()
    scheduler = BundleScheduler(executor)
    out = np.zeros(x.shape)
    stored = x.store(out, return_stored=True, compute=False, lock=False)
    doubled = stored.map_blocks(lambda b: np.full_like(b, 2 * b.sum()))
    total, mean = dask.compute(doubled.sum(), x.mean(), scheduler=scheduler)
    np.testing.assert_array_equal(out, x.compute(scheduler="sync"))
    assert total == 2 * LENGTH * out.sum()
    assert mean == out.mean()


def test_a_plan_with_a_target_serves_once(x: da.Array) -> None:
    """Two targets with the same values are two targets."""
    scheduler = BundleScheduler(CountingExecutor())
    outs = [np.zeros(x.shape) for _ in range(3)]
    for number, out in enumerate(outs):
        (x + number).store(out, scheduler=scheduler, lock=False)
    again = [np.zeros(x.shape) for _ in range(3)]
    for out in again:
        x.store(out, scheduler=scheduler, lock=False)
    expected = x.compute(scheduler="sync")
    for number, out in enumerate(outs):
        np.testing.assert_array_equal(out, expected + number)
    for out in again:
        np.testing.assert_array_equal(out, expected)
    assert scheduler.usage.reused_plans == 0


class Stored:
    """Stands for a chunk in the caller: where each was stored."""

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.blocks: dict[int, float] = {}

    def __setitem__(self, index: Any, value: np.ndarray) -> None:
        self.pids.append(os.getpid())
        (at,) = index
        self.blocks[at.start] = float(value[0])


def test_several_sources_and_targets(x: da.Array) -> None:
    first, second = Stored(), np.zeros(LENGTH)
    da.store([x, x[:LENGTH] * 3], [first, second], scheduler=BundleScheduler(CountingExecutor()), lock=False)
    expected = x.compute(scheduler="sync")
    assert len(first.pids) == CHUNKS
    assert {at: expected[at] for at in range(0, CHUNKS * LENGTH, LENGTH)} == first.blocks
    np.testing.assert_array_equal(second, 3 * expected[:LENGTH])


def test_zarr_in_files_is_written_by_nodes_unless_they_share_a_chunk(x: da.Array, tmp_path: Any) -> None:
    zarr = pytest.importorskip("zarr")
    ran: dict[str, int] = {}
    for name, chunk, shard in (
        ("own", LENGTH, None),
        ("shared", LENGTH + 10, None),
        ("sharded", 10, 2 * LENGTH),
    ):
        executor = CountingExecutor()
        target = zarr.create_array(
            tmp_path / name, shape=x.shape, chunks=(chunk,), shards=shard and (shard,), dtype=float
        )
        x.store(target, scheduler=BundleScheduler(executor), lock=False)
        np.testing.assert_array_equal(target[:], x.compute(scheduler="sync"))
        ran[name] = sum(bundle.feeds for bundle in executor.bundles)
    assert ran["own"] == 0
    assert ran["shared"] > 0
    assert ran["sharded"] > 0
