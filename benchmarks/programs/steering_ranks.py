"""Ranks that send a chunk and then get what the analytics makes of it; both generations of deisa-ray.

Runs under ``mpiexec``. Rank 0 prints one JSON object; times called ``*_at`` are on the clock that all processes share.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI

COMM = MPI.COMM_WORLD
WAIT_S = 60.0
LINGER_S = 0.1  # a look at whether the analytics of 0.1.8 is done


def main() -> None:
    """Send, get, and time both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generation", choices=["this", "0.1.8"], required=True)
    parser.add_argument("--session", default="bench")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--gets", type=int, required=True, help="that are timed without waiting")
    parser.add_argument("--pause", type=float, required=True)
    parser.add_argument("--done", default="", help="a file that the analytics makes at its end")
    options = parser.parse_args()

    from deisa.ray.bridge import Bridge

    chunk = np.ones(4096)
    described = {
        "global_shape": (COMM.size * chunk.size,),
        "chunk_shape": chunk.shape,
        "chunk_position": (COMM.rank,),
    }
    this = options.generation == "this"
    if this:
        described["dtype"] = chunk.dtype
        bridge = Bridge(comm=COMM, arrays_metadata={"field": described}, session=options.session)
    else:
        bridge = Bridge(comm=COMM, arrays_metadata={"field": described})
    sent_at, got_at, get_s = [], [], []
    for step in range(options.steps):
        time.sleep(options.pause)
        COMM.barrier()
        bridge.send("field", chunk, step)
        sent_at.append(time.monotonic())
        if this:
            mean = bridge.get("mean", step, wait=WAIT_S)
            got_at.append(time.monotonic())
            assert mean == 1.0, mean
    for _ in range(options.gets):
        began = time.perf_counter()
        bridge.get("mean", 0)
        get_s.append(time.perf_counter() - began)
    bridge.close(options.steps)
    last_sent_at = np.max(COMM.allgather(sent_at), axis=0).tolist()
    last_got_at = np.max(COMM.allgather(got_at), axis=0).tolist()
    all_get_s = [second for seconds in COMM.allgather(get_s) for second in seconds]
    while options.done and not Path(options.done).exists():
        time.sleep(LINGER_S)
    if COMM.rank == 0:
        print(json.dumps({"sent_at": last_sent_at, "got_at": last_got_at, "get": all_get_s}), flush=True)


if __name__ == "__main__":
    main()
