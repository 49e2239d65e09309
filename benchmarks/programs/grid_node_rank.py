"""One of a few ranks without MPI, on a node of its own: owns some rows of chunks of a two-dimensional array.

A file ``step-<n>`` in a folder that all nodes see lets step n go. Prints the seconds of every `send`, and of a
copy of the same chunk into memory of this process, as JSON; those of the first step are left out.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from benchmarks.programs.traffic_rank import wait_for
from deisa.ray.bridge import Bridge


def main() -> None:
    """Run the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--grid", type=int, nargs=2, required=True, help="chunks along each dimension")
    parser.add_argument("--chunk", type=int, nargs=2, required=True, help="elements of a chunk, likewise")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    shape = tuple(options.chunk)
    rows = np.array_split(np.arange(options.grid[0]), options.ranks)[options.rank]
    positions = [(int(i), j) for i in rows for j in range(options.grid[1])]
    described = [
        {
            "chunk_shape": shape,
            "nb_chunks_per_dim": tuple(options.grid),
            "chunk_position": position,
            "dtype": np.float64,
        }
        for position in positions
    ]
    chunks = [np.random.default_rng(position).random(shape) for position in positions]
    targets = np.ones((len(chunks), *shape))
    send, copy = [], []
    with Bridge(
        bridge_id=options.rank,
        arrays_metadata={"field": described},
        system_metadata={"world_size": options.ranks},
    ) as bridge:
        for step in range(options.steps):
            wait_for(options.folder / f"step-{step}")
            for chunk, target in zip(chunks, targets, strict=True):
                began = time.perf_counter()
                np.copyto(target, chunk)
                copy.append(time.perf_counter() - began)
            for index, chunk in enumerate(chunks):
                began = time.perf_counter()
                bridge.send("field", chunk, step, chunk_index=index)
                send.append(time.perf_counter() - began)
    print(json.dumps({"send": send[len(chunks) :], "copy": copy[len(chunks) :]}), flush=True)


if __name__ == "__main__":
    main()
