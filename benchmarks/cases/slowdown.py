"""What analytics on a core of its own costs the simulation beside it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clusters import ROOT, output_of, started
from benchmarks.suite import THIS, Outcome, Setting, case
from tests.support.mpi import Mpi
from tests.support.ray_node import AUTHENTICATION, RayNode

SIMULATION = ROOT / "examples/gray_scott/simulation.py"
ANALYTICS = ROOT / "benchmarks/programs/summary_analytics.py"
TIMEOUT_S = 300.0
EVERY = 20
BRIGHTEST = 0.45  # the end of the histogram of V


@case("How much slower is a simulation whose analytics has a core of its own?")
def slowdown(setting: Setting) -> Outcome:
    """Run the Gray-Scott example with and without analytics, in turns; only its loop over the steps is timed."""
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
    size, steps, pairs = setting.pick((1024, 1600, 5), (256, 200, 1))
    sizes = (f"--size={size}", f"--steps={steps}", f"--every={EVERY}")
    simulation = [*_pinned(cores[0]), mpi.mpiexec, "-n", "1", mpi.python, "-m", "mpi4py", SIMULATION, *sizes]
    report = setting.scratch / "report.json"
    analytics = [*_pinned(cores[1]), sys.executable, ANALYTICS, "--array=V"]
    analytics += [f"--highest={BRIGHTEST}", f"--report={report}"]
    beside, alone, reports = [], [], []
    with _cluster_on(cores[1], setting.scratch / "ray") as variables:
        for _ in range(pairs):
            with started(analytics, variables) as running:
                beside.append(_loop_s(simulation, variables))
                output_of(running, TIMEOUT_S)
            reports.append(json.loads(report.read_text()))
            alone.append(_loop_s([*simulation, "--no-bridge"], variables))
    outcome.figure("loop over the steps, median", "simulation alone", np.median(alone), "s")
    outcome.figure("loop over the steps, median", THIS, np.median(beside), "s")
    _add_figures(outcome, reports)
    ratios = np.divide(beside, alone)
    outcome.figure("slowdown, least of the pairs", THIS, 100 * (min(ratios) - 1), "%")
    outcome.figure("slowdown, greatest of the pairs", THIS, 100 * (max(ratios) - 1), "%")
    outcome.compare(
        f"slowdown of the simulation, analytics every {EVERY} steps on a core of its own",
        100 * (np.median(ratios) - 1),
        "<=",
        2.0,
        "%",
    )
    outcome.notes.append(
        f"The Gray-Scott example, {size} x {size} cells, {steps} steps, one rank on core {cores[0]}. Ray, agent and "
        f"analytics on core {cores[1]}: mean, deviation and histogram every {EVERY} steps. {pairs} runs with and "
        f"{pairs} without, in turns; the median of the ratios. Ray runs, idle, beside the simulation alone too."
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
