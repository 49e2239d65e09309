"""Exceptions of tasks on their way from a worker process to the analytics.

An exception that pickle cannot carry as it is (its ``__init__`` takes other arguments than ``args``, one of its
attributes is a lock, its class was defined inside a function) is taken apart: class, arguments and attributes
travel for themselves, and what cannot travel is left out. The text always arrives.
"""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from typing import Any

import cloudpickle

from deisa.ray.errors import TaskError

MOST_TRACE = 20_000  # characters


@dataclass(frozen=True, slots=True)
class Failure:
    """What a task has raised, in place of the values of its bundle.

    Attributes
    ----------
    packed : bytes
        Unpickles to the exception.
    trace : str
        Its traceback, with those of its causes, as Python prints it.
    """

    packed: bytes
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Take down an exception that is being handled."""
        trace = "".join(traceback.format_exception(error)).rstrip()
        if len(trace) > MOST_TRACE:
            trace = f"{trace[: MOST_TRACE // 2]}\n...\n{trace[-MOST_TRACE // 2 :]}"
        return cls(_packed(error), trace)

    def error(self, where: str) -> BaseException:
        """Return the exception, with its traceback `where` it was raised as a note."""
        try:
            error: BaseException = pickle.loads(self.packed)
        except Exception as exc:  # whatever its class does here that it did not do there
            last = self.trace.rpartition("\n")[2]
            error = TaskError(f"{last} (the exception itself cannot be rebuilt in the analytics: {exc!r})")
        error.add_note(f"raised by a task {where}:\n{self.trace}")
        return error


def _packed(error: BaseException) -> bytes:
    for candidate in (error, _Parts(error)):
        try:
            packed = cloudpickle.dumps(candidate, protocol=5)
            rebuilt = pickle.loads(packed)
            if type(rebuilt).__qualname__ == type(error).__qualname__ and str(rebuilt) == str(error):
                return packed
        except Exception:  # a foreign __reduce__ or __str__ may raise anything
            continue
    return cloudpickle.dumps(TaskError(_line(error)), protocol=5)


def _line(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception_only(error)).strip()
    except Exception:  # its __str__ raises
        return type(error).__qualname__


class _Parts:
    """Pickles as class, arguments and attributes, as far as each of them can be pickled."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[Any, ...]:
        error = self._error
        given: tuple[Any, ...] = error.__reduce__()[1]  # type: ignore[assignment]  # an OSError has more than `args`
        arguments = tuple(arg if _can_travel(arg) else repr(arg) for arg in given)
        state = {name: value for name, value in vars(error).items() if _can_travel(value)}
        return _from_parts, (type(error), arguments, state)


def _from_parts(
    kind: type[BaseException], arguments: tuple[Any, ...], state: dict[str, Any]
) -> BaseException:
    error = kind.__new__(kind, *arguments)  # its __init__ may want others
    vars(error).update(state)
    return error


def _can_travel(value: Any) -> bool:
    try:
        pickle.loads(cloudpickle.dumps(value, protocol=5))
    except Exception:  # a foreign __reduce__ may raise anything
        return False
    return True
