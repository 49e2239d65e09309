"""Which callback runs for which timestep, and with which windows."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._state.arrivals import NodeArrivals
from deisa.ray._state.events import BridgeClosed, OwnersPassed, StepComplete, StepTorn
from deisa.ray._state.stats import BridgeStats
from deisa.ray._state.timeline import CompleteStep, Firing, Subscription, Timeline, When
from deisa.ray.errors import IncompleteTimestepError
from tests.unit.parts import number_counted


def on(*windows: tuple[str, int], when: When = "AND") -> Subscription:
    return Subscription(windows, when)


class OneNode:
    """A timeline of arrays that all live on one node."""

    def __init__(self, arrays: str, *subscriptions: Subscription, **every: int) -> None:
        self.timeline = Timeline({name: {"n": (0,)} for name in arrays}, subscriptions, every=every)

    def complete(self, array: str, timestep: int) -> None:
        assert self.timeline.step_complete("n", StepComplete(array, timestep, (0,))) == CompleteStep(
            array, timestep, {"n": (0,)}
        )

    def passed(self, arrays: str, timestep: int | None) -> None:
        for array in arrays:
            self.timeline.owners_passed("n", OwnersPassed(array, timestep))

    def firings(self) -> list[tuple[int, int, tuple[tuple[int, ...], ...]]]:
        found = []
        while (firing := self.timeline.next_firing()) is not None:
            found.append((firing.callback, firing.timestep, firing.windows))
        return found


# When.


def test_and_fires_at_once() -> None:
    node = OneNode("ab", on(("a", 1), ("b", 1)))
    node.complete("a", 0)
    assert node.firings() == []
    node.complete("b", 0)
    assert node.firings() == [(0, 0, ((0,), (0,)))]
    assert node.firings() == []


def test_and_runs_only_where_all_are_complete() -> None:
    node = OneNode("ab", on(("a", 2), ("b", 2)))
    for t in range(4):
        node.passed("ab", t)
        node.complete("a", t)
        if t % 3 == 0:
            node.complete("b", t)
    assert node.firings() == [(0, 0, ((0,), (0,))), (0, 3, ((2, 3), (0, 3)))]


def test_or_fires_at_once_when_all_are_complete() -> None:
    node = OneNode("ab", on(("a", 1), ("b", 1), when="OR"))
    node.complete("a", 0)
    node.complete("b", 0)
    assert node.firings() == [(0, 0, ((0,), (0,)))]


def test_or_waits_until_the_timestep_is_over_for_what_may_still_come() -> None:
    node = OneNode("ab", on(("a", 1), ("b", 1), when="OR"))
    node.complete("a", 0)
    node.complete("b", 0)
    node.firings()
    node.passed("ab", 1)
    node.complete("a", 1)
    assert node.firings() == []
    node.passed("ab", 2)
    assert node.firings() == [(0, 1, ((1,), (0,)))]


def test_or_over_and_over_without_the_rarer_array() -> None:
    node = OneNode("ab", on(("a", 1), ("b", 1), when="OR"))
    node.complete("a", 0)
    node.complete("b", 0)
    node.firings()
    for t in range(1, 6):
        node.passed("ab", t)
        assert node.firings() == ([(0, t - 1, ((t - 1,), (0,)))] if t > 1 else [])
        node.complete("a", t)
    node.passed("ab", None)
    assert node.firings() == [(0, 5, ((5,), (0,)))]


def test_or_starts_when_all_have_been_seen() -> None:
    node = OneNode("ab", on(("a", 2), ("b", 1), when="OR"))
    for t in range(3):
        node.passed("ab", t)
        node.complete("a", t)
    node.complete("b", 2)
    assert node.firings() == [(0, 2, ((1, 2), (2,)))]


def test_or_does_not_run_for_a_timestep_before_all_had_been_seen() -> None:
    node = OneNode("ab", on(("a", 1), ("b", 1), when="OR"))
    node.complete("a", 0)
    node.complete("a", 1)
    node.complete("b", 1)  # known before timestep 0 has been decided
    assert node.firings() == [(0, 1, ((1,), (1,)))]


def test_or_that_never_sees_one_of_its_arrays_never_runs() -> None:
    node = OneNode("ab", on(("a", 1), ("b", 1), when="OR"))
    node.complete("a", 0)
    node.passed("ab", None)
    assert node.firings() == []
    assert node.timeline.resolved_entirely


def test_or_of_one_array_needs_no_waiting() -> None:
    node = OneNode("a", on(("a", 1), when="OR"))
    node.complete("a", 4)
    assert node.firings() == [(0, 4, ((4,),))]


def test_closing_resolves_everything() -> None:
    node = OneNode("ab", on(("a", 1), ("b", 1), when="OR"))
    node.complete("b", 0)
    node.passed("ab", 1)
    node.complete("a", 1)
    assert not node.timeline.resolved_entirely
    node.passed("ab", None)
    assert not node.timeline.resolved_entirely  # one firing is left to take
    assert node.firings() == [(0, 1, ((1,), (0,)))]
    assert node.timeline.resolved_entirely


# Order, windows.


def test_by_timestep_then_by_registration() -> None:
    node = OneNode("ab", on(("b", 1)), on(("a", 1)), on(("a", 1), ("b", 1)))
    for t in range(2):
        node.complete("a", t)
        node.complete("b", t)
    assert [firing[:2] for firing in node.firings()] == [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]


def test_a_callback_that_is_not_ready_holds_up_no_other() -> None:
    node = OneNode("ab", on(("a", 1), ("b", 1)), on(("a", 1)))
    node.complete("a", 0)
    assert node.firings() == [(1, 0, ((0,),))]
    node.complete("b", 0)
    assert node.firings() == [(0, 0, ((0,), (0,)))]


def test_windows_hold_the_last_timesteps_that_were_sent() -> None:
    node = OneNode("a", on(("a", 3)))
    for t in (-5, 0, 10, 11):
        node.complete("a", t)
    assert [windows for _, _, windows in node.firings()] == [
        ((-5,),),
        ((-5, 0),),
        ((-5, 0, 10),),
        ((0, 10, 11),),
    ]


def test_a_late_firing_does_not_see_what_came_after_it() -> None:
    node = OneNode("a", on(("a", 2)))
    for t in range(3):
        node.complete("a", t)
    firing = node.timeline.next_firing()
    assert firing == Firing(0, 0, ((0,),))
    assert node.timeline.arrays_of(0) == ("a",)


def test_arrays_that_nobody_uses_are_counted() -> None:
    node = OneNode("ab", on(("a", 1)))
    node.complete("b", 0)
    node.complete("b", 3)
    assert node.timeline.timesteps_seen() == {"a": 0, "b": 2}
    assert node.timeline.forget() == [("b", 0), ("b", 3)]


# What is counted.


def test_a_timestep_is_delivered_when_something_fires_at_it() -> None:
    node = OneNode("ab", on(("a", 2), ("b", 1)), on(("b", 1)))
    for t in range(4):
        node.passed("ab", t)
        node.complete("a", t)
        assert node.firings() == []
    assert node.timeline.timesteps_delivered() == {"a": 0, "b": 0}
    node.complete("b", 3)
    assert node.firings() == [(0, 3, ((2, 3), (3,))), (1, 3, ((3,),))]
    assert node.timeline.timesteps_delivered() == {"a": 1, "b": 1}
    assert node.timeline.timesteps_seen() == {"a": 4, "b": 1}


def test_skipped_timesteps_leave_nothing_behind() -> None:
    node = OneNode("ab", on(("a", 1), ("b", 1)))
    node.passed("b", None)
    for t in range(100):
        node.complete("a", t)
        assert node.timeline.forget() == [("a", t)]
    assert node.timeline._arrays["a"].undelivered == set()


# Several nodes.


def test_a_step_is_complete_when_every_node_is() -> None:
    timeline = Timeline({"a": {"x": (0,), "y": (1, 2)}}, [on(("a", 1))])
    assert timeline.step_complete("y", StepComplete("a", 0, (4, 5))) is None
    assert timeline.waiting_for() == "'a' at timestep 0 from bridge 0"
    assert timeline.next_firing() is None
    assert timeline.step_complete("x", StepComplete("a", 0, (6,))) == CompleteStep(
        "a", 0, {"y": (4, 5), "x": (6,)}
    )
    assert timeline.waiting_for() == "the next timestep"
    assert timeline.next_firing() == Firing(0, 0, ((0,),))


def test_a_timestep_is_over_when_the_slowest_node_has_passed_it() -> None:
    timeline = Timeline({"a": {"x": (0,)}, "b": {"x": (0,), "y": (1,)}}, [on(("a", 1), ("b", 1), when="OR")])
    for node in "xy":
        timeline.step_complete(node, StepComplete("b", 0, (0,)))
    timeline.step_complete("x", StepComplete("a", 0, (0,)))
    assert timeline.next_firing() == Firing(0, 0, ((0,), (0,)))
    timeline.owners_passed("x", OwnersPassed("a", 1))
    timeline.owners_passed("x", OwnersPassed("b", 1))
    timeline.step_complete("x", StepComplete("a", 1, (0,)))
    timeline.owners_passed("x", OwnersPassed("b", 7))
    assert timeline.next_firing() is None
    timeline.owners_passed("y", OwnersPassed("b", 2))
    assert timeline.next_firing() == Firing(0, 1, ((1,), (0,)))


@pytest.mark.parametrize("passed", [3, None])
@pytest.mark.parametrize("news_first", ["passed", "complete"])
def test_a_node_that_skips_a_timestep_is_named(passed: int | None, news_first: str) -> None:
    timeline = Timeline({"a": {"x": (0, 4), "y": (1, 2)}}, [on(("a", 1))])
    news = [
        lambda: timeline.owners_passed("y", OwnersPassed("a", passed)),
        lambda: timeline.step_complete("x", StepComplete("a", 2, (0, 0))),
    ]
    if news_first == "complete":
        news.reverse()
    news[0]()
    with pytest.raises(IncompleteTimestepError, match="'a' at timestep 2: bridges 1 and 2 moved on"):
        news[1]()


def test_a_node_that_only_passes_up_to_a_timestep_does_not_skip_it() -> None:
    timeline = Timeline({"a": {"x": (0,), "y": (1,)}}, [on(("a", 1))])
    timeline.owners_passed("y", OwnersPassed("a", 2))
    timeline.step_complete("x", StepComplete("a", 2, (0,)))
    timeline.step_complete("y", StepComplete("a", 2, (0,)))
    assert timeline.next_firing() == Firing(0, 2, ((2,),))


def test_bridges_that_skip_what_their_neighbours_sent_are_named() -> None:
    node = OneNode("a", on(("a", 1)))
    error = node.timeline.step_torn(StepTorn("a", 8, (3, 5)))
    assert isinstance(error, IncompleteTimestepError)
    assert "array 'a' at timestep 8: bridges 3 and 5 moved on without sending it" in str(error)


# What is kept.


@pytest.mark.parametrize(("when", "kept"), [("AND", 2), ("OR", 3)])
def test_kept_when_nothing_is_pending(when: When, kept: int) -> None:
    node = OneNode("a", on(("a", 3), when=when), on(("a", 1)))
    alive = []
    for t in range(6):
        node.complete("a", t)
        node.firings()
        alive.append(("a", t))
        for step in node.timeline.forget():
            alive.remove(step)
        assert alive == [("a", s) for s in range(max(0, t + 1 - kept), t + 1)]


def test_a_firing_that_is_not_taken_yet_keeps_its_window() -> None:
    node = OneNode("a", on(("a", 2)))
    for t in range(4):
        node.complete("a", t)
    node.timeline.next_firing()
    assert node.timeline.forget() == []
    assert node.timeline.next_firing() == Firing(0, 1, ((0, 1),))
    assert node.timeline.forget() == [("a", 0)]
    assert [windows for _, _, windows in node.firings()] == [((1, 2),), ((2, 3),)]
    assert node.timeline.forget() == [("a", 1), ("a", 2)]


def test_an_array_that_waits_for_another_one_is_kept() -> None:
    timeline = Timeline({"a": {"n": (0,)}, "b": {"n": (1,)}}, [on(("a", 1), ("b", 1))])
    for t in range(3):
        timeline.step_complete("n", StepComplete("a", t, (0,)))
    assert timeline.forget() == []
    timeline.owners_passed("n", OwnersPassed("b", 2))
    assert timeline.forget() == [("a", 0), ("a", 1)]
    timeline.step_complete("n", StepComplete("b", 2, (0,)))
    assert timeline.next_firing() == Firing(0, 2, ((2,), (2,)))
    assert timeline.forget() == [("a", 2), ("b", 2)]


def test_or_keeps_the_old_window_of_an_array_that_is_ahead_of_another() -> None:
    timeline = Timeline({"a": {"n": (0,)}, "b": {"n": (1,)}}, [on(("a", 1), ("b", 1), when="OR")])
    for array in "ab":
        timeline.step_complete("n", StepComplete(array, 1, (0,)))
    assert timeline.next_firing() == Firing(0, 1, ((1,), (1,)))
    timeline.step_complete("n", StepComplete("b", 5, (1,)))
    assert timeline.forget() == []
    timeline.step_complete("n", StepComplete("a", 3, (1,)))
    assert timeline.next_firing() == Firing(0, 3, ((3,), (1,)))
    timeline.step_complete("n", StepComplete("a", 5, (0,)))
    assert timeline.next_firing() == Firing(0, 5, ((5,), (5,)))
    assert timeline.forget() == [("a", 1), ("a", 3), ("b", 1)]


# Any simulation at all, against a reference that knows the whole schedule.


@dataclass(frozen=True)
class Simulation:
    """Which bridges live where, who owns what, and at which timesteps each array is sent."""

    node_of: tuple[int, ...]
    owners: dict[str, tuple[int, ...]]
    sent: dict[str, tuple[int, ...]]
    subscriptions: tuple[Subscription, ...]

    def expected(self, number: int) -> list[tuple[int, tuple[tuple[int, ...], ...]]]:
        """All firings of one callback, from the rules alone."""
        windows, when = self.subscriptions[number].windows, self.subscriptions[number].when
        firings = []
        for t in sorted({t for name, _ in windows for t in self.sent[name]}):
            complete = [t in self.sent[name] for name, _ in windows]
            seen = [min(self.sent[name], default=t + 1) <= t for name, _ in windows]
            if all(complete) if when == "AND" else all(seen):
                firings.append(
                    (t, tuple(tuple([s for s in self.sent[n] if s <= t][-size:]) for n, size in windows))
                )
        return firings


@st.composite
def simulations(draw: st.DrawFn) -> Simulation:
    nodes = draw(st.integers(1, 3))
    node_of = draw(st.lists(st.integers(0, nodes - 1), min_size=1, max_size=4))
    bridges = st.lists(st.integers(0, len(node_of) - 1), min_size=1, unique=True)
    arrays = "abc"[: draw(st.integers(1, 3))]
    owners = {name: tuple(sorted(draw(bridges))) for name in arrays}
    steps = st.lists(st.integers(-1, 6), unique=True, max_size=6)
    sent = {name: tuple(sorted(draw(steps))) for name in arrays}
    windows = st.lists(
        st.tuples(st.sampled_from(arrays), st.integers(1, 3)), min_size=1, unique_by=lambda w: w[0]
    )
    subscription = st.builds(Subscription, windows.map(tuple), st.sampled_from(["AND", "OR"]))
    return Simulation(
        tuple(node_of), owners, sent, tuple(draw(st.lists(subscription, min_size=1, max_size=3)))
    )


class Replay:
    """Runs a simulation through the nodes into a timeline, in any order that `data` draws."""

    def __init__(self, simulation: Simulation, data: st.DataObject, skip: tuple[int, str, int] | None = None):
        self.simulation, self.data = simulation, data
        self.nodes = sorted({*simulation.node_of})
        self.arrivals = {node: NodeArrivals() for node in self.nodes}
        self.region: dict[tuple[int, str], int] = {}
        names = {name for s in simulation.subscriptions for name, _ in s.windows}
        for here, arrivals in self.arrivals.items():
            bridges = {
                bridge: {name: 1 for name, owners in simulation.owners.items() if bridge in owners}
                for bridge, node in enumerate(simulation.node_of)
                if node == here
            }
            for bridge in bridges:
                arrivals.join(bridge)
            parts = number_counted(bridges, simulation.owners)
            self.region |= {(p.bridge_id, name): p.region for name, own in parts.items() for p in own}
            wanted = {name: own for name, own in parts.items() if name in names}
            arrivals.subscribe(dict.fromkeys(names, 100), wanted, ["c"])
        self.timeline = Timeline(
            {
                name: {
                    str(node): tuple(b for b in simulation.owners[name] if simulation.node_of[b] == node)
                    for node in {simulation.node_of[b] for b in simulation.owners[name]}
                }
                for name in names
            },
            simulation.subscriptions,
        )
        self.todo = [
            deque(
                (t, name)
                for t in range(-1, 7)
                for name in data.draw(st.permutations(sorted(simulation.owners)))
                if bridge in simulation.owners[name]
                and t in simulation.sent[name]
                and (bridge, name, t) != skip
            )
            for bridge in range(len(simulation.node_of))
        ]
        self.names = names
        self.open = set(range(len(self.todo)))
        self.queues: dict[int, deque] = {node: deque() for node in self.nodes}  # type: ignore[type-arg]
        self.alive: dict[str, set[int]] = {name: set() for name in names}
        self.fired: list[list[tuple[int, tuple[tuple[int, ...], ...]]]] = [
            [] for _ in simulation.subscriptions
        ]

    def run(self) -> None:
        while self.open or any(self.queues.values()):
            choices = [("bridge", b) for b in sorted(self.open)]
            choices += [("node", n) for n in self.nodes if self.queues[n]]
            kind, number = self.data.draw(st.sampled_from(choices))
            if kind == "bridge":
                self.act(number)
            else:
                self.deliver(number)
            if self.data.draw(st.booleans()):
                self.take()
        self.take()

    def act(self, bridge: int) -> None:
        node = self.simulation.node_of[bridge]
        if self.todo[bridge]:
            t, name = self.todo[bridge].popleft()
            if name in self.names:
                self.arrivals[node].put(bridge, self.region[bridge, name], t)
            else:
                self.arrivals[node].advance(bridge, t)
        else:
            self.open.discard(bridge)
            self.arrivals[node].close(bridge, BridgeStats())
        self.queues[node].extend(self.arrivals[node].take_events())

    def deliver(self, node: int) -> None:
        event = self.queues[node].popleft()
        match event:
            case StepComplete():
                step = self.timeline.step_complete(str(node), event)
                if step is not None:
                    self.alive[step.array].add(step.timestep)
            case OwnersPassed():
                self.timeline.owners_passed(str(node), event)
            case StepTorn():
                raise self.timeline.step_torn(event)
            case _:
                assert isinstance(event, BridgeClosed)

    def take(self) -> None:
        """Take all firings that are ready; then nothing but what a later one may need is kept."""
        order = []
        while (firing := self.timeline.next_firing()) is not None:
            order.append((firing.timestep, firing.callback))
            self.fired[firing.callback].append((firing.timestep, firing.windows))
            for name, window in zip(self.timeline.arrays_of(firing.callback), firing.windows, strict=True):
                assert set(window) <= self.alive[name]
            for name, t in self.timeline.forget():
                self.alive[name].remove(t)
        assert order == sorted(order)
        for name, t in self.timeline.forget():
            self.alive[name].remove(t)


def bound(subscriptions: Sequence[Subscription], array: str) -> int:
    return max(size - (s.when == "AND") for s in subscriptions for name, size in s.windows if name == array)


@given(simulations(), st.data())
def test_every_firing_of_any_simulation(simulation: Simulation, data: st.DataObject) -> None:
    replay = Replay(simulation, data)
    replay.run()
    for number in range(len(simulation.subscriptions)):
        assert replay.fired[number] == simulation.expected(number)
    assert replay.timeline.resolved_entirely
    assert replay.timeline.timesteps_seen() == {n: len(simulation.sent[n]) for n in replay.names}
    fired: dict[str, set[int]] = {name: set() for name in replay.names}
    for subscription, firings in zip(simulation.subscriptions, replay.fired, strict=True):
        for name, _ in subscription.windows:
            fired[name] |= {timestep for timestep, _ in firings}
    assert replay.timeline.timesteps_delivered() == {
        name: len(fired[name] & set(simulation.sent[name])) for name in replay.names
    }
    for name, timesteps in replay.alive.items():
        assert len(timesteps) <= bound(simulation.subscriptions, name)


@given(simulations(), st.data())
def test_a_skipped_chunk_is_always_reported(simulation: Simulation, data: st.DataObject) -> None:
    wanted = {name for s in simulation.subscriptions for name, _ in s.windows}
    skippable = [
        (bridge, name, t)
        for name, owners in simulation.owners.items()
        for bridge in owners
        for t in simulation.sent[name]
        if name in wanted and len(owners) > 1
    ]
    if not skippable:
        return
    bridge, name, t = data.draw(st.sampled_from(skippable))
    replay = Replay(simulation, data, skip=(bridge, name, t))
    with pytest.raises(
        IncompleteTimestepError, match=rf"'{name}' at timestep {t}: bridges? [^;]*\b{bridge}\b"
    ):
        replay.run()
    for number in range(len(simulation.subscriptions)):
        expected = simulation.expected(number)
        assert replay.fired[number] == expected[: len(replay.fired[number])]


# Streams that leave timesteps out.


def test_with_and_a_timestep_that_one_of_them_leaves_out_is_dropped_at_once() -> None:
    node = OneNode("ab", on(("a", 1), ("b", 1)), b=4)
    node.complete("a", 3)
    assert node.timeline.forget() == [("a", 3)]
    node.complete("a", 4)
    assert node.timeline.forget() == []  # `b` may have it
    node.complete("b", 4)
    assert node.firings() == [(0, 4, ((4,), (4,)))]


def test_with_or_a_timestep_waits_for_the_last_one_that_the_other_takes() -> None:
    node = OneNode("ab", Subscription((("a", 1), ("b", 1)), "OR"), b=4)
    node.complete("a", 5)
    assert node.firings() == []  # `b` may still become complete at 4
    node.complete("b", 4)
    assert node.firings() == [(0, 5, ((5,), (4,)))]  # at 4 there was nothing of `a` yet
    node.complete("a", 7)
    assert node.firings() == [(0, 7, ((7,), (4,)))]
    node.complete("a", 8)
    assert node.firings() == []  # `b` may have it


def test_timesteps_that_a_stream_leaves_out_are_finished() -> None:
    node = OneNode("a", on(("a", 1)), a=4)
    node.passed("a", -2)  # nothing at -3 or before: so nothing before 0
    assert node.timeline.finished == -1
    node.complete("a", 0)
    assert node.timeline.finished == -1
    node.firings()
    assert node.timeline.finished == 3
    node.passed("a", 4)
    assert node.timeline.finished == 3
    node.passed("a", 5)
    assert node.timeline.finished == 7


# With which timesteps the analytics has finished.


def test_nothing_is_finished_before_the_first_timestep() -> None:
    assert OneNode("a", on(("a", 1))).timeline.finished == -math.inf


def test_a_timestep_is_finished_when_its_callback_has_fired() -> None:
    node = OneNode("a", on(("a", 1)))
    node.complete("a", 3)
    assert node.timeline.finished == 2
    node.firings()
    assert node.timeline.finished == 3
    node.passed("a", 6)
    assert node.timeline.finished == 5


def test_a_timestep_is_finished_when_all_callbacks_have_fired() -> None:
    node = OneNode("ab", on(("a", 1)), on(("b", 1)))
    node.complete("a", 3)
    node.complete("b", 3)
    node.timeline.next_firing()
    assert node.timeline.finished == 2
    node.timeline.next_firing()
    assert node.timeline.finished == 3


def test_with_and_one_array_that_skips_the_timestep_decides() -> None:
    node = OneNode("ab", on(("a", 1), ("b", 1)))
    node.complete("a", 3)
    assert node.timeline.finished == 2
    node.passed("b", 4)
    assert node.timeline.finished == 3
    node.passed("a", 9)
    assert node.timeline.finished == 8


def test_with_or_all_arrays_must_have_passed_it() -> None:
    node = OneNode("ab", on(("a", 1), ("b", 1), when="OR"))
    node.complete("a", 3)
    assert node.timeline.finished == -math.inf
    node.passed("b", 4)
    assert node.timeline.finished == 3
    node.complete("b", 5)
    node.complete("a", 5)
    node.firings()
    assert node.timeline.finished == 5


def test_all_is_finished_after_the_end() -> None:
    node = OneNode("a", on(("a", 1)))
    node.passed("a", None)
    assert node.timeline.finished == math.inf
