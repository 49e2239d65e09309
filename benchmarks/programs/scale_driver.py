"""A real driver for simulated nodes (`benchmarks.simulated`): prints what each timestep cost it, as JSON."""

from __future__ import annotations

import argparse
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import ray

from benchmarks.simulated import ARRAY, Machine, SimulatedEngine
from deisa.ray import Deisa, Settings, WindowSpec, window_handler
from deisa.ray.types import DeisaArray

NEVER = 10**9


def run(machine: Machine, *, merged: bool, steps: int, join_s: float, idle_s: float) -> dict[str, Any]:
    """Run callbacks on simulated timesteps.

    Parameters
    ----------
    machine : Machine
    merged : bool
        Whether a node's chunks share memory.
    steps : int
        Timesteps.
    join_s, idle_s : float
        Time over which the ranks join, and in which nothing happens after the last timestep (seconds).

    Returns
    -------
    dict
        ``steps`` holds for each timestep the seconds of each part, the first of them having no plan to reuse;
        the rest is about the whole.
    """
    settings = Settings(
        session=f"scale-{os.urandom(3).hex()}", merge_chunks_beyond=0 if merged else NEVER, warn_every_s=60
    )
    engine = SimulatedEngine(settings, machine)
    with mock.patch.object(window_handler, "_make_engine", lambda *_: engine):
        deisa = Deisa(settings=settings)
    driver = _Driver(deisa, engine)
    deisa.register_callback(driver.callback, WindowSpec(ARRAY))
    ready_bytes = resident_bytes()
    simulation = threading.Thread(target=driver.simulate, args=(steps, join_s, idle_s))
    simulation.start()
    deisa.execute_callbacks()
    simulation.join()
    agents = engine.agents
    return {
        "steps": driver.steps,
        "register_s": agents.started - agents.first_joined,
        "register_after_last_s": agents.started - driver.all_joined,
        "start_s": agents.started - agents.laid_out,
        "progress_calls": agents.progress_calls,
        "idle_cpu": driver.idle_cpu,
        "bundles": driver.bundles,
        "ready_bytes": ready_bytes,
        "started_bytes": driver.started_bytes,
        "end_bytes": driver.end_bytes,
        "peak_bytes": resident_bytes("VmHWM"),
    }


class _Driver:
    def __init__(self, deisa: Deisa, engine: SimulatedEngine) -> None:
        self._usage = deisa._scheduler.usage
        self._agents = engine.agents
        self._executor = engine.executor
        self._called: dict[int, float] = {}
        self.steps: list[dict[str, float]] = []
        self.all_joined, self.idle_cpu = 0.0, 0.0
        self.bundles, self.started_bytes, self.end_bytes = 0, 0, 0

    def callback(self, x: list[DeisaArray]) -> None:
        """Take the mean of an array, and note how long each part took."""
        called = time.monotonic()
        before = self._spent()
        began = time.perf_counter()
        mean = x[-1].mean()
        built = time.perf_counter()
        value = float(mean.compute())
        computed = time.perf_counter()
        planned, submitted, fetched, bundles = (
            after - earlier for earlier, after in zip(before, self._spent(), strict=True)
        )
        if value != 1:
            raise ArithmeticError(f"the mean of ones is {value}")
        self.bundles = int(bundles)
        self._called[x[-1].t] = called
        self.steps.append(
            {
                "build_s": built - began,
                "optimize_s": computed - built - planned - fetched,
                "plan_s": planned - submitted,
                "submit_s": submitted,
                "wait_s": fetched,
            }
        )

    def _spent(self) -> tuple[float, float, float, int]:
        executor = self._executor
        return self._usage.planning_s, executor.submit_s, executor.fetch_s, executor.stats.submitted

    def simulate(self, steps: int, join_s: float, idle_s: float) -> None:
        """Be the ranks: the next timestep begins when the last one has been released everywhere."""
        self.all_joined = max(self._all("join", join_s))
        self._agents.running.wait()
        self.started_bytes = resident_bytes()
        for timestep in range(steps):
            self._all("put", timestep)
            began, cpu, release_s = time.monotonic(), time.process_time(), self._agents.release_s
            shown = max(self._all("show"))
            self._all("wait_released", timestep)
            self.steps[timestep] |= {
                "fan_in_s": self._called[timestep] - shown,
                "release_s": self._agents.release_s - release_s,
                "cpu_s": time.process_time() - cpu,
                "whole_s": time.monotonic() - began,
            }
        self.end_bytes = resident_bytes()
        cpu, began = time.process_time(), time.monotonic()
        time.sleep(idle_s)
        self.idle_cpu = (time.process_time() - cpu) / (time.monotonic() - began)
        self._all("end")

    def _all(self, method: str, *arguments: Any) -> list[Any]:
        return ray.get([getattr(host, method).remote(*arguments) for host in self._agents.hosts])


def resident_bytes(field: str = "VmRSS") -> int:
    """Memory that this process occupies, or has (``VmHWM``) at most occupied."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def main() -> None:
    """Read arguments, run, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--chunks", type=int, required=True)
    parser.add_argument("--merged", action="store_true")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--join", type=float, default=1.0)
    parser.add_argument("--idle", type=float, default=4.0)
    options = parser.parse_args()
    machine = Machine(options.nodes, options.chunks)
    measured = run(
        machine, merged=options.merged, steps=options.steps, join_s=options.join, idle_s=options.idle
    )
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
