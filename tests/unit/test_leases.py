"""Leases are given back when the last reference goes, wherever that happens."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence

import pytest

from deisa.ray._session.leases import Leases, Step
from tests.support.patience import PATIENCE_S


@pytest.fixture
def released() -> list[Step]:
    return []


@pytest.fixture
def leases(released: list[Step]) -> Iterator[Leases]:
    def release(steps: Sequence[Step]) -> None:
        released.extend(steps)

    leases = Leases(release)
    yield leases
    leases.stop()


def test_a_step_is_released_once_nobody_holds_it(leases: Leases, released: list[Step]) -> None:
    first, second = leases.grant("a", 1), leases.grant("a", 2)
    also_first = first
    del first
    assert leases.live() == {("a", 1), ("a", 2)}
    del second
    while leases.live() != {("a", 1)}:
        leases.wait_gone(0.01)
    assert released == [("a", 2)]
    del also_first
    assert leases.wait_gone(PATIENCE_S)
    assert released == [("a", 2), ("a", 1)]


def test_a_lease_in_a_cycle_ends_with_the_cycle(leases: Leases, released: list[Step]) -> None:
    cycle = [leases.grant("a", 1)]
    cycle.append(cycle)  # type: ignore[arg-type]
    del cycle
    gc.collect()
    assert leases.wait_gone(PATIENCE_S)
    assert released == [("a", 1)]


def test_who_waits_is_woken_when_the_session_is_closed(leases: Leases) -> None:
    kept = leases.grant("a", 1)
    waiting = threading.Thread(target=leases.wait_gone)
    waiting.start()
    leases.stop()
    waiting.join(PATIENCE_S)
    assert not waiting.is_alive()
    del kept


def test_a_failing_release_does_not_end_the_thread() -> None:
    seen: list[Step] = []

    def release(steps: Sequence[Step]) -> None:
        seen.extend(steps)
        raise ConnectionError("the agent has gone")

    leases = Leases(release)
    for timestep in range(2):
        leases.grant("a", timestep)
        assert leases.wait_gone(PATIENCE_S)
    assert seen == [("a", 0), ("a", 1)]
    leases.stop()
