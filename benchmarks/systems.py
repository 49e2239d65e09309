"""Run the same stepping simulation (`programs.ranks`) with each system, and collect what both sides measured."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clusters import output_of, ray_cluster, started
from benchmarks.peers import ADIOS2_SST, DEISA_RAY_018, EARLIER, Peers, PeerUnavailableError
from benchmarks.suite import THIS, Outcome, Setting

TIMEOUT_S = 600.0
INLINE_MPI = "inline MPI"
LOCAL = "deisa-ray, local engine"


@dataclass(frozen=True)
class Work:
    """What every system is given to do.

    Attributes
    ----------
    chunk_bytes, ranks, steps : int
    compute_s : float
        Processor time that each rank spends computing before each hand-over (seconds).
    pause_s : float
        Time that it sleeps besides, for measurements that are about an idle machine (seconds).
    layout : str
        How a chunk lies in the rank's memory, one of `programs.ranks.LAYOUTS`.
    turns : sequence of str
        Arguments with which `programs.ranks` waits for its turn.
    """

    chunk_bytes: int
    ranks: int = 4
    steps: int = 200
    compute_s: float = 0.02
    pause_s: float = 0.0
    layout: str = "row"
    turns: Sequence[str] = ()

    def arguments(self) -> list[str]:
        """For `programs.ranks`."""
        return [
            f"--bytes={self.chunk_bytes}",
            f"--steps={self.steps}",
            f"--compute={self.compute_s}",
            f"--pause={self.pause_s}",
            f"--layout={self.layout}",
            *self.turns,
        ]


@dataclass(frozen=True)
class Measured:
    """Times of one system, over all ranks and steps (seconds).

    Attributes
    ----------
    start : array
        Creating the system's object, by rank.
    hand_over, copy : array
        Handing one chunk over; copying the same chunk into warm memory.
    answer : array
        From the last rank's handing over to the mean being there, by step; empty where nothing comes back.
    gained_bytes : array
        Private memory gained, by rank.
    analytics : mapping
        What the analytics printed.
    """

    start: np.ndarray
    hand_over: np.ndarray
    copy: np.ndarray
    answer: np.ndarray
    gained_bytes: np.ndarray
    analytics: Mapping[str, Any] = field(default_factory=dict)

    def median(self) -> float:
        """Median time of handing over."""
        return float(np.median(self.hand_over))

    def p99(self) -> float:
        """99th percentile of it."""
        return float(np.percentile(self.hand_over, 99))


def measure_all(
    setting: Setting, outcome: Outcome, work: Work, systems: Sequence[str]
) -> dict[str, Measured]:
    """Run the work with one system after the other; those that are not to be had are noted, and left out."""
    measured: dict[str, Measured] = {}
    for system in systems:
        try:
            # The existing deisa-ray needs about 0.2 s for a step, and its percentiles settle soon.
            own = replace(work, steps=min(work.steps, 120)) if system == DEISA_RAY_018 else work
            measured[system] = measure(system, own, setting.peers)
        except PeerUnavailableError as reason:
            outcome.not_measured(system, reason)
    return measured


def measure_in_turns(
    setting: Setting, outcome: Outcome, work: Work, systems: Sequence[str], *, block: int = 20
) -> dict[str, Measured]:
    """Run the work with all systems at once, of which one goes on at a time, for a block of steps.

    So load that comes and goes hits all of them. Systems that are not to be had are noted, and left out.

    Raises
    ------
    ExceptionGroup
        When a system fails: the others end too.
    """
    available = []
    for system in systems:
        try:
            if setting.peers.installs(system):
                setting.peers.python(system)
            available.append(system)
        except PeerUnavailableError as reason:
            outcome.not_measured(system, reason)
    with (
        tempfile.TemporaryDirectory(prefix="dr-") as folder,
        ThreadPoolExecutor(len(available)) as pool,
    ):

        def take_part(turn: int) -> Measured:
            turns = (f"--turns={folder}", f"--turn={turn}", f"--turn-of={len(available)}", f"--block={block}")
            try:
                return measure(available[turn], replace(work, turns=turns), setting.peers)
            except BaseException:
                Path(folder, "failed").touch()
                raise

        parts = [pool.submit(take_part, turn) for turn in range(len(available))]
        if errors := [error for part in parts if isinstance(error := part.exception(), Exception)]:
            raise ExceptionGroup("systems that took turns have failed", errors)
        return {system: part.result() for system, part in zip(available, parts, strict=True)}


def measure(system: str, work: Work, peers: Peers) -> Measured:
    """Run the work with a system; starts a cluster if it needs one."""
    return {
        THIS: measure_this,
        LOCAL: measure_local,
        EARLIER: measure_earlier,
        DEISA_RAY_018: measure_018,
        ADIOS2_SST: measure_sst,
        INLINE_MPI: measure_inline,
    }[system](work, peers)


def measure_this(
    work: Work,
    peers: Peers,
    *,
    slots: bool = False,
    analytics_under: Sequence[str] = (),
    ranks_under: Sequence[str] = (),
) -> Measured:
    """Measure this project, on a cluster of its own.

    `analytics_under` and `ranks_under` are commands to start the sides under, such as `nice`. Ray and the agent
    belong to the analytics.
    """
    with ray_cluster(wrapper=analytics_under) as variables:
        system = "deisa-ray-slots" if slots else "deisa-ray"
        return _hand_over(work, Path(sys.executable), variables, system, "ray", analytics_under, ranks_under)


def measure_local(work: Work, peers: Peers) -> Measured:
    """Measure this project without Ray; ranks are processes all the same."""
    return _hand_over(work, Path(sys.executable), {}, engine="local")


def measure_earlier(work: Work, peers: Peers) -> Measured:
    """Measure an earlier commit of this project, on a cluster of its own."""
    python = peers.python(EARLIER)
    with ray_cluster(python) as variables:
        return _hand_over(work, python, variables)


def _hand_over(
    work: Work,
    python: Path,
    variables: Mapping[str, str],
    system: str = "deisa-ray",
    engine: str = "ray",
    analytics_under: Sequence[str] = (),
    ranks_under: Sequence[str] = (),
) -> Measured:
    session = f"bench-{os.urandom(3).hex()}"
    analytics = [
        *(*analytics_under, python, "-m", "benchmarks.programs.mean_analytics", "--generation=this"),
        *(f"--engine={engine}", f"--session={session}", f"--steps={work.steps}"),
    ]
    with started(analytics, variables) as running:
        wait_ready(running)
        arguments = [f"--system={system}", f"--session={session}"]
        ranks = _ranks(python, work, arguments, variables, ranks_under)
        return _measured(ranks, last_line(output_of(running, TIMEOUT_S)))


def measure_018(work: Work, peers: Peers) -> Measured:
    """Measure the existing deisa-ray, on a cluster of its own; ranks stay until the analytics is done."""
    python = peers.python(DEISA_RAY_018)
    with ray_cluster(python) as variables, tempfile.TemporaryDirectory(prefix="dr-") as folder:
        done = Path(folder, "done")
        analytics = [
            *(python, "-m", "benchmarks.programs.mean_analytics", "--generation=0.1.8"),
            *(f"--steps={work.steps}", f"--done={done}"),
        ]
        with started(analytics, variables) as running:
            wait_ready(running)
            ranks = _ranks(python, work, ["--system=deisa-ray-0.1.8", f"--linger={done}"], variables)
            return _measured(ranks, last_line(output_of(running, TIMEOUT_S)))


def measure_sst(work: Work, peers: Peers) -> Measured:
    """Measure ADIOS2 SST; its reader takes the same mean."""
    python = peers.python(ADIOS2_SST)
    with tempfile.TemporaryDirectory(prefix="dr-") as folder:
        reader = [
            *(python, "-m", "benchmarks.programs.sst_reader"),
            *(f"--ranks={work.ranks}", f"--folder={folder}"),
        ]
        with started(reader) as running:
            ranks = _ranks(python, work, ["--system=adios2-sst", f"--folder={folder}"], {})
            return _measured(ranks, last_line(output_of(running, TIMEOUT_S)))


def measure_inline(work: Work, peers: Peers) -> Measured:
    """Measure the reduction inside the simulation."""
    return _measured(_ranks(Path(sys.executable), work, ["--system=inline-mpi"], {}), {"there_at": []})


def wait_ready(analytics: Any) -> None:
    """Wait until an analytics says on its standard error that it is ready."""
    for line in analytics.stderr:
        if line.strip() == "ready":
            return
    output_of(analytics, TIMEOUT_S)
    raise RuntimeError("the analytics ended before it was ready")


def _ranks(
    python: Path, work: Work, system: list[str], variables: Mapping[str, str], under: Sequence[str] = ()
) -> dict[str, Any]:
    mpiexec = [*under, python.parent / "mpiexec", "-n", str(work.ranks)]
    program = [python, "-m", "benchmarks.programs.ranks", *work.arguments(), *system]
    with started([*mpiexec, *program], variables) as simulation:
        return last_line(output_of(simulation, TIMEOUT_S))


def last_line(output: str) -> dict[str, Any]:
    """Read the line of JSON that a program prints; Ray and the existing deisa-ray print lines of their own."""
    return json.loads(next(line for line in reversed(output.splitlines()) if line.startswith("{")))


def _measured(ranks: Mapping[str, Any], analytics: Mapping[str, Any]) -> Measured:
    there_at, handed_over_at = analytics["there_at"], ranks["handed_over_at"]
    answers = np.subtract(there_at, handed_over_at[: len(there_at)])
    return Measured(
        **{name: np.array(ranks[name]) for name in ("start", "hand_over", "copy", "gained_bytes")},
        answer=answers[10:] if len(answers) > 20 else answers[len(answers) // 2 :],
        analytics=analytics,
    )
