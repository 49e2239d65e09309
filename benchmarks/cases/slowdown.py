"""What analytics on a core of its own costs the simulation beside it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.clusters import ROOT, output_of, started
from benchmarks.intervals import median_interval
from benchmarks.suite import THIS, Outcome, Setting, case
from tests.support.mpi import Mpi
from tests.support.processes import kill_tree
from tests.support.ray_node import AUTHENTICATION, RayNode

SIMULATION = ROOT / "examples/gray_scott/simulation.py"
ANALYTICS = ROOT / "benchmarks/programs/summary_analytics.py"
TIMEOUT_S = 300.0
EVERY = 20
MOST_PAIRS = 40
NARROW = 2.0  # points, of the interval of the median
BRIGHTEST = 0.45  # the end of the histogram of V


@case("How much slower is a simulation whose analytics has a core of its own?")
def slowdown(setting: Setting) -> Outcome:
    """Run the Gray-Scott example in pairs, with analytics and without; only steps after the first ones are timed."""
    outcome = Outcome()
    mpi = Mpi.find("mpich")
    cores = sorted(os.sched_getaffinity(0))
    if mpi is None or len(cores) < 2:
        outcome.notes.append(
            "Not measured: MPICH is not installed."
            if mpi is None
            else "Not measured: there is one core only."
        )
        return outcome
    size, untimed, steps, most = setting.pick((1024, 800, 1600, MOST_PAIRS), (256, 100, 100, 1))
    sizes = (f"--size={size}", f"--steps={untimed + steps}", f"--untimed={untimed}", f"--every={EVERY}")
    simulation = [*_pinned(cores[0]), mpi.mpiexec, "-n", "1", mpi.python, "-m", "mpi4py", SIMULATION, *sizes]
    report = setting.scratch / "report.json"
    analytics = [*_pinned(cores[1]), sys.executable, ANALYTICS, "--array=V"]
    analytics += [f"--highest={BRIGHTEST}", f"--report={report}"]
    beside, alone, reports = [], [], []
    slower: list[float] = []  # of each pair, in %
    interval = None

    with _cluster_on(cores[1], setting.scratch / "ray") as variables:

        def run_beside() -> None:
            own = {**variables, "DEISA_RAY_SESSION": f"slowdown-{os.urandom(3).hex()}"}
            with started(analytics, own) as running:
                try:
                    beside.append(_loop_s(simulation, own))
                except RuntimeError as error:
                    kill_tree(running)
                    error.add_note(f"the analytics said: {running.communicate()[1][-2000:]}")
                    raise
                output_of(running, TIMEOUT_S)
            reports.append(json.loads(report.read_text()))

        def run_alone() -> None:
            alone.append(_loop_s([*simulation, "--no-bridge"], variables))

        while len(slower) < most and (interval is None or interval[1] - interval[0] >= NARROW):
            both = (run_beside, run_alone)
            for run in both if len(slower) % 2 else reversed(both):
                run()
            slower.append(100 * (beside[-1] / alone[-1] - 1))
            interval = median_interval(slower)
    outcome.figure("the timed steps, median", "simulation alone", median(alone), "s")
    outcome.figure("the timed steps, median", THIS, median(beside), "s")
    _add_figures(outcome, reports)
    outcome.figure("pairs of runs", THIS, len(slower), "")
    if interval is not None:
        outcome.figure("slowdown, lower end of the 95 % interval of the median", THIS, interval[0], "%")
        outcome.figure("slowdown, upper end of the 95 % interval of the median", THIS, interval[1], "%")
        outcome.compare("width of that interval (points)", interval[1] - interval[0], "<=", NARROW, "%")
    outcome.compare(
        f"slowdown of the simulation, analytics every {EVERY} steps on a core of its own, median of the pairs",
        median(slower),
        "<=",
        2.0,
        "%",
    )
    outcome.notes.append(
        f"The Gray-Scott example, {size} x {size} cells, one rank on core {cores[0]}: {steps} steps, after {untimed} "
        f"in which the workers of the analytics start and its callback runs for the first times. Ray, agent and "
        f"analytics on core {cores[1]}: mean, deviation and histogram every {EVERY} steps. Pairs of runs, one with and "
        f"one without in alternating order, until the 95 % interval of the median of their ratios (that of the sign "
        f"test) is narrower than {NARROW:g} points, or {most} pairs have been run. Ray runs, idle, beside "
        "the simulation alone too."
    )
    return outcome


def _add_figures(outcome: Outcome, reports: list[dict[str, Any]]) -> None:
    sends = len(reports[0]["results_at"])
    outcome.figure("timesteps handed over in a run", THIS, sends, "")
    outcome.figure("bytes of one", THIS, reports[0]["bytes"] / sends, "B")
    outcome.figure("one callback, mean", THIS, np.mean([r["callbacks_s"] / sends for r in reports]), "s")
    outcome.figure("waiting for slots, greatest of the runs", THIS, max(r["held_up_s"] for r in reports), "s")


def _pinned(core: int) -> tuple[str, ...]:
    """What to put before a command for it, and all that it starts, to keep to a core."""
    return ("taskset", "--cpu-list", str(core))


@contextmanager
def _cluster_on(core: int, folder: Path) -> Iterator[Mapping[str, str]]:
    """Start a cluster that keeps to a core; yields the variables for processes that are to use it."""
    folder.mkdir()
    node = RayNode.start(folder, cpus=1, wrapper=_pinned(core))
    try:
        node.wait_started()
        yield {**AUTHENTICATION, "RAY_ADDRESS": node.address, "OMP_NUM_THREADS": "1"}
    finally:
        node.stop()


def _loop_s(simulation: list[Any], variables: Mapping[str, str]) -> float:
    """Run the simulation, and return the time that it gives for its steps (seconds)."""
    with started(simulation, {**variables, "DEISA_RAY_CONNECT_TIMEOUT_S": str(TIMEOUT_S)}) as running:
        printed = output_of(running, TIMEOUT_S)
    found = re.search(r"steps on 1 ranks in ([\d.]+) s", printed)
    if found is None:
        raise RuntimeError(f"the simulation gave no time: {printed!r}")
    return float(found[1])
