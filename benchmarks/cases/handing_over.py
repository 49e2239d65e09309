"""What a simulation pays for each hand-over."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import numpy as np

from benchmarks.peers import ADIOS2_SST, DEISA_RAY_018
from benchmarks.suite import THIS, Outcome, Setting, case
from benchmarks.systems import INLINE_MPI, Work, measure, measure_all, measure_this

MIB = 2**20
LAYOUTS = {
    "c": "C order",
    "fortran": "Fortran order",
    "ghosts": "ghost cells on all sides",
    "halo": "a declared halo on all sides",
}


@case("What does handing over a small chunk cost a rank that computes 20 ms per step?")
def send_small(setting: Setting) -> Outcome:
    """32 KiB from each of 4 ranks, a mean at every step."""
    outcome = Outcome()
    work = Work(32 * 1024, steps=setting.pick(400, 30))
    measured = measure_all(setting, outcome, work, [THIS, DEISA_RAY_018, ADIOS2_SST, INLINE_MPI])
    for system, times in measured.items():
        outcome.figure("hand-over of 32 KiB, median", system, times.median(), "s")
        outcome.figure("hand-over of 32 KiB, 99th percentile", system, times.p99(), "s")
        outcome.figure("copy of 32 KiB in the same step, median", system, float(np.median(times.copy)), "s")
    ours = measured[THIS]
    if DEISA_RAY_018 in measured:
        theirs = measured[DEISA_RAY_018]
        outcome.compare(
            "send of 32 KiB, median: deisa-ray 0.1.8 / this", theirs.median() / ours.median(), ">=", 1000
        )
        outcome.compare("send of 32 KiB, p99: deisa-ray 0.1.8 / this", theirs.p99() / ours.p99(), ">=", 100)
    if ADIOS2_SST in measured:
        theirs = measured[ADIOS2_SST]
        outcome.compare(
            "send of 32 KiB, median: ADIOS2 SST step / this", theirs.median() / ours.median(), ">=", 10
        )
        outcome.compare("send of 32 KiB, p99: ADIOS2 SST step / this", theirs.p99() / ours.p99(), ">=", None)
    return outcome


@case("What does handing over a large chunk cost, against a bare copy of it?")
def send_large(setting: Setting) -> Outcome:
    """8 and 64 MiB from one rank, however they lie in its memory, the analytics having a core of its own."""
    outcome = Outcome()
    for mib in setting.pick((8, 64), (1,)):
        chunk_s = 0.004 * mib  # time for the analytics to take its mean meanwhile
        work = Work(mib * MIB, ranks=1, steps=setting.pick(60, 25), pause_s=0.02 + chunk_s, layout="c")
        medians: dict[str, float] = {}
        for layout, described in LAYOUTS.items():
            ours = measure(THIS, replace(work, layout=layout), setting.peers)
            what = f"{mib} MiB, {described}"
            medians[layout] = outcome.figure(f"hand-over of {what}, median", THIS, ours.median(), "s")
            copy = outcome.figure(f"copy of {what}, median", "NumPy", float(np.median(ours.copy)), "s")
            outcome.compare(f"send of {what}: this / bare copy", medians[layout] / copy, "<=", 1.1)
        for theirs in measure_all(setting, outcome, work, [ADIOS2_SST]).values():
            outcome.figure(f"hand-over of {mib} MiB, C order, median", ADIOS2_SST, theirs.median(), "s")
            ratio = theirs.median() / medians["c"]
            outcome.compare(f"send of {mib} MiB: ADIOS2 SST step / this", ratio, ">=", 10)
        if mib == 64 or setting.quick:
            slots = measure_this(work, setting.peers, slots=True)
            outcome.figure(f"handing over a slot of {mib} MiB, median", THIS, slots.median(), "s")
            outcome.compare(f"{mib} MiB: send / slot computed into", medians["c"] / slots.median(), ">=", 50)
    outcome.notes.append(
        "Chunks have three dimensions and are copied into memory in C order, as slots are. So a chunk in Fortran order "
        "is transposed, by `send` and by the bare copy. One with ghost cells is the interior of a larger array: "
        "a view of it is sent, or, with a declared halo, the larger array itself."
    )
    return outcome


@case(
    "How long do the slowest sends take where ranks and analytics share two cores, and the analytics yields?"
)
def send_nice(setting: Setting) -> Outcome:
    """32 KiB from each of 4 ranks that compute 20 ms a step; Ray, agent and analytics at `nice 10`."""
    outcome = Outcome()
    cores = sorted(os.sched_getaffinity(0))[:2]
    on_both = ("taskset", "--cpu-list", ",".join(map(str, cores)))
    if len(cores) < 2 or shutil.which("taskset") is None:
        outcome.notes.append("Not measured: there is one core only, or no taskset.")
        return outcome
    work = Work(32 * 1024, steps=setting.pick(1000, 30))
    times = measure_this(
        work, setting.peers, analytics_under=(*on_both, "nice", "-n", "10"), ranks_under=on_both
    )
    copy_p99 = float(np.percentile(times.copy, 99))
    outcome.figure("hand-over of 32 KiB, median", THIS, times.median(), "s")
    outcome.figure("hand-over of 32 KiB, 99th percentile", THIS, times.p99(), "s")
    outcome.figure("copy of 32 KiB in the same step, median", "NumPy", float(np.median(times.copy)), "s")
    outcome.figure("copy of 32 KiB in the same step, 99th percentile", "NumPy", copy_p99, "s")
    outcome.compare("send of 32 KiB, p99: this / bare copy", times.p99() / copy_p99, "<=", None)
    return outcome


@case("How does a hand-over grow with the ranks of a node?")
def send_ranks(setting: Setting) -> Outcome:
    """32 KiB from 1 to 32 ranks that sleep, since there are fewer cores than ranks."""
    outcome = Outcome()
    lines: dict[str, list[tuple[float, float]]] = {"median": [], "99th percentile": []}
    for ranks in setting.pick((1, 2, 4, 8, 16, 32), (1, 2)):
        work = Work(
            32 * 1024, ranks=ranks, steps=setting.pick(100, 25), compute_s=0.001, pause_s=0.01 * ranks
        )
        times = measure_this(work, setting.peers)
        lines["median"].append((ranks, times.median()))
        lines["99th percentile"].append((ranks, times.p99()))
        outcome.figure(f"hand-over of 32 KiB with {ranks} ranks, median", THIS, times.median(), "s")
    outcome.curve("Handing over 32 KiB, by ranks on one node of 2 cores", "ranks", "seconds", lines)
    return outcome


@case("What does the analytics cost beside a reduction inside the simulation?")
def against_inline(setting: Setting) -> Outcome:
    """The mean of 4 chunks of 8 MiB: `comm.reduce` in the ranks, or `send` and a callback."""
    outcome = Outcome()
    nbytes, steps, pause_s = setting.pick((8 * MIB, 60, 0.25), (MIB, 25, 0.05))
    work = Work(nbytes, steps=steps, compute_s=0.0, pause_s=pause_s)
    measured = measure_all(setting, outcome, work, [THIS, INLINE_MPI])
    ours, inline = measured[THIS], measured[INLINE_MPI]
    computing = float(np.median(ours.analytics["compute"][5:]))
    answer = float(np.median(ours.answer))
    outcome.figure("in the simulation's step, median", INLINE_MPI, inline.median(), "s")
    outcome.figure("in the simulation's step (send), median", THIS, ours.median(), "s")
    outcome.figure("from the last send to the mean, median", THIS, answer, "s")
    outcome.figure("of which in compute(): graph, bundles, result", THIS, computing, "s")
    outcome.figure("of which before the callback: agent, Ray call, driver", THIS, answer - computing, "s")
    outcome.compare("time in the step: this / inline MPI", ours.median() / inline.median(), "<=", None)
    outcome.compare("time to the result: this / inline MPI", answer / inline.median(), "<=", None)
    return outcome
