"""Triggers on both engines: what they compute, what they cost, and what follows when another analytics takes over."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from deisa.ray import DeisaArray, WindowSpec
from deisa.ray.errors import TriggerError
from tests.e2e.simulation import Ranks, Site, ranks, values


def test_a_callback_runs_where_its_trigger_is_true(site: Site) -> None:
    """The largest element is 1000 t + 7; the window has both timesteps, and no memory is added."""
    deisa = site.deisa()
    seen: list[list[int]] = []
    everything: list[int] = []

    @deisa.register(WindowSpec("x", 2), trigger=lambda w: w[-1].dask.max() == 2007, following=2)
    def rare(x: list[DeisaArray]) -> None:
        assert np.array_equal(x[-1].dask.compute(), values((8,), x[-1].t))
        seen.append([array.t for array in x])

    deisa.register_callback(lambda x: everything.append(x[-1].t), WindowSpec("x", 2))
    with ranks(*(partial(site.send_rows, rank, 2, range(7)) for rank in range(2))):
        report = deisa.execute_callbacks()
    assert seen == [[1, 2], [2, 3], [3, 4]]
    assert everything == list(range(7))
    figures, other = report.callbacks
    assert other.trigger is None
    assert figures.trigger is not None
    assert (figures.calls, figures.trigger.evaluated, figures.trigger.fired) == (3, 7, 1)
    assert report.computations.graphs == 7 + 3  # the trigger's are computed once each
    assert sum(report.bound_bytes.values()) == 2 * 3 * 4096  # a page for each chunk and slot
    assert report.arrays["x"].delivered == 7
    assert "trigger of" in str(report)


def test_what_triggers_raise(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    deisa = site.deisa()
    handled: list[Exception] = []
    ran: list[int] = []
    deisa.register_callback(
        lambda x: ran.append(x[-1].t), "x", trigger=lambda w: w[-1] > 0, exception_handler=handled.append
    )
    deisa.register_callback(lambda x: ran.append(x[-1].t), "x", trigger=lambda w: None)
    with ranks(partial(site.send_rows, 0, 1, range(3))):
        report = deisa.execute_callbacks()
    assert not ran
    assert {type(error) for error in handled} == {TriggerError}
    assert ".any() or .all()" in str(handled[0])
    assert handled[2].__notes__ == ["in trigger '<lambda>' of callback '<lambda>' at timestep 2"]
    said = "the trigger of callback '<lambda>' failed 3 of 3 times"
    assert caplog.records[-1].getMessage() == f"{said}, {said}"
    assert str(report).startswith(said)


@pytest.mark.parametrize("engine", [pytest.param("ray", marks=pytest.mark.ray)], indirect=True)
def test_another_analytics_goes_on_with_what_follows(site: Site) -> None:
    """The first one ends at timestep 4, of which the second one only knows that it follows timestep 2."""
    ran: list[Any] = []

    def analytics(ends_at: int | None) -> Any:
        deisa = site.deisa(on_error="raise", max_simulation_ahead=2)

        @deisa.register("x", trigger=lambda x: x[-1].t == 2, following=3)
        def rare(x: list[DeisaArray]) -> None:
            if x[-1].t == ends_at:
                raise RuntimeError("on purpose")
            ran.append(x[-1].t)

        return deisa

    sending = partial(site.send_rows, 0, 1, range(9), on_analytics_lost="wait")
    simulation = Ranks([sending])
    with pytest.raises(RuntimeError, match="on purpose"):
        analytics(4).execute_callbacks()
    report = analytics(None).execute_callbacks()
    simulation.check()
    assert ran == [2, 3, 4, 5]
    assert report.callbacks[0].trigger.evaluated == 5
