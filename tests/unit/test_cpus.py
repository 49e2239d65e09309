"""What others leave of a node's CPUs, and whom a computation waits for; without Ray."""

from __future__ import annotations

import pytest

from deisa.ray._engine.cpus import LATE_S, CpuShares, CpuWait, Holder, describe_shortage
from deisa.ray.errors import NoFreeCpusError, WaitTimeoutError
from deisa.ray.report import SHOWN_NODE_ID

NODE = "0123456789abcdef"
ACTOR = Holder(NODE, 1.0, "actor 'solver' of class Solver (pid 7)")
TASK = Holder(NODE, 1.0, "task rank (pid 8)")


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def shares(clock: Clock) -> CpuShares:
    return CpuShares(clock)


def test_all_cpus_are_left_where_nobody_else_is(shares: CpuShares) -> None:
    assert shares.remaining(NODE, 8) == 8
    shares.look({NODE: 8}, {NODE: 8.0})
    assert shares.remaining(NODE, 8) == 8


@pytest.mark.parametrize(("available", "remaining"), [(7.0, 7), (6.5, 6), (0.5, 1), (0.0, 1)])
def test_what_others_hold_is_left_to_them(shares: CpuShares, available: float, remaining: int) -> None:
    shares.look({NODE: 8}, {NODE: available})
    assert shares.remaining(NODE, 8) == remaining


def test_what_our_own_bundles_hold_is_not_for_others(shares: CpuShares, clock: Clock) -> None:
    for _ in range(3):
        shares.took(NODE)
    shares.look({NODE: 8}, {NODE: 5.0})
    assert shares.remaining(NODE, 8) == 8
    for _ in range(3):
        shares.gave_back(NODE)
    shares.look({NODE: 8}, {NODE: 5.0})  # Ray has not heard of it
    assert shares.remaining(NODE, 8) == 8
    clock.now += LATE_S
    shares.look({NODE: 8}, {NODE: 5.0})  # so it is somebody else
    assert shares.remaining(NODE, 8) == 5


def test_what_is_known_of_others_lasts_while_ours_come_and_go(shares: CpuShares) -> None:
    shares.look({NODE: 8}, {NODE: 6.0})
    shares.took(NODE)
    shares.look({NODE: 8}, {NODE: 6.0})  # ours has not started, or one of theirs has ended
    assert shares.remaining(NODE, 8) == 6
    shares.look({NODE: 8}, {NODE: 8.0})
    assert shares.remaining(NODE, 8) == 8


def test_ray_is_asked_now_and_then(shares: CpuShares, clock: Clock) -> None:
    assert not shares.fresh
    shares.look({}, {})
    assert shares.fresh
    clock.now += 10
    assert not shares.fresh


def test_a_computation_that_runs_is_not_short_of_cpus(shares: CpuShares) -> None:
    """One CPU is ours, the other somebody else's: none is available, and nothing is wrong."""
    shares.took(NODE)
    shares.look({NODE: 2}, {NODE: 0.0})
    exhausted = shares.exhausted({NODE: 2})
    assert exhausted == {NODE: 2}
    assert shares.held_by_others(exhausted, [ACTOR]) == {}
    assert shares.held_by_others(exhausted, [ACTOR, TASK]) == {NODE: 2}


def test_a_node_without_our_bundles_or_without_cpus_does_not_count(shares: CpuShares) -> None:
    shares.took("other")
    shares.look({NODE: 2, "other": 0}, {NODE: 0.0, "other": 0.0})
    assert shares.exhausted({NODE: 2, "other": 0}) == {}


def test_holders_that_ray_has_no_name_for(shares: CpuShares) -> None:
    shares.look({NODE: 2}, {NODE: 0.0})
    shares.took(NODE)
    short = shares.held_by_others(shares.exhausted({NODE: 2}), [])
    assert describe_shortage(short, []) == (
        f"all 2 CPUs of node {NODE[:SHOWN_NODE_ID]} are held by work that Ray has no name for"
    )


def test_a_shortage_names_who_holds_what() -> None:
    assert describe_shortage({NODE: 2}, [ACTOR, TASK, Holder("other", 1.0, "x")]) == (
        f"all 2 CPUs of node {NODE[:SHOWN_NODE_ID]} are held by actor 'solver' of class Solver (pid 7), 1 CPU; "
        "task rank (pid 8), 1 CPU"
    )
    many = describe_shortage({NODE: 1}, [Holder(NODE, 0.1, f"task {n}") for n in range(10)])
    assert many.startswith(f"the only CPU of node {NODE[:SHOWN_NODE_ID]} is held by task 0, 0.1 CPU; ")
    assert many.endswith("task 7, 0.1 CPU and 2 more")


def test_the_wait_for_a_cpu_ends(clock: Clock) -> None:
    wait = CpuWait(10.0, clock)
    clock.now += 9
    assert "task rank (pid 8)" in wait.check({NODE: 1}, [TASK])
    clock.now += 1
    with pytest.raises(NoFreeCpusError) as caught:
        wait.check({NODE: 1}, [TASK])
    assert isinstance(caught.value, WaitTimeoutError)
    assert str(caught.value).startswith(
        "no CPU for a computation within 10 s (DEISA_RAY_CPU_TIMEOUT_S sets how long): the only CPU of node"
    )


def test_a_computation_that_runs_may_take_long(clock: Clock) -> None:
    wait = CpuWait(10.0, clock)
    clock.now += 1000
    assert wait.check({}, []) == ""
    clock.now += 9
    assert wait.check({NODE: 1}, [TASK])
