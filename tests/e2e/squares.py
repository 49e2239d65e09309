"""Ranks that send an array ``T`` of chunks of 8 x 8, one chunk each, and one callback on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from deisa.ray import DeisaArray, Report, WindowSpec
from tests.e2e.simulation import Ranks, Site

SIDE = 8


def square(timestep: int, grid: tuple[int, int] = (2, 2)) -> np.ndarray:
    """The whole array at a timestep."""
    rows, columns = SIDE * grid[0], SIDE * grid[1]
    return np.arange(rows * columns, dtype=float).reshape(rows, columns) + 1000.0 * timestep


def send_squares(
    site: Site, rank: int, timesteps: int, grid: tuple[int, int] = (2, 2), **settings: Any
) -> None:
    """Be a rank."""
    row, column = divmod(rank, grid[1])
    box = (slice(SIDE * row, SIDE * row + SIDE), slice(SIDE * column, SIDE * column + SIDE))
    chunk = {
        "chunk_shape": (SIDE, SIDE),
        "nb_chunks_per_dim": grid,
        "chunk_position": (row, column),
        "dtype": float,
    }
    with site.bridge(rank, grid[0] * grid[1], {"T": chunk}, **settings) as bridge:
        for timestep in range(timesteps):
            bridge.send("T", square(timestep, grid)[box], timestep)


def reraise(error: Exception) -> None:
    """End the run where a callback raises."""
    raise error


def run_squares(
    site: Site,
    callback: Callable[[list[DeisaArray]], Any],
    timesteps: int,
    *,
    grid: tuple[int, int] = (2, 2),
    window_size: int = 1,
) -> Report:
    """Run one callback on the whole simulation; raises what it raises."""
    deisa = site.deisa()
    deisa.register_callback(callback, WindowSpec("T", window_size), exception_handler=reraise)
    running = Ranks(
        [lambda rank=rank: send_squares(site, rank, timesteps, grid) for rank in range(grid[0] * grid[1])]
    )
    report = deisa.execute_callbacks()
    running.check()
    return report
