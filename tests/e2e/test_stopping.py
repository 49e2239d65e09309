"""The end before the end: an analytics that has seen enough, and what its ranks learn."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from deisa.ray import Deisa, DeisaArray
from deisa.ray.errors import AnalyticsLostError, AnalyticsStoppedError
from tests.e2e.simulation import Ranks, Site, rows, values
from tests.support.patience import wait_until

LAST = 3  # the timestep at which the analytics has seen enough
MANY = 10**6


def send_until_stopped(site: Site, rank: int, sent: list[int], policy: str = "raise") -> None:
    """A time loop that ends when the analytics has seen enough, and closes its bridge after all."""
    bridge = site.bridge(rank, 2, {"x": rows(rank, 2)}, on_analytics_lost=policy)
    try:
        for timestep in range(MANY):
            bridge.send("x", values((8,), timestep)[4 * rank : 4 * rank + 4], timestep)
            sent.append(timestep)
    except AnalyticsStoppedError as error:
        assert "has ended session" in str(error) and "by its own wish, with close()" in str(error)
    bridge.close()


@pytest.mark.parametrize("policy", ["wait", "raise"])
def test_a_callback_closes(site: Site, policy: str) -> None:
    """What it does afterwards still works; no other callback runs; the report is there; ranks leave their loops."""
    deisa = site.deisa()
    seen: list[tuple[str, int, float]] = []

    @deisa.register("x")
    def until_converged(x: list[DeisaArray]) -> None:
        if x[-1].t == LAST:
            deisa.close()
        seen.append(("first", x[-1].t, float(x[-1].sum().compute())))

    @deisa.register("x")
    def another(x: list[DeisaArray]) -> None:
        seen.append(("second", x[-1].t, 0.0))

    sent: list[list[int]] = [[], []]
    simulation = Ranks([partial(send_until_stopped, site, rank, sent[rank], policy) for rank in range(2)])
    report = deisa.execute_callbacks()
    simulation.check()
    firsts = [(t, total) for name, t, total in seen if name == "first"]
    assert firsts == [(t, values((8,), t).sum()) for t in range(LAST + 1)]
    assert [t for name, t, _ in seen if name == "second"] == list(range(LAST))
    assert [figures.calls for figures in report.callbacks] == [LAST + 1, LAST]
    assert report is deisa.report
    # The send that hands the last chunk of a timestep over may already hear what the callback has done with it.
    assert all(steps[:LAST] == list(range(LAST)) for steps in sent)


def test_ranks_go_on_if_they_are_to(site: Site) -> None:
    deisa = site.deisa()
    deisa.register_callback(lambda x: deisa.close(), "x")

    def rank(number: int) -> None:
        site.send_rows(number, 2, range(200), on_analytics_lost="continue")

    simulation = Ranks([partial(rank, number) for number in range(2)])
    assert deisa.execute_callbacks().callbacks[0].calls == 1
    simulation.check()


def stop_from_a_thread(deisa: Deisa) -> None:
    threading.Thread(target=deisa.close).start()


def stop_from_a_signal_handler(deisa: Deisa) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: deisa.close())
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("stop", [stop_from_a_thread, stop_from_a_signal_handler])
def test_others_close(site: Site, stop: Callable[[Deisa], None]) -> None:
    deisa = site.deisa()
    begun = threading.Event()

    @deisa.register("x")
    def count(x: list[DeisaArray]) -> None:
        if x[-1].t == LAST:
            stop(deisa)
            wait_until(lambda: deisa._session.stopped, "the run is to end")
            begun.set()

    sent: list[list[int]] = [[], []]
    simulation = Ranks([partial(send_until_stopped, site, rank, sent[rank]) for rank in range(2)])
    assert deisa.execute_callbacks().callbacks[0].calls == LAST + 1
    simulation.check()
    assert begun.is_set()


def test_closed_while_nothing_comes(site: Site) -> None:
    """Also while the analytics waits for the first bridge, or for a timestep."""
    deisa = site.deisa()
    deisa.register_callback(lambda x: None, "x")
    closer = threading.Timer(0.2, deisa.close)
    closer.start()
    report = deisa.execute_callbacks()
    assert report.callbacks[0].calls == 0 and report.bridges == {}


def test_a_bridge_closes_after_the_analytics_was_lost(site: Site) -> None:
    """It ends in order, twice if need be, and sends nothing more."""
    deisa = site.deisa()
    deisa.register_callback(lambda x: deisa.close(), "x")
    outcome: list[str] = []

    def rank() -> None:
        bridge = site.bridge(0, 1, {"x": rows(0, 1)})
        with pytest.raises(AnalyticsLostError):
            for timestep in range(MANY):
                bridge.send("x", np.ones(4), timestep)
        bridge.close()
        bridge.close()
        outcome.append(repr(bridge))

    simulation = Ranks([rank])
    deisa.execute_callbacks()
    simulation.check()
    assert "closed" in outcome[0]
