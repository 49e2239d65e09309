"""Whether a rank pays more than it did at an earlier commit of this project."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from benchmarks.clusters import ROOT, output_of, started
from benchmarks.peers import EARLIER, PeerUnavailableError
from benchmarks.suite import THIS, Outcome, Setting, case
from benchmarks.systems import Work, measure_in_turns

TIMEOUT_S = 60.0


@case("Does a rank pay more for its bridge than at an earlier commit, in time or in memory?")
def earlier_commit(setting: Setting) -> Outcome:
    """Import in fresh processes, and `send` of 32 KiB from each of 4 ranks that compute 20 ms a step; in turns."""
    outcome = Outcome()
    try:
        pythons = {THIS: Path(sys.executable), EARLIER: setting.peers.python(EARLIER)}
    except PeerUnavailableError as reason:
        outcome.not_measured(EARLIER, reason)
        return outcome
    imports: dict[str, list[tuple[float, float]]] = {system: [] for system in pythons}
    for _ in range(setting.pick(41, 3)):
        for system, python in pythons.items():
            imports[system].append(_import(python, {} if system == THIS else {"PYTHONPATH": str(ROOT)}))
    work = Work(32 * 1024, steps=setting.pick(400, 40))
    sends = measure_in_turns(setting, outcome, work, list(pythons))
    numbers = {
        system: {
            ("import deisa.ray.bridge, median", "s"): seconds,
            ("memory gained by the import, median", "B"): nbytes,
            ("memory gained by a rank of 4, median", "B"): float(np.median(sends[system].gained_bytes)),
            ("send of 32 KiB, median", "s"): sends[system].median(),
        }
        for system in pythons
        for seconds, nbytes in [np.median(imports[system][1:], axis=0).tolist()]  # the first one compiles
    }
    for system, by_what in numbers.items():
        for (what, unit), value in by_what.items():
            outcome.figure(what, system, value, unit)
        outcome.figure("send of 32 KiB, 99th percentile", system, sends[system].p99(), "s")
    for key, value in numbers[THIS].items():
        outcome.compare(f"{key[0]}: this / {EARLIER}", value / numbers[EARLIER][key], "<=", 1)
    outcome.notes.append(
        "Both have the same releases of Python, Ray, Dask and NumPy. Memory is what is resident in a process alone. "
        "That of a rank includes the import, `Bridge()` and all sends."
    )
    return outcome


def _import(python: Path, variables: dict[str, str]) -> tuple[float, float]:
    """Import the bridge in a fresh process (seconds, bytes)."""
    with started([python, "-m", "benchmarks.programs.footprint"], variables) as process:
        printed = json.loads(output_of(process, TIMEOUT_S))
    return printed["seconds"], printed["bytes"]
