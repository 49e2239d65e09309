"""The analytics as one rank of the job that the simulation is; a local Ray, whose workers use mpi4py.

Prints what its tasks see of MPI; ends with another status than 0 unless all is right."""

import os
import sys

from mpi4py import MPI

from deisa.ray import Deisa

if os.environ["SPLIT"] == "yes":
    MPI.COMM_WORLD.Split(color=1)
deisa = Deisa()
seen = []


def alone(block):
    from mpi4py import MPI

    return block + 100 * MPI.COMM_WORLD.size + 1000 * MPI.COMM_WORLD.rank


@deisa.register("x")
def use_mpi_in_tasks(x):
    seen.append(float(x[-1].dask.map_blocks(alone, dtype=float).sum().compute()))


deisa.execute_callbacks()
print(f"rank {MPI.COMM_WORLD.rank} of {MPI.COMM_WORLD.size} saw {seen}", flush=True)
sys.exit(seen != [8 * (100 + 10.0 * t) + 4 for t in range(4)])
