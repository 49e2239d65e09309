"""What it costs a callback that arrays have labels."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.clusters import ray_cluster
from benchmarks.grids import Grid, run
from benchmarks.suite import THIS, Outcome, Setting, case

Compute = Callable[[Any], Any]


def _mean(window: Any) -> float:
    return float(window[-1].dask.mean().compute())


def _labelled_mean(window: Any) -> float:
    return float(window[-1].xarray.mean(skipna=False).compute())


def _profile(window: Any) -> np.ndarray:
    """The mean along one dimension."""
    profile: np.ndarray = window[-1].dask.mean(axis=0).compute()
    return profile


def _labelled_profile(window: Any) -> np.ndarray:
    profile: np.ndarray = window[-1].xarray.mean("y", skipna=False).compute().values
    return profile


def _rate(window: Any) -> float:
    """How fast the window changes."""
    import dask.array as da

    stacked = da.stack([timestep.dask for timestep in window])
    return float((stacked[1:] - stacked[:-1]).mean().compute())


def _labelled_rate(window: Any) -> float:
    return float(window.xarray.diff("time").mean(skipna=False).compute())


PAIRS: dict[str, tuple[Compute, Compute]] = {
    "mean": (_mean, _labelled_mean),
    "mean along a dimension": (_profile, _labelled_profile),
    "change over a window of 3": (_rate, _labelled_rate),
}


@case("What does a callback cost that uses labels (xarray), beside one that uses the Dask array?")
def labels(setting: Setting) -> Outcome:
    """The same result in both ways at each timestep, each way first in every other one."""
    outcome = Outcome()
    small = {"4 chunks of 8 KiB": (Grid((2, 2)), None)}
    sizes = setting.pick({"4 chunks of 32 MiB": (Grid((2, 2), (2048, 2048)), 1.2), **small}, small)
    steps = setting.pick(60, 8)
    with ray_cluster():
        for size, (grid, target) in sizes.items():
            taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in PAIRS}

            def in_both_ways(window: Any, taken: Any = taken) -> None:
                if len(window) < 3:
                    return
                for name, ways in PAIRS.items():
                    results = [None, None]
                    for way in (0, 1) if window[-1].t % 2 else (1, 0):
                        began = time.perf_counter()
                        results[way] = ways[way](window)
                        taken[name][way].append(time.perf_counter() - began)
                    np.testing.assert_allclose(*results)

            run(grid, steps, in_both_ways, window=3, pause_s=0.1, labels=True)
            for name, both in taken.items():
                plain, labelled = (float(np.median(seconds[len(seconds) // 2 :])) for seconds in both)
                outcome.figure(f"{name}, {size}, median", "Dask array", plain, "s")
                outcome.figure(f"{name}, {size}, median", f"{THIS}, xarray", labelled, "s")
                outcome.compare(f"{name}, {size}: with labels / without", labelled / plain, "<=", target)
            without, with_labels = (
                run(grid, steps, compute, pause_s=0.05, labels=given)
                for given, compute in ((False, lambda window: window[0].mean().compute()), (True, _mean))
            )
            outcome.compare(
                f"chunk complete -> mean, {size}: ranks that give labels and times / that give none",
                with_labels.answer_later / without.answer_later,
                "<=",
                1.2,
            )
    outcome.notes.append(
        "Ways of one result are compared at the same timesteps of one run; ranks with and without labels in two runs, "
        "one after the other. xarray's own work is about the same for every computation, however large the array is: "
        "the small one has no target. `skipna=False` has xarray compute what Dask does; by default it looks for NaN."
    )
    return outcome
