"""One `Deisa` after another of the same process and session, as a notebook's cells make them."""

from __future__ import annotations

import threading
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

from deisa.ray import Deisa, DeisaArray, Settings, WindowSpec
from deisa.ray.errors import AnalyticsLostError, ClosedError, SessionEndedError, SessionInUseError
from tests.e2e.simulation import Ranks, Site, ranks, rows, values
from tests.support.patience import PATIENCE_S, wait_until


def bridges_joined(deisa: Deisa, site: Site) -> bool:
    """Whether a bridge has come to an analytics that does not run yet."""
    agents = deisa._engine.agents
    if site.engine == "local":
        return bool(agents._server._node.bridges)  # type: ignore[attr-defined]
    return not agents._events.empty()  # type: ignore[attr-defined]


def summed(deisa: Deisa) -> dict[int, float]:
    seen: dict[int, float] = {}

    @deisa.register("x")
    def add_up(x: list[DeisaArray]) -> None:
        assert x[-1].t not in seen
        seen[x[-1].t] = x[-1].sum().compute()

    return seen


def test_one_that_never_ran_makes_way_with_the_bridges_that_are_there(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    first = site.deisa()
    never = summed(first)
    with ranks(*(partial(site.send_rows, rank, 2, range(3)) for rank in range(2))):
        wait_until(lambda: bridges_joined(first, site), "a bridge has joined")
        second = site.deisa()
        seen = summed(second)
        second.execute_callbacks()
    assert (seen, never) == ({t: values((8,), t).sum() for t in range(3)}, {})
    assert "takes the place of one of this process that never ran" in caplog.text
    for call in (first.execute_callbacks, lambda: first.register_callback(lambda x: None, "x")):
        with pytest.raises(ClosedError, match=r"a new Deisa of session .* has taken the place of this one"):
            call()
    first.close()  # nothing more


def test_one_that_never_ran_makes_way_for_another_that_wants_something_else(site: Site) -> None:
    first = site.deisa()
    second = site.deisa(max_simulation_ahead=3)
    seen = summed(second)
    with ranks(*(partial(site.send_rows, rank, 2, range(3)) for rank in range(2))):
        second.execute_callbacks()
    assert list(seen) == [0, 1, 2]
    with pytest.raises(ClosedError, match="taken the place"):
        first.execute_callbacks()


@pytest.mark.ray
def test_ranks_that_wait_stay_when_settings_change(ray_cluster: str, session_name: str) -> None:
    site = Site(
        "ray", Settings(session=session_name, start_timeout_s=PATIENCE_S, driver_timeout_s=PATIENCE_S)
    )
    first = site.deisa()
    with ranks(*(partial(site.send_rows, rank, 2, range(3)) for rank in range(2))):
        wait_until(lambda: bridges_joined(first, site), "a bridge has joined")
        second = site.deisa(max_simulation_ahead=3)
        seen = summed(second)
        second.execute_callbacks()
    site.close()
    assert list(seen) == [0, 1, 2]


def test_one_that_has_run_makes_way_with_an_array_alive(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    """The array gives its own values or an error, never those of the new run."""
    first = site.deisa()
    kept: list[DeisaArray] = []
    copies: list[DeisaArray] = []

    @first.register("x")
    def keep(x: list[DeisaArray]) -> None:
        kept.append(x[-1])
        copies.append(x[-1].persist())

    with ranks(partial(site.send_rows, 0, 1, range(2))):
        first.execute_callbacks()
    second = site.deisa()
    seen: list[int] = []

    @second.register("x")
    def look_back(x: list[DeisaArray]) -> None:
        assert x[-1].sum().compute() == values((4,), x[-1].t).sum()
        for array in kept:
            with suppress(SessionEndedError):
                np.testing.assert_array_equal(array.compute(), values((4,), array.t))
        np.testing.assert_array_equal(copies[1].compute(), values((4,), 1))
        seen.append(x[-1].t)

    with ranks(partial(site.send_rows, 0, 1, range(100, 104))):
        report = second.execute_callbacks()
    assert seen == [100, 101, 102, 103], report
    assert "arrays which are left of that run can no longer be read" in caplog.text
    kept.clear()
    copies.clear()


def test_one_that_runs_does_not_make_way(site: Site) -> None:
    """Nor to another thread; once it has ended, it does."""
    deisa = site.deisa()
    runs, may_end = threading.Event(), threading.Event()

    @deisa.register("x")
    def waits(x: list[DeisaArray]) -> None:
        runs.set()
        assert may_end.wait(PATIENCE_S)

    with ranks(partial(site.send_rows, 0, 1, range(2))):
        analytics = Ranks([deisa.execute_callbacks])
        assert runs.wait(PATIENCE_S)
        with pytest.raises(
            SessionInUseError, match=r"by this very process, .*: thread 'rank-0', pid \d+ on "
        ):
            site.deisa()
        may_end.set()
        analytics.check()
    seen = summed(second := site.deisa())
    with ranks(partial(site.send_rows, 0, 1, range(2))):
        second.execute_callbacks()
    assert list(seen) == [0, 1]


def test_a_closed_one_makes_way_without_a_word(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    first = site.deisa()
    first.close()
    seen = summed(second := site.deisa())
    with ranks(partial(site.send_rows, 0, 1, range(2))):
        second.execute_callbacks()
    assert list(seen) == [0, 1]
    assert "Deisa" not in caplog.text


def test_ranks_are_told_that_the_analytics_closed_without_running(site: Site) -> None:
    deisa = site.deisa()
    simulation = Ranks(
        [
            partial(
                site.bridge,
                0,
                1,
                {"x": rows(0, 1)},
            )
        ]
    )
    wait_until(lambda: bridges_joined(deisa, site), "a bridge has joined")
    deisa.close()
    (error,) = simulation.errors()
    assert (type(error), str(error)) == (
        AnalyticsLostError,
        "the analytics ended without execute_callbacks()",
    )


@pytest.mark.ray
def test_an_interrupted_run_goes_on_at_the_very_callback(ray_cluster: str, session_name: str) -> None:
    site = Site("ray", Settings(session=session_name, driver_timeout_s=PATIENCE_S))
    calls: list[tuple[str, list[int]]] = []

    def analyse(interrupt: bool) -> None:
        deisa = site.deisa()

        @deisa.register(WindowSpec("x", 2))
        def first(x: list[DeisaArray]) -> None:
            for array in x:
                assert array.sum().compute() == values((8,), array.t).sum()
            calls.append(("first", [array.t for array in x]))

        @deisa.register("x")
        def second(x: list[DeisaArray]) -> None:
            if interrupt and x[-1].t == 2:
                raise KeyboardInterrupt
            calls.append(("second", [array.t for array in x]))

        deisa.execute_callbacks()

    with ranks(*(partial(site.send_rows, rank, 2, range(6)) for rank in range(2))):
        with pytest.raises(KeyboardInterrupt):
            analyse(interrupt=True)
        analyse(interrupt=False)
    site.close()
    steps = range(6)
    assert [window for name, window in calls if name == "first"] == [[t - 1, t] if t else [0] for t in steps]
    assert [window for name, window in calls if name == "second"] == [[t] for t in steps]
