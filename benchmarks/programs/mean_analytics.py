"""The analytics of both generations of deisa-ray: the mean of each timestep; prints when each was there, as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Run until the simulation ends, or until the last timestep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generation", choices=["this", "0.1.8"], required=True)
    parser.add_argument("--engine", choices=["ray", "local"], default="ray")
    parser.add_argument("--session", default="bench")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--done", default="", help="a file to make when the last mean is there")
    options = parser.parse_args()

    from deisa.ray.window_handler import Deisa

    there_at: list[float] = []
    means: list[float] = []
    took: list[float] = []

    def mean(field):  # type: ignore[no-untyped-def]
        began = time.perf_counter()
        latest = field[-1]
        array = latest.dask if options.generation == "this" else latest
        means.append(float(array.mean().compute()))
        there_at.append(time.monotonic())
        took.append(time.perf_counter() - began)
        if len(means) == options.steps and options.done:
            Path(options.done).touch()

    if options.generation == "this":
        from deisa.ray.types import WindowSpec

        deisa = Deisa(engine=options.engine, session=options.session)
        deisa.register_callback(mean, [WindowSpec("field")])
    else:
        from deisa.ray.types import Window

        deisa = Deisa()
        deisa.register_callback(mean, Window("field", size=1))
    print("ready", file=sys.stderr, flush=True)
    deisa.execute_callbacks()
    print(json.dumps({"there_at": there_at, "compute": took, "means": means}), flush=True)


if __name__ == "__main__":
    main()
