"""The simulation that every system is measured with: ranks that compute, and hand a chunk over at each step.

Runs under ``mpiexec`` with the interpreter of the system it measures, and needs NumPy and mpi4py besides. Rank 0
prints one JSON object; times are in seconds, those called ``*_at`` on the clock that all processes share.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from benchmarks.programs.footprint import private_bytes

COMM = MPI.COMM_WORLD
WARM_UP_STEPS = 10
SLOTS = 2  # that a chunk has with a window of 1 and one timestep ahead
LAYOUTS = ("row", "c", "fortran", "ghosts", "halo")
GHOSTS = LAYOUTS[3:]  # have ghost cells, which a view leaves out, or the description declares
LOOK_EVERY_S = 0.01


class NoSystem:
    """The simulation alone."""

    def __init__(self, chunk: np.ndarray, options: argparse.Namespace) -> None:
        self.chunk = chunk

    def hand_over(self, step: int) -> None:
        """Do nothing."""

    def close(self, steps: int) -> None:
        """Do nothing."""


class DeisaRay:
    """This project: `Bridge.send`."""

    def __init__(self, chunk: np.ndarray, options: argparse.Namespace) -> None:
        from deisa.ray.bridge import Bridge

        self.chunk = local_array(chunk) if options.layout == "halo" else chunk
        self.bridge = Bridge(comm=COMM, arrays_metadata=describe(chunk, options), session=options.session)

    def hand_over(self, step: int) -> None:
        """Copy the chunk."""
        self.bridge.send("field", self.chunk, step)

    def close(self, steps: int) -> None:
        """Say that this was all."""
        self.bridge.close(steps)


class DeisaRaySlots(DeisaRay):
    """This project, the simulation having computed straight into a slot: only the handing over is timed."""

    def prepare(self, step: int) -> None:
        """Get the slot and fill it."""
        self.slot = self.bridge.slot("field", step)
        self.slot[...] = self.chunk

    def hand_over(self, step: int) -> None:
        """Hand the slot over."""
        self.bridge.send("field", self.slot, step)


class DeisaRay018(DeisaRay):
    """The existing deisa-ray: each rank is a Ray driver; it must outlive the analytics."""

    def __init__(self, chunk: np.ndarray, options: argparse.Namespace) -> None:
        from deisa.ray.bridge import Bridge

        self.chunk = chunk
        self.bridge = Bridge(comm=COMM, arrays_metadata=describe(chunk, options))


class Adios2Sst:
    """ADIOS2's SST engine through its PyPI wheel, which is built without MPI: one stream for each rank."""

    def __init__(self, chunk: np.ndarray, options: argparse.Namespace) -> None:
        import adios2

        os.chdir(options.folder)  # where the contact files go
        self.chunk = chunk.reshape(-1)
        io = adios2.Adios().declare_io("field")
        io.set_engine("SST")
        io.set_parameters(
            {
                "QueueLimit": "2",
                "QueueFullPolicy": "Block",
                "RendezvousReaderCount": "1",
                "DataTransport": options.transport,
            }
        )
        self.variable = io.define_variable("field", chunk, [chunk.size], [0], [chunk.size])
        self.stream = adios2.Stream(io, f"field-{COMM.rank}", "w")

    def hand_over(self, step: int) -> None:
        """Write one step."""
        self.stream.begin_step()
        self.stream.write(self.variable, self.chunk)
        self.stream.end_step()

    def close(self, steps: int) -> None:
        """Wait for the reader and close."""
        self.stream.close()


class InlineMpi:
    """No system at all: the mean by a reduction inside the simulation."""

    def __init__(self, chunk: np.ndarray, options: argparse.Namespace) -> None:
        self.chunk = chunk

    def hand_over(self, step: int) -> None:
        """Reduce the chunks' sums."""
        COMM.reduce(self.chunk.sum())

    def close(self, steps: int) -> None:
        """Do nothing."""


SYSTEMS: dict[str, Callable[[np.ndarray, argparse.Namespace], Any]] = {
    "none": NoSystem,
    "deisa-ray": DeisaRay,
    "deisa-ray-slots": DeisaRaySlots,
    "deisa-ray-0.1.8": DeisaRay018,
    "adios2-sst": Adios2Sst,
    "inline-mpi": InlineMpi,
}


def describe(chunk: np.ndarray, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Describe chunks along the first dimension, one for each rank, as both generations of deisa-ray take it."""
    described: dict[str, Any] = {
        "global_shape": (COMM.size * chunk.shape[0], *chunk.shape[1:]),
        "chunk_shape": chunk.shape,
        "chunk_position": (COMM.rank, *[0] * (chunk.ndim - 1)),
    }
    if options.system != "deisa-ray-0.1.8":
        described["dtype"] = chunk.dtype
    if options.layout == "halo":
        described["halo"] = 1
    return {"field": described}


def chunk_of(layout: str, count: int) -> np.ndarray:
    """Make a chunk of so many elements: a row, or a box with sides that are powers of two, by where those lie."""
    values = np.random.default_rng(COMM.rank).random(count)
    if layout == "row":
        return values
    doublings = count.bit_length() - 1
    box = values[: 2**doublings].reshape([2 ** ((doublings + d) // 3) for d in range(3)])
    if layout == "fortran":
        return np.asfortranarray(box)
    if layout in GHOSTS:
        return np.pad(box, 1)[1:-1, 1:-1, 1:-1]
    return box


def local_array(chunk: np.ndarray) -> np.ndarray:
    """Return the array around a chunk, ghost cells included."""
    assert chunk.base is not None
    return chunk.base


def shared_targets(chunk: np.ndarray) -> list[np.ndarray]:
    """Make what bare copies go to: an array in C order for each slot of a chunk, in such memory, touched."""
    each = -(-chunk.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    descriptor = os.memfd_create("bare-copies")
    os.ftruncate(descriptor, SLOTS * each)
    memory = mmap.mmap(descriptor, SLOTS * each)
    os.close(descriptor)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    targets = [
        np.ndarray(chunk.shape, chunk.dtype, buffer=memory, offset=slot * each) for slot in range(SLOTS)
    ]
    for target in targets:
        target[...] = 1
    return targets


class Turns:
    """Whose steps come next, where the same work runs with several systems at once; files keep them apart.

    File ``ready-<i>`` is there once system i has started, ``turn-<k>`` once the k-th block of steps may run, and
    ``failed`` once a system cannot go on. Systems take the blocks in turns.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder, self.number, self.systems = Path(options.turns), options.turn, options.turn_of
        self.block = options.block
        if COMM.rank == 0:
            (self.folder / f"ready-{self.number}").touch()
            (self.folder / "turn-0").touch()
        self.wait([f"ready-{number}" for number in range(self.systems)])

    def wait(self, names: Sequence[str]) -> None:
        """Wait until some files are there."""
        while not all((self.folder / name).exists() for name in names):
            if (self.folder / "failed").exists():
                sys.exit("another system has failed")
            time.sleep(LOOK_EVERY_S)

    def begin(self, step: int) -> None:
        """Wait for the turn of this system, if a block begins with this step."""
        if step % self.block == 0:
            self.wait([f"turn-{step // self.block * self.systems + self.number}"])

    def end(self, step: int, steps: int) -> None:
        """Give the turn to the next system, if a block ends with this step; after the last one, wait for the others."""
        if (step + 1) % self.block and step + 1 < steps:
            return
        COMM.Barrier()
        if COMM.rank == 0:
            (self.folder / f"turn-{step // self.block * self.systems + self.number + 1}").touch()
        if step + 1 == steps:
            self.wait([f"turn-{(step // self.block + 1) * self.systems}"])


def import_system(system: str) -> None:
    """Import what a system needs, which is not part of the time that its object takes to create."""
    if system.startswith("deisa-ray"):
        import deisa.ray.bridge  # noqa: F401
    elif system == "adios2-sst":
        import adios2  # noqa: F401


def compute(seconds: float, block: np.ndarray) -> None:
    """Keep the processor busy for so much of its time."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        np.sqrt(block)


def timed_copy(target: np.ndarray, chunk: np.ndarray) -> float:
    """Copy the chunk into warm memory; returns how long it took."""
    began = time.perf_counter()
    np.copyto(target, chunk)
    return time.perf_counter() - began


def main() -> None:
    """Run the steps and gather the times."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--bytes", type=int, required=True, help="of each rank's chunk")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--compute", type=float, default=0.02, help="processor seconds for each step")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds of sleep for each step")
    parser.add_argument("--session", default="bench")
    parser.add_argument("--folder", default=".")
    parser.add_argument("--transport", default="WAN", help="of ADIOS2 SST")
    parser.add_argument("--linger", default="", help="a file to wait for before the rank ends")
    parser.add_argument("--layout", choices=LAYOUTS, default="row", help="how a chunk lies in memory")
    parser.add_argument("--turns", default="", help="a folder in which systems agree on whose turn it is")
    parser.add_argument("--turn", type=int, default=0, help="which of those systems this one is")
    parser.add_argument("--turn-of", type=int, default=1, help="how many they are")
    parser.add_argument("--block", type=int, default=20, help="steps of a turn")
    options = parser.parse_args()

    chunk = chunk_of(options.layout, options.bytes // 8)
    targets = shared_targets(chunk)
    block = np.ones(4096)
    compute(0.05, block)
    COMM.Barrier()
    before = private_bytes()
    import_system(options.system)
    COMM.Barrier()
    began = time.perf_counter()
    system = SYSTEMS[options.system](chunk, options)
    times: dict[str, list[float]] = {
        "start": [time.perf_counter() - began],
        "hand_over": [],
        "copy": [],
        "handed_over_at": [],
    }
    turns = Turns(options) if options.turns else None
    for step in range(options.steps):
        if turns:
            turns.begin(step)
        compute(options.compute, block)
        if options.pause:
            time.sleep(options.pause)
        COMM.Barrier()  # as ranks that exchange halos wait for each other; else the fast ones would run ahead
        if hasattr(system, "prepare"):
            system.prepare(step)
        copying_first = step // 2 % 2  # whoever comes second finds the chunk in the processor's cache
        copied = timed_copy(targets[step % SLOTS], chunk) if copying_first else 0.0
        began = time.perf_counter()
        system.hand_over(step)
        handed_over = time.perf_counter() - began
        times["handed_over_at"].append(time.monotonic())
        if not copying_first:
            copied = timed_copy(targets[step % SLOTS], chunk)
        if step >= WARM_UP_STEPS:
            times["hand_over"].append(handed_over)
            times["copy"].append(copied)
        if turns:
            turns.end(step, options.steps)
    times["gained_bytes"] = [private_bytes() - before]
    system.close(options.steps)
    gathered = COMM.gather(times)
    if gathered is not None:
        last = [max(at) for at in zip(*(one.pop("handed_over_at") for one in gathered), strict=True)]
        together = {key: [t for one in gathered for t in one[key]] for key in gathered[0]}
        print(json.dumps({**together, "handed_over_at": last}), flush=True)
    while options.linger and not Path(options.linger).exists():
        time.sleep(0.05)


if __name__ == "__main__":
    main()
