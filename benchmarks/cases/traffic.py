"""What crosses the network when the analytics runs where the data is."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import numpy as np

from benchmarks.clusters import ROOT, output_of
from benchmarks.suite import THIS, Curve, Outcome, Setting, case
from tests.support.netns import NamespacedCluster, namespaced_cluster, reason_unavailable
from tests.support.processes import kill_tree

PROGRAMS = ROOT / "benchmarks/programs"
TIMEOUT_S = 120.0
SETTLE_S = 1.5  # Ray reports what tasks did once a second; that belongs to the steps too


@dataclass(frozen=True)
class Moved:
    """What one run has moved, and how fast.

    Attributes
    ----------
    handed_over, in_steps, idle : int
        Bytes of chunks; bytes that all nodes sent from before the first to after the last timestep; the same
        over as long a time in which the session was open, and nothing happened.
    seconds : float
        How long that time was.
    answers_s : sequence of float
        From the last chunk's being sent to the results, by timestep (seconds).
    """

    handed_over: int
    in_steps: int
    idle: int
    seconds: float
    answers_s: Sequence[float]

    @property
    def answer_s(self) -> float:
        """Its median, the first timestep left out: processes start and plans are made there."""
        return float(np.median(self.answers_s[1:]))


@case("How many bytes cross the network?")
def traffic(setting: Setting) -> Outcome:
    """Count bytes on the links of nodes in network namespaces; the analytics runs on a node without ranks."""
    outcome = Outcome()
    if reason := reason_unavailable():
        outcome.notes.append(f"Not measured: {reason}.")
        return outcome
    chunk_bytes, steps = setting.pick((64 * 2**20, 20), (2**20, 3))
    with namespaced_cluster(nodes=3) as cluster:
        moved = _run(cluster, 2, chunk_bytes, steps, setting.scratch)
        alone = _sent_during(cluster, lambda: time.sleep(moved.seconds))
        if setting.quick:
            curves = _by_nodes(cluster, 2, 2**20, 2, setting.scratch)
    if not setting.quick:
        with namespaced_cluster(nodes=5, cpus=1) as cluster:
            curves = _by_nodes(cluster, 4, 8 * 2**20, 10, setting.scratch)
    outcome.figure("data handed over", THIS, moved.handed_over, "B")
    outcome.figure(f"bytes between nodes, {steps} timesteps", THIS, moved.in_steps, "B")
    outcome.figure("bytes between nodes in the same time, session open, no timesteps", THIS, moved.idle, "B")
    outcome.figure("bytes between nodes in the same time, no session", "Ray", alone, "B")
    outcome.figure("that time", THIS, moved.seconds, "s")
    outcome.figure("from the last chunk to the results, median", THIS, moved.answer_s, "s")
    outcome.compare(
        "bytes between nodes / data handed over; mean, deviation and histogram",
        100 * moved.in_steps / moved.handed_over,
        "<=",
        0.1,
        "%",
    )
    outcome.notes.append(
        f"2 nodes with a rank each, chunks of {chunk_bytes / 2**20:g} MiB, the analytics on a third node. All "
        "bytes on the links count: also what Ray sends in any case, and what the first timestep needs."
    )
    outcome.curves += curves
    return outcome


def _by_nodes(
    cluster: NamespacedCluster, most: int, chunk_bytes: int, steps: int, scratch: Path
) -> list[Curve]:
    """Leave more and more nodes of a cluster a rank."""
    runs = {n: _run(cluster, n, chunk_bytes, steps, scratch) for n in range(1, most + 1)}
    size, nodes = f"{chunk_bytes / 2**20:g} MiB each", "nodes with a rank"
    return [
        Curve(
            f"Bytes between nodes, chunks of {size}",
            nodes,
            "KiB per timestep",
            {
                "while timesteps come": [(n, moved.in_steps / steps / 2**10) for n, moved in runs.items()],
                "in the same time without": [(n, moved.idle / steps / 2**10) for n, moved in runs.items()],
            },
        ),
        Curve(
            f"From the last chunk to the results, chunks of {size}",
            nodes,
            "ms, median",
            {THIS: [(n, 1000 * moved.answer_s) for n, moved in runs.items()]},
        ),
    ]


def _run(cluster: NamespacedCluster, nodes: int, chunk_bytes: int, steps: int, scratch: Path) -> Moved:
    """Run a rank on each of `nodes` nodes, and the analytics on the head."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    variables = {"DEISA_RAY_SESSION": f"traffic-{os.urandom(3).hex()}"}

    with ExitStack() as undo:

        def start(node: int, program: str, *options: str) -> Popen[str]:
            argv = [sys.executable, str(PROGRAMS / program), f"--folder={folder}", *options]
            process = undo.enter_context(cluster.run(node, argv, variables))
            undo.callback(kill_tree, process)
            return process

        report = folder / "report.json"  # Ray, too, may print at the end
        analytics = start(0, "summary_analytics.py", f"--report={report}")
        sizes = (f"--ranks={nodes}", f"--bytes={chunk_bytes}", f"--steps={steps}")
        ranks = [start(1 + rank, "traffic_rank.py", f"--rank={rank}", *sizes) for rank in range(nodes)]
        programs = [analytics, *ranks]
        for rank in range(nodes):
            _wait_for(folder / f"ready-{rank}", programs)

        def run_steps() -> None:
            (folder / "step-0").touch()
            _wait_for(folder / f"step-{steps}", programs)
            time.sleep(SETTLE_S)

        began = time.monotonic()
        in_steps = _sent_during(cluster, run_steps)
        seconds = time.monotonic() - began
        idle = _sent_during(cluster, lambda: time.sleep(seconds))
        (folder / "counted").touch()
        sent_at = [json.loads(output_of(rank, TIMEOUT_S)) for rank in ranks]
        output_of(analytics, TIMEOUT_S)
        found = json.loads(report.read_text())
    answers = np.subtract(found["results_at"], np.max(sent_at, axis=0))
    return Moved(found["bytes"], in_steps, idle, seconds, answers.tolist())


def _sent_during(cluster: NamespacedCluster, act: Callable[[], object]) -> int:
    """Bytes that all nodes send while something is done."""
    nodes = range(len(cluster.namespaces))
    before = sum(map(cluster.bytes_sent, nodes))
    act()
    return sum(map(cluster.bytes_sent, nodes)) - before


def _wait_for(file: Path, programs: Sequence[Popen[str]]) -> None:
    """Wait for a file that one of the programs makes.

    Raises
    ------
    RuntimeError
        When a program ends before, with its errors; or after `TIMEOUT_S`.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while not file.exists():
        for program in programs:
            if program.poll() is not None:
                output_of(program, TIMEOUT_S)
                raise RuntimeError(f"ended too early: {program.args!r}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"no {file.name} after {TIMEOUT_S:g} s")
        time.sleep(0.01)
