"""Triggers: a condition that is asked first, and the callback that runs only where it is true.

A callback with a trigger runs at each timestep at which the condition is true, and at the `following` ones after it::

    timestep              0   1   2   3   4   5   6   7
    condition             -   -  true -  true -   -   -
    following=2: runs             2   3   4   5   6
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from types import FunctionType
from typing import Any

import dask

from deisa.ray.errors import RegistrationError, TriggerError
from deisa.ray.functions import Binding, name_of, values_of
from deisa.ray.report import TriggerFigures
from deisa.ray.types import DeisaArray


@dataclass(frozen=True, slots=True)
class Trigger:
    """A condition on the windows of a callback.

    Attributes
    ----------
    condition : Binding
    following : int
        At how many timesteps the callback also runs after one at which the condition was true.
    """

    condition: Binding
    following: int = 0

    @classmethod
    def of(cls, condition: Any, following: Any, arrays: Sequence[str], callback: str) -> Trigger | None:
        """Check what was given as ``trigger=`` and ``following=``; None where that is no trigger.

        Raises
        ------
        RegistrationError
        """
        try:
            count = operator.index(following)
        except TypeError as exc:
            raise RegistrationError(
                f"callback {callback!r}: following must be an integer, got {following!r}"
            ) from exc
        if count < 0:
            raise RegistrationError(f"callback {callback!r}: following is {count}; it must be at least 0")
        if condition is not None:
            return cls(Binding.of(condition, arrays, f"callback {callback!r}: trigger"), count)
        if count:
            raise RegistrationError(
                f"callback {callback!r}: following={count} says how many timesteps follow one at which a trigger "
                "fires; give the trigger, too, as in trigger=lambda w: w[-1].max() > 10"
            )
        return None

    def evaluate(self, windows: Sequence[Sequence[DeisaArray]]) -> bool:
        """Ask the condition.

        Raises
        ------
        TriggerError
        """
        return truth_of(self.condition.call(windows), self.condition.name)

    def is_same(self, other: Trigger) -> bool:
        """Whether two triggers are made by the same code of the same values, or by an edited version of that code."""
        if self == other:
            return True
        now, before = self.condition.function, other.condition.function
        if not isinstance(now, FunctionType) or not isinstance(before, FunctionType):
            return False
        if (now.__module__, now.__qualname__) != (before.__module__, before.__qualname__):
            return False
        code, earlier = now.__code__, before.__code__
        if code.co_filename != earlier.co_filename:  # of a notebook's cell, which has run again
            return True
        return self.following == other.following and code == earlier and values_of(now) == values_of(before)


@dataclass(slots=True)
class TriggerCalls:
    """Asks one trigger and counts.

    Attributes
    ----------
    left : int
        Timesteps that still follow one at which the trigger has fired.
    """

    trigger: Trigger
    left: int = 0
    evaluated: int = 0
    fired: int = 0
    failures: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0

    def resume(self, left: int) -> None:
        """Go on where another analytics has ended."""
        self.left = max(0, min(left, self.trigger.following))

    def lets_run(self, windows: Sequence[Sequence[DeisaArray]], failed: Callable[[Exception], None]) -> bool:
        """Whether the callback runs now; what the trigger raises goes to `failed`."""
        runs, self.left = self.left > 0, max(0, self.left - 1)
        started = time.monotonic()
        self.evaluated += 1
        try:
            if self.trigger.evaluate(windows):
                self.fired += 1
                runs, self.left = True, self.trigger.following
        except Exception as error:
            self.failures += 1
            failed(error)
        finally:
            seconds = time.monotonic() - started
            self.total_s += seconds
            self.longest_s = max(self.longest_s, seconds)
        return runs

    @property
    def figures(self) -> TriggerFigures:
        """What has been counted."""
        return TriggerFigures(
            self.trigger.condition.name,
            self.evaluated,
            self.fired,
            self.failures,
            self.total_s,
            self.longest_s,
        )


def truth_of(returned: Any, name: str) -> bool:
    """Return whether what a trigger has returned is true; what is lazy is computed for that, in one go.

    Parameters
    ----------
    returned : object
        A bool, a number, an array with one element, or anything else that says by itself whether it is true.
    name : str
        The trigger.

    Raises
    ------
    TriggerError
    """
    _check_is_one(returned, name)
    if dask.is_dask_collection(returned):
        (returned,) = dask.compute(returned)
        _check_is_one(returned, name)
    _check_has_truth(returned, name)
    try:
        if returned != returned:
            raise TriggerError(
                f"trigger {name!r} returned NaN, which is neither true nor false; compare it, as in "
                "w[-1].max() > 10: a comparison with NaN is false"
            )
        return bool(returned)
    except TriggerError:
        raise
    except (TypeError, ValueError) as exc:
        raise TriggerError(
            f"trigger {name!r} returned {_kind(returned)}, of which Python cannot say whether it is true ({exc}); "
            "return a comparison of one number, and of many .any() or .all()"
        ) from exc


def _check_is_one(returned: Any, name: str) -> None:
    """Check that something is not a whole array, as far as that is known without computing it."""
    shape = getattr(returned, "shape", ())
    if not isinstance(shape, tuple) or not all(isinstance(length, Real) for length in shape):
        return
    size = math.prod(shape)
    if size != 1 and size == size:  # it is NaN where chunks have unknown sizes
        raise TriggerError(
            f"trigger {name!r} returned an array of shape {shape}, which has {size} elements and not one; use .any() "
            "or .all()"
        )


def _check_has_truth(returned: Any, name: str) -> None:
    """Check that something says by itself whether it is true: anything else is true because it is there."""
    if returned is None:
        raise TriggerError(
            f"trigger {name!r} returned None; it must return whether the callback is to run: is a return missing?"
        )
    if not isinstance(returned, Mapping) and hasattr(type(returned), "__bool__"):
        return
    if hasattr(type(returned), "__len__"):
        why = "which is true unless it is empty, whatever is in it; use any(...) or all(...)"
    else:
        why = "which is always true; return a bool, a comparison of a number, or an array with one element"
    missing = "; are the parentheses of a call missing?" if callable(returned) else ""
    raise TriggerError(f"trigger {name!r} returned {_kind(returned)}, {why}{missing}")


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}" if not callable(value) else f"the function {name_of(value)!r}"
