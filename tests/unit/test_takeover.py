"""What an analytics that takes over makes of what the agents still hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._state.arrivals import NodeArrivals
from deisa.ray._state.events import BridgeClosed, BridgeJoined, BridgeLost, Event, OwnersPassed, StepComplete
from deisa.ray._state.journal import Handled
from deisa.ray._state.stats import BridgeStats
from deisa.ray._state.takeover import (
    HeldArray,
    NodeSnapshot,
    Wreck,
    count_unhandled,
    find_wreck,
    resume,
)
from deisa.ray._state.timeline import Subscription, Timeline
from deisa.ray.errors import IncompleteTimestepError
from tests.unit.parts import number_counted, start_plan


def held(newest: float, *timesteps: int, passed: float | None = None) -> HeldArray:
    slots = {t: t % 3 for t in timesteps}
    return HeldArray(slots, newest, newest if passed is None else passed)


def test_what_all_nodes_hold_is_complete() -> None:
    found = resume({"a": {"x": held(5, 4, 5)}, "b": {"x": held(5, 4, 5)}})
    steps = [(node, e.timestep) for node, e in found.events if isinstance(e, StepComplete)]
    assert steps == [("a", 4), ("b", 4), ("a", 5), ("b", 5)]
    assert not found.releases


def test_what_one_node_has_given_back_is_given_back_by_all() -> None:
    found = resume({"a": {"x": held(5, 4, 5)}, "b": {"x": held(5, 5)}})
    assert found.releases == {"a": [("x", 4)]}
    assert [(n, e.timestep) for n, e in found.events if isinstance(e, StepComplete)] == [("a", 5), ("b", 5)]


def test_what_one_node_has_yet_to_get_stays() -> None:
    found = resume({"a": {"x": held(6, 5, 6)}, "b": {"x": held(5, 5)}})
    assert not found.releases
    assert [(n, e.timestep) for n, e in found.events if isinstance(e, StepComplete)][-1] == ("a", 6)


def test_an_array_of_one_node_alone() -> None:
    found = resume({"a": {"x": held(1, 1)}, "b": {"y": held(-math.inf)}})
    assert found.events == (("a", StepComplete("x", 1, 1)), ("a", OwnersPassed("x", 1)))


def test_a_timestep_that_a_node_skipped_is_still_torn() -> None:
    nodes = {"a": {"x": held(6, 6)}, "b": {"x": held(5, passed=8)}}
    timeline = Timeline({"x": {"a": (0,), "b": (1,)}}, [Subscription((("x", 1),), "AND")])
    with pytest.raises(IncompleteTimestepError, match="timestep 6: bridge 1 moved on"):
        for node, event in resume(nodes).events:
            if isinstance(event, StepComplete):
                timeline.step_complete(node, event)
            else:
                timeline.owners_passed(node, event)


def test_a_callback_does_not_run_again_for_what_it_has_handled() -> None:
    subscriptions = [Subscription((("x", 2),), "AND"), Subscription((("x", 1),), "AND")]
    timeline = Timeline({"x": {"a": (0,)}}, subscriptions, handled=[5, 3])
    for timestep in (3, 4, 5, 6):
        timeline.step_complete("a", StepComplete("x", timestep, 0))
    fired = []
    while (firing := timeline.next_firing()) is not None:
        fired.append((firing.timestep, firing.callback, *firing.windows))
    assert fired == [(4, 1, (4,)), (5, 1, (5,)), (6, 0, (5, 6)), (6, 1, (6,))]


def test_the_node_tells_of_bridges_that_have_gone_however_often_it_is_asked() -> None:
    arrivals = NodeArrivals()
    bridges = {bridge: {"x": 1} for bridge in range(2)}
    for bridge in bridges:
        arrivals.join(bridge)
    arrivals.subscribe({"x": 2}, number_counted(bridges, {"x": 2}), ["analytics"])
    arrivals.put(0, 0, 1)
    arrivals.put(1, 1, 1)
    arrivals.close(0, BridgeStats())
    arrivals.take_events()
    arrivals.lose(1, "gone")
    for _ in range(2):
        kinds = [type(event) for event in arrivals.lasting_events]
        assert kinds == [BridgeClosed, BridgeLost]
        arrivals.take_events()
    assert arrivals.held() == {"x": HeldArray({1: 0}, 1, 1)}


@st.composite
def run_of_two_nodes(draw: st.DrawFn) -> tuple[int, int, list[int], list[int], int, int]:
    """Timesteps complete on each node, and given back by each; and the window and what was handled."""
    window = draw(st.integers(1, 3))
    newest = [draw(st.integers(0, 8)) for _ in range(2)]
    common = min(newest)
    handled = draw(st.integers(-1, common))
    oldest_needed = max(0, handled + 1 - (window - 1))
    back = [draw(st.integers(0, oldest_needed)) for _ in range(2)]
    return window, handled, newest, back, common, oldest_needed


@given(run_of_two_nodes())
def test_nothing_is_lost_and_nothing_comes_twice(
    run: tuple[int, int, list[int], list[int], int, int],
) -> None:
    """Wherever the nodes were when the analytics died, callbacks go on with the first timestep not handled."""
    window, handled, newest, back, common, _ = run
    nodes = {name: {"x": held(n, *range(b, n + 1))} for name, n, b in zip("ab", newest, back, strict=True)}
    found = resume(nodes)
    timeline = Timeline({"x": {"a": (0,), "b": (1,)}}, [Subscription((("x", window),), "AND")], [handled])
    for node, event in found.events:
        if isinstance(event, StepComplete):
            timeline.step_complete(node, event)
        else:
            timeline.owners_passed(node, event)
    fired = []
    while (firing := timeline.next_firing()) is not None:
        fired.append((firing.timestep, list(firing.windows[0])))
    assert fired == [(t, list(range(max(0, t - window + 1), t + 1))) for t in range(handled + 1, common + 1)]
    kept = max(back)
    assert all(t < kept for steps in found.releases.values() for _, t in steps)


def snapshot(
    *since: Event, bridges: Sequence[int] = (0,), of: int = 1, started: bool = True, **held_arrays: HeldArray
) -> NodeSnapshot:
    joined = tuple(BridgeJoined(b, of, ()) for b in bridges)
    plan = start_plan({"x": 3}, {"x": None}, ("c",)) if started else None
    return NodeSnapshot("run:node", plan, joined, held_arrays, since, (Handled(4),))


def test_what_can_be_taken_over() -> None:
    assert find_wreck({}) is None
    assert find_wreck({"a": snapshot(started=False)}) is None
    assert find_wreck({"a": snapshot()}) is None
    assert find_wreck({"a": snapshot(BridgeClosed(0, BridgeStats()))}) is None


def test_a_lost_bridge_ends_it() -> None:
    losses = [BridgeLost(1, 7, "its process ended"), BridgeLost(0, None, "killed")]
    wreck = find_wreck({"a": snapshot(*losses, bridges=(0, 1), of=2, x=held(6, 3, 4, 5, 6))})
    assert wreck == Wreck("bridge 0 was lost before it sent anything (killed), and 1 more", 2)


def test_a_lost_agent_ends_it() -> None:
    wreck = find_wreck({"a": snapshot(bridges=(0,), of=3)})
    assert wreck is not None and wreck.why == "bridges 1 and 2 of 3 went with their agents"


def test_half_a_start_ends_it() -> None:
    wreck = find_wreck({"a": snapshot(bridges=(0,), of=2), "b": snapshot(bridges=(1,), of=2, started=False)})
    assert wreck is not None and wreck.why == "its analytics died while it started the session"


def test_a_timestep_is_dropped_once_and_only_if_all_nodes_have_it() -> None:
    nodes = {
        "a": snapshot(x=held(6, 4, 5, 6), y=held(5, 5)),
        "b": snapshot(x=held(7, 5, 6, 7)),
    }
    assert count_unhandled(nodes) == 2  # timesteps 5 and 6; 4 was handled, 7 is not complete
