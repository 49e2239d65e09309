"""Analytics that sums each timestep up by mean, deviation and histogram; writes what it measured, as JSON."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import dask
import dask.array as da

from deisa.ray.types import DeisaArray, WindowSpec
from deisa.ray.window_handler import Deisa

BINS = 64


def stop(exception: Exception) -> None:
    """End the run: figures of callbacks that failed would mean nothing."""
    raise exception


def main() -> None:
    """Run until the simulation ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--array", default="field")
    parser.add_argument("--highest", type=float, default=1.0, help="end of the histogram, which begins at 0")
    parser.add_argument(
        "--folder", type=Path, help="where to make a file `step-<n+1>` once step n has its results"
    )
    parser.add_argument("--report", type=Path, required=True, help="file to write")
    options = parser.parse_args()
    results_at: list[float] = []

    def summarize(windows: list[DeisaArray]) -> None:
        values = windows[-1].dask
        counts, _ = da.histogram(values, bins=BINS, range=(0, options.highest))
        dask.compute(values.mean(), values.std(), counts)
        results_at.append(time.monotonic())
        if options.folder is not None:
            (options.folder / f"step-{len(results_at)}").touch()

    deisa = Deisa()
    deisa.register_callback(summarize, [WindowSpec(options.array)], exception_handler=stop)
    report = deisa.execute_callbacks()
    measured = {
        "results_at": results_at,
        "bytes": sum(report.bytes_handed_over.values()),
        "held_up_s": max(report.held_up_s.values()),
        "callbacks_s": report.callbacks_s,
    }
    options.report.write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
