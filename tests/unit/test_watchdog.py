"""A callback that runs for long is named, with the place it is at."""

from __future__ import annotations

import logging
import time

import pytest

from deisa.ray._engine.watchdog import Watchdog


def loiter(seconds: float) -> None:
    time.sleep(seconds)


def test_a_long_call_is_named_again_and_again(caplog: pytest.LogCaptureFixture) -> None:
    watchdog = Watchdog(0.1)
    with caplog.at_level(logging.WARNING), watchdog.on_guard():
        with watchdog.watching("summary", 7):
            loiter(0.5)
        time.sleep(0.3)
    texts = [record.getMessage() for record in caplog.records]
    assert 2 <= len(texts) <= 3  # after 0.1, 0.2 and 0.4 s
    assert "callback 'summary' has been running for 0 s at timestep 7, since " in texts[0]
    assert "in loiter" in texts[0] and "time.sleep(seconds)" in texts[0]


def test_short_calls_are_not(caplog: pytest.LogCaptureFixture) -> None:
    watchdog = Watchdog(0.2)
    with caplog.at_level(logging.WARNING), watchdog.on_guard():
        for timestep in range(10):
            with watchdog.watching("summary", timestep):
                loiter(0.05)
    assert not caplog.records
