"""A rank that one mpiexec starts beside mpmd_analytics.py; SPLIT says whether its communicator is without that."""

import os

import numpy as np
from mpi4py import MPI

from deisa.ray.bridge import Bridge

comm = MPI.COMM_WORLD.Split(color=0) if os.environ["SPLIT"] == "yes" else MPI.COMM_WORLD
described = {"chunk_shape": (4,), "nb_chunks_per_dim": (comm.size,), "chunk_position": (comm.rank,)}
with Bridge(comm=comm, arrays_metadata={"x": {**described, "dtype": "float64"}}) as bridge:
    for t in range(4):
        bridge.send("x", np.full(4, 10.0 * t + comm.rank), t)
