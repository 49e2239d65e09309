"""What it brings that chunks of a node are merged, and what it costs the ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.cases.many_chunks import NEVER
from benchmarks.clusters import ray_cluster
from benchmarks.grids import Grid, run
from benchmarks.suite import THIS, Outcome, Setting, case

if TYPE_CHECKING:
    import dask.array as da


def differences(window: Sequence[da.Array]) -> float:
    """The mean square of differences between neighbouring rows."""
    x = window[-1]
    return float(((x[1:] - x[:-1]) ** 2).mean().compute())


def gradient(window: Sequence[da.Array]) -> float:
    """The mean size of the gradient, found with halos of one element."""
    x = window[-1]
    dx = x.map_overlap(lambda block: np.gradient(block, axis=0), depth=1, boundary="nearest", dtype=x.dtype)
    return float(abs(dx).mean().compute())


EXPRESSIONS: dict[str, Callable[[Sequence[Any]], float]] = {
    "((x[1:] - x[:-1])**2).mean()": differences,
    "gradient by map_overlap": gradient,
}


@case("What do expressions over 10,000 rank chunks cost, with and without merging the chunks of a node?")
def merging(setting: Setting) -> Outcome:
    """Slices and halos over 10,000 chunks of 8 KiB."""
    outcome = Outcome()
    grid = Grid(setting.pick((100, 100), (8, 8)))
    with ray_cluster():
        for name, expression in EXPRESSIONS.items():
            steps = setting.pick(5, 4)
            apart = run(grid, steps, expression, merge_chunks_beyond=NEVER)
            merged = run(grid, 2 * steps, expression, merge_chunks_beyond=0)
            np.testing.assert_allclose(merged.results[0], apart.results[0])
            outcome.figure(f"{name}, {grid.count} chunks apart", THIS, apart.later, "s")
            outcome.figure(f"{name}, merged", THIS, merged.later, "s")
            outcome.compare(f"{name}: apart / merged", apart.later / merged.later, ">=", 20)
    return outcome
