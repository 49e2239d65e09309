"""Scripts of deisa-ray 0.1.8, and calls that deisa-core and deisa-dask know, on both engines."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from deisa.core import IDeisa
from deisa.ray import DeisaArray, Window
from deisa.ray.errors import AnalyticsLostError, RegistrationError
from tests.e2e.simulation import Ranks, Site, ranks


def test_what_ends_a_run_there_ends_it_here(site: Site) -> None:
    deisa = site.deisa()

    @deisa.register("x")
    def wrong(x: list[DeisaArray]) -> None:
        assert x[-1].t < 1, "these numbers cannot be"

    simulation = Ranks([partial(site.send_rows, 0, 1, range(1000))])
    with pytest.raises(AssertionError, match="these numbers cannot be") as caught:
        deisa.execute_callbacks()
    assert caught.value.__notes__ == ["in callback 'wrong' at timestep 1"]
    (told,) = simulation.errors()
    assert isinstance(told, AnalyticsLostError) and "these numbers cannot be" in str(told)


def test_a_handler_of_ones_own_gets_everything(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    deisa = site.deisa()
    handled: list[Exception] = []

    @deisa.register("x", exception_handler=handled.append)
    def wrong(x: list[DeisaArray]) -> None:
        raise (AssertionError, TimeoutError, ValueError)[x[-1].t]

    @deisa.register("x", exception_handler=IDeisa._IDeisa__default_exception_handler)  # type: ignore[attr-defined]
    def fails(x: list[DeisaArray]) -> None:
        raise ZeroDivisionError("printed")

    with ranks(partial(site.send_rows, 0, 1, range(3))):
        report = deisa.execute_callbacks()
    assert [type(error) for error in handled] == [AssertionError, TimeoutError, ValueError]
    assert capsys.readouterr().err.count("printed") == 3
    assert report.callbacks_failed == 6


def test_a_callback_that_is_unregistered_runs_no_more(site: Site) -> None:
    deisa = site.deisa()
    seen: list[Any] = []

    @deisa.register("x")
    def never(x: list[DeisaArray]) -> None:
        seen.append("never")

    @deisa.register(Window("x", 2))
    def twice(x: list[DeisaArray]) -> None:
        seen.append(x[-1].t)
        if x[-1].t == 1:
            deisa.unregister_callback(twice)

    deisa.register_callback(lambda x: seen.append("still there"), "x")
    deisa.unregister_callback(never)
    with pytest.raises(
        RegistrationError, match="'never' is not registered; registered are 'twice', '<lambda>'"
    ):
        deisa.unregister_callback(never)
    with ranks(*(partial(site.send_rows, rank, 2, range(5)) for rank in range(2))):
        report = deisa.execute_callbacks()
    assert seen == [0, "still there", 1, *["still there"] * 4]
    assert [(callback.name, callback.calls) for callback in report.callbacks] == [
        ("twice", 2),
        ("<lambda>", 5),
    ]
