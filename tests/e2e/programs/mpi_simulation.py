"""A rank of a simulation, as a user would write it.

Arguments: grid rows, grid columns, timesteps, and a dtype if the ranks are to declare it."""

import sys

import numpy as np
from mpi4py import MPI

from deisa.ray.bridge import Bridge

comm = MPI.COMM_WORLD
rows, columns, timesteps = map(int, sys.argv[1:4])
declared = {"dtype": sys.argv[4]} if sys.argv[4:] else {}
row, column = divmod(comm.rank, columns)
assert rows * columns == comm.size

bridge = Bridge(
    comm=comm,
    arrays_metadata={
        "temperature": {
            "global_shape": (rows * 8, columns * 16),
            "chunk_shape": (8, 16),
            "chunk_position": (row, column),
            **declared,
        }
    },
)
temperature = np.empty((8, 16))
for t in range(timesteps):
    temperature[:] = 100 * t + comm.rank
    comm.Barrier()  # ranks and bridge get along with MPI traffic in between
    bridge.send("temperature", temperature, timestep=t)
bridge.close(timestep=timesteps)

heavy = {"ray", "dask", "distributed"} & sys.modules.keys()
print(
    f"rank {comm.rank} of {comm.size} sent {bridge.stats.chunks} chunks, imported {sorted(heavy)}", flush=True
)
