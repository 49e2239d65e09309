"""The simulation that every system is measured with: ranks that compute, and hand a chunk over at each step.

Runs under ``mpiexec`` with the interpreter of the system it measures, and needs NumPy and mpi4py besides. Rank 0
prints one JSON object; times are in seconds, those called ``*_at`` on the clock that all processes share.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

COMM = MPI.COMM_WORLD
WARM_UP_STEPS = 10


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

        self.chunk = chunk
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
        self.chunk = chunk
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
    """Describe a row of chunks, one for each rank, as both generations of deisa-ray take it."""
    described: dict[str, Any] = {
        "global_shape": (COMM.size * chunk.size,),
        "chunk_shape": chunk.shape,
        "chunk_position": (COMM.rank,),
    }
    if options.system != "deisa-ray-0.1.8":
        described["dtype"] = chunk.dtype
    return {"field": described}


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


def private_bytes() -> int:
    """Memory resident in this process alone, shared memory left out."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))


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
    options = parser.parse_args()

    chunk = np.random.default_rng(COMM.rank).random(options.bytes // 8)
    target = np.ones_like(chunk)
    block = chunk[:4096].copy()
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
    for step in range(options.steps):
        compute(options.compute, block)
        if options.pause:
            time.sleep(options.pause)
        COMM.Barrier()  # as ranks that exchange halos wait for each other; else the fast ones would run ahead
        if hasattr(system, "prepare"):
            system.prepare(step)
        copying_first = step % 2  # whoever comes second finds the chunk in the processor's cache
        copied = timed_copy(target, chunk) if copying_first else 0.0
        began = time.perf_counter()
        system.hand_over(step)
        handed_over = time.perf_counter() - began
        times["handed_over_at"].append(time.monotonic())
        if not copying_first:
            copied = timed_copy(target, chunk)
        if step >= WARM_UP_STEPS:
            times["hand_over"].append(handed_over)
            times["copy"].append(copied)
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
