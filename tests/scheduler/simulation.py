"""A simulation whose ranks are threads of this process; every chunk says which timestep and chunk it is."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from deisa.ray import Bridge, Deisa, Report, Settings, WindowSpec
from deisa.ray.errors import DeisaError
from tests.support.patience import PATIENCE_S

ROWS, COLUMNS = 40, 30  # of a chunk


def chunk_at(timestep: int, row: int, column: int, name: str = "x") -> np.ndarray:
    """A chunk's values: no two chunks, timesteps or elements have the same."""
    base = np.arange(ROWS * COLUMNS, dtype=np.float64).reshape(ROWS, COLUMNS) / 4096
    return base + (1000 * timestep + 10 * row + column) * (-1 if name == "y" else 1)


class Simulation:
    """Ranks that send arrays ``x`` (and more) of a grid of chunks, each rank one row of the grid.

    Attributes
    ----------
    sent : list of int
        For each rank, how many timesteps it has handed over.
    errors : dict of int to DeisaError
        What ended a rank.
    """

    def __init__(
        self,
        settings: Settings,
        timesteps: int,
        grid: tuple[int, int] = (2, 2),
        names: Sequence[str] = ("x",),
    ) -> None:
        self._settings = settings
        self._timesteps = timesteps
        self.grid = grid
        self._names = names
        self.sent = [0] * grid[0]
        self.errors: dict[int, DeisaError] = {}
        self._threads = [
            threading.Thread(target=self._rank, args=(row,), daemon=True) for row in range(grid[0])
        ]

    def at(self, timestep: int, name: str = "x") -> np.ndarray:
        """The whole array at a timestep."""
        rows, columns = self.grid
        return np.block([[chunk_at(timestep, i, j, name) for j in range(columns)] for i in range(rows)])

    def _rank(self, row: int) -> None:
        rows, columns = self.grid
        described = [
            {
                "chunk_shape": (ROWS, COLUMNS),
                "nb_chunks_per_dim": self.grid,
                "chunk_position": (row, column),
                "dtype": np.float64,
            }
            for column in range(columns)
        ]
        metadata = dict.fromkeys(self._names, described)
        buffer = np.empty((ROWS, COLUMNS))
        try:
            with Bridge(
                None, metadata, {"world_size": rows}, bridge_id=row, settings=self._settings
            ) as bridge:
                for timestep in range(self._timesteps):
                    for name in self._names:
                        for column in range(columns):
                            buffer[...] = chunk_at(timestep, row, column, name)
                            bridge.send(name, buffer, timestep, chunk_index=column)
                            buffer[...] = np.nan
                    self.sent[row] += 1
        except DeisaError as error:
            self.errors[row] = error
            print(
                f"rank {row} ended after {self.sent[row]} timesteps: {error!r}"
            )  # for the report of a failed test

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a rank hangs"


def reraise(error: Exception) -> None:
    raise error


def run(
    engine: Any,
    settings: Settings,
    callback: Callable[..., Any],
    windows: Sequence[WindowSpec],
    timesteps: int = 3,
    grid: tuple[int, int] = (2, 2),
    names: Sequence[str] = ("x",),
) -> Report:
    """Run one callback on a simulation; raises what it raises."""
    simulation = Simulation(settings, timesteps, grid, names)
    with ExitStack() as undo:
        deisa = Deisa(engine=engine, settings=settings)
        undo.callback(simulation.join)
        deisa.register_callback(callback, *windows, exception_handler=reraise)
        simulation.start()
        report = deisa.execute_callbacks()
    assert not simulation.errors
    return report
