"""What triggers may return, when callbacks run by them, and what becomes of their failures; without any session."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from deisa.ray.callbacks import Calls, Registration, Registrations, window_specs
from deisa.ray.errors import RegistrationError, TriggerError
from deisa.ray.triggers import truth_of
from deisa.ray.types import DeisaArray, Timesteps


def window(*timesteps: int, value: float | None = None) -> list[DeisaArray]:
    return [DeisaArray(da.from_array(np.full(4, float(t) if value is None else value)), t) for t in timesteps]


def register(
    callback: Callable[..., Any], *windows: Any, trigger: Any = None, following: Any = 0, handler: Any = None
) -> Registration:
    specs = window_specs(windows or ("T",), "the callback")
    return Registration.of(callback, specs, handler, "AND", trigger, following)


def run(trigger: Any, following: int = 0, timesteps: Sequence[int] = range(8), **more: Any) -> list[int]:
    """The timesteps at which a callback with a trigger runs."""
    ran: list[int] = []
    calls = Calls(register(lambda T: ran.append(T[-1].t), trigger=trigger, following=following, **more))
    for timestep in timesteps:
        calls.call(timestep, [window(timestep)])
    return ran


# What is true.

LAZY = da.from_array(np.arange(6.0), chunks=2)
TRUE = {
    "bool": True,
    "int": 3,
    "Decimal": Decimal("0.5"),
    "NumPy bool": np.True_,
    "NumPy float": np.float32(0.5),
    "array of no dimension": np.array(1),
    "array of one element": np.array([[True]]),
    "lazy": LAZY.max() > 4,
    "lazy of one element": (LAZY > 4)[-1:],
    "lazy of unknown size": LAZY[LAZY > 4] > 0,
    "delayed": dask.delayed(lambda: np.True_)(),
    "DataArray": xr.DataArray(np.array(True)),
    "lazy DataArray": xr.DataArray(LAZY).max() > 4,
    "DeisaArray": DeisaArray(LAZY[5], 0),
    "dask.dataframe": dd.from_pandas(pd.Series([1, 2]), npartitions=1).max() > 1,
}
FALSE = {
    "bool": False,
    "zero": 0.0,
    "lazy": LAZY.max() > 5,
    "comparison with NaN": np.float64("nan") > 0,
    "lazy comparison with NaN": (LAZY * np.nan).max() > 0,
    "masked": np.ma.masked_all(3).max() > 0,
}


@pytest.mark.parametrize("what", TRUE)
def test_true(what: str) -> None:
    assert truth_of(TRUE[what], "hot") is True


@pytest.mark.parametrize("what", FALSE)
def test_false(what: str) -> None:
    assert truth_of(FALSE[what], "hot") is False


@pytest.mark.filterwarnings("ignore:All-NaN")
@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (None, "returned None; .* is a return missing"),
        (LAZY > 4, r"an array of shape \(6,\), which has 6 elements and not one; use \.any\(\) or \.all\(\)"),
        (np.zeros((2, 3)), r"shape \(2, 3\), which has 6 .* use \.any\(\) or \.all\(\)"),
        (np.array([]), "has 0 elements"),
        (LAZY[LAZY > 2], r"shape \(3,\), which has 3"),
        (xr.DataArray(LAZY), r"shape \(6,\)"),
        (pd.Series([1, 2]), r"shape \(2,\)"),
        (
            pd.Series([1]),
            "a Series, of which Python cannot say whether it is true .ambiguous|a Series, of which",
        ),
        (xr.Dataset({"a": 1}), r"a Dataset, which is true unless it is empty.* use any\(\.\.\.\) or all"),
        ([LAZY.max() > 9], r"a list, which is true unless it is empty.* use any"),
        (Timesteps(window(1, 2), "T"), "a Timesteps, which is true unless it is empty"),
        ({"T": False}, "a dict, which is true unless"),
        ("False", "a str, which is true unless"),
        (LAZY.compute, "the function 'compute', which is always true; .* parentheses of a call missing"),
        pytest.param(object(), "a object, which is always true; return a bool", id="an object"),
        (np.nan, "returned NaN, which is neither true nor false; compare it"),
        (LAZY.max() * np.nan, "returned NaN"),
        (pd.NA, "a NAType, of which Python cannot say"),
    ],
    ids=str,
)
def test_what_is_neither(returned: Any, error: str) -> None:
    with pytest.raises(TriggerError, match=f"^trigger 'hot' returned .*{error}|{error}"):
        truth_of(returned, "hot")


def test_an_array_that_is_too_large_is_refused_before_it_is_computed() -> None:
    def compute(block: np.ndarray) -> np.ndarray:
        raise AssertionError("computed")

    with pytest.raises(TriggerError, match="has 6 elements"):
        truth_of(LAZY.map_blocks(compute, meta=np.empty(0)), "hot")


def test_what_is_lazy_is_computed_once() -> None:
    computed: list[int] = []

    def note(block: np.ndarray) -> np.ndarray:
        computed.append(1)
        return block

    assert truth_of(da.from_array(np.ones(1)).map_blocks(note, meta=np.empty(0))[0] > 0, "hot")
    assert computed == [1]


# When the callback runs.


@pytest.mark.parametrize(
    ("following", "ran"), [(0, [2, 4]), (1, [2, 3, 4, 5]), (2, [2, 3, 4, 5, 6]), (9, [2, 3, 4, 5, 6, 7])]
)
def test_it_runs_where_the_condition_is_true_and_after(following: int, ran: list[int]) -> None:
    assert run(lambda T: T[-1].t in (2, 4), following) == ran


def test_timesteps_that_follow_are_those_at_which_it_would_run() -> None:
    assert run(lambda T: T[-1].t == 10, 2, [0, 10, 35, 40, 70]) == [10, 35, 40]


@pytest.mark.parametrize(
    "trigger",
    [
        lambda T, p: T[-1].t + 10 == p[-1].t == 11,
        lambda p, T: T[-1].t + 10 == p[-1].t == 11,
        lambda w, other: w[-1].t + 10 == other[-1].t == 11,
        lambda **windows: windows["T"][-1].t == 1,
        lambda *windows: [w[-1].t for w in windows] == [1, 11],
    ],
    ids=["names", "in another order", "position", "all by name", "all by position"],
)
@pytest.mark.parametrize(
    "callback", [lambda ran, T, p: ran.append(T[-1].t), lambda ran, x, y: ran.append(x[-1].t)]
)
def test_a_trigger_takes_windows_in_its_own_way(trigger: Any, callback: Any) -> None:
    ran: list[int] = []
    calls = Calls(register(partial(callback, ran), "T", "p", trigger=trigger))
    for timestep in range(3):
        calls.call(timestep, [window(timestep), window(timestep + 10)])
    assert ran == [1]


def test_what_a_trigger_assigns_does_not_show() -> None:
    seen: list[float] = []

    def overwrite(T: Any) -> bool:
        T[-1][:] = 99
        T.clear()
        return True

    calls = Calls(register(lambda T: seen.append(float(T[-1].max())), trigger=overwrite))
    calls.call(3, [window(3)])
    assert seen == [3.0]


@pytest.mark.parametrize(
    ("trigger", "following", "error"),
    [
        (None, 2, "following=2 .* give the trigger, too"),
        (lambda T: True, -1, "following is -1; it must be at least 0"),
        (lambda T: True, 1.5, r"following must be an integer, got 1\.5"),
        (lambda T, p: True, 0, r"trigger '<lambda>' takes \(T, p\), but is registered on 1 windows: T"),
        ("T > 10", 0, "trigger must be callable, got 'T > 10'"),
        (bool, 0, "trigger 'bool' is a class"),
    ],
)
def test_what_is_no_trigger(trigger: Any, following: Any, error: str) -> None:
    with pytest.raises(RegistrationError, match=f"^callback '<lambda>': {error}"):
        register(lambda T: None, trigger=trigger, following=following)


# Failures.


def fails_at(*timesteps: int) -> Callable[[Any], bool]:
    def hot(T: Any) -> bool:
        if T[-1].t in timesteps:
            raise ZeroDivisionError(T[-1].t)
        return bool(T[-1].t == 2)

    return hot


def test_failures_go_to_the_handler_of_the_callback() -> None:
    raised: list[Exception] = []
    assert run(fails_at(1, 5), handler=raised.append) == [2]
    assert [(error.args, error.__notes__) for error in raised] == [
        ((t,), [f"in trigger 'hot' of callback '<lambda>' at timestep {t}"]) for t in (1, 5)
    ]


def test_what_follows_runs_though_the_trigger_fails() -> None:
    assert run(fails_at(1, 3, 5), following=2) == [2, 3, 4]


def test_failures_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    run(fails_at(1, 3))
    first, second = caplog.records
    assert first.levelno == logging.ERROR and first.exc_info is not None
    what = "trigger 'hot' of callback '<lambda>' failed"
    assert first.getMessage() == f"{what} at timestep 1; the run goes on"
    assert (
        second.getMessage()
        == f"{what} again in the same place at timestep 3: ZeroDivisionError: 3 (2 times so far)"
    )


def test_a_failure_may_end_the_run() -> None:
    calls = Calls(register(lambda T: None, trigger=lambda T: None), ends_run=True)
    with pytest.raises(TriggerError, match="returned None") as caught:
        calls.call(3, [window(3)])
    assert caught.value.__notes__ == ["in trigger '<lambda>' of callback '<lambda>' at timestep 3"]


def test_figures() -> None:
    calls = Calls(register(lambda T: None, trigger=fails_at(1), following=1, handler=lambda error: None))
    for timestep in range(6):
        calls.call(timestep, [window(timestep)])
    figures = calls.figures
    assert (figures.calls, figures.failures) == (2, 0)
    trigger = figures.trigger
    assert trigger is not None
    assert (trigger.name, trigger.evaluated, trigger.fired, trigger.failures) == ("hot", 6, 1, 1)
    assert trigger.total_s >= trigger.longest_s > 0


# Where another analytics goes on.


def test_another_analytics_goes_on_with_what_is_to_follow() -> None:
    ran: list[int] = []
    registration = register(lambda T: ran.append(T[-1].t), trigger=lambda T: T[-1].t == 2, following=3)
    first, second = Calls(registration), Calls(registration)
    for timestep in range(4):
        first.call(timestep, [window(timestep)])
    assert first.following == 2
    second.resume(first.following)
    for timestep in range(4, 8):
        second.call(timestep, [window(timestep)])
    assert ran == [2, 3, 4, 5]


def test_another_one_may_want_fewer() -> None:
    calls = Calls(register(lambda T: None, trigger=lambda T: True, following=1))
    calls.resume(5)
    assert calls.following == 1
    without = Calls(register(lambda T: None))
    without.resume(5)
    assert without.following == 0


# In notebooks, and in loops.


def registered(*registrations: Registration) -> int:
    all_of_them = Registrations()
    for registration in registrations:
        all_of_them.add(registration)
    return len(all_of_them)


def alarm(T: Any) -> None: ...


def above(limit: int) -> Any:
    return lambda T: T[-1].max() > limit


def cell(code: str, file: str) -> Any:
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, file, "exec"), names)
    return names["trigger"]


def test_one_callback_with_several_triggers_stays() -> None:
    one, two = above(1), above(2)
    assert registered(register(alarm, trigger=one), register(alarm, trigger=two)) == 2
    assert registered(register(alarm, trigger=one), register(alarm)) == 2
    assert registered(register(alarm, trigger=one), register(alarm, trigger=one, following=3)) == 2
    assert registered(register(alarm, trigger=partial(one)), register(alarm, trigger=partial(one))) == 2


def test_a_cell_that_runs_again_registers_its_trigger_once() -> None:
    assert registered(register(alarm, trigger=above(1)), register(alarm, trigger=above(1))) == 1
    first = cell("trigger = lambda T: T[-1].max() > 1", "<cell 1>")
    again = cell("trigger = lambda T: T[-1].max() > 1", "<cell 1>")
    edited = cell("trigger = lambda T: T[-1].max() > 2", "<cell 2>")
    assert registered(register(alarm, trigger=first), register(alarm, trigger=again)) == 1
    assert registered(register(alarm, trigger=first), register(alarm, trigger=edited)) == 1
