"""Computations on a Ray whose CPUs others hold."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

from deisa.ray import DeisaArray, Settings
from deisa.ray.errors import NoFreeCpusError
from tests.e2e.simulation import QUICK_TO_GIVE_UP, Site, ranks
from tests.support.patience import PATIENCE_S, wait_until

pytestmark = pytest.mark.ray

LARGE = {"chunk_shape": (2**18,), "nb_chunks_per_dim": (4,), "dtype": float}  # two CPUs pay


@pytest.fixture
def ray_site(ray_cluster: str, session_name: str) -> Iterator[Site]:
    site = Site("ray", Settings(session=session_name, **QUICK_TO_GIVE_UP))
    yield site
    site.close()


def send_large(site: Site, rank: int, timesteps: int) -> None:
    with site.bridge(rank, 4, {"x": {**LARGE, "chunk_position": (rank,)}}) as bridge:
        for timestep in range(timesteps):
            bridge.send("x", np.full(2**18, float(timestep)), timestep)


def hold_cpus(count: float, name: str) -> Any:
    """An actor that holds CPUs until it is killed."""
    import ray

    @ray.remote(num_cpus=count)
    class Holder:
        def there(self) -> bool:
            return True

    holder = Holder.options(name=name).remote()
    assert ray.get(holder.there.remote(), timeout=PATIENCE_S)
    return holder


def test_bundles_run_on_what_others_leave(ray_site: Site, session_name: str) -> None:
    """An actor takes one of two CPUs while bundles that are worth two come one after another, and gives it back."""
    import ray

    deisa = ray_site.deisa()
    holder: list[Any] = []
    seen = []

    @deisa.register("x")
    def add_up(x: list[DeisaArray]) -> None:
        if x[-1].t == 1:
            holder.append(hold_cpus(1, session_name))
        if x[-1].t == 3:
            ray.kill(holder.pop())
        seen.append(x[-1].dask.map_blocks(slowly, dtype=float).mean().compute())

    with ranks(*(partial(send_large, ray_site, rank, 5) for rank in range(4))):
        deisa.execute_callbacks()
    assert seen == [0.0, 1.0, 2.0, 3.0, 4.0]


def slowly(block: np.ndarray) -> np.ndarray:
    """Long enough for a Ray task of its own at every timestep."""
    time.sleep(0.02)
    return block


def test_where_no_cpu_is_free_the_holders_are_named(
    ray_site: Site, session_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes on with the next timestep, once there is a CPU again; the one that failed keeps no slot."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    @ray.remote(num_cpus=1)
    def like_a_rank() -> None:
        threading.Event().wait(PATIENCE_S)

    deisa = ray_site.deisa(cpu_timeout_s=3.0, warn_every_s=0.2)
    actor = hold_cpus(0.5, session_name)
    group = placement_group([{"CPU": 0.5}], name=session_name)
    assert group.wait(PATIENCE_S)
    task = like_a_rank.remote()
    wait_until(lambda: ray.available_resources().get("CPU", 0) == 0, "no CPU is free")
    errors: list[Exception] = []
    seen = []

    def note(error: Exception) -> None:
        errors.append(error)
        ray.cancel(task, force=True)

    def add_up(x: list[DeisaArray]) -> None:
        seen.append(x[-1].sum().compute())

    deisa.register_callback(add_up, "x", exception_handler=note)
    try:
        with ranks(partial(ray_site.send_rows, 0, 1, range(6))):
            deisa.execute_callbacks()
    finally:
        ray.cancel(task, force=True)
        ray.kill(actor)
        remove_placement_group(group)
    (error,) = errors
    assert isinstance(error, NoFreeCpusError)
    text = str(error)
    assert text.startswith(
        "no CPU for a computation within 3 s (DEISA_RAY_CPU_TIMEOUT_S sets how long): all 2 CPUs"
    )
    assert f"actor '{session_name}' of class Holder (pid " in text
    assert f"placement group '{session_name}', 0.5 CPU" in text
    assert re.search(r"task \S*like_a_rank \(pid \d+\), 1 CPU", text)
    assert any("waits for a CPU: all 2 CPUs" in line for line in caplog.messages)
    assert len(seen) == 5
