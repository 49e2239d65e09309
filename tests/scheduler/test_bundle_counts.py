"""Few Ray tasks for many chunks, on the way that a callback takes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import ray

from deisa.ray import Bridge, Deisa, DeisaArray, Settings, WindowSpec
from deisa.ray._engine.ray_executor import PreparedBundle, RayExecutor
from tests.scheduler.simulation import reraise

CHUNKS = 1024
TIMESTEPS = 3

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_a_mean_of_1024_chunks_is_a_handful_of_tasks(
    session_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(session=session_name, merge_chunks_beyond=CHUNKS)
    submitted: list[str | None] = []  # nodes

    def note(start: Callable[..., list]) -> Callable[..., list]:
        def noted(self: RayExecutor, prepared: PreparedBundle, *rest: Any) -> list:
            submitted.append(prepared.node_id)
            return start(self, prepared, *rest)

        return noted

    for way in ("submit", "run_here"):
        monkeypatch.setattr(RayExecutor, way, note(getattr(RayExecutor, way)))

    def rank() -> None:
        described = [
            {"chunk_shape": (16,), "nb_chunks_per_dim": (CHUNKS,), "chunk_position": (i,), "dtype": "f8"}
            for i in range(CHUNKS)
        ]
        with Bridge(None, {"x": described}, {"world_size": 1}, bridge_id=0, settings=settings) as bridge:
            for timestep in range(TIMESTEPS):
                for i in range(CHUNKS):
                    bridge.send("x", np.full(16, float(i + timestep)), timestep, chunk_index=i)

    counts: dict[str, int] = {}

    def callback(window: list[DeisaArray]) -> None:
        x = window[-1]
        for name, lazy, expected in [
            ("mean", x.mean(), (CHUNKS - 1) / 2 + x.t),
            ("std", x.std(), np.arange(CHUNKS).std()),
            ("difference", (x - window[0]).max(), x.t - window[0].t),
            ("part", x[5:1000].sum(), np.repeat(np.arange(CHUNKS) + x.t, 16)[5:1000].sum()),
        ]:
            before = len(submitted)
            assert lazy.compute() == pytest.approx(expected)
            counts[name] = len(submitted) - before

    deisa = Deisa(engine="ray", settings=settings)
    deisa.register_callback(callback, WindowSpec("x", 2), exception_handler=reraise)
    thread = threading.Thread(target=rank)
    thread.start()
    deisa.execute_callbacks()
    thread.join()
    assert counts == {"mean": 1, "std": 1, "difference": 1, "part": 1}
    assert set(submitted) == {ray.get_runtime_context().get_node_id()}
