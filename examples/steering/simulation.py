"""Gray-Scott under MPI, steered: the analytics says at which rate to feed it, and when to stop.

    mpiexec -n 4 python -m mpi4py -m examples.steering.simulation

No rank asks another one for that, and all of them do the same at the same step.
"""

import argparse

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from deisa.ray.bridge import Bridge
from examples.gray_scott.simulation import DIFFUSION, FEED, KILL, Fields, drops, exchange_halos

WAIT_S = 600.0  # for the analytics, which may be slow


def advance(fields: Fields, feed: float, change: Fields, reaction: NDArray[np.float32]) -> None:
    """Take one explicit Euler step in place; `change` and `reaction` are scratch space."""
    inner = fields[:, 1:-1, 1:-1]
    u, v = inner
    np.add(fields[:, :-2, 1:-1], fields[:, 2:, 1:-1], out=change)
    change += fields[:, 1:-1, :-2]
    change += fields[:, 1:-1, 2:]
    change *= DIFFUSION
    np.multiply(v, v, out=reaction)
    reaction *= u
    inner *= 1 - 4 * DIFFUSION - np.array([feed, feed + KILL], dtype=np.float32).reshape(2, 1, 1)
    inner += change
    u -= reaction
    u += np.float32(feed)
    v += reaction


def main() -> None:
    parser = argparse.ArgumentParser(description="Gray-Scott reaction-diffusion under MPI, steered.")
    parser.add_argument("--size", type=int, default=256, help="cells along each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=100_000, help="steps to take at most")
    parser.add_argument("--every", type=int, default=100, help="send every so many (default: %(default)s)")
    options = parser.parse_args()

    ranks = MPI.COMM_WORLD.Get_size()
    grid = MPI.COMM_WORLD.Create_cart(MPI.Compute_dims(ranks, 2), periods=(True, True))
    if options.size % grid.dims[0] or options.size % grid.dims[1]:
        raise SystemExit(f"--size {options.size} does not divide into {grid.dims[0]} x {grid.dims[1]} ranks")
    ny, nx = options.size // grid.dims[0], options.size // grid.dims[1]
    py, px = grid.coords

    fields = np.empty((2, ny + 2, nx + 2), dtype=np.float32)
    change, reaction = np.empty((2, ny, nx), np.float32), np.empty((ny, nx), np.float32)
    plane = drops(options.size, count=max(4, options.size // 24))
    fields[:, 1:-1, 1:-1] = plane[:, py * ny : (py + 1) * ny, px * nx : (px + 1) * nx]
    v = fields[1, 1:-1, 1:-1]
    layout = {
        "V": {
            "global_shape": (options.size, options.size),
            "chunk_shape": (ny, nx),
            "chunk_position": (py, px),
            "dtype": v.dtype,
        }
    }
    feed, step = FEED, 0
    with Bridge(comm=grid, arrays_metadata=layout) as bridge:
        while step < options.steps:
            step += 1
            exchange_halos(fields, grid)
            advance(fields, feed, change, reaction)
            if step % options.every == 0:
                bridge.send("V", v, step)
                feed = bridge.get("feed", step, default=feed, wait=WAIT_S)
                if bridge.get("stop", step, default=False, wait=WAIT_S):
                    break
    print(f"rank {grid.Get_rank()} stopped after step {step}, fed at {feed:.4f}", flush=True)


if __name__ == "__main__":
    main()
