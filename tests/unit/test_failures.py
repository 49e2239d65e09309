"""Exceptions that pickle cannot carry as they are arrive all the same."""

from __future__ import annotations

import pickle
import threading
from typing import Any

import pytest

from deisa.ray._graph.failures import MOST_TRACE, Failure
from deisa.ray.errors import TaskError


class TwoArgumentsError(ValueError):
    def __init__(self, name: str, value: int) -> None:
        super().__init__(f"{name}={value}")
        self.name, self.value = name, value


class KeywordsError(Exception):
    def __init__(self, *, code: int) -> None:
        super().__init__(code)
        self.code = code

    def __str__(self) -> str:
        return f"code {self.code}"


class BadTextError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def carried(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as raised:
        failure: Failure = pickle.loads(pickle.dumps(Failure.of(raised)))
    return failure.error("somewhere")


def local_class() -> BaseException:
    class LocalError(Exception):
        pass

    return LocalError("local", 1)


def with_lock() -> BaseException:
    error = OSError(2, "gone", "/file")
    error.lock = threading.Lock()  # type: ignore[attr-defined]
    error.code = 5  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "attributes"),
    [
        (ValueError("plain"), {}),
        (TwoArgumentsError("x", 3), {"name": "x", "value": 3}),
        (KeywordsError(code=4), {"code": 4}),
        (local_class(), {}),
        (with_lock(), {"code": 5, "errno": 2, "filename": "/file"}),
        (SystemExit(2), {"code": 2}),
        (ExceptionGroup("several", [ValueError("one"), KeyError("two")]), {"message": "several"}),
        (ValueError(threading.Lock()), {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_type_text_and_attributes(error: BaseException, attributes: dict[str, Any]) -> None:
    error.add_note("a note")
    found = carried(error)
    assert type(found).__qualname__ == type(error).__qualname__
    assert str(found) == str(error)
    assert found.__notes__[0] == "a note"
    assert found.__notes__[1].startswith("raised by a task somewhere:\n")
    assert "Traceback (most recent call last)" in found.__notes__[1]
    assert {name: getattr(found, name) for name in attributes} == attributes


def test_an_exception_without_a_text() -> None:
    found = carried(BadTextError())
    assert isinstance(found, TaskError)
    assert "BadTextError" in str(found)


def test_causes_stand_in_the_traceback_and_long_ones_are_cut() -> None:
    try:
        raise KeyError("first")
    except KeyError as cause:
        error = ValueError("y" * 3 * MOST_TRACE)
        error.__cause__ = cause
    (note,) = carried(error).__notes__
    assert "KeyError: 'first'" in note
    assert len(note) < 2 * MOST_TRACE
