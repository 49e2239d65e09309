"""Ranks that write a two-dimensional array to HDF5 as a user without this project would; runs under ``mpiexec``.

It needs nothing but NumPy, mpi4py and h5py, so that it also runs with a Python whose h5py was built with MPI. Rank 0
prints one JSON object: the seconds that each timestep took, until the slowest rank had its part in its file.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import h5py
import numpy as np
from mpi4py import MPI

COMM = MPI.COMM_WORLD
WAYS = ("own", "gather", "parallel")


def main() -> None:
    """Write the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS, required=True, help="a file each, one by rank 0, one by all")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--shape", type=int, nargs=2, required=True, help="elements of a rank's part")
    options = parser.parse_args()
    rows, columns = options.shape
    mine = np.random.default_rng(COMM.rank).random((rows, columns))
    took = []
    for step in range(options.steps):
        COMM.Barrier()
        began = time.perf_counter()
        if options.way == "own":
            path = os.path.join(options.folder, f"own-{step}-{COMM.rank}.h5")
            with h5py.File(path, "w") as file:
                file.create_dataset("field", data=mine)
        elif options.way == "gather":
            whole = np.empty((COMM.size * rows, columns)) if COMM.rank == 0 else None
            COMM.Gather(mine, whole)
            if COMM.rank == 0:
                with h5py.File(os.path.join(options.folder, f"gathered-{step}.h5"), "w") as file:
                    file.create_dataset("field", data=whole)
        else:
            path = os.path.join(options.folder, f"parallel-{step}.h5")
            with h5py.File(path, "w", driver="mpio", comm=COMM) as file:
                target = file.create_dataset("field", (COMM.size * rows, columns), np.float64)
                target[COMM.rank * rows : (COMM.rank + 1) * rows] = mine
        took.append(COMM.allreduce(time.perf_counter() - began, MPI.MAX))
    if COMM.rank == 0:
        print(json.dumps({"took": took}), flush=True)


if __name__ == "__main__":
    main()
