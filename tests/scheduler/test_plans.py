"""Reusing plans: the same graph on another timestep is recognised, another graph never."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import pytest

from deisa.ray._graph.scheduler import BundleScheduler
from tests.scheduler.cluster import PretendedExecutor, at_slot, home_on_nodes, pretend_nodes

NODES = ["m0", "m0", "m1", "m1"]


def scaled(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda block: block * factor


@pytest.mark.parametrize(
    "build",
    [
        lambda x, y: x.mean(),
        lambda x, y: (x[1:] - x[:-1]).std(),
        lambda x, y: x.map_blocks(scaled(2.0)).sum(),
        lambda x, y: da.map_overlap(np.gradient, x, depth=1, boundary="reflect", meta=x._meta).sum(),
        lambda x, y: (x - y).max(),
        lambda x, y: da.histogram(x, bins=4, range=(0, 4000))[0],
    ],
    ids=["mean", "slices", "closure", "overlap", "two timesteps", "histogram"],
)
def test_a_plan_serves_other_timesteps(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nodes(monkeypatch, ["m0", "m1"], (5,), np.float64)
    scheduler = BundleScheduler(PretendedExecutor(["elsewhere"]))
    home = home_on_nodes(NODES, 5)
    for slot in range(3):
        x, y = at_slot(home, slot + 1), at_slot(home, slot)
        expected = build(x, y).compute(scheduler="sync")
        np.testing.assert_allclose(build(x, y).compute(scheduler=scheduler), expected)
    assert scheduler.usage.reused_plans == 2


def test_what_differs_is_not_taken_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_nodes(monkeypatch, ["m0", "m1"], (5,), np.float64)
    scheduler = BundleScheduler(PretendedExecutor(["elsewhere"]))
    home, other = home_on_nodes(NODES, 5), home_on_nodes(["m1", "m0", "m0", "m0"], 5)
    x, y, z = at_slot(home, 1), at_slot(home, 3), at_slot(other, 1)
    token, another = "0" * 31 + "a", "0" * 31 + "b"
    alike = [
        x.sum(), z.sum(), x.max(), (x - y).sum(), (y - x).sum(), (x + 1).sum(), (x + 2).sum(), x[1:].sum(),
        x[2:].sum(), x.map_blocks(scaled(2.0)).sum(), x.map_blocks(scaled(3.0)).sum(),
        x.map_blocks(lambda b, k: b * int(k, 16), token).sum(),
        x.map_blocks(lambda b, k: b * int(k, 16), another).sum(),
    ]  # fmt: skip
    for lazy in alike:
        expected = lazy.compute(scheduler="sync")
        np.testing.assert_allclose(lazy.compute(scheduler=scheduler), expected)
    assert scheduler.usage.reused_plans == 1  # x - y and y - x are alike, with their slots in the other order
