"""Gray-Scott reaction-diffusion under MPI: the simulation whose patterns the analytics watches.

Two chemicals with concentrations U and V spread over a periodic square. U is fed in, V turns U into
more V and is removed; from a few drops of V corals grow until they meet.

    mpiexec -n 4 python examples/gray_scott/simulation.py

Only the lines that mention ``bridge`` are about deisa-ray: the rest is a simulation as it was before.
"""

import argparse
import time
from contextlib import nullcontext

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from deisa.ray.bridge import Bridge

Fields = NDArray[np.float32]  # (2, ny + 2, nx + 2): U and V of one rank, with one ghost cell on every side

# Per unit of time and cell; one step is one unit of time. These values make corals.
FEED = 0.0545
KILL = 0.062
DIFFUSION = np.array([0.2, 0.1], dtype=np.float32).reshape(2, 1, 1)
LOSS = np.array([FEED, FEED + KILL], dtype=np.float32).reshape(2, 1, 1)

# For each way a halo travels: axis, displacement, the edge it leaves from, the ghost cells it fills.
HALOS = [
    (0, +1, np.s_[:, -2, :], np.s_[:, 0, :]),
    (0, -1, np.s_[:, 1, :], np.s_[:, -1, :]),
    (1, +1, np.s_[:, :, -2], np.s_[:, :, 0]),
    (1, -1, np.s_[:, :, 1], np.s_[:, :, -1]),
]


def drops(size: int, count: int) -> Fields:
    """The whole plane at the start, (2, size, size): U everywhere, and square drops of V at random places."""
    plane = np.zeros((2, size, size), dtype=np.float32)
    plane[0] = 1
    for y, x in np.random.default_rng(seed=2).integers(size - 8, size=(count, 2)):
        plane[:, y : y + 8, x : x + 8] = np.array([0.5, 0.25]).reshape(2, 1, 1)
    return plane


def exchange_halos(fields: Fields, grid: MPI.Cartcomm) -> None:
    """Fill the ghost cells with the edges of the four neighbours."""
    for axis, displacement, edge, ghost in HALOS:
        source, destination = grid.Shift(axis, displacement)
        outgoing = np.ascontiguousarray(fields[edge])
        incoming = np.empty_like(outgoing)
        grid.Sendrecv(outgoing, destination, recvbuf=incoming, source=source)
        fields[ghost] = incoming


def advance(fields: Fields, change: Fields, reaction: Fields) -> None:
    """Take one explicit Euler step in place; `change` and `reaction` are scratch space."""
    inner = fields[:, 1:-1, 1:-1]
    u, v = inner

    # Diffusion: the five-point Laplacian, whose centre is gathered with the loss below.
    np.add(fields[:, :-2, 1:-1], fields[:, 2:, 1:-1], out=change)
    change += fields[:, 1:-1, :-2]
    change += fields[:, 1:-1, 2:]
    change *= DIFFUSION

    # Reaction: U + 2V -> 3V.
    np.multiply(v, v, out=reaction)
    reaction *= u

    inner *= 1 - 4 * DIFFUSION - LOSS
    inner += change
    u -= reaction
    u += FEED
    v += reaction


def main() -> None:
    parser = argparse.ArgumentParser(description="Gray-Scott reaction-diffusion under MPI.")
    parser.add_argument("--size", type=int, default=512, help="cells along each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12_000, help="steps to take (default: %(default)s)")
    parser.add_argument("--every", type=int, default=100, help="send every so many (default: %(default)s)")
    parser.add_argument(
        "--untimed",
        type=int,
        default=0,
        help="leave so many first steps out of the time (default: %(default)s)",
    )
    parser.add_argument("--no-bridge", action="store_true", help="run alone, without sending anything")
    options = parser.parse_args()

    ranks = MPI.COMM_WORLD.Get_size()
    grid = MPI.COMM_WORLD.Create_cart(MPI.Compute_dims(ranks, 2), periods=(True, True))
    if options.size % grid.dims[0] or options.size % grid.dims[1]:
        raise SystemExit(f"--size {options.size} does not divide into {grid.dims[0]} x {grid.dims[1]} ranks")
    ny, nx = options.size // grid.dims[0], options.size // grid.dims[1]
    py, px = grid.coords

    fields = np.empty((2, ny + 2, nx + 2), dtype=np.float32)
    change = np.empty((2, ny, nx), dtype=np.float32)
    reaction = np.empty((ny, nx), dtype=np.float32)
    plane = drops(options.size, count=options.size // 24)
    fields[:, 1:-1, 1:-1] = plane[:, py * ny : (py + 1) * ny, px * nx : (px + 1) * nx]
    v = fields[1, 1:-1, 1:-1]  # a view: `send` copies it, ghost cells left out

    layout = {
        "V": {
            "global_shape": (options.size, options.size),
            "chunk_shape": (ny, nx),
            "chunk_position": (py, px),
            "dtype": v.dtype,
        }
    }
    with nullcontext() if options.no_bridge else Bridge(comm=grid, arrays_metadata=layout) as bridge:
        started = time.perf_counter()
        for step in range(1, options.steps + 1):
            if step == options.untimed + 1:
                started = time.perf_counter()
            exchange_halos(fields, grid)
            advance(fields, change, reaction)
            if bridge is not None and step % options.every == 0:
                bridge.send(array_name="V", chunk=v, timestep=step)
        taken = time.perf_counter() - started
    if grid.Get_rank() == 0:
        print(f"{options.steps - options.untimed} steps on {ranks} ranks in {taken:.2f} s")


if __name__ == "__main__":
    main()
