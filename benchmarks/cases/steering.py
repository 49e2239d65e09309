"""What it costs a rank to get what the analytics has set, and how soon it gets it."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.clusters import output_of, ray_cluster, started
from benchmarks.peers import DEISA_RAY_018, PeerUnavailableError
from benchmarks.suite import THIS, Outcome, Setting, case
from benchmarks.systems import TIMEOUT_S, last_line, wait_ready

RANKS = 4
WARM_UP_STEPS = 10
GENERATIONS = {THIS: "this", DEISA_RAY_018: "0.1.8"}


@case("What does `get` cost, and how soon does a rank have what a callback sets?")
def steering(setting: Setting) -> Outcome:
    """4 ranks wait after each `send` for the mean of what they have sent; and get it again and again."""
    outcome = Outcome()
    ranks, analytics = measure(THIS, setting, sys.executable)
    sent_at, got_at = np.array(ranks["sent_at"]), np.array(ranks["got_at"])
    there_at = np.array(analytics["there_at"])
    result, round_trip = ((at - sent_at)[WARM_UP_STEPS:] for at in (there_at, got_at))
    for what, taken in (
        ("result in the callback", result),
        ("get(wait=) has returned on all ranks", round_trip),
    ):
        outcome.figure(f"last send -> {what}, median", THIS, float(np.median(taken)), "s")
    ratio = float(np.median(round_trip) / np.median(result))
    outcome.compare("last send -> get(wait=) / last send -> result", ratio, "<=", 1.5)
    cost = outcome.figure("get, median", THIS, float(np.median(ranks["get"])), "s")
    outcome.figure("get, 99th percentile", THIS, float(np.percentile(ranks["get"], 99)), "s")
    try:
        theirs, _ = measure(DEISA_RAY_018, setting, setting.peers.python(DEISA_RAY_018))
    except PeerUnavailableError as reason:
        outcome.not_measured(DEISA_RAY_018, reason)
        return outcome
    their_cost = outcome.figure("get, median", DEISA_RAY_018, float(np.median(theirs["get"])), "s")
    outcome.compare("get: deisa-ray 0.1.8 / this", their_cost / cost, ">=", None)
    return outcome


def measure(system: str, setting: Setting, python: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run both sides with a generation, on a cluster of its own; returns what each has printed."""
    of_peer = system == DEISA_RAY_018
    steps = setting.pick(60, 20)
    generation = [f"--generation={GENERATIONS[system]}", f"--steps={steps}"]
    session = [] if of_peer else [f"--session=bench-{os.urandom(3).hex()}"]
    with (
        ray_cluster(Path(python) if of_peer else None) as variables,
        tempfile.TemporaryDirectory(prefix="dr-") as folder,
    ):
        done = [f"--done={Path(folder, 'done')}"] if of_peer else []
        programs = "benchmarks.programs.steering"
        with started(
            [python, "-m", f"{programs}_analytics", *generation, *session, *done], variables
        ) as running:
            wait_ready(running)
            gets = [
                f"--gets={setting.pick(2000, 50) if not of_peer else 50}",
                f"--pause={setting.pick(0.1, 0.02)}",
            ]
            mpiexec = [Path(python).parent / "mpiexec", "-n", str(RANKS)]
            program = [python, "-m", f"{programs}_ranks", *generation, *session, *done, *gets]
            with started([*mpiexec, *program], variables) as simulation:
                ranks = last_line(output_of(simulation, TIMEOUT_S))
            return ranks, last_line(output_of(running, TIMEOUT_S))
