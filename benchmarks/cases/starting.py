"""What it costs a rank to have a bridge."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from benchmarks.peers import DEISA_RAY_018
from benchmarks.suite import THIS, Outcome, Setting, case
from benchmarks.systems import Measured, Work, measure_all

MIB = 2**20


@case("How long does Bridge() take once the analytics is up, and how much memory does it cost a rank?")
def bridge(setting: Setting) -> Outcome:
    """Connect 4 and 16 ranks, a few times over: more ranks than cores do not start alike twice."""
    outcome = Outcome()
    for ranks in setting.pick((4, 16), (2,)):
        work = Work(32 * 1024, ranks=ranks, steps=12, compute_s=0.0, pause_s=0.05)
        runs: dict[str, list[Measured]] = defaultdict(list)
        for _ in range(setting.pick(3, 1)):
            for system, measured in measure_all(setting, outcome, work, (THIS, DEISA_RAY_018)).items():
                runs[system].append(measured)
        start: dict[str, float] = {}
        for system, measured_runs in runs.items():
            start[system] = outcome.figure(
                f"Bridge() with {ranks} ranks, the slowest, median of {len(measured_runs)} runs",
                system,
                float(np.median([np.max(measured.start) for measured in measured_runs])),
                "s",
            )
            gained = outcome.figure(
                f"memory gained by a rank of {ranks}, median",
                system,
                float(np.median([measured.gained_bytes for measured in measured_runs])),
                "B",
            )
            if system == THIS:
                outcome.compare(f"memory gained by a rank of {ranks}", gained / MIB, "<=", 15, "MiB")
        if DEISA_RAY_018 in start:
            ratio = start[DEISA_RAY_018] / start[THIS]
            outcome.compare(
                f"Bridge() with {ranks} ranks: deisa-ray 0.1.8 / this", ratio, ">=", 40, every_run=ranks == 16
            )
    return outcome
