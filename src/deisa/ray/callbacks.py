"""Callbacks: how they are registered, their calls, and what becomes of their failures."""

from __future__ import annotations

import difflib
import inspect
import logging
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

from deisa.ray._state.layout import ArrayLayout
from deisa.ray._state.streams import Stream
from deisa.ray._state.timeline import Subscription, When
from deisa.ray.errors import RegistrationError, WindowError, cause_chain
from deisa.ray.functions import Binding, check_has_run, check_runs, check_takes_one, name_of, values_of
from deisa.ray.report import CallbackFigures
from deisa.ray.triggers import Trigger, TriggerCalls
from deisa.ray.types import DeisaArray, WindowSpec, window_spec

logger = logging.getLogger("deisa.ray")

Callback = Callable[..., Any]
Condition = Callable[..., Any]
ExceptionHandler = Callable[[Exception], Any]

END_RUN = (
    AssertionError,
    TimeoutError,
)  # whatever `on_error` says: later results would be wrong, or wait as long


@dataclass(frozen=True, slots=True)
class Registration:
    """A callback, and when it runs.

    Attributes
    ----------
    binding : Binding
        The callback, and how it takes its windows.
    windows : tuple of WindowSpec
    exception_handler : callable or None
        None where `Settings.on_error`, and the kind of the exception, decide.
    when : {"AND", "OR"}
    trigger : Trigger or None
        None where it runs at every timestep.
    """

    binding: Binding
    windows: tuple[WindowSpec, ...]
    exception_handler: ExceptionHandler | None
    when: When
    trigger: Trigger | None = None

    @classmethod
    def of(
        cls,
        callback: Callback,
        windows: Sequence[WindowSpec],
        exception_handler: ExceptionHandler | None,
        when: When,
        trigger: Condition | None = None,
        following: int = 0,
    ) -> Registration:
        """Check whether a callback and its trigger can be called on windows, and its handler on an exception.

        Raises
        ------
        RegistrationError, WindowError
        """
        check_runs(callback, "callback")
        if when not in ("AND", "OR"):
            raise RegistrationError(f"when must be 'AND' or 'OR', got {when!r}")
        names = [spec.name for spec in windows]
        if len(set(names)) < len(names):
            raise WindowError(f"two windows of one callback name the same array: {names}")
        if exception_handler is not None:
            check_runs(exception_handler, "exception_handler")
            check_takes_one(exception_handler)
        binding = Binding.of(callback, names, "callback")
        condition = Trigger.of(trigger, following, names, binding.name)
        return cls(binding, tuple(windows), exception_handler, when, condition)

    @property
    def name(self) -> str:
        """The function's name."""
        return self.binding.name

    @property
    def callback(self) -> Callback:
        """The function itself."""
        return self.binding.function

    def subscription(self, stream_of: Callable[[WindowSpec], Stream]) -> Subscription:
        """What the timeline needs to know; `stream_of` finds what a window asks for.

        Raises
        ------
        WindowError
            Naming the callback.
        """
        try:
            return Subscription(tuple((stream_of(w).name, w.window_size) for w in self.windows), self.when)
        except WindowError as error:
            error.add_note(f"asked for by callback {self.name!r}")
            raise

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

    def __contains__(self, registration: object) -> bool:
        """Whether it is one of them: itself, since a callback may be equal to another, or say nothing of it."""
        return any(own is registration for own in self._all)

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

    def put_first(self, others: Iterable[Registration]) -> None:
        """Add callbacks that run before all others."""
        self._all[:0] = others

    def remove(self, callback: Callback) -> None:
        """Remove every registration of a function.

        Raises
        ------
        RegistrationError
            When there is none.
        """
        kept = [registration for registration in self._all if registration.callback != callback]
        if len(kept) == len(self._all):
            names = ", ".join(repr(registration.name) for registration in self._all) or "none"
            raise RegistrationError(
                f"callback {name_of(callback)!r} is not registered; registered are {names}"
            )
        self._all = kept

    def clear(self) -> None:
        """Let go of the callbacks, which may hold arrays."""
        self._all.clear()


@dataclass(slots=True)
class Calls:
    """Calls one callback, where its trigger says so, and counts."""

    registration: Registration
    ends_run: bool = False
    count: int = 0
    failures: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0
    trigger: TriggerCalls | None = None
    _seen: Counter[Any] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.registration.trigger is not None:
            self.trigger = TriggerCalls(self.registration.trigger)

    def resume(self, following: int) -> None:
        """Go on where another analytics has ended, of which so many timesteps were to follow a firing."""
        if self.trigger is not None:
            self.trigger.resume(following)

    @property
    def following(self) -> int:
        """At how many timesteps the callback runs whatever its trigger says."""
        return self.trigger.left if self.trigger is not None else 0

    def call(self, timestep: int, windows: list[list[DeisaArray]]) -> None:
        """Call the callback for a timestep, if its trigger lets it run; what they raise goes to the handler.

        Without a handler, it is logged or ends the run.
        """
        try:
            if self.trigger is None or self.trigger.lets_run(
                windows, lambda error: self._failed(error, timestep, trigger=True)
            ):
                self._call(timestep, windows)
        finally:
            windows.clear()  # an exception that is kept has this frame, too

    def _call(self, timestep: int, windows: list[list[DeisaArray]]) -> None:
        started = time.monotonic()
        self.count += 1
        try:
            self.registration.binding.call(windows)
        except Exception as error:
            self.failures += 1
            self._failed(error, timestep)
        finally:
            seconds = time.monotonic() - started
            self.total_s += seconds
            self.longest_s = max(self.longest_s, seconds)

    def _failed(self, error: Exception, timestep: int, *, trigger: bool = False) -> None:
        what = f"callback {self.registration.name!r}"
        if trigger and self.registration.trigger is not None:
            what = f"trigger {self.registration.trigger.condition.name!r} of {what}"
        error.add_note(f"in {what} at timestep {timestep}")
        self._handle(error, what, timestep)
        _let_go(error)

    def _handle(self, error: Exception, what: str, timestep: int) -> None:
        handler = self.registration.exception_handler
        if handler is not None:
            check_has_run(handler(error), name_of(handler))
        elif self.ends_run or isinstance(error, END_RUN):
            raise error
        else:
            self._log(error, what, timestep)

    def _log(self, error: Exception, what: str, timestep: int) -> None:
        """Log a failure with its traceback, and one that was seen before in a line."""
        lines = traceback.walk_tb(error.__traceback__)
        failure = type(error), tuple((frame.f_code.co_filename, line) for frame, line in lines)
        self._seen[failure] += 1
        seen = self._seen[failure]
        if seen == 1:
            logger.error("%s failed at timestep %d; the run goes on", what, timestep, exc_info=error)
        else:
            last_line = traceback.format_exception_only(error)[0].strip()
            logger.error(
                "%s failed again in the same place at timestep %d: %s (%d times so far)",
                what,
                timestep,
                last_line,
                seen,
            )

    @property
    def figures(self) -> CallbackFigures:
        """What has been counted."""
        trigger = self.trigger.figures if self.trigger is not None else None
        return CallbackFigures(
            self.registration.name, self.count, self.failures, self.total_s, self.longest_s, trigger
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
        alike = not inside if now is before else values_of(now) == values_of(before)
        return same_windows and alike and now.__name__ != "<lambda>" and _same_trigger(new, old)
    if inside or now.__name__ == "<lambda>":
        return False
    if code.co_filename != earlier.co_filename or code.co_firstlineno == earlier.co_firstlineno:
        return True
    return code.co_filename.startswith("<") and same_windows  # text that is no file


def _same_trigger(new: Registration, old: Registration) -> bool:
    if new.trigger is None or old.trigger is None:
        return new.trigger is old.trigger
    return new.trigger.is_same(old.trigger)


def _let_go(error: BaseException) -> None:
    """Let go of the windows that an exception holds, lest a handler that keeps it stall the simulation."""
    for link in cause_chain(error):
        traceback.clear_frames(link.__traceback__)
        if isinstance(link, AttributeError):
            link.obj = None
