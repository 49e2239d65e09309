"""The analytics of both generations of deisa-ray: sets each timestep's mean; prints when each was there, as JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Run until the simulation ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generation", choices=["this", "0.1.8"], required=True)
    parser.add_argument("--session", default="bench")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--done", default="", help="a file to make when the last mean is set")
    options = parser.parse_args()

    from deisa.ray.window_handler import Deisa

    there_at: list[float] = []

    def steer(field):  # type: ignore[no-untyped-def]
        latest = field[-1]
        array = latest.dask if options.generation == "this" else latest
        mean = float(array.mean().compute())
        there_at.append(time.monotonic())
        deisa.set("mean", mean, timestep=int(latest.t))
        if len(there_at) == options.steps and options.done:
            Path(options.done).touch()

    if options.generation == "this":
        from deisa.ray.types import WindowSpec

        deisa = Deisa(session=options.session, on_error="raise")
        deisa.register_callback(steer, [WindowSpec("field")])
    else:
        from deisa.ray.types import Window

        deisa = Deisa()
        deisa.register_callback(steer, Window("field", size=1))
    print("ready", file=sys.stderr, flush=True)
    deisa.execute_callbacks()
    print(json.dumps({"there_at": there_at}), flush=True)


if __name__ == "__main__":
    main()
