"""Ranks that do nothing but send: under ``mpiexec``, as fast as the analytics allows."""

from __future__ import annotations

import argparse

import numpy as np
from mpi4py import MPI

from deisa.ray.bridge import Bridge


def main() -> None:
    """Run the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, required=True, help="of each rank's chunk")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--session", required=True)
    options = parser.parse_args()

    comm = MPI.COMM_WORLD
    chunk = np.random.default_rng(comm.rank).random(options.bytes // 8)
    described = {
        "chunk_shape": chunk.shape,
        "nb_chunks_per_dim": (comm.size,),
        "chunk_position": (comm.rank,),
        "dtype": chunk.dtype,
    }
    with Bridge(comm=comm, arrays_metadata={"field": described}, session=options.session) as bridge:
        for step in range(options.steps):
            bridge.send("field", chunk, step)


if __name__ == "__main__":
    main()
