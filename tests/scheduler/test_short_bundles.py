"""Bundles that were short the last time: a standing worker runs them, or the caller itself."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest

from deisa.ray import Deisa, DeisaArray, Settings, WindowSpec
from deisa.ray._engine import ray_executor
from deisa.ray._engine.ray_executor import RayExecutor
from deisa.ray._graph import scheduler as graph_scheduler
from deisa.ray._graph.scheduler import BundleScheduler
from tests.scheduler.cluster import PretendedExecutor, at_slot, home_on_nodes, pretend_nodes
from tests.scheduler.simulation import Simulation, run
from tests.support.patience import PATIENCE_S, wait_until

ALWAYS, NEVER = 3600.0, -1.0
WHERE = {"caller": (ALWAYS, ALWAYS), "standing": (NEVER, ALWAYS), "task": (NEVER, NEVER)}


def on_ray(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.ray(pytest.mark.usefixtures("told_in_time")(test))


@pytest.fixture
def told_in_time(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No graph is started before Ray has told how long the bundles of the last one took."""
    start = BundleScheduler._run

    def start_later(self: BundleScheduler, *arguments: Any, **options: Any) -> Any:
        assert self._executor.wait_ended(PATIENCE_S)
        return start(self, *arguments, **options)

    monkeypatch.setattr(BundleScheduler, "_run", start_later)


def send_short_ones(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Have every bundle of a plan that is reused run in one place, however long it takes."""
    here_s, short_s = WHERE[where]
    monkeypatch.setattr(ray_executor, "HERE_S", here_s)
    monkeypatch.setattr(ray_executor, "SHORT_S", short_s)


def kind_of_process() -> str:
    if b"StandingWorker" in Path("/proc/self/cmdline").read_bytes():
        return "standing"
    return "caller" if b"pytest" in Path("/proc/self/cmdline").read_bytes() else "task"


def place_of_user_code(where: str) -> str:
    """Where a bundle with code of the user runs when it is that short: never in the caller."""
    return "standing" if where == "caller" else where


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def where_it_runs(block: np.ndarray, seconds: float = 0.0) -> np.ndarray:
    """For the block, the process that it is computed in, and its kind."""
    time.sleep(seconds)
    return np.array([(os.getpid(), kind_of_process())], dtype="i8,U8").reshape(1, 1)


def places(x: DeisaArray, seconds: float = 0.0) -> set[tuple[int, str]]:
    one_each = ((1,) * x.dask.numblocks[0], (1,) * x.dask.numblocks[1])
    lazy = x.dask.map_blocks(where_it_runs, seconds, chunks=one_each, dtype="i8,U8")
    return {(int(pid), str(kind)) for pid, kind in lazy.compute().ravel()}


@on_ray
@pytest.mark.parametrize("where", WHERE)
def test_a_short_bundle_goes_where_that_pays(
    session_name: str, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    send_short_ones(monkeypatch, where)
    seen: list[set[tuple[int, str]]] = []
    run("ray", Settings(session=session_name), lambda x: seen.append(places(x[-1])), [WindowSpec("x")])
    first, *later = seen
    assert [kind for _, kind in first] == ["task"]
    for (found,) in later:
        assert found[1] == place_of_user_code(where)
        assert found[0] != os.getpid()


@on_ray
def test_a_long_bundle_stays_a_task(session_name: str) -> None:
    seen: list[set[tuple[int, str]]] = []
    run("ray", Settings(session=session_name), lambda x: seen.append(places(x[-1], 0.05)), [WindowSpec("x")])
    assert [kind for found in seen for _, kind in found] == ["task"] * 3


@on_ray
def test_a_bundle_that_has_become_long_goes_back_to_being_a_task(
    session_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_executor, "HERE_S", NEVER)
    monkeypatch.setattr(ray_executor, "SHORT_S", 2.0)
    seen: list[set[tuple[int, str]]] = []

    def callback(x: list[DeisaArray]) -> None:
        one_each = ((1, 1), (1, 1))
        lazy = x[-1].dask.map_blocks(slow_at_timestep_one, chunks=one_each, dtype="i8,U8")
        seen.append({str(kind) for _, kind in lazy.compute().ravel()})

    run("ray", Settings(session=session_name), callback, [WindowSpec("x")], timesteps=4)
    assert seen == [{"task"}, {"standing"}, {"task"}, {"standing"}]


def slow_at_timestep_one(block: np.ndarray) -> np.ndarray:
    return where_it_runs(block, 0.6 if 1000 <= block[0, 0] < 2000 else 0.0)


def killed_once(block: np.ndarray, marker: Path) -> np.ndarray:
    if kind_of_process() == "standing" and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * block


@on_ray
def test_a_standing_worker_that_dies_is_replaced(
    session_name: str, own_standing_workers: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    send_short_ones(monkeypatch, "standing")
    settings = Settings(session=session_name)
    simulation = Simulation(settings, 4)
    ran_on: list[set[tuple[int, str]]] = []

    def callback(x: list[DeisaArray]) -> None:
        doubled = x[-1].dask.map_blocks(killed_once, tmp_path / "killed", dtype=float).compute()
        np.testing.assert_array_equal(doubled, 2 * simulation.at(x[-1].t))
        ran_on.append(places(x[-1]))

    run("ray", settings, callback, [WindowSpec("x")], timesteps=4)
    assert (tmp_path / "killed").exists()
    assert {kind for _, kind in ran_on[-1]} == {"standing"}


@on_ray
def test_no_standing_worker_outlives_its_session(
    session_name: str, own_standing_workers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_short_ones(monkeypatch, "standing")
    seen: list[set[tuple[int, str]]] = []

    def callback(x: list[DeisaArray]) -> None:
        seen.append(places(x[-1]))

    run("ray", Settings(session=session_name), callback, [WindowSpec("x")])
    ((pid, kind),) = seen[-1]
    assert kind == "standing"
    wait_until(lambda: not is_alive(pid), "the standing worker has gone")


class NoValueError(ValueError):
    """What a function of the analytics raises."""


def fail_at_timestep_one(block: np.ndarray) -> np.ndarray:
    if 1000 <= block[0, 0] < 2000:
        raise NoValueError(kind_of_process())
    return block


@on_ray
@pytest.mark.parametrize("where", WHERE)
def test_errors_keep_their_types(session_name: str, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """They are kept, too, and what they hold does not keep the simulation from going on."""
    send_short_ones(monkeypatch, where)
    settings = Settings(session=session_name, send_timeout_s=PATIENCE_S)
    simulation = Simulation(settings, 6)
    errors: list[Exception] = []
    right: list[int] = []

    def callback(x: list[DeisaArray]) -> None:
        passed = x[-1].dask.map_blocks(fail_at_timestep_one, dtype=float).compute()
        np.testing.assert_array_equal(passed, simulation.at(x[-1].t))
        right.append(x[-1].t)

    deisa = Deisa(engine="ray", settings=settings)
    deisa.register_callback(callback, WindowSpec("x"), exception_handler=errors.append)
    simulation.start()
    report = deisa.execute_callbacks()
    simulation.join()
    (error,) = errors
    assert type(error) is NoValueError
    assert error.args == (place_of_user_code(where),)
    assert right == [0, 2, 3, 4, 5]
    assert report.callbacks_failed == 1


@pytest.fixture
def run_in_the_caller(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has every bundle of a reused plan run here; grows by an item for each."""
    send_short_ones(monkeypatch, "caller")
    ran: list[int] = []
    run_here = RayExecutor.run_here

    def noted(self: RayExecutor, *arguments: Any) -> list:
        ran.append(threading.get_ident())
        return run_here(self, *arguments)

    monkeypatch.setattr(RayExecutor, "run_here", noted)
    return ran


def hand_on(block: np.ndarray) -> dict[str, Any]:
    return {"view": block.T, "list": [block[1:], (block,)]}


def hand_on_another(_: np.ndarray, other: np.ndarray) -> dict[str, np.ndarray]:
    return {"other": other}


@on_ray
def test_results_are_the_callers_own(session_name: str, run_in_the_caller: list[int]) -> None:
    """Nobody else writes into them, neither ranks nor later timesteps; and the caller may."""
    settings = Settings(session=session_name)
    simulation = Simulation(settings, 6)
    given = np.arange(600.0)
    results: list[tuple[int, list[tuple[np.ndarray, np.ndarray]]]] = []

    def callback(window: list[DeisaArray]) -> None:
        x, whole = window[-1].dask, simulation.at(window[-1].t)
        block = whole[:40, :30]
        handed_on = x.blocks[0, 0].map_blocks(hand_on, meta=np.empty((0, 0))).compute()
        constant = x.blocks[0, 0].map_blocks(hand_on_another, given, meta=np.empty((0, 0))).compute()
        found = [
            (whole, x.compute()),
            (whole[3:50], x[3:50].compute()),
            (block, x.blocks[0, 0].compute()),
            (block.T, handed_on["view"]),
            (block[1:], handed_on["list"][0]),
            (block, handed_on["list"][1][0]),
            (np.broadcast_to(block[0], (3, 30)), da.broadcast_to(x.blocks[0, 0][0], (3, 30)).compute()),
            (given, constant["other"]),
        ]
        for expected, value in found:
            np.testing.assert_array_equal(value, expected)
            value += 1
        results.append((window[-1].t, found))

    run("ray", settings, callback, [WindowSpec("x")], timesteps=6)
    assert len(run_in_the_caller) == 4 * 5  # four graphs without user code, at all timesteps but the first
    for _, found in results:
        for expected, value in found:
            np.testing.assert_array_equal(value, expected + 1)


@on_ray
def test_persisted_results_of_short_graphs(session_name: str, run_in_the_caller: list[int]) -> None:
    settings = Settings(session=session_name)
    simulation = Simulation(settings, 4)
    kept: list[tuple[int, Any]] = []

    def callback(window: list[DeisaArray]) -> None:
        x, t = window[-1].dask, window[-1].t
        ran = len(run_in_the_caller)
        rows = (2 * x).sum(axis=1).persist()
        assert len(run_in_the_caller) == ran
        found = rows.compute()
        found += 1  # not the kept one
        whole = simulation.at(t)
        expected = (2 * whole.sum(axis=1, keepdims=True) + whole).sum()
        np.testing.assert_allclose((rows[:, None] + x).sum().compute(), expected)
        kept.append((t, rows))

    run("ray", settings, callback, [WindowSpec("x")], timesteps=4)
    for t, rows in kept:
        np.testing.assert_allclose(rows.compute(), 2 * simulation.at(t).sum(axis=1))


class HalfHereExecutor(PretendedExecutor):
    """Runs bundles that nobody else waits for in the caller, and takes a second over each by its own clock."""

    def __init__(self, node_ids: list[str | None]) -> None:
        super().__init__(node_ids)
        self.here = 0

    def perf_counter(self) -> float:
        return float(self.here)

    def runs_here(self, prepared: Any) -> bool:
        return prepared[0].last

    def run_here(self, *arguments: Any) -> list:
        self.here += 1
        return self.submit(*arguments)


@pytest.fixture
def three_nodes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], da.Array]:
    """Timesteps of an array with a chunk on each of three nodes."""
    pretend_nodes(monkeypatch, ["m0", "m1", "m2"], (5,), np.float64)
    home = home_on_nodes(["m0", "m1", "m2"], 5)
    return lambda slot: at_slot(home, slot)


def test_persist_leaves_nothing_to_the_caller(three_nodes: Callable[[int], da.Array]) -> None:
    executor = HalfHereExecutor(["m0"])
    x = three_nodes(1)
    with dask.config.set(scheduler=BundleScheduler(executor)):
        total = x.sum().persist()
        assert (executor.here, len(executor.bundles)) == (0, 4)
        assert total.compute() == x.sum().compute(scheduler="sync")


def test_what_runs_in_the_caller_comes_last_and_is_no_planning(
    three_nodes: Callable[[int], da.Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = HalfHereExecutor(["m0"])
    monkeypatch.setattr(graph_scheduler, "time", executor)
    scheduler = BundleScheduler(executor)
    x = three_nodes(1)
    lazy = [x.blocks[0].sum(), x.blocks[1:].sum()]  # the first is on one node only, and could be first
    expected = dask.compute(*lazy, scheduler="sync")
    assert dask.compute(*lazy, scheduler=scheduler) == expected
    assert [bundle.last for bundle in executor.bundles] == [False, False, True, True]
    assert executor.here == 2
    assert (scheduler.usage.planning_s, scheduler.usage.waiting_s) == (0.0, 2.0)
