"""Analytics of a two-dimensional array: differences and a gradient at every timestep, timed one by one.

Writes a JSON object: for each expression its seconds and its values by timestep, and how many chunks Dask saw.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.programs.summary_analytics import stop
from deisa.ray.types import DeisaArray, WindowSpec
from deisa.ray.window_handler import Deisa

if TYPE_CHECKING:
    import dask.array as da


def differences(x: da.Array) -> float:
    """The mean square of differences between neighbouring rows."""
    return float(((x[1:] - x[:-1]) ** 2).mean().compute())


def gradient(x: da.Array) -> float:
    """The mean size of the gradient, found with halos of one element."""
    dx = x.map_overlap(lambda block: np.gradient(block, axis=0), depth=1, boundary="nearest", dtype=x.dtype)
    return float(abs(dx).mean().compute())


EXPRESSIONS: dict[str, Callable[[da.Array], float]] = {
    "((x[1:] - x[:-1])**2).mean()": differences,
    "gradient by map_overlap": gradient,
}


def main() -> None:
    """Run until the simulation ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where to make `step-<n+1>` after each step n"
    )
    parser.add_argument("--report", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in EXPRESSIONS}
    values: dict[str, list[float]] = {name: [] for name in EXPRESSIONS}
    chunks: list[int] = []

    def analyse(windows: list[DeisaArray]) -> None:
        newest = windows[-1]
        for name, compute in EXPRESSIONS.items():
            began = time.perf_counter()
            values[name].append(compute(newest.dask))
            seconds[name].append(time.perf_counter() - began)
        chunks.append(newest.dask.npartitions)
        (options.folder / f"step-{newest.t + 1}").touch()

    deisa = Deisa()
    deisa.register_callback(analyse, [WindowSpec("field")], exception_handler=stop)
    deisa.execute_callbacks()
    options.report.write_text(json.dumps({"seconds": seconds, "values": values, "chunks": chunks[0]}))


if __name__ == "__main__":
    main()
