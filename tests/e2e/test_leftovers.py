"""What is left when a run is over: nothing, however many there were."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from deisa.ray import DeisaArray, Settings
from deisa.ray._state.journal import Handled
from deisa.ray.errors import AnalyticsLostError
from tests.e2e.simulation import QUICK_TO_GIVE_UP, Ranks, Site, ranks
from tests.support.patience import wait_until

WARM_RUNS = 5
ELEMENTS = 2**17  # 1 MiB a chunk
GROWTH_BYTES = 12 * 2**20  # less than a MiB a run, where each run maps six of them several times


def short_run(site: Site) -> None:
    """Two ranks, two timesteps, one callback."""

    def rank(number: int) -> None:
        described = {
            "chunk_shape": (ELEMENTS,),
            "nb_chunks_per_dim": (2,),
            "chunk_position": (number,),
            "dtype": float,
        }
        with site.bridge(number, 2, {"x": described}) as bridge:
            for timestep in range(2):
                bridge.send("x", np.full(ELEMENTS, float(timestep)), timestep)

    seen: list[float] = []
    with site.deisa() as deisa:
        site.opened.clear()

        @deisa.register("x")
        def average(x: list[DeisaArray]) -> None:
            seen.append(x[-1].mean().compute())

        with ranks(*(partial(rank, number) for number in range(2))):
            deisa.execute_callbacks()
    assert seen == [0.0, 1.0]


def sockets(session: str) -> list[str]:
    return [line for line in Path("/proc/net/unix").read_text().splitlines() if f"/{session}" in line]


def memory(session: str) -> list[str]:
    """Mappings and descriptors of the session's chunk memory, in any process."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it may end while we look
            found += [line for line in (process / "maps").read_text().splitlines() if session in line]
            found += [str(link) for link in _links(process / "fd") if session in str(link)]
    return found


def _links(directory: Path) -> Iterable[Path]:
    for entry in directory.iterdir():
        with suppress(OSError):
            yield entry.readlink()


def own_footprint() -> tuple[int, int, int]:
    """Open descriptors, threads and resident bytes of this process."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), resident


def assert_nothing_left(engine: str, session: str) -> None:
    gc.collect()  # an exception refers to the frames it went through, and these to chunk memory
    wait_until(lambda: not sockets(session), f"no socket of {session}")
    wait_until(lambda: not memory(session), f"no chunk memory of {session}")
    if engine == "ray":
        import ray

        def agents() -> list[str]:
            actors = ray.util.list_named_actors(all_namespaces=True)
            return [actor["name"] for actor in actors if session in actor["name"]]

        wait_until(lambda: not agents(), f"no actor of {session}")


@pytest.mark.parametrize("runs", [15, pytest.param(50, marks=pytest.mark.slow)])
def test_run_after_run_leaves_nothing(site: Site, runs: int) -> None:
    for _ in range(WARM_RUNS):
        short_run(site)
    descriptors, threads, resident = own_footprint()
    for _ in range(runs - WARM_RUNS):
        short_run(site)
    assert_nothing_left(site.engine, site.settings.session)

    def grown() -> tuple[int, int]:
        now = own_footprint()
        return max(0, now[0] - descriptors), max(0, now[1] - threads)

    wait_until(lambda: grown() == (0, 0), f"descriptors and threads back at {descriptors} and {threads}")
    assert own_footprint()[2] - resident < GROWTH_BYTES


def test_a_run_that_fails_leaves_nothing(site: Site) -> None:
    def rank() -> None:
        site.send_rows(0, 1, range(3))

    deisa = site.deisa(driver_timeout_s=2)  # for so long its agents wait for another analytics

    @deisa.register("x")
    def stop(x: list[DeisaArray]) -> None:
        assert memory(site.settings.session) and sockets(site.settings.session)  # or the test sees nothing
        raise KeyboardInterrupt

    simulation = Ranks([rank])
    with pytest.raises(KeyboardInterrupt):
        deisa.execute_callbacks()
    simulation.errors().clear()
    assert_nothing_left(site.engine, site.settings.session)


def test_four_sessions_side_by_side(engine: str, session_name: str) -> None:
    sites = [Site(engine, Settings(session=f"{session_name}-{n}", **QUICK_TO_GIVE_UP)) for n in range(4)]
    Ranks([partial(short_run, site) for site in sites]).check()
    assert_nothing_left(engine, session_name)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_an_analytics_that_ends_before_its_start_leaves_the_journal(session_name: str) -> None:
    """The next one still knows what the first one had handled."""
    from deisa.ray._engine.ray_agents import RayAgents
    from deisa.ray._engine.ray_cluster import connect

    settings = Settings(session=session_name, **QUICK_TO_GIVE_UP)
    connect(settings)
    first, second, third = (RayAgents(settings) for _ in range(3))
    first.open()
    journal = first.follow(2)
    assert journal is not None
    handled = (Handled(7), Handled(5, following=2))
    for callback, noted in enumerate(handled):
        journal.note(callback, noted)
    first.abandon(AnalyticsLostError("it has ended"))
    second.open()
    second.abandon(AnalyticsLostError("it has ended before its start"))
    third.open()
    try:
        (snapshot,) = third.predecessor.values()
        assert snapshot.handled == handled
    finally:
        third.close(None)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_agents_that_nobody_has_opened_hide_no_other(session_name: str) -> None:
    """An analytics that was killed while it started leaves such an agent, beside those that have data."""
    import ray

    from deisa.ray._engine.ray_agents import RayAgents
    from deisa.ray._engine.ray_cluster import connect

    settings = Settings(session=session_name, **QUICK_TO_GIVE_UP)
    connect(settings)
    first, second = RayAgents(settings), RayAgents(settings)
    first.open()
    (node_id,) = first.cpus()
    unopened = []
    try:
        for _ in range(4):
            killed = RayAgents(settings)
            unopened.append(killed._start_agent(node_id))
        first.abandon(AnalyticsLostError("it has ended"))
        second.open()
        assert list(second.predecessor) == [node_id]
    finally:
        for actor in unopened:
            ray.kill(actor)
        second.close(None)
