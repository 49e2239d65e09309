"""Whether the analytics is there, and what that means for those who come later."""

from __future__ import annotations

import pytest

from deisa.ray._state.presence import (
    DRIVER_QUIET_S,
    HOLD_S,
    QUIET_HOLD_S,
    Presence,
    in_use,
    is_certain,
    judge_presence,
)


def presence(*, ends_alone: bool = True) -> Presence:
    return Presence("first", "pid 1 on host h", 100.0, ends_alone=ends_alone)


def test_a_connection_is_certain() -> None:
    there = presence()
    there.connected = True
    assert there.state(1000.0) == ("here", 0.0)
    there.connected = False
    assert there.leave("it has died", 1000.0)
    assert not there.leave("again", 1001.0)
    assert there.state(1003.0) == ("gone", 3.0)
    assert there.reason == "it has died"


def test_silence_decides_after_a_while() -> None:
    there = presence()
    assert there.state(100.0 + DRIVER_QUIET_S) == ("quiet", DRIVER_QUIET_S)
    assert not there.fall_silent("silent", 100.0 + DRIVER_QUIET_S)
    assert there.fall_silent("silent", 101.0 + DRIVER_QUIET_S)
    assert there.state(107.0) == ("quiet", 7.0)
    assert there.begin_poll() and there.reason == ""
    there.end_poll("first", 108.0)
    assert there.quiet_s(109.0) == 1.0


def test_one_that_asks_is_there() -> None:
    there = presence()
    assert not there.begin_poll()
    assert there.quiet_s(1000.0) == 0.0


def test_one_in_the_same_process_is_always_there() -> None:
    there = presence(ends_alone=False)
    assert there.state(1000.0) == ("here", 0.0)
    assert not there.fall_silent("silent", 1000.0)


def test_another_one_takes_over() -> None:
    there = presence()
    assert not there.follow("second", "pid 2", 101.0)
    there.leave("it has died", 102.0)
    assert there.follow("third", "pid 3", 103.0)
    assert (there.driver_id, there.holder, there.reason) == ("third", "pid 3", "")
    there.begin_poll()
    there.end_poll("second", 110.0)  # an answer to one that has been given up is no sign of life
    assert there.quiet_s(111.0) == 8.0


@pytest.mark.parametrize(
    ("answers", "waited_s", "verdict"),
    [
        ([], 0.0, "gone"),
        ([("here", 0.0), ("quiet", 0.0)], 0.0, "unsure"),  # it may just have been killed
        ([("here", 0.0)], HOLD_S + 1, "here"),
        ([("gone", 0.5), ("quiet", 0.0)], 0.0, "unsure"),  # so may its ranks
        ([("gone", HOLD_S + 1), ("quiet", 0.0)], 0.0, "gone"),
        ([("gone", 0.5)], HOLD_S + 1, "gone"),
        ([("quiet", 1.0)], 0.0, "unsure"),
        ([("quiet", DRIVER_QUIET_S + 1), ("quiet", DRIVER_QUIET_S + 2)], 0.0, "gone"),
        ([("quiet", DRIVER_QUIET_S + 1), ("quiet", 0.0)], QUIET_HOLD_S + 1, "here"),
    ],
)
def test_what_all_agents_say(answers, waited_s: float, verdict: str) -> None:  # type: ignore[no-untyped-def]
    assert judge_presence(answers, waited_s) == verdict


def test_an_address_in_use() -> None:
    assert not is_certain("here", 0.0, HOLD_S, 60.0)
    assert is_certain("here", 0.0, HOLD_S + 1, 60.0)
    assert is_certain("quiet", 0.0, QUIET_HOLD_S + 1, 60.0)
    assert not is_certain("quiet", 7.0, 60.0, 60.0)  # it will end
    assert is_certain("gone", 70.0, 70.0, 60.0)  # it has not
    assert "by another analytics, pid 7 on host h; end it" in in_use("s", "here", "pid 7 on host h")
