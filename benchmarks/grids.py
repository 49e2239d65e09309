"""A two-dimensional array in many chunks, handed over by a few ranks, and the analytics of it in this process."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.clusters import output_of, started
from benchmarks.peers import PeerUnavailableError

if TYPE_CHECKING:
    import dask.array as da

    from deisa.ray.report import Report

RANKS = 2
TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Grid:
    """Chunks of one array.

    Attributes
    ----------
    chunks : (int, int)
        Along each dimension.
    shape : (int, int)
        Of one chunk (elements).
    """

    chunks: tuple[int, int]
    shape: tuple[int, int] = (32, 32)

    @property
    def count(self) -> int:
        """Number of chunks."""
        return self.chunks[0] * self.chunks[1]

    def values(self) -> np.ndarray:
        """The whole array, as the ranks make it."""
        rows = [
            np.hstack([np.random.default_rng((i, j)).random(self.shape) for j in range(self.chunks[1])])
            for i in range(self.chunks[0])
        ]
        return np.vstack(rows)


@dataclass(frozen=True)
class Steps:
    """What a run over a grid took, by timestep (seconds).

    Attributes
    ----------
    callback : array
        The whole callback: building the expression, planning, computing.
    answer : array
        From the last chunk being handed over to the callback's end.
    driver : array
        Processor time of the analytics process within the callback.
    results : list
        What the callback returned.
    report : Report
    """

    callback: np.ndarray
    answer: np.ndarray
    driver: np.ndarray
    results: Sequence[Any]
    report: Report

    @property
    def later(self) -> float:
        """Median time of the callback once its graph has been seen."""
        return float(np.median(self.callback[len(self.callback) // 2 :]))

    @property
    def answer_later(self) -> float:
        """Median time from handing over to the result once the graph has been seen."""
        return float(np.median(self.answer[len(self.answer) // 2 :]))


def run(
    grid: Grid,
    steps: int,
    compute: Callable[[Sequence[da.Array]], Any],
    *,
    window: int = 1,
    pause_s: float = 0.2,
    labels: bool = False,
    **settings: Any,
) -> Steps:
    """Hand the grid over so often, and compute something of each window in this process.

    A Ray cluster must be up. With `labels` the ranks give labels and times, and `compute` gets the window itself
    instead of a list of Dask arrays. `settings` are those of the session.
    """
    from deisa.ray import Deisa, Settings, WindowSpec

    session = f"bench-{os.urandom(3).hex()}"
    deisa = Deisa(settings=Settings(session=session, **settings))
    callback, ended_at, driver, results = [], [], [], []

    def analyse(field: Sequence[Any]) -> None:
        used, began = time.process_time(), time.perf_counter()
        results.append(compute(field if labels else [timestep.dask for timestep in field]))
        callback.append(time.perf_counter() - began)
        ended_at.append(time.monotonic())
        driver.append(time.process_time() - used)

    deisa.register_callback(analyse, [WindowSpec("field", window_size=window)], exception_handler=_raise)
    program = [
        *(Path(sys.executable).parent / "mpiexec", "-n", RANKS, sys.executable, "-m"),
        *("benchmarks.programs.grid_ranks", "--session", session, "--steps", steps, "--pause", pause_s),
        *("--grid", *grid.chunks, "--chunk", *grid.shape, *(["--labels"] if labels else [])),
    ]
    with started(list(map(str, program))) as simulation:
        report = deisa.execute_callbacks()
        ranks = json.loads(output_of(simulation, TIMEOUT_S).splitlines()[-1])
    return Steps(
        *map(np.array, (callback, np.subtract(ended_at, ranks["handed_over_at"]), driver)),
        results,
        report,
    )


def _raise(error: Exception) -> None:
    raise error


def in_object_store(grid: Grid) -> da.Array:
    """Put every chunk of the grid into Ray's object store; returns the Dask array made of the references."""
    import dask.array as da
    import ray

    values = grid.values()
    rows, columns = grid.shape
    name = f"stored-{os.urandom(4).hex()}"
    graph = {
        (name, i, j): ray.put(values[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].copy())
        for i in range(grid.chunks[0])
        for j in range(grid.chunks[1])
    }
    chunks = tuple((n,) * count for n, count in zip(grid.shape, grid.chunks, strict=True))
    return da.Array(graph, name, chunks, dtype=values.dtype)


def ray_dask_get_time(
    compute: Callable[[Sequence[da.Array]], Any], arrays: Sequence[da.Array]
) -> tuple[float, Any]:
    """Time a computation with Ray's own Dask scheduler, one Ray task for each Dask task (seconds, result).

    Raises
    ------
    PeerUnavailableError
        Without ``dask[dataframe]``, which that scheduler imports.
    """
    import dask

    try:
        from ray.util.dask import ray_dask_get
    except ImportError as error:
        raise PeerUnavailableError(str(error)) from error

    with dask.config.set(scheduler=ray_dask_get):
        began = time.perf_counter()
        result = compute(arrays)
        return time.perf_counter() - began, result
