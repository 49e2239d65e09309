"""How the cost of a callback grows with the number of chunks."""

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

NEVER = 10**9  # a number of chunks beyond which nothing is merged


def mean(window: Sequence[da.Array]) -> float:
    """The mean of the newest timestep."""
    return float(window[-1].mean().compute())


@case("How long does mean() over many chunks take, from the last chunk to the result?")
def many_chunks(setting: Setting) -> Outcome:
    """64, 1,024 and 10,000 chunks of 8 KiB against one Ray task for each Dask task."""
    outcome = Outcome()
    targets = {(8, 8): 10, (32, 32): 50, (100, 100): 100}
    with ray_cluster():
        for chunks, target in targets.items() if not setting.quick else {(4, 4): 2}.items():
            grid = Grid(chunks)
            ours = run(grid, setting.pick(12, 6), mean)
            outcome.figure(f"mean() of {grid.count} chunks, callback", THIS, ours.later, "s")
            answer = outcome.figure(
                f"mean() of {grid.count} chunks, last chunk -> result", THIS, ours.answer_later, "s"
            )
            try:
                ray_dask_get_time(mean, [in_object_store(Grid((4, 4)))])  # its workers are up then
                theirs, expected = ray_dask_get_time(mean, [in_object_store(grid)])
            except PeerUnavailableError as reason:
                outcome.not_measured(RAY_DASK, reason)
                continue
            np.testing.assert_allclose(ours.results, expected)
            outcome.figure(f"mean() of {grid.count} chunks", RAY_DASK, theirs, "s")
            outcome.compare(
                f"mean() of {grid.count} chunks: ray_dask_get / this, last chunk -> result",
                theirs / answer,
                ">=",
                target,
            )
    return outcome


@case("From how many chunks on is it faster to merge those of a node?")
def when_to_merge(setting: Setting) -> Outcome:
    """Mean of 4 to 2,000 chunks of 8 KiB with and without merging, in turns; 64 and 1,024 with the default."""
    outcome = Outcome()
    rounds, steps = setting.pick((3, 24), (1, 5))

    def answers(grids: Sequence[Grid], *settings: dict[str, int]) -> list[list[float]]:
        """Median time from the last chunk to the mean, by grid and settings; all take turns."""
        taken = [
            [[run(grid, steps, mean, pause_s=0.1, **one).answer_later for one in settings] for grid in grids]
            for _ in range(rounds)
        ]
        return np.median(taken, axis=0).tolist()

    sides = ((2, 2), (4, 4), (4, 6), (4, 8), (6, 8), (8, 8), (8, 16), (16, 16), (16, 32), (32, 32), (40, 50))
    grids = [Grid(side) for side in setting.pick(sides, ((2, 2), (4, 4)))]
    names = ("apart", "merged")
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    with ray_cluster():
        by_grid = answers(grids, {"merge_chunks_beyond": NEVER}, {"merge_chunks_beyond": 0})
        few, many = (Grid(side) for side in setting.pick(((8, 8), (32, 32)), ((2, 2), (4, 4))))
        ((few_s,), (many_s,)) = answers((few, many), {})
    for grid, both in zip(grids, by_grid, strict=True):
        for name, seconds in zip(names, both, strict=True):
            lines[name].append((grid.count, seconds))
            outcome.figure(f"mean() of {grid.count} chunks {name}, last chunk -> result", THIS, seconds, "s")
    for grid, seconds in ((few, few_s), (many, many_s)):
        outcome.figure(f"mean() of {grid.count} chunks with the default settings", THIS, seconds, "s")
    outcome.compare(f"mean() of {few.count} chunks / of {many.count}", few_s / many_s, "<=", 1)
    outcome.curve("Last chunk handed over -> mean()", "chunks", "seconds", lines)
    return outcome


@case(
    "What does a timestep cost the driver, by number of chunks, when the graph is new and when it is known?"
)
def planning(setting: Setting) -> Outcome:
    """Mean of 100 to 10,000 chunks, unmerged and merged."""
    outcome = Outcome()
    names = ("first timestep", "later timesteps", "later, merged per node")
    lines: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    sides = setting.pick((10, 18, 32, 56, 100), (4, 8))
    with ray_cluster():
        for side in sides:
            grid = Grid((side, side), (8, 8))
            apart = run(grid, setting.pick(10, 5), mean, merge_chunks_beyond=NEVER)
            merged = run(grid, setting.pick(10, 5), mean, merge_chunks_beyond=0)
            first, later = float(apart.driver[0]), float(np.median(apart.driver[3:]))
            points = (first, later, float(np.median(merged.driver[3:])))
            for name, seconds in zip(names, points, strict=True):
                lines[name].append((grid.count, seconds))
                outcome.figure(f"driver's processor time, {grid.count} chunks, {name}", THIS, seconds, "s")
        outcome.compare(
            f"driver time per timestep at {grid.count} chunks: graph known / first timestep",
            later / first,
            "<=",
            0.2,
        )
    outcome.curve("Processor time of the driver for mean()", "chunks", "seconds per timestep", lines)
    return outcome
