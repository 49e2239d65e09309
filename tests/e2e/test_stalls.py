"""Simulations that cannot go on: both sides say because of whom, or of what."""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

from deisa.ray import DeisaArray
from deisa.ray.errors import DeisaError, KeptArraysError, WaitTimeoutError
from tests.e2e.simulation import Ranks, Site, ranks, rows, values
from tests.support.patience import PATIENCE_S, wait_until


def running_mean(deisa, keep):  # type: ignore[no-untyped-def]
    state: dict[str, DeisaArray] = {}
    means: list[float] = []

    @deisa.register("x")
    def mean(x: list[DeisaArray]) -> None:
        n = x[-1].t + 1
        state["mean"] = x[-1].dask if n == 1 else keep(state["mean"] + (x[-1].dask - state["mean"]) / n)
        means.append(x[-1].t)

    return state


def test_a_mean_that_keeps_every_timestep(site: Site) -> None:
    deisa = site.deisa(warn_every_s=0.5)
    running_mean(deisa, keep=lambda mean: mean)
    learned: list[DeisaError] = []

    def rank(number: int) -> None:
        with pytest.raises(KeptArraysError) as error:
            site.send_rows(number, 2, range(10))
        learned.append(error.value)

    with ranks(*(partial(rank, number) for number in range(2))), pytest.raises(KeptArraysError) as error:
        deisa.execute_callbacks()
    text = str(error.value)
    assert (
        "keeps arrays of earlier timesteps, 'x' at 0, 'x' at 1, so that none of the 2 slots of array 'x'"
        in text
    )
    assert "bridges 0 and 1 wait with timestep 2" in text
    assert "a run may keep 1 timestep of 'x' (max_simulation_ahead)" in text
    assert "call compute() or persist()" in text
    assert [str(e) for e in learned] == [text] * 2


def test_as_many_as_may_be_kept(site: Site) -> None:
    """The number that the error gives is right."""
    deisa = site.deisa(max_simulation_ahead=3)
    kept: list[DeisaArray] = []

    @deisa.register("x")
    def keep(x: list[DeisaArray]) -> None:
        if len(kept) < 3:
            kept.append(x[-1])

    with ranks(*(partial(site.send_rows, rank, 2, range(12)) for rank in range(2))):
        assert deisa.execute_callbacks().callbacks[0].calls == 12


def test_a_mean_that_is_persisted(site: Site) -> None:
    deisa = site.deisa()
    state = running_mean(deisa, keep=lambda mean: mean.persist())
    with ranks(*(partial(site.send_rows, rank, 2, range(10)) for rank in range(2))):
        deisa.execute_callbacks()
    expected = np.mean([values((8,), t) for t in range(10)], axis=0)
    np.testing.assert_allclose(state["mean"].compute(), expected)


def test_arrays_that_a_thread_is_still_at_work_on(site: Site) -> None:
    """It lets go of them in time."""
    deisa = site.deisa()
    done: list[int] = []

    def work(array: DeisaArray) -> None:
        total = 0.0
        while not deisa._session._run._stalls._stuck_since:  # until the run has found that nothing can come
            total += float(np.sin(total))
        done.append(array.t)

    @deisa.register("x")
    def hand_on(x: list[DeisaArray]) -> None:
        if x[-1].t in (1, 2):
            threading.Thread(target=work, args=(x[-1],)).start()

    with ranks(*(partial(site.send_rows, rank, 2, range(6)) for rank in range(2))):
        assert deisa.execute_callbacks().callbacks[0].calls == 6
    wait_until(lambda: sorted(done) == [1, 2], "the threads have ended")


def mesh_once(site: Site, ended: threading.Event) -> None:
    """A rank that sends its array once, and neither advances nor closes."""
    bridge = site.bridge(2, 3, {"mesh": rows(0, 1)})
    bridge.send("mesh", np.ones(4), 0)
    ended.wait(PATIENCE_S)
    with suppress(DeisaError):
        bridge.close()


@pytest.mark.parametrize("when", ["AND", "OR"])
def test_a_rank_that_never_advances_is_named(site: Site, when: str, caplog: pytest.LogCaptureFixture) -> None:
    """By the waiting ranks, by the analytics, and by the error that ends both."""
    deisa = site.deisa(warn_every_s=0.5)
    deisa.register_callback(lambda x, mesh: None, "x", "mesh", when=when)
    ended = threading.Event()
    learned: list[str] = []

    def rank(number: int) -> None:
        with (
            pytest.raises(WaitTimeoutError) as error,
            site.bridge(number, 3, {"x": rows(number, 2)}, send_timeout_s=6.0, warn_every_s=1.0) as bridge,
        ):
            for timestep in range(10):
                bridge.send("x", np.ones(4), timestep)
        learned.append(str(error.value))

    simulation = Ranks([*(partial(rank, number) for number in range(2)), partial(mesh_once, site, ended)])
    culprit = "bridge 2, which has not passed timestep 1 (at timestep 0)"
    with caplog.at_level(logging.WARNING), pytest.raises(WaitTimeoutError) as error:
        deisa.execute_callbacks()
    ended.set()
    simulation.check()
    for text in [str(error.value), *learned]:
        assert culprit in text and "advance()" in text
    assert f"the simulation waited for {culprit}" in str(error.value)
    assert f"the analytics waits for {culprit}" in caplog.text
    assert f"timestep {2 if when == 'OR' else 3} waits for {culprit}" in caplog.text


def test_a_rank_that_is_slow_is_named(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Though no callback waits for another array."""
    deisa = site.deisa(warn_every_s=0.5)
    deisa.register_callback(lambda x: None, "x")
    goes_on = threading.Event()

    def slow() -> None:
        with site.bridge(1, 2, {"x": rows(1, 2)}) as bridge:
            bridge.send("x", np.ones(4), 0)
            goes_on.wait(PATIENCE_S)
            for timestep in range(1, 5):
                bridge.send("x", np.ones(4), timestep)

    with (
        caplog.at_level(logging.WARNING),
        ranks(partial(site.send_rows, 0, 2, range(5), warn_every_s=1.0), slow),
    ):
        analytics = Ranks([deisa.execute_callbacks])
        named = "'x' from bridge 1 (at timestep 0), others being at timestep 3"
        wait_until(lambda: caplog.text.count(f"waits for {named}") >= 2, "both sides name the bridge")
        goes_on.set()
        analytics.check()


def test_a_stall_beside_an_array_that_goes_on(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """Callbacks on other arrays run all the while."""
    deisa = site.deisa(warn_every_s=0.5)
    deisa.register_callback(lambda x, mesh: None, "x", "mesh", when="OR")
    deisa.register_callback(lambda p: None, "p")
    named = threading.Event()

    def mesh() -> None:
        with site.bridge(1, 3, {"mesh": rows(0, 1)}) as bridge:
            bridge.send("mesh", np.ones(4), 0)
            named.wait(PATIENCE_S)

    def flowing() -> None:
        with site.bridge(2, 3, {"p": rows(0, 1)}) as bridge:
            for timestep in range(10**6):
                if named.wait(0.05):
                    break
                bridge.send("p", np.ones(4), timestep)

    def rank() -> None:
        with site.bridge(0, 3, {"x": rows(0, 1)}, warn_every_s=1.0) as bridge:
            for timestep in range(6):
                bridge.send("x", np.ones(4), timestep)

    with caplog.at_level(logging.WARNING), ranks(rank, mesh, flowing):
        analytics = Ranks([deisa.execute_callbacks])
        culprit = "waits for bridge 1, which has not passed timestep 1 (at timestep 0)"
        wait_until(lambda: caplog.text.count(culprit) >= 3, "both sides name the bridge")
        assert "timestep 2 " + culprit in caplog.text
        named.set()
        analytics.check()
