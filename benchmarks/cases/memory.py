"""Whether memory grows over a long run, looked at from outside."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.clusters import ROOT, output_of, started
from benchmarks.suite import THIS, Curve, Outcome, Setting, case
from tests.support.mpi import Mpi
from tests.support.processes import live_processes
from tests.support.ray_node import AUTHENTICATION, RayNode

RANKS = ROOT / "benchmarks/programs/memory_ranks.py"
ANALYTICS = ROOT / "benchmarks/programs/memory_analytics.py"
TIMEOUT_S = 300.0
MIB = 2**20
TOLERANCE_MIB = 2.0
AT_EITHER_END = 3  # samples whose median stands for the beginning, and for the end

AGENT, DRIVER, WORKERS, RANK = "agent", "analytics", "workers", "ranks"
GCS, DAEMONS = "Ray's GCS", "Ray's other daemons"
CHUNKS, OBJECTS = "chunk memory", "object store"


@dataclass
class Samples:
    """Memory at some timesteps (bytes).

    Attributes
    ----------
    private : mapping of str to mapping of int to mapping of int to int
        Anonymous memory, by kind of process, process id and timestep.
    shared : mapping of str to mapping of int to int
        Pages of shared memory that exist, each counted once however many processes map it, by what they are
        for and timestep.
    """

    private: dict[str, dict[int, dict[int, int]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(dict))
    )
    shared: dict[str, dict[int, int]] = field(default_factory=lambda: defaultdict(dict))

    def total(self, kind: str) -> list[tuple[float, float]]:
        """Memory of a kind of process, all together, by timestep (MiB)."""
        sums: dict[int, int] = defaultdict(int)
        for by_timestep in self.private[kind].values():
            for timestep, nbytes in by_timestep.items():
                sums[timestep] += nbytes
        return [(timestep, nbytes / MIB) for timestep, nbytes in sorted(sums.items())]

    def growth_mib(self, kind: str, after: int) -> float:
        """Growth of the process of a kind that grew most, from a timestep to the end of the run (MiB).

        Processes that Ray started later, or ended earlier, are left out.
        """
        last = max(t for by_timestep in self.private[kind].values() for t in by_timestep)
        grown = []
        for by_timestep in self.private[kind].values():
            seen = [nbytes for timestep, nbytes in sorted(by_timestep.items()) if timestep >= after]
            if {after, last} <= set(by_timestep):
                grown.append(np.median(seen[-AT_EITHER_END:]) - np.median(seen[:AT_EITHER_END]))
        if not grown:
            raise RuntimeError(f"no process of kind {kind!r} was there from timestep {after} to {last}")
        return float(max(grown)) / MIB


@case("Does memory grow over thousands of timesteps?")
def memory(setting: Setting) -> Outcome:
    """Look at the memory of all processes of a node every so many timesteps."""
    outcome = Outcome()
    mpi = Mpi.find("mpich")
    if mpi is None:
        outcome.notes.append("Not measured: MPICH is not installed.")
        return outcome
    steps, every, after = setting.pick((2000, 50, 200), (60, 10, 10))
    chunk_bytes, ranks = MIB, 4
    samples = Samples()
    with _cluster(setting.scratch / "ray") as node:
        variables = {**AUTHENTICATION, "RAY_ADDRESS": node.address}
        session = f"memory-{os.urandom(3).hex()}"
        analytics = [sys.executable, ANALYTICS, f"--session={session}", f"--print-every={every}"]
        # A few steps more, so that the last sample is taken before ranks end.
        sizes = (f"--session={session}", f"--bytes={chunk_bytes}", f"--steps={steps + every}")
        simulation = [mpi.mpiexec, "-n", str(ranks), mpi.python, "-m", "mpi4py", RANKS, *sizes]
        with started(analytics, variables) as driver, started(simulation, variables) as running:
            bound = _watch(samples, node, driver, session)
            output_of(driver, TIMEOUT_S)
            output_of(running, TIMEOUT_S)
    _add_results(outcome, samples, bound, after)
    outcome.notes.append(
        f"{steps} timesteps, {ranks} ranks with chunks of {chunk_bytes / MIB:g} MiB, a window of three; every 50th "
        "timestep one array is persisted and kept until the next. Growth is that of anonymous memory "
        f"(RssAnon) from timestep {after} to the end, of the process of its kind that grew most."
    )
    return outcome


def _add_results(outcome: Outcome, samples: Samples, bound: int, after: int) -> None:
    chunks, objects = samples.shared[CHUNKS], samples.shared[OBJECTS]
    outcome.figure("bound announced", THIS, bound, "B")
    outcome.figure("chunk memory, greatest", THIS, max(chunks.values()), "B")
    outcome.figure("object store, greatest", THIS, max(objects.values()), "B")
    outcome.compare("chunk memory / bound announced", max(chunks.values()) / bound, "<=", 1.1)
    half = max(chunks) // 2
    for kind in (AGENT, DRIVER, WORKERS, RANK, GCS, DAEMONS):
        system, target = (THIS, TOLERANCE_MIB) if kind not in (GCS, DAEMONS) else ("Ray", None)
        outcome.figure(f"private memory at the end, {kind}", system, MIB * samples.total(kind)[-1][1], "B")
        later = samples.growth_mib(kind, half)
        outcome.figure(f"its growth over the second half of the run, {kind}", system, MIB * later, "B")
        growth = samples.growth_mib(kind, after)
        outcome.compare(f"growth of private memory, {kind}", growth, "<=", target, "MiB")
    shared = {name: [(t, n / MIB) for t, n in sorted(at.items())] for name, at in samples.shared.items()}
    private = {kind: samples.total(kind) for kind in samples.private}
    outcome.curves.append(Curve("Memory of a node", "timesteps", "MiB", {**private, **shared}))


@contextmanager
def _cluster(folder: Path) -> Iterator[RayNode]:
    folder.mkdir()
    node = RayNode.start(folder)
    try:
        node.wait_started()
        yield node
    finally:
        node.stop()


def _watch(samples: Samples, node: RayNode, driver: subprocess.Popen[str], session: str) -> int:
    """Take a sample at each timestep that the analytics tells, until its end; returns the bound that it tells."""
    assert driver.stdout is not None
    bound = 0
    for line in driver.stdout:
        match line.split():  # Ray, too, may print
            case ["timestep", timestep]:
                _sample(samples, int(timestep), node, driver.pid, session)
            case ["bound", nbytes]:
                bound = int(nbytes)
    return bound


def _sample(samples: Samples, timestep: int, node: RayNode, driver: int, session: str) -> None:
    samples.private[DRIVER][driver][timestep] = _private_bytes(driver)
    for process in live_processes():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            command = Path(f"/proc/{process.pid}/cmdline").read_text(errors="replace").split("\0")
            kind = _kind_of_ray(command) if process.session == node.process.pid else RANK
            if kind == RANK and not {"mpi4py", f"--session={session}"} <= set(command[2:]):
                continue
            samples.private[kind][process.pid][timestep] = _private_bytes(process.pid)
            if kind == AGENT:
                samples.shared[CHUNKS][timestep] = _shared_bytes(process.pid, "/memfd:deisa-")
            elif command[0].endswith("/raylet"):
                samples.shared[OBJECTS][timestep] = _shared_bytes(process.pid, "/dev/shm/")


def _kind_of_ray(command: Sequence[str]) -> str:
    """Tell Ray's processes apart by the names that they give themselves."""
    if command[0].startswith("ray::NodeAgent"):
        return AGENT
    if command[0].startswith(("ray::IDLE", "ray::run_on_node")):
        return WORKERS
    return GCS if command[0].endswith("/gcs_server") else DAEMONS


def _private_bytes(pid: int) -> int:
    """Anonymous memory of a process: what it has for itself, libraries and shared memory left out."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def _shared_bytes(pid: int, prefix: str) -> int:
    """Pages that exist of the shared memory of which a process has descriptors, each file counted once."""
    files = {}
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if os.readlink(descriptor).startswith(prefix):
                found = descriptor.stat()
                files[found.st_ino] = 512 * found.st_blocks
    return sum(files.values())
