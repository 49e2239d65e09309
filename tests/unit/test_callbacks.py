"""What may be a callback, how its windows reach it, and what becomes of its failures; without any session."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import dask.array as da
import numpy as np
import pytest

from deisa.ray.callbacks import Calls, Registration, Registrations, window_specs
from deisa.ray.errors import NoFreeCpusError, RegistrationError, WindowError
from deisa.ray.types import DeisaArray, WindowSpec


def register(callback: Any, *windows: Any, handler: Any = None, when: Any = "AND") -> Registration:
    specs = window_specs(windows or ("T",), "the callback")
    return Registration.of(callback, specs, handler, when)


def window(*timesteps: int) -> list[DeisaArray]:
    return [DeisaArray(da.from_array(np.full(4, float(t))), t) for t in timesteps]


def called(callback: Any, *windows: Any, **more: Any) -> Calls:
    """Call a callback once, with a window of two timesteps for each array."""
    calls = Calls(register(callback, *windows, **more))
    calls.call(1, [window(0, 1) for _ in windows or ("T",)])
    return calls


# What can never run.


async def coroutine(T: Any) -> None: ...


async def asynchronous_generator(T: Any) -> AsyncIterator[int]:
    yield 1


def generator(T: Any) -> Iterator[int]:
    yield 1


class Asynchronous:
    async def __call__(self, T: Any) -> None: ...

    async def method(self, T: Any) -> None: ...

    @staticmethod
    async def static(T: Any) -> None: ...


class Generating:
    def __call__(self, T: Any) -> Iterator[int]:
        yield 1


class NoCallback:
    def __init__(self, T: Any = None) -> None: ...


class Callback(NoCallback):
    def __call__(self, T: Any) -> None: ...


NEVER = {
    "async def": coroutine,
    "asynchronous generator": asynchronous_generator,
    "generator": generator,
    "partial of async def": functools.partial(coroutine),
    "partial of a partial": functools.partial(functools.partial(generator)),
    "instance with async __call__": Asynchronous(),
    "partial of such an instance": functools.partial(Asynchronous()),
    "async method": Asynchronous().method,
    "async static method": Asynchronous.static,
    "instance with yield in __call__": Generating(),
    "class": NoCallback,
    "class of callbacks": Callback,
    "partial of a class": functools.partial(NoCallback),
    "exception class": ValueError,
    "instance that cannot be called": NoCallback(),
    "nothing": None,
    "a name": "T",
}


@pytest.mark.parametrize("role", ["callback", "exception_handler"])
@pytest.mark.parametrize("what", NEVER)
def test_what_never_runs_is_refused(what: str, role: str) -> None:
    refused = NEVER[what]
    if role == "exception_handler" and refused is None:
        return  # none was given
    with pytest.raises(RegistrationError, match=f"^{role} "):
        if role == "callback":
            register(refused)
        else:
            register(lambda T: None, handler=refused)


def test_the_error_says_what_to_give() -> None:
    with pytest.raises(
        RegistrationError, match=r"'coroutine' is a coroutine function .* make it a plain function"
    ):
        register(coroutine)
    with pytest.raises(
        RegistrationError, match=r"'NoCallback' is a class, .* an instance .*: NoCallback\(...\)"
    ):
        register(NoCallback)


@pytest.mark.parametrize(
    "handler",
    [
        lambda: None,
        lambda error, more: None,
        lambda *, error: None,
        functools.partial(print, file=3).func.__class__,
    ],
    ids=["none", "two", "keyword", "class"],
)
def test_handlers_that_cannot_take_an_exception(handler: Any) -> None:
    with pytest.raises(RegistrationError, match="exception_handler"):
        register(lambda T: None, handler=handler)


def test_what_can_run_is_accepted() -> None:
    ran: list[Any] = []

    def note(T: Any) -> None:
        ran.append(T)

    class Analysis:
        def step(self, T: Any) -> None:
            ran.append(T)

        __call__ = step

    @functools.wraps(coroutine)
    def runs_it(T: Any) -> None:
        asyncio.run(coroutine(T))
        ran.append(T)

    for callback in (
        note,
        functools.partial(note),
        Analysis(),
        Analysis().step,
        functools.partial(Analysis().step),
        functools.lru_cache(lambda T: None) and ran.append,
        runs_it,
    ):
        called(callback)
    assert len(ran) == 7
    for handler in (
        print,
        ran.append,
        lambda *errors: None,
        lambda error=None, more=3: None,
        Analysis().step,
    ):
        register(note, handler=handler)


@pytest.mark.parametrize("made", [coroutine, asynchronous_generator, generator])
def test_what_returns_work_that_nobody_does_has_failed(made: Callable[..., Any]) -> None:
    raised: list[Exception] = []
    calls = called(lambda T: made(T), handler=raised.append)
    assert (calls.count, calls.failures) == (1, 1)
    assert isinstance(raised[0], RegistrationError)
    assert "which nobody runs" in str(raised[0])


def test_a_handler_that_returns_such_work_ends_the_run() -> None:
    def fails(T: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(RegistrationError, match="'<lambda>' returned <coroutine object"):
        called(fails, handler=lambda error: coroutine(error))


def test_other_arguments_that_make_no_sense() -> None:
    with pytest.raises(RegistrationError, match="'AND' or 'OR', got 'XOR'"):
        register(lambda T: None, when="XOR")
    with pytest.raises(WindowError, match="name the same array"):
        register(lambda a, b: None, "T", WindowSpec("T", 2))
    with pytest.raises(WindowError, match="at least one window"):
        window_specs([], "the callback")


# Windows and parameters.


def arguments(make: Callable[[list[Any]], Any], *windows: str) -> Any:
    """What a callback got, each window by the array of which it is the name."""
    got: list[Any] = []
    calls = Calls(register(make(got), *windows))
    calls.call(1, [window(number) for number in range(len(windows))])
    assert calls.failures == 0
    (only,) = got
    return only


def test_by_name_by_position_or_all_of_them() -> None:
    def named(got: list[Any]) -> Any:
        return lambda p, T: got.append((T[-1].t, p[-1].t))

    def placed(got: list[Any]) -> Any:
        return lambda first, second: got.append((first[-1].t, second[-1].t))

    def starred(got: list[Any]) -> Any:
        return lambda *all: got.append(tuple(one[-1].t for one in all))

    for make in (named, placed, starred):
        assert arguments(make, "T", "p") == (0, 1)


def test_windows_by_name_in_a_dictionary() -> None:
    def all_of_them(got: list[Any]) -> Any:
        def callback(**windows: Any) -> None:
            got.append({name: one[-1].t for name, one in windows.items()})

        return callback

    def one_and_the_others(got: list[Any]) -> Any:
        def callback(p: Any, **others: Any) -> None:
            got.append({"p": p[-1].t} | {name: one[-1].t for name, one in others.items()})

        return callback

    def with_a_default(got: list[Any]) -> Any:
        def callback(scale: float = 1.0, **windows: Any) -> None:
            got.append({name: one[-1].t for name, one in windows.items()})

        return callback

    for make in (all_of_them, one_and_the_others, with_a_default):
        assert arguments(make, "T", "p", "not-an-identifier") == {"T": 0, "p": 1, "not-an-identifier": 2}


def test_keywords_beside_positions() -> None:
    def placed(got: list[Any]) -> Any:
        return lambda first, second, **more: got.append((first[-1].t, second[-1].t, more))

    def anything(got: list[Any]) -> Any:
        return lambda *all, **more: got.append((*(one[-1].t for one in all), more))

    assert arguments(placed, "T", "p") == (0, 1, {})
    assert arguments(anything, "T", "p") == (0, 1, {})


def test_a_parameter_never_gets_another_array_than_its_name_says() -> None:
    with pytest.raises(RegistrationError, match=r"'p' would get array 'T'; name all parameters"):
        register(lambda p, temperature: None, "T", "p")
    register(lambda T, pressure: None, "T", "p")
    register(lambda t, pressure: None, "T", "p")


def test_callbacks_that_cannot_take_their_windows() -> None:
    with pytest.raises(
        RegistrationError, match=r"'<lambda>' takes \(one\), but is registered on 2 windows: T, p"
    ):
        register(lambda one: None, "T", "p")
    with pytest.raises(RegistrationError, match="registered on 1 windows"):
        register(lambda T, p: None, "T")


@pytest.mark.parametrize(
    ("callback", "hint"),
    [
        (lambda u: u.mean(), "u[-1].mean"),
        (lambda T: T - 1, "T[-1]"),
        (lambda *windows: windows[0].mean(), "T[-1].mean"),
        (lambda **windows: windows["T"].mean(), "T[-1].mean"),
    ],
)
def test_a_window_that_is_taken_for_an_array_says_so(callback: Any, hint: str) -> None:
    raised: list[Exception] = []
    called(callback, handler=raised.append)
    assert hint in str(raised[0])


# Versions of a function.


def cell(text: str, file: str = "<cell>") -> Any:
    """Run a notebook's cell, and return what it calls `callback`."""
    space: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(text, file, "exec"), space)
    return space["callback"]


def registered(*all: tuple[Any, Any]) -> list[Any]:
    registrations = Registrations()
    for callback, windows in all:
        registrations.add(register(callback, *windows))
    return [registration.callback for registration in registrations]


def test_a_cell_that_runs_again_registers_once(caplog: pytest.LogCaptureFixture) -> None:
    first, again, other = (cell("def callback(T): ...") for _ in range(3))
    other.__qualname__ = "other"
    assert registered((first, ["T"]), (other, ["T"]), (again, ["T"])) == [again, other]
    assert "callback 'callback' takes the place of the one that was registered under its name" in caplog.text


@pytest.mark.parametrize(
    ("text", "file", "windows"),
    [
        ("def callback(T): return 1", "<cell>", ["T"]),
        ("# now with a window of three\ndef callback(T): ...", "<cell>", ["T"]),
        ("def callback(T): return 1", "/tmp/other/cell", [WindowSpec("T", 3)]),
        ("\ndef callback(p): return 1", "/tmp/other/cell", ["p"]),
    ],
)
def test_an_edited_cell_takes_the_place_of_the_first(text: str, file: str, windows: list[Any]) -> None:
    first = cell("def callback(T): ...", "<cell>" if file == "<cell>" else "/tmp/one/cell")
    edited = cell(text, file)
    assert registered((first, ["T"]), (edited, windows)) == [edited]


def test_decorated_functions_are_told_apart_by_what_is_decorated() -> None:
    text = """
from functools import wraps

def timed(function):
    @wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper

@timed
def callback(T): ...
"""
    first, again = cell(text), cell(text)
    assert registered((first, ["T"]), (again, ["T"])) == [again]


def test_functions_that_only_share_their_name_stay() -> None:
    def make(number: int) -> Any:
        def callback(T: Any) -> int:
            return number

        return callback

    closures = [make(number) for number in range(3)]
    assert registered(*((one, ["T"]) for one in closures)) == closures

    lambdas = [lambda T: 1, lambda T: 2]
    assert registered(*((one, ["T"]) for one in lambdas)) == lambdas

    class Analysis:
        def step(self, T: Any) -> None: ...

    methods = [Analysis().step, Analysis().step]
    assert registered(*((one, ["T"]) for one in methods)) == methods

    partials = [functools.partial(print, n) for n in range(2)]
    assert registered(*((one, ["T"]) for one in partials)) == partials

    two = "def callback(T): ...\nfirst = callback\n\ndef callback(T): ...\ncallback = (first, callback)"
    in_one_file = cell(two, "/tmp/analytics.py")
    assert registered(*((one, ["T"]) for one in in_one_file)) == list(in_one_file)


def test_what_a_loop_makes_of_one_definition_stays() -> None:
    on_two_arrays = """
callback = []
for name in ("T", "p"):
    def each(window): ...
    callback.append(each)
"""
    with_two_values = """
callback = []
for number in (1000, 2000):
    def each(T, number=number): ...
    callback.append(each)
"""
    first, second = cell(on_two_arrays, "/tmp/analytics.py")
    assert registered((first, ["T"]), (second, ["p"])) == [first, second]
    first, second = cell(with_two_values, "/tmp/analytics.py")
    assert registered((first, ["T"]), (second, ["T"])) == [first, second]


def test_a_function_that_is_run_again_registers_once_what_it_defines() -> None:
    made: list[Any] = []

    def as_in_a_cell() -> None:
        def callback(T: Any) -> None:
            made.append(T)

        made.append(callback)

    as_in_a_cell()
    as_in_a_cell()
    first, again = made
    assert registered((first, ["T"]), (again, ["T"])) == [again]
    assert registered((first, ["T"]), (again, ["p"])) == [first, again]
    assert registered((first, ["T"]), (first, ["T"])) == [first, first]


def test_one_function_on_several_arrays_stays() -> None:
    callback = cell("def callback(window): ...")
    assert (
        registered((callback, ["T"]), (callback, ["p"]), (callback, [WindowSpec("T", 2)])) == [callback] * 3
    )
    assert registered((callback, ["T"]), (callback, ["T"])) == [callback]


# Failures.


def failing(kind: type[Exception], timesteps: int, callback: Any = None) -> Calls:
    def fails(T: Any) -> None:
        raise kind(f"at {T[-1].t}")

    calls = Calls(register(callback or fails))
    for timestep in range(timesteps):
        calls.call(timestep, [window(timestep)])
    return calls


def test_the_first_failure_is_told_at_length_and_its_repeats_in_a_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = failing(ZeroDivisionError, 3)
    assert (calls.count, calls.failures) == (3, 3)
    first, *others = caplog.records
    assert first.exc_info is not None and first.levelno == logging.ERROR
    assert first.getMessage() == "callback 'fails' failed at timestep 0; the run goes on"
    assert "in callback 'fails' at timestep 0" in caplog.text
    assert [(record.exc_info, record.getMessage()) for record in others] == [
        (
            None,
            f"callback 'fails' failed again in the same place at timestep {t}: ZeroDivisionError: at {t} "
            f"({t + 1} times so far)",
        )
        for t in (1, 2)
    ]


def test_another_failure_is_told_at_length_too(caplog: pytest.LogCaptureFixture) -> None:
    def fails(T: Any) -> None:
        if T[-1].t == 1:
            raise ZeroDivisionError
        if T[-1].t == 2:
            raise KeyError
        raise ZeroDivisionError

    failing(ZeroDivisionError, 6, fails)
    assert [record.exc_info is not None for record in caplog.records] == [
        True,
        True,
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("kind", [AssertionError, TimeoutError, NoFreeCpusError])
def test_checks_and_waits_that_fail_end_the_run(kind: type[Exception]) -> None:
    with pytest.raises(kind, match="at 0") as caught:
        failing(kind, 2)
    assert caught.value.__notes__ == ["in callback 'fails' at timestep 0"]


def test_a_handler_hears_of_every_failure(caplog: pytest.LogCaptureFixture) -> None:
    raised: list[Exception] = []

    def fails(T: Any) -> None:
        raise ZeroDivisionError(T[-1].t)

    calls = Calls(register(fails, handler=raised.append), ends_run=True)
    for timestep in range(3):
        calls.call(timestep, [window(timestep)])
    assert [error.args for error in raised] == [(0,), (1,), (2,)]
    assert not caplog.records


def test_a_failure_may_end_the_run() -> None:
    calls = Calls(register(lambda T: 1 // 0), ends_run=True)
    with pytest.raises(ZeroDivisionError) as caught:
        calls.call(3, [window(3)])
    assert caught.value.__notes__ == ["in callback '<lambda>' at timestep 3"]
    assert (calls.count, calls.failures) == (1, 1)
