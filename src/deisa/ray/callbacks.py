"""Callbacks: what may be one, how its windows reach it, its calls, and what becomes of its failures."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from deisa.ray._state.layout import ArrayLayout
from deisa.ray._state.timeline import Subscription, When
from deisa.ray.errors import RegistrationError, WindowError, cause_chain
from deisa.ray.report import CallbackFigures
from deisa.ray.types import DeisaArray, Timesteps, WindowSpec, window_spec

logger = logging.getLogger("deisa.ray")

Callback = Callable[..., Any]
ExceptionHandler = Callable[[Exception], Any]

_NEVER_RUN: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (inspect.iscoroutinefunction, "a coroutine function (async def)"),
    (inspect.isasyncgenfunction, "an asynchronous generator function"),
    (inspect.isgeneratorfunction, "a generator function (it has yield)"),
)
_NAMED = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


@dataclass(frozen=True, slots=True)
class Registration:
    """A callback, its windows, and how it takes them.

    Attributes
    ----------
    exception_handler : callable or None
        None where `Settings.on_error` decides.
    by_name : bool
        Whether the callback takes its windows by the names of their arrays.
    called : tuple of str
        What the callback calls each window.
    """

    callback: Callback
    windows: tuple[WindowSpec, ...]
    exception_handler: ExceptionHandler | None
    when: When
    by_name: bool
    called: tuple[str, ...]

    @classmethod
    def of(
        cls,
        callback: Callback,
        windows: Sequence[WindowSpec],
        exception_handler: ExceptionHandler | None,
        when: When,
    ) -> Registration:
        """Check whether a callback can be called on windows, and its handler on an exception.

        Raises
        ------
        RegistrationError, WindowError
        """
        _check_runs(callback, "callback")
        if when not in ("AND", "OR"):
            raise RegistrationError(f"when must be 'AND' or 'OR', got {when!r}")
        names = [spec.name for spec in windows]
        if len(set(names)) < len(names):
            raise WindowError(f"two windows of one callback name the same array: {names}")
        if exception_handler is not None:
            _check_runs(exception_handler, "exception_handler")
            _check_takes_one(exception_handler)
        by_name, called = _bind(callback, names)
        return cls(callback, tuple(windows), exception_handler, when, by_name, called)

    @property
    def name(self) -> str:
        """The function's name."""
        return name_of(self.callback)

    @property
    def subscription(self) -> Subscription:
        """What the timeline needs to know."""
        return Subscription(tuple((w.name, w.window_size) for w in self.windows), self.when)

    def can_run(self, layouts: Mapping[str, ArrayLayout]) -> bool:
        """Whether there are all its arrays; says which is missing."""
        missing = [w.name for w in self.windows if w.name not in layouts]
        for name in missing:
            close = difflib.get_close_matches(name, layouts, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            logger.error(
                "callback %r will not run: no bridge has an array %r, there are %s%s",
                self.name,
                name,
                ", ".join(map(repr, sorted(layouts))) or "none",
                hint,
            )
        return not missing


class Registrations:
    """The callbacks of one analytics, in the order of registration."""

    def __init__(self) -> None:
        self._all: list[Registration] = []

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Registration]:
        return iter(self._all)

    def add(self, new: Registration) -> None:
        """Add a callback, in the place of an earlier version of the same function if there is one."""
        earlier = [n for n, old in enumerate(self._all) if _is_another_version(new, old)]
        if not earlier:
            self._all.append(new)
            return
        logger.warning("callback %r takes the place of the one that was registered under its name", new.name)
        self._all[earlier[0]] = new
        for number in reversed(earlier[1:]):
            del self._all[number]

    def clear(self) -> None:
        """Let go of the callbacks, which may hold arrays."""
        self._all.clear()


@dataclass(slots=True)
class Calls:
    """Calls one callback and counts."""

    registration: Registration
    ends_run: bool = False
    count: int = 0
    failures: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0
    _seen: Counter[Any] = field(default_factory=Counter)

    def call(self, timestep: int, windows: list[list[DeisaArray]]) -> None:
        """Call the callback for a timestep; what it raises goes to its handler, or ends the run."""
        registration = self.registration
        started = time.monotonic()
        self.count += 1
        arguments = [
            # Copies: what a callback assigns to an array of its own shows nowhere else, nor at the next timestep.
            Timesteps([array.copy() for array in window], name)
            for window, name in zip(windows, registration.called, strict=True)
        ]
        try:
            if registration.by_name:
                names = (window.name for window in registration.windows)
                returned = registration.callback(**dict(zip(names, arguments, strict=True)))
            else:
                returned = registration.callback(*arguments)
            _check_has_run(returned, registration.name)
        except Exception as error:
            self.failures += 1
            error.add_note(f"in callback {registration.name!r} at timestep {timestep}")
            self._handle(error, timestep)
            _let_go(error)
            arguments.clear()  # this frame is one of the traceback's
            windows.clear()
        finally:
            seconds = time.monotonic() - started
            self.total_s += seconds
            self.longest_s = max(self.longest_s, seconds)

    def _handle(self, error: Exception, timestep: int) -> None:
        handler = self.registration.exception_handler
        if handler is not None:
            _check_has_run(handler(error), name_of(handler))
        elif self.ends_run:
            raise error
        else:
            self._log(error, timestep)

    def _log(self, error: Exception, timestep: int) -> None:
        """Log a failure with its traceback, and one that was seen before in a line."""
        lines = traceback.walk_tb(error.__traceback__)
        failure = type(error), tuple((frame.f_code.co_filename, line) for frame, line in lines)
        self._seen[failure] += 1
        name, seen = self.registration.name, self._seen[failure]
        if seen == 1:
            logger.error("callback %r failed at timestep %d; the run goes on", name, timestep, exc_info=error)
        else:
            what = traceback.format_exception_only(error)[0].strip()
            logger.error(
                "callback %r failed again in the same place at timestep %d: %s (%d times so far)",
                name,
                timestep,
                what,
                seen,
            )

    @property
    def figures(self) -> CallbackFigures:
        """What has been counted."""
        return CallbackFigures(
            self.registration.name, self.count, self.failures, self.total_s, self.longest_s
        )


def window_specs(windows: Iterable[Any], of: str) -> tuple[WindowSpec, ...]:
    """Read windows in all their spellings, also in lists of them; there must be one.

    Raises
    ------
    WindowError
    """
    specs = tuple(map(window_spec, _flat(windows)))
    if not specs:
        raise WindowError(
            f"{of} needs at least one window, as in register_callback(callback, "
            "[WindowSpec('temperature', window_size=3)]) or @deisa.register('temperature')"
        )
    return specs


def _flat(windows: Iterable[Any]) -> list[Any]:
    flat: list[Any] = []
    for window in windows:
        is_list = (
            isinstance(window, Sequence | set) and not isinstance(window, str) and not hasattr(window, "name")
        )
        flat += window if is_list else [window]
    return flat


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, or what stands for it."""
    return getattr(function, "__name__", None) or repr(function)


# What may be a callback or a handler.


def _check_runs(function: Any, role: str) -> None:
    """Check that calling a function runs it."""
    if not callable(function):
        raise RegistrationError(f"{role} must be callable, got {function!r}")
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if isinstance(inner, type):
        raise RegistrationError(
            f"{role} {inner.__name__!r} is a class, and calling it only makes an instance; give a function, a method "
            f"of an instance, or an instance that can be called: {inner.__name__}(...)"
        )
    called = inner if inspect.isroutine(inner) else type(inner).__call__
    for is_one, what in _NEVER_RUN:
        if is_one(inner) or is_one(called):
            raise RegistrationError(
                f"{role} {name_of(function)!r} is {what}: calling it would run nothing of it; make it a plain function"
            )


def _check_has_run(returned: Any, name: str) -> None:
    """Check that a function did not return something which would still have to be run."""
    if inspect.iscoroutine(returned) or inspect.isgenerator(returned) or inspect.isasyncgen(returned):
        if inspect.iscoroutine(returned):
            returned.close()  # lest Python warns that nobody awaited it
        raise RegistrationError(
            f"{name!r} returned {returned!r}, which nobody runs; it must do its work itself, as a plain function does"
        )


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """The parameters of a function, where Python knows them: not of some builtins."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _check_takes_one(handler: ExceptionHandler) -> None:
    signature = _signature(handler)
    try:
        if signature is not None:
            signature.bind(None)
    except TypeError as exc:
        raise RegistrationError(
            f"exception_handler {name_of(handler)!r} takes {signature}, but is called with one argument, "
            f"the exception ({exc})"
        ) from exc


def _bind(callback: Callback, names: Sequence[str]) -> tuple[bool, tuple[str, ...]]:
    """Whether a callback takes its windows by the names of their arrays, and what it calls each of them."""
    called = tuple(name if name.isidentifier() else "window" for name in names)
    signature = _signature(callback)
    if signature is None:
        return False, called
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    named = {p.name for p in signature.parameters.values() if p.kind in _NAMED}
    by_name = set(names) <= named or (
        inspect.Parameter.VAR_KEYWORD in kinds
        and inspect.Parameter.VAR_POSITIONAL not in kinds
        and _takes_names(signature, names)
    )
    try:
        if by_name:
            signature.bind(**dict.fromkeys(names))
            return True, called
        bound = signature.bind(*names)
    except TypeError as exc:
        raise RegistrationError(
            f"callback {name_of(callback)!r} takes {signature}, but is registered on "
            f"{len(names)} windows: {', '.join(names)} ({exc})"
        ) from exc
    given = {parameter: name for parameter, name in bound.arguments.items() if isinstance(name, str)}
    for parameter, name in given.items():
        if parameter in names and parameter != name:
            raise RegistrationError(
                f"callback {name_of(callback)!r} takes {signature}: not every array has a parameter of its name, so "
                f"that windows {', '.join(names)} go by position, and {parameter!r} would get array {name!r}; name all "
                "parameters after the arrays, or none"
            )
    by_array = {name: parameter for parameter, name in given.items()}
    return False, tuple(by_array.get(name, what) for name, what in zip(names, called, strict=True))


def _takes_names(signature: inspect.Signature, names: Sequence[str]) -> bool:
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError:
        return False
    return True


# Versions of a function, as a notebook makes them.


def _is_another_version(new: Registration, old: Registration) -> bool:
    """Whether a function is defined anew: by the same cell of a notebook, by an edited one, by a module loaded again.

    Not what one place of a program makes of other values or registers on other arrays, as a loop does, and not two
    functions of one name in one file.
    """
    now, before = inspect.unwrap(new.callback), inspect.unwrap(old.callback)
    if not isinstance(now, FunctionType) or not isinstance(before, FunctionType):
        return False
    if (now.__module__, now.__qualname__) != (before.__module__, before.__qualname__):
        return False
    code, earlier = now.__code__, before.__code__
    inside = "<locals>" in now.__qualname__
    same_windows = new.windows == old.windows
    if code is earlier:  # the same place of a program
        alike = not inside if now is before else _values_of(now) == _values_of(before)
        return same_windows and alike and now.__name__ != "<lambda>"
    if inside or now.__name__ == "<lambda>":
        return False
    if code.co_filename != earlier.co_filename or code.co_firstlineno == earlier.co_firstlineno:
        return True
    return code.co_filename.startswith("<") and same_windows  # text that is no file


def _values_of(function: FunctionType) -> list[int]:
    """What a function has of the place where it was made, by identity: its defaults, and what it refers to there."""
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            values.append(cell.cell_contents)
    return [id(value) for value in values]


def _let_go(error: BaseException) -> None:
    """Let go of the windows that an exception holds, lest a handler that keeps it stall the simulation."""
    for link in cause_chain(error):
        traceback.clear_frames(link.__traceback__)
        if isinstance(link, AttributeError):
            link.obj = None
