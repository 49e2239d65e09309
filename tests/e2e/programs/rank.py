"""A rank without MPI. Arguments: its number, the number of ranks, timesteps, elements of its chunk,
and how it ends: `close`, or `die` without a word; `steered` asks for what the analytics sets, and closes."""

import json
import os
import sys

import numpy as np

from deisa.ray import Bridge

rank, size, timesteps, elements = map(int, sys.argv[1:5])
start = np.arange(rank * elements, (rank + 1) * elements, dtype=float)
place = start / 2 if elements <= 2**20 else {"start": 0.0, "step": 0.5}
bridge = Bridge(
    bridge_id=rank,
    arrays_metadata={
        "x": {
            "chunk_shape": (elements,),
            "nb_chunks_per_dim": (size,),
            "chunk_position": (rank,),
            "dtype": np.float64,
            "dims": ["cell"],
            "coords": {"cell": ("cell", place, {"units": "m"})} if elements <= 10_000 else {},
            "attrs": {"units": "K"} if rank == 0 else {},
        }
    },
    system_metadata={"world_size": size},
)
for t in range(timesteps):
    if sys.argv[5] == "steered":
        early = bridge.get("early", t, "default")
    bridge.send("x", start + t, t, time=t / 4)
    if sys.argv[5] == "steered":
        print(json.dumps({"early": early, "mean": bridge.get("mean", t, wait=60)}))
if sys.argv[5] == "die":
    os._exit(3)
bridge.close()
