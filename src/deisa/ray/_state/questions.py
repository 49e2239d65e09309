"""Questions of steering: which keys, timesteps and waits make sense. A rank imports no more than this of steering."""

from __future__ import annotations

import operator
from typing import Any

from deisa.ray.errors import FeedbackError, FeedbackTypeError

MAX_KEY_BYTES = 255
UNFINISHED = -(2**63)  # in place of a timestep: the analytics has finished with none
FINISHED = 2**63 - 1  # with all


def check_key(key: Any, who: str) -> str:
    """Return a key as it is.

    Raises
    ------
    FeedbackTypeError, FeedbackError
    """
    if not isinstance(key, str):
        raise FeedbackTypeError(f"{who}: a key is a string, got {key!r:.60}")
    try:
        length = len(key.encode())
    except UnicodeEncodeError as exc:
        raise FeedbackError(f"{who}: key {key!r:.60} cannot be written in UTF-8") from exc
    if not 1 <= length <= MAX_KEY_BYTES or "\0" in key:
        raise FeedbackError(
            f"{who}: a key has 1 to {MAX_KEY_BYTES} bytes of UTF-8, none of them 0; got {key!r:.60} ({length} bytes)"
        )
    return key


def check_timestep(timestep: Any, who: str) -> int:
    """Return a timestep as an integer.

    Raises
    ------
    FeedbackTypeError, FeedbackError
    """
    try:
        step = None if isinstance(timestep, bool) else int(operator.index(timestep))
    except TypeError:
        step = None
    if step is None:
        raise FeedbackTypeError(
            f"{who}: timestep is an integer, the one for which the simulation asks; got {timestep!r:.60}"
        )
    if not UNFINISHED < step <= FINISHED:
        raise FeedbackError(f"{who}: timestep {step} exceeds 64 bits")
    return step


def check_wait(wait: Any, timestep: Any, who: str) -> float | None:
    """Return for how long to wait, in seconds, or None.

    Raises
    ------
    FeedbackTypeError, FeedbackError
    """
    if wait is None:
        return None
    if timestep is None:
        raise FeedbackError(f"{who}: wait= needs timestep=: without one, there is nothing to wait for")
    try:
        seconds = float(wait)
    except (TypeError, ValueError) as exc:
        raise FeedbackTypeError(f"{who}: wait is a number of seconds, got {wait!r:.60}") from exc
    if not seconds >= 0:
        raise FeedbackError(f"{who}: wait is {wait}; it must be a number of seconds, at least 0")
    return seconds
