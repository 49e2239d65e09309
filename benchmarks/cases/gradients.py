"""A callback that does more than a mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.clusters import ray_cluster
from benchmarks.grids import Grid, in_object_store, ray_dask_get_time, run
from benchmarks.peers import RAY_DASK, PeerUnavailableError
from benchmarks.suite import THIS, Outcome, Setting, case

if TYPE_CHECKING:
    import dask.array as da


def harder(window: Sequence[da.Array]) -> tuple[np.ndarray, ...]:
    """Mean gradient, standard deviation and histogram of the mean over a window."""
    import dask
    import dask.array as da

    mean = sum(window[1:], start=window[0]) / len(window)
    gradient = mean.map_overlap(
        lambda block: np.hypot(*np.gradient(block)), depth=1, boundary="nearest", dtype=mean.dtype
    )
    counts, _ = da.histogram(mean, bins=64, range=(0, 1))
    return dask.compute(gradient.mean(), mean.std(), counts)


@case("How long does a harder callback take: a gradient, a deviation and a histogram over a window of 3?")
def harder_callback(setting: Setting) -> Outcome:
    """1,024 chunks of 8 KiB, a window of 3 timesteps."""
    outcome = Outcome()
    grid = Grid(setting.pick((32, 32), (3, 3)))
    with ray_cluster():
        ours = run(grid, setting.pick(12, 6), harder, window=3)
        outcome.figure(f"harder callback, {grid.count} chunks, window of 3", THIS, ours.later, "s")
        try:
            ray_dask_get_time(harder, [in_object_store(Grid((2, 2)))])  # its workers are up then
            theirs, expected = ray_dask_get_time(harder, [in_object_store(grid) for _ in range(3)])
        except PeerUnavailableError as reason:
            outcome.not_measured(RAY_DASK, reason)
            return outcome
    for got, wanted in zip(ours.results[-1], expected, strict=True):
        np.testing.assert_allclose(got, wanted)
    outcome.figure(f"harder callback, {grid.count} chunks, window of 3", RAY_DASK, theirs, "s")
    outcome.compare("harder callback: ray_dask_get / this", theirs / ours.later, ">=", 20)
    return outcome
