"""How soon a result is there."""

from __future__ import annotations

import numpy as np

from benchmarks.peers import ADIOS2_SST, DEISA_RAY_018
from benchmarks.suite import THIS, Outcome, Setting, case
from benchmarks.systems import LOCAL, Work, measure_all, measure_in_turns


@case("How long after the last chunk is the mean there?")
def answer(setting: Setting) -> Outcome:
    """4 ranks with a chunk each, slow enough that nothing queues."""
    outcome = Outcome()
    work = Work(32 * 1024, steps=setting.pick(60, 24), compute_s=0.0, pause_s=setting.pick(0.5, 0.05))
    medians: dict[str, float] = {}
    all_measured = {
        **measure_in_turns(setting, outcome, work, (THIS, LOCAL), block=setting.pick(6, 12)),
        **measure_all(setting, outcome, work, (DEISA_RAY_018, ADIOS2_SST)),
    }
    for system, measured in all_measured.items():
        medians[system] = outcome.figure(
            "last chunk handed over -> mean() in the callback, median",
            system,
            float(np.median(measured.answer)),
            "s",
        )
        outcome.figure("the same, 99th percentile", system, float(np.percentile(measured.answer, 99)), "s")
    what = "chunk complete -> result, 4 chunks"
    outcome.compare(f"{what}: this / local engine", medians[THIS] / medians[LOCAL], "<=", 1.3)
    if DEISA_RAY_018 in medians:
        ratio = medians[DEISA_RAY_018] / medians[THIS]
        outcome.compare(f"{what}: deisa-ray 0.1.8 / this", ratio, ">=", 8)
    return outcome
