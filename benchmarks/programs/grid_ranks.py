"""A simulation whose ranks own several chunks each of one two-dimensional array; runs under ``mpiexec``.

Rank 0 prints one JSON object: when each timestep had been handed over by all (seconds, on the clock that processes
share).
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
from mpi4py import MPI

from deisa.ray.bridge import Bridge

COMM = MPI.COMM_WORLD


def main() -> None:
    """Send the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", type=int, nargs=2, required=True, help="chunks along each dimension")
    parser.add_argument(
        "--chunk", type=int, nargs=2, required=True, help="elements of a chunk along each dimension"
    )
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds of sleep after each step")
    parser.add_argument("--labels", action="store_true", help="give dimensions, coordinates, units and times")
    parser.add_argument("--session", required=True)
    options = parser.parse_args()
    grid, shape = tuple(options.grid), tuple(options.chunk)
    numbers = np.array_split(np.arange(grid[0] * grid[1]), COMM.size)[COMM.rank]
    positions = [(int(n) // grid[1], int(n) % grid[1]) for n in numbers]
    whole = (grid[0] * shape[0], grid[1] * shape[1])
    labels = {
        "dims": ("y", "x"),
        "coords": {"y": {"start": 0.0, "step": 0.1}, "x": ("x", np.linspace(0, 1, whole[1]), {"units": "m"})},
        "attrs": {"units": "K", "long_name": "temperature"},
    }
    described = [
        {
            "global_shape": whole,
            "chunk_shape": shape,
            "chunk_position": position,
            "dtype": np.float64,
            **(labels if options.labels else {}),
        }
        for position in positions
    ]
    chunks = [np.random.default_rng(position).random(shape) for position in positions]
    handed_over_at = []
    with Bridge(comm=COMM, arrays_metadata={"field": described}, session=options.session) as bridge:
        for step in range(options.steps):
            for index, chunk in enumerate(chunks):
                bridge.send(
                    "field", chunk, step, chunk_index=index, time=step / 10 if options.labels else None
                )
            handed_over_at.append(COMM.allreduce(time.monotonic(), MPI.MAX))
            time.sleep(options.pause)
    if COMM.rank == 0:
        print(json.dumps({"handed_over_at": handed_over_at}), flush=True)


if __name__ == "__main__":
    main()
