"""Chunk memory is used again only when nobody needs it: no window, no live array, no task that runs."""

from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import dask
import numpy as np
import pytest

from deisa.ray import Deisa, DeisaArray, Settings, WindowSpec
from deisa.ray._session import session
from deisa.ray._transport.address import agent_address
from deisa.ray._transport.reader import probe
from deisa.ray.errors import BridgeLostError, WaitTimeoutError
from tests.scheduler.simulation import Simulation, reraise, run
from tests.support.patience import PATIENCE_S, wait_until


def slowly(block: np.ndarray, seconds: float = 0.03) -> np.ndarray:
    """Double a block in two halves with a pause in between, so that a chunk that changes meanwhile is seen."""
    half = len(block) // 2
    above = 2 * block[:half]
    time.sleep(seconds)
    return np.concatenate([above, 2 * block[half:]])


def agent_is_gone(settings: Settings) -> bool:
    try:
        probe(agent_address(settings))
    except OSError:
        return True
    return False


@pytest.mark.parametrize("window", [1, 2, 3])
def test_random_lifetimes(engine: str, session_name: str, window: int) -> None:
    """Arrays, collections built on them and running tasks come and go; each value is that of its timestep."""
    settings = Settings(session=session_name, send_timeout_s=PATIENCE_S)
    timesteps = 25
    simulation = Simulation(settings, timesteps)
    dice = random.Random(f"{engine} {window}")
    alive: list[tuple[int, Any]] = []  # timestep, and an array or a collection on its slots
    persisted: list[tuple[np.ndarray, Any]] = []  # expected value, collection
    checks = 0

    def check(t: int, lazy: Any) -> None:
        nonlocal checks
        np.testing.assert_array_equal(lazy.compute(), simulation.at(t))
        checks += 1

    def callback(arrays: list[DeisaArray]) -> None:
        nonlocal checks
        now = arrays[-1].t
        assert [x.t for x in arrays] == list(range(max(0, now - window + 1), now + 1))
        x = dice.choice(arrays)
        what = dice.randrange(6)
        if what == 0:
            alive.append((x.t, x))
        elif what == 1:
            alive.append((x.t, (x + 1) - 1))
        elif what == 2:
            alive.append((x.t, dask.array.concatenate([x[:7], x[7:]])))
        elif what == 3:
            persisted.append((2 * simulation.at(x.t), x.map_blocks(slowly, dtype=float).persist()))
        elif what == 4:
            total = sum(2 * simulation.at(y.t) for y in arrays)
            persisted.append((total, sum(y.map_blocks(slowly, dtype=float) for y in arrays).persist()))
        else:
            check(x.t, x)
        del x, arrays[:]
        for t, lazy in dice.sample(alive, len(alive) // 2):
            check(t, lazy)
        # The simulation goes on if one more timestep than the next window's is held.
        while len({t for t, _ in alive if t < now - window + 2}) > 1 or (alive and dice.random() < 0.3):
            alive.pop(0)
        while len(persisted) > 4 or (persisted and dice.random() < 0.3):
            expected, lazy = persisted.pop(dice.randrange(len(persisted)))
            np.testing.assert_array_equal(lazy.compute(), expected)
            checks += 1

    report = run(engine, settings, callback, [WindowSpec("x", window)], timesteps=timesteps)
    alive.clear()
    assert report.timesteps == {"x": timesteps}
    for expected, lazy in persisted:
        np.testing.assert_array_equal(lazy.compute(), expected)
    assert checks > timesteps / 4


def test_persist_and_drop_at_once(engine: str, session_name: str) -> None:
    """Nothing but the running tasks needs the chunks, while the simulation would like to overwrite them."""
    timesteps = 6
    settings = Settings(session=session_name)
    simulation = Simulation(settings, timesteps)
    persisted = []

    def callback(arrays: list[DeisaArray]) -> None:
        x = arrays.pop()
        doubled = x.map_blocks(slowly, 0.2 if engine == "ray" else 0.01, dtype=float)
        persisted.append((x.t, doubled.persist()))

    run(engine, settings, callback, [WindowSpec("x")], timesteps=timesteps)
    assert [t for t, _ in persisted] == list(range(timesteps))
    for t, lazy in persisted:
        np.testing.assert_array_equal(lazy.compute(), 2 * simulation.at(t))


def test_results_do_not_lie_in_the_slots(engine: str, session_name: str) -> None:
    """Values computed or kept are copies, also where the graph only hands chunks on."""
    settings = Settings(session=session_name)
    simulation = Simulation(settings, 8)
    results: list[tuple[int, Any]] = []

    def callback(arrays: list[DeisaArray]) -> None:
        x = arrays.pop()
        block, whole = simulation.at(x.t)[:40, :30], simulation.at(x.t)
        results.append((x.t, [(whole, x.compute()), (block, x.blocks[0, 0].compute())]))
        views = dask.delayed(lambda b: {"t": b.T, "list": [b[1:], (b,)], "box": Box(b)})(x.to_delayed()[0, 0])
        made = views.compute()
        results.append(
            (x.t, [(block.T, made["t"]), (block[1:], made["list"][0]), (block, made["list"][1][0])])
        )
        results.append((x.t, [(block, made["box"].content)]))
        pile = dask.delayed(in_an_object_array)(x.to_delayed()[0, 0]).compute()
        results.append((x.t, [(block, pile[0])]))
        view = dask.delayed(np.asarray)(x.to_delayed()[0, 0]).persist()
        results.append((x.t, [(block, view), (whole, x.dask.persist())]))

    run(engine, settings, callback, [WindowSpec("x")], timesteps=8)
    for _, pairs in results:
        for expected, found in pairs:
            np.testing.assert_array_equal(dask.compute(found)[0], expected)


class Box:
    def __init__(self, content: np.ndarray) -> None:
        self.content = content


def in_an_object_array(block: np.ndarray) -> np.ndarray:
    pile = np.empty(1, object)
    pile[0] = block
    return pile


@contextmanager
def running(
    engine: Any, settings: Settings, callback: Callable[..., Any], window: int, simulation: Simulation
) -> Iterator[threading.Thread]:
    """Analytics in a thread, so that the test can watch."""
    deisa = Deisa(engine=engine, settings=settings)
    deisa.register_callback(callback, WindowSpec("x", window), exception_handler=reraise)
    errors: list[BaseException] = []

    def execute() -> None:
        try:
            deisa.execute_callbacks()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=execute, daemon=True)
    thread.start()
    simulation.start()
    yield thread
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    simulation.join()
    deisa.close()
    if errors:
        raise errors[0]


@pytest.mark.parametrize(("window", "ahead"), [(1, 1), (2, 1), (3, 1), (1, 3)])
def test_keeping_arrays_stalls_the_simulation_at_the_bound(
    engine: str, session_name: str, window: int, ahead: int
) -> None:
    settings = Settings(session=session_name, max_simulation_ahead=ahead)
    bound = window + ahead
    timesteps = bound + 4
    simulation = Simulation(settings, timesteps)
    kept: list[DeisaArray] = []
    keep = True
    ran = []

    def callback(arrays: list[DeisaArray]) -> None:
        ran.append(arrays[-1].t)
        if keep:
            kept.append(arrays[-1])

    with running(engine, settings, callback, window, simulation):
        wait_until(lambda: simulation.sent == [bound, bound], "every slot is filled")
        time.sleep(0.7)
        assert simulation.sent == [bound, bound]
        assert ran == list(range(bound))
        for x in kept:
            np.testing.assert_array_equal(x.dask.compute(scheduler="synchronous"), simulation.at(x.t))
        keep = False
        del x
        kept.clear()
    assert simulation.sent == [timesteps, timesteps]
    assert ran == list(range(timesteps))
    assert not simulation.errors


def test_a_stalled_send_gives_up_in_time(engine: str, session_name: str) -> None:
    settings = Settings(session=session_name, send_timeout_s=0.3)  # the analytics has not yet seen why
    simulation = Simulation(settings, 5, grid=(1, 2))
    kept: list[DeisaArray] = []
    with (
        pytest.raises(BridgeLostError),
        running(engine, settings, lambda arrays: kept.extend(arrays), 1, simulation),
    ):
        pass
    assert simulation.sent == [2]
    assert any(isinstance(error, WaitTimeoutError) for error in simulation.errors.values())
    assert any("2 slots of array 'x'" in str(error) for error in simulation.errors.values())
    kept.clear()
    wait_until(lambda: agent_is_gone(settings), "the agent has ended")


def test_a_slow_callback_holds_the_simulation_back(engine: str, session_name: str) -> None:
    ahead, timesteps = 2, 8
    settings = Settings(session=session_name, max_simulation_ahead=ahead)
    simulation = Simulation(settings, timesteps)
    furthest: list[int] = []

    def callback(arrays: list[DeisaArray]) -> None:
        may_send = min(arrays[-1].t + 1 + ahead, timesteps)
        wait_until(lambda: simulation.sent == [may_send] * 2, "the ranks have filled their slots")
        time.sleep(0.05)  # they would go on in that time
        furthest.append(max(simulation.sent))

    with running(engine, settings, callback, 1, simulation):
        pass
    assert furthest == [min(t + 1 + ahead, timesteps) for t in range(timesteps)]


def test_arrays_in_reference_cycles_are_collected(engine: str, session_name: str) -> None:
    settings = Settings(session=session_name, send_timeout_s=PATIENCE_S)
    gc.disable()
    try:

        def callback(arrays: list[DeisaArray]) -> None:
            cycle: dict[str, Any] = {"x": arrays[-1]}
            cycle["itself"] = cycle
            lazy = arrays[-1].sum()
            cycle["lazy"] = lazy

        run(engine, settings, callback, [WindowSpec("x")], timesteps=5)
    finally:
        gc.enable()
    wait_until(lambda: agent_is_gone(settings), "the agent has ended")


@pytest.mark.parametrize("merged", [True, False])
def test_computing_makes_no_reference_cycles(
    engine: str, session_name: str, merged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slot is given back when its array goes, without the garbage collector, whether a plan is new or reused."""
    settings = Settings(
        session=session_name,
        max_simulation_ahead=1,
        merge_chunks_beyond=0 if merged else 10**9,
        send_timeout_s=PATIENCE_S,
    )
    monkeypatch.setattr(session, "gc", SimpleNamespace(collect=lambda: 0))
    gc.disable()
    try:

        def callback(arrays: list[DeisaArray]) -> None:
            x, t = arrays[-1].dask, arrays[-1].t
            steep = ((x[t + 1 :] - x[: -t - 1]) ** 2).mean()  # not alike from one timestep to the next
            assert float(x.mean().compute()) == pytest.approx(float((x.sum() / x.size).compute()))
            assert dask.compute(steep, x.std())[0] >= 0

        simulation = Simulation(settings, 4)
        with running(engine, settings, callback, 1, simulation):
            pass
    finally:
        gc.enable()
    assert simulation.sent == [4, 4]


def test_arrays_of_a_failed_callback_are_let_go(engine: str, session_name: str) -> None:
    settings = Settings(session=session_name)
    simulation = Simulation(settings, 6)
    handled: list[str] = []
    deisa = Deisa(engine=engine, settings=settings)

    def callback(arrays: list[DeisaArray]) -> None:
        local = arrays[-1] + 1
        raise ValueError(f"at {local.shape}")

    deisa.register_callback(
        callback, WindowSpec("x"), exception_handler=lambda error: handled.append(str(error))
    )
    simulation.start()
    report = deisa.execute_callbacks()
    simulation.join()
    assert (report.callbacks_failed, handled) == (6, ["at (80, 60)"] * 6)
    assert not simulation.errors


def test_arrays_outlive_the_run(engine: str, session_name: str) -> None:
    settings = Settings(session=session_name)
    simulation = Simulation(settings, 4)
    kept: list[DeisaArray] = []
    run(
        engine,
        settings,
        lambda arrays: kept.__setitem__(slice(None), arrays),
        [WindowSpec("x", 2)],
        timesteps=4,
    )
    assert [x.t for x in kept] == [2, 3]
    for _ in range(2):
        for x in kept:
            np.testing.assert_array_equal(x.dask.compute(), simulation.at(x.t))
    time.sleep(1)
    assert not agent_is_gone(settings)
    difference = kept[1] - kept[0]
    del x
    kept.clear()
    np.testing.assert_array_equal(difference.compute(), simulation.at(3) - simulation.at(2))
    del difference
    wait_until(lambda: agent_is_gone(settings), "the agent has ended")


class Keeper:
    def __init__(self) -> None:
        self.kept: list[DeisaArray] = []

    def __call__(self, arrays: list[DeisaArray]) -> None:
        self.kept[:] = arrays


def test_arrays_that_only_the_callback_knows_are_let_go(session_name: str) -> None:
    settings = Settings(session=session_name)
    keeper = Keeper()
    known = weakref.ref(keeper)
    run("local", settings, keeper, [WindowSpec("x")])
    del keeper
    try:
        wait_until(lambda: agent_is_gone(settings), "the agent has ended")
    finally:
        if (left := known()) is not None:
            left.kept.clear()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_arrays_that_outlive_the_run_can_be_computed_on_ray(session_name: str) -> None:
    """With Dask's own optimisation, which is only switched off within callbacks."""
    from deisa.ray import deisa_ray_get

    settings = Settings(session=session_name)
    simulation = Simulation(settings, 2)
    kept: list[Any] = []

    def callback(arrays: list[DeisaArray]) -> None:
        kept[:] = [arrays[-1].dask.map_blocks(slowly, dtype=float), arrays[-1].dask.sum()]

    run("ray", settings, callback, [WindowSpec("x")], timesteps=2)
    doubled, total = dask.compute(*kept, scheduler=deisa_ray_get)
    np.testing.assert_array_equal(doubled, 2 * simulation.at(1))
    assert total == pytest.approx(simulation.at(1).sum())
    kept.clear()
    wait_until(lambda: agent_is_gone(settings), "the agent has ended")


def test_kept_results_outlive_the_run(engine: str, session_name: str) -> None:
    settings = Settings(session=session_name)
    simulation = Simulation(settings, 3)
    kept: list[DeisaArray] = []
    run(engine, settings, lambda arrays: kept.append(arrays[-1].persist()), [WindowSpec("x")], timesteps=3)
    wait_until(lambda: agent_is_gone(settings), "the agent has ended")
    for x in kept:
        np.testing.assert_array_equal(x.compute(), simulation.at(x.t))
