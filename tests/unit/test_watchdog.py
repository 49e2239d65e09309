"""A callback that runs for long is named, with the place it is at."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest

from deisa.ray._session import watchdog
from deisa.ray._session.watchdog import Watchdog
from tests.support.patience import wait_until

WARN_S = 0.1  # the watchdog looks four times as often


class Clock:
    """What the watchdog takes for the time: it stands still while nobody turns it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._looks = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        if threading.current_thread().name == "deisa-watchdog":
            self._looks += 1
        return self.now

    def turn_to(self, now: float) -> None:
        """Set the time, and wait until the watchdog has seen it and done what it had to."""
        self.now = now
        enough = self._looks + 4  # a warning takes two looks
        wait_until(lambda: self._looks >= enough, "the watchdog has looked at the clock")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


def test_a_long_call_is_named_again_and_again(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    guard = Watchdog(WARN_S)
    with caplog.at_level(logging.WARNING), guard.on_guard(), guard.watching("summary", 7):
        for named, after in enumerate((WARN_S, 2 * WARN_S, 4 * WARN_S)):
            clock.turn_to(after - 0.01)
            assert len(caplog.records) == named
            clock.turn_to(after + 0.01)
            assert len(caplog.records) == named + 1
    text = caplog.records[0].getMessage()
    assert text.startswith("callback 'summary' has been running for 0 s at timestep 7, since ")
    assert "in turn_to" in text and "wait_until(lambda: self._looks >= enough" in text


def test_short_calls_are_not(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """However long they take together, and whatever lies between them."""
    guard = Watchdog(WARN_S)
    with caplog.at_level(logging.WARNING), guard.on_guard():
        for timestep in range(3):
            with guard.watching("summary", timestep):
                clock.turn_to(clock.now + 0.9 * WARN_S)
            clock.now += 10 * WARN_S
    assert not caplog.records
