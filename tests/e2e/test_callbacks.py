"""Callbacks as users write them, and what becomes of their failures, on both engines."""

from __future__ import annotations

import logging
import threading
from functools import partial
from typing import Any

import pytest

from deisa.core import Window as CoreWindow
from deisa.ray import DeisaArray, Window, WindowSpec
from deisa.ray.errors import AnalyticsLostError, NotPicklableError, RegistrationError, WindowError
from tests.e2e.simulation import Ranks, Site, ranks, rows, values


def send_both(site: Site, timesteps: int) -> None:
    with site.bridge(0, 1, {"x": rows(0, 1), "y": rows(0, 1)}) as bridge:
        for timestep in range(timesteps):
            bridge.send("x", values((4,), timestep), timestep)
            bridge.send("y", -values((4,), timestep), timestep)


def test_windows_by_name_and_the_latest_only(site: Site) -> None:
    deisa = site.deisa()
    seen: list[Any] = []

    @deisa.register(WindowSpec("x", 2), Window("y", None))
    def all_of_them(**windows: list[DeisaArray]) -> None:
        seen.append({name: [array.t for array in window] for name, window in windows.items()})
        assert windows["x"][-1].sum().compute() == -windows["y"][-1].sum().compute()

    deisa.register_callback(lambda y: seen.append(len(y)), CoreWindow("y", None))
    with ranks(partial(send_both, site, 2)):
        report = deisa.execute_callbacks()
    assert report.callbacks_failed == 0
    assert seen == [{"x": [0], "y": [0]}, 1, {"x": [0, 1], "y": [1]}, 1]


def test_what_is_registered_the_wrong_way(site: Site) -> None:
    deisa = site.deisa()

    async def later(x: Any) -> None: ...

    with pytest.raises(
        RegistrationError, match=r'say of which array, as in @deisa.register\("temperature"\)'
    ):

        @deisa.register
        def bare(x: Any) -> None: ...

    with pytest.raises(WindowError, match=r"register\(\) needs at least one window"):
        deisa.register()
    with pytest.raises(RegistrationError, match="'later' is a coroutine function"):
        deisa.register("x")(later)
    with pytest.raises(RegistrationError, match="'later' is a coroutine function"):
        deisa.register_callback(lambda x: None, "x", exception_handler=later)
    deisa.close()


def test_failures_are_the_last_words(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    deisa = site.deisa()

    @deisa.register("x")
    def vorticity(x: list[DeisaArray]) -> None:
        x.mean()  # type: ignore[attr-defined]

    deisa.register_callback(lambda x: None, "x")
    with ranks(partial(site.send_rows, 0, 1, range(4))):
        report = deisa.execute_callbacks()
    assert caplog.records[-1].getMessage() == "callback 'vorticity' failed 4 of 4 times"
    assert caplog.records[-1].levelno == logging.ERROR
    assert str(report).startswith("callback 'vorticity' failed 4 of 4 times; ")
    failures = [record for record in caplog.records if "'vorticity' failed " in record.getMessage()]
    assert [record.exc_info is not None for record in failures] == [True, False, False, False, False]
    assert (
        "x is a window: a list of timesteps, oldest first; use x[-1].mean for the newest one" in caplog.text
    )


@pytest.mark.parametrize("given", ["keyword", "setting"])
@pytest.mark.parametrize("kind", [ZeroDivisionError, NotPicklableError])
def test_the_first_failure_ends_the_run(
    site: Site, given: str, kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """The simulation does what its policy says, whatever the callback has raised."""
    deisa = site.deisa(on_error="raise") if given == "setting" else site.deisa_with(on_error="raise")
    handled: list[Exception] = []

    @deisa.register("x", exception_handler=handled.append)
    def has_a_handler(x: list[DeisaArray]) -> None:
        raise KeyError

    @deisa.register("x")
    def fails(x: list[DeisaArray]) -> None:
        if x[-1].t == 1:
            raise kind("enough")

    simulation = Ranks([partial(site.send_rows, rank, 2, range(1000)) for rank in range(2)])
    with pytest.raises(kind, match="enough") as caught:
        deisa.execute_callbacks()
    assert caught.value.__notes__ == ["in callback 'fails' at timestep 1"]
    for error in simulation.errors():
        assert isinstance(error, AnalyticsLostError)
        assert kind.__name__ in str(error) and "enough" in str(error)
    assert len(handled) == 2
    said = "callback 'has_a_handler' failed 2 of 2 times, callback 'fails' failed 1 of 2 times"
    assert caplog.records[-1].getMessage() == said
    assert str(deisa.report).startswith(said)


def test_an_exception_that_names_a_window_may_be_kept(site: Site) -> None:
    """Python notes in an `AttributeError` whose attribute it was: a window that would keep its slots."""
    deisa = site.deisa()
    raised: list[Exception] = []

    @deisa.register("x", exception_handler=raised.append)
    def fails(x: list[DeisaArray]) -> None:
        x[-1].no_such_thing if x[-1].t % 2 else x.no_such_thing  # type: ignore[attr-defined]

    with ranks(*(partial(site.send_rows, rank, 2, range(6)) for rank in range(2))):
        report = deisa.execute_callbacks()
    assert report.callbacks_failed == len(raised) == 6
    assert {type(error) for error in raised} == {AttributeError}
    assert not [t for t in threading.enumerate() if t.name == "deisa-linger"]
