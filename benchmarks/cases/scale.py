"""What a timestep costs the driver, from one node to a thousand; the nodes are simulated, the driver is real."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.clusters import output_of, ray_cluster, started
from benchmarks.suite import THIS, Curve, Outcome, Setting, case

CHUNKS = 50  # on each node
PREDICTED_NODES = 200
TIMEOUT_S = 400.0
# What the driver does at a timestep, in this order; while it waits for bundles it does nothing.
PARTS = {
    "fan_in_s": "hearing of all nodes",
    "build_s": "building the graph (Dask)",
    "optimize_s": "optimising it (Dask)",
    "plan_s": "recognising its plan",
    "submit_s": "submitting bundles",
    "release_s": "giving slots back",
}
MERGED, SEPARATE = "chunks of a node merged", "chunks not merged"


@dataclass(frozen=True)
class Measured:
    """What `programs.scale_driver` printed for one number of nodes."""

    nodes: int
    whole: Mapping[str, Any]

    @property
    def first(self) -> Mapping[str, float]:
        """Seconds of each part at the first timestep."""
        return self.whole["steps"][0]

    def part(self, name: str) -> float:
        """Seconds of a part at later timesteps, their median."""
        return statistics.median(step[name] for step in self.whole["steps"][1:])

    @property
    def timestep_s(self) -> float:
        """Seconds of all parts together at later timesteps."""
        return statistics.median(sum(step[name] for name in PARTS) for step in self.whole["steps"][1:])

    @property
    def processor_s(self) -> float:
        """Processor time of a later timestep, all threads, without that of listening meanwhile."""
        listening = self.whole["idle_cpu"]
        return statistics.median(
            max(0.0, step["cpu_s"] - listening * step["whole_s"]) for step in self.whole["steps"][1:]
        )


@dataclass(frozen=True)
class Line:
    """``seconds = fixed_s + per_node_s * nodes``."""

    fixed_s: float
    per_node_s: float

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float]]) -> Line:
        """Fit it so that relative errors are small."""
        nodes, seconds = np.array(points).T
        slope, fixed = np.polyfit(nodes, seconds, 1, w=1 / seconds)
        return cls(float(fixed), float(slope))

    def at(self, nodes: float) -> float:
        """Seconds at a number of nodes."""
        return self.fixed_s + self.per_node_s * nodes


@case("What does a timestep cost the driver as nodes are added?")
def scale(setting: Setting) -> Outcome:
    """Run a mean at each timestep on simulated nodes, with their chunks merged and not."""
    counts = setting.pick((1, 10, 100, 300, 1000), (1, 8))
    tilings = setting.pick((MERGED, SEPARATE), (MERGED,))
    outcome = Outcome()
    with ray_cluster(cpus=1) as variables:
        by_tiling = {
            tiling: [_measure(nodes, tiling == MERGED, setting, variables) for nodes in counts]
            for tiling in tilings
        }
    for tiling, measured in by_tiling.items():
        _report(outcome, tiling, measured)
    outcome.curves += _curves(by_tiling)
    outcome.notes.append(
        f"Nodes are simulated, {CHUNKS} ranks with a chunk each on every one: a few actors answer for all of them, and "
        "all bundles run on one node, where no chunk is read. The driver, its events, calls and bundles are real; it "
        "has fewer connections than it would have, and shares the machine's cores with everything simulated."
    )
    return outcome


def _measure(nodes: int, merged: bool, setting: Setting, variables: Mapping[str, str]) -> Measured:
    argv = [
        *(sys.executable, "-m", "benchmarks.programs.scale_driver"),
        *(f"--nodes={nodes}", f"--chunks={CHUNKS}", f"--steps={setting.pick(5, 3)}"),
        *(f"--join={setting.pick(1.0, 0.2)}", f"--idle={setting.pick(4.0, 0.5)}"),
        *(["--merged"] if merged else []),
    ]
    with started(argv, variables) as driver:
        return Measured(nodes, json.loads(output_of(driver, TIMEOUT_S)))


def _report(outcome: Outcome, tiling: str, measured: Sequence[Measured]) -> None:
    most = measured[-1]
    system = f"{THIS}, {most.nodes:,} nodes, {tiling}"
    outcome.figure("driver's time for a timestep", system, most.timestep_s, "s")
    for name, words in PARTS.items():
        outcome.figure(f"… {words}", system, most.part(name), "s")
    outcome.figure("processor time of the driver for it", system, most.processor_s, "s")
    outcome.figure("planning at the first timestep", system, most.first["plan_s"], "s")
    outcome.figure("bundles of a timestep", system, most.whole["bundles"], "bundles")
    outcome.figure("first bridge to start", system, most.whole["register_s"], "s")
    outcome.figure("last bridge to start", system, most.whole["register_after_last_s"], "s")
    outcome.figure("listening to idle nodes", system, 100 * most.whole["idle_cpu"], "% of a core")
    outcome.figure("driver's memory before any bridge", system, most.whole["ready_bytes"], "B")
    outcome.figure("driver's memory after the last timestep", system, most.whole["end_bytes"], "B")
    outcome.figure("driver's memory at most", system, most.whole["peak_bytes"], "B")

    line = Line.fit([(m.nodes, m.timestep_s) for m in measured])
    off = max(abs(line.at(m.nodes) / m.timestep_s - 1) for m in measured)
    predicted = f"{THIS}, {PREDICTED_NODES} nodes x {CHUNKS} ranks (predicted), {tiling}"
    outcome.figure("driver's time for a timestep", predicted, line.at(PREDICTED_NODES), "s")
    first = Line.fit([(m.nodes, m.first["plan_s"]) for m in measured])
    outcome.figure("planning at the first timestep", predicted, first.at(PREDICTED_NODES), "s")
    outcome.notes.append(
        f"With {tiling}, a timestep costs the driver {1e3 * line.fixed_s:.1f} ms + {1e3 * line.per_node_s:.2f} ms "
        f"for each node (the fit is off by {off:.0%} at most): {1e3 * line.at(PREDICTED_NODES):.0f} ms for "
        f"{PREDICTED_NODES * CHUNKS:,} ranks on {PREDICTED_NODES} nodes."
    )


def _curves(by_tiling: Mapping[str, Sequence[Measured]]) -> Iterator[Curve]:
    for tiling, measured in by_tiling.items():
        lines = {words: [(m.nodes, m.part(name)) for m in measured] for name, words in PARTS.items()}
        lines["all of it"] = [(m.nodes, m.timestep_s) for m in measured]
        yield Curve(f"Driver's time for a timestep, {tiling}", "nodes", "seconds", lines)
    once = {
        f"{what}, {tiling}": [(m.nodes, seconds(m)) for m in measured]
        for tiling, measured in by_tiling.items()
        for what, seconds in (
            ("planning", lambda m: m.first["plan_s"]),
            ("last bridge to start", lambda m: m.whole["register_after_last_s"]),
        )
    }
    yield Curve("Driver's time once in a run", "nodes", "seconds", once)
    memory = {
        tiling: [(m.nodes, m.whole["peak_bytes"] / 2**20) for m in measured]
        for tiling, measured in by_tiling.items()
    }
    yield Curve("Driver's memory at most", "nodes", "MiB", memory)
