"""Chunks and slots of one node."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from deisa.ray._state.arrivals import Grant, NodeArrivals
from deisa.ray._state.events import BridgeClosed, BridgeLost, OwnersPassed, StepComplete, StepTorn
from deisa.ray._state.stats import BridgeStats
from deisa.ray.errors import ProtocolError
from tests.unit.parts import number_counted


def node(
    *chunk_counts: dict[str, int], slots: dict[str, int], consumers: tuple[str, ...] = ("c",)
) -> NodeArrivals:
    return started(dict(enumerate(chunk_counts)), slots, consumers)


def started(
    bridges: dict[int, dict[str, int]], slots: dict[str, int], consumers: tuple[str, ...] = ("c",)
) -> NodeArrivals:
    arrivals = NodeArrivals()
    for bridge_id in bridges:
        arrivals.join(bridge_id)
    arrivals.subscribe(slots, number_counted(bridges, slots), consumers)
    return arrivals


def test_what_was_numbered_at_the_start_arrives() -> None:
    arrivals = started({7: {"a": 2, "b": 1}, 3: {"a": 1, "c": 0}}, {"a": 2})
    for bridge_id, region in ((7, 0), (3, 3), (7, 1)):
        arrivals.put(bridge_id, region, 0)
    assert StepComplete("a", 0, 0) in arrivals.take_events()
    assert arrivals.regions_of(3) == {"a": (3,)}
    assert arrivals.array_of(3) == "a"


def test_a_step_is_complete_when_every_chunk_is_in() -> None:
    arrivals = node({"a": 2}, {"a": 1}, slots={"a": 3})
    arrivals.put(0, 0, 5)
    arrivals.put(1, 2, 5)
    assert arrivals.take_events() == [
        OwnersPassed("a", 5)
    ]  # a bridge is at another timestep, and has not all chunks in
    arrivals.put(0, 1, 5)
    assert arrivals.take_events() == [StepComplete("a", 5, 0)]
    assert arrivals.take_events() == []


def test_a_bridge_owes_what_others_have_handed_over() -> None:
    arrivals = node({"a": 2, "b": 1}, {"a": 1}, {"b": 1, "unasked": 1}, slots={"a": 3, "b": 3})
    assert not any(map(arrivals.owes, range(3)))
    arrivals.put(1, 3, 0)
    assert list(map(arrivals.owes, range(3))) == [True, False, False]
    arrivals.put(0, 0, 0)
    assert list(map(arrivals.owes, range(3))) == [True, False, False]  # one of its two chunks
    arrivals.put(0, 1, 0)
    assert not any(map(arrivals.owes, range(3)))
    arrivals.put(0, 2, 1)
    assert list(map(arrivals.owes, range(3))) == [False, False, True]


def test_bridges_of_another_array_do_not_hold_an_array_back() -> None:
    arrivals = node({"a": 1}, {"b": 1}, slots={"a": 1, "b": 1})
    arrivals.put(0, 0, 3)
    assert arrivals.take_events() == [StepComplete("a", 3, 0)]


def test_a_complete_timestep_says_how_far_its_owners_are() -> None:
    arrivals = node({"a": 1}, {"a": 1}, slots={"a": 3})
    for t in (0, 1):
        arrivals.put(0, 0, t)
        arrivals.put(1, 1, t)
        assert arrivals.take_events() == [StepComplete("a", t, t)]
    for bridge in (0, 1):
        arrivals.advance(bridge, 2)
    assert arrivals.take_events() == []  # nothing is known but that timestep 1, which is complete, is over
    for bridge in (0, 1):
        arrivals.advance(bridge, 3)
    assert arrivals.take_events() == [OwnersPassed("a", 3)]  # nothing has come for timestep 2
    assert arrivals.take_events() == []


def test_a_slot_comes_back_when_every_consumer_has_let_go() -> None:
    arrivals = node({"a": 1}, {"a": 1}, slots={"a": 1}, consumers=("one", "two"))
    arrivals.put(0, 0, 1)
    arrivals.put(1, 1, 1)
    assert arrivals.release("one", "a", 1) is None
    assert arrivals.must_wait(0, 0)
    with pytest.raises(ProtocolError, match="region 0 has no free slot"):
        arrivals.put(0, 0, 2)
    assert arrivals.release("two", "a", 1) == Grant(1, 0)
    assert not arrivals.must_wait(0, 0)
    arrivals.put(0, 0, 2)


def test_the_slot_released_first_has_the_next_sequence_number() -> None:
    arrivals = node({"a": 1}, slots={"a": 3})
    for t in range(3):
        arrivals.put(0, 0, t)
    assert arrivals.release("c", "a", 1) == Grant(3, 1)
    assert arrivals.release("c", "a", 0) == Grant(4, 0)
    arrivals.take_events()
    for t in (3, 4):
        arrivals.put(0, 0, t)
    complete = [event for event in arrivals.take_events() if isinstance(event, StepComplete)]
    assert complete == [StepComplete("a", 3, 1), StepComplete("a", 4, 0)]


def test_chunks_of_one_timestep_in_different_slots_are_never_whole() -> None:
    arrivals = node({"a": 1}, {"a": 1}, slots={"a": 3})
    arrivals.put(0, 0, 0)
    arrivals.put(0, 0, 1)
    arrivals.put(1, 1, 1)  # it skipped timestep 0
    assert arrivals.take_events() == [StepTorn("a", 0, (1,))]


def test_torn_step_names_those_who_skipped_it() -> None:
    arrivals = node({"a": 1}, {"a": 1}, {"a": 2}, slots={"a": 3})
    arrivals.put(1, 1, 4)
    arrivals.put(2, 2, 4)  # one of its two
    arrivals.advance(0, 5)
    arrivals.put(1, 1, 5)
    assert arrivals.take_events() == [OwnersPassed("a", 4)]
    arrivals.put(2, 2, 5)
    assert arrivals.take_events() == [StepTorn("a", 4, (0, 2)), OwnersPassed("a", 5)]


def test_closing_tears_what_is_unfinished() -> None:
    arrivals = node({"a": 1}, {"a": 1}, slots={"a": 2})
    arrivals.close(1, BridgeStats())
    arrivals.put(0, 0, 0)
    arrivals.close(0, BridgeStats(chunks=1))
    assert arrivals.take_events() == [
        BridgeClosed(1, BridgeStats()),
        StepTorn("a", 0, (1,)),
        BridgeClosed(0, BridgeStats(chunks=1)),
        OwnersPassed("a", None),
    ]


def test_a_lost_bridge_reports_its_last_timestep() -> None:
    arrivals = node({"a": 1}, {"a": 1}, slots={"a": 1})
    arrivals.put(0, 0, -3)
    arrivals.take_events()
    arrivals.lose(0, "gone")
    arrivals.lose(1, "gone too")
    assert arrivals.take_events() == [BridgeLost(0, -3, "gone"), BridgeLost(1, None, "gone too")]


@pytest.mark.parametrize(
    ("put", "message"),
    [
        ((0, 1, 5), "bridge 0 has no region 1 to send"),  # bridge 1's
        ((0, 99, 5), "bridge 0 has no region 99 to send"),
        ((2, 2, 5), "bridge 2 has no region 2 to send"),  # of an array that nobody asked for
        ((0, 0, 4), "bridge 0 went back from timestep 5 to 4"),
        ((0, 0, 5), "bridge 0 sent region 0 twice for timestep 5"),
    ],
)
@pytest.mark.parametrize("complete", [False, True], ids=["arriving", "complete"])
def test_a_broken_account_is_refused_and_changes_nothing(put: Any, message: str, complete: bool) -> None:
    arrivals = node({"a": 1}, {"a": 1}, {"unwanted": 1}, slots={"a": 2})
    arrivals.put(0, 0, 5)
    if complete:
        arrivals.put(1, 1, 5)
    arrivals.take_events()
    with pytest.raises(ProtocolError, match=message):
        arrivals.put(*put)
    assert arrivals.take_events() == []
    if not complete:
        arrivals.put(1, 1, 5)
        assert StepComplete("a", 5, 0) in arrivals.take_events()
    arrivals.release("c", "a", 5)
    arrivals.put(0, 0, 6)


def test_nothing_comes_after_closing() -> None:
    arrivals = node({"a": 1}, slots={"a": 2})
    arrivals.close(0, BridgeStats())
    arrivals.take_events()
    with pytest.raises(ProtocolError, match="bridge 0 went back"):
        arrivals.put(0, 0, 0)
    assert arrivals.take_events() == []


def test_what_chunks_have_overtaken_says_nothing_new() -> None:
    arrivals = node({"a": 1}, slots={"a": 3})
    arrivals.put(0, 0, 0)
    arrivals.put(0, 0, 1)
    arrivals.take_events()
    arrivals.advance(0, 0)
    assert arrivals.take_events() == []
    arrivals.put(0, 0, 2)


def test_waiting_for_another_bridges_slot_is_refused() -> None:
    arrivals = node({"a": 1, "unwanted": 1}, {"a": 1}, slots={"a": 1})
    for region in (1, 2, 3):
        with pytest.raises(ProtocolError, match=f"bridge 0 has no region {region} to wait for"):
            arrivals.must_wait(0, region)
    assert arrivals.take_events() == []


def test_a_bridge_owes_what_others_have_sent() -> None:
    arrivals = node({"a": 2}, {"a": 1, "b": 1}, slots={"a": 2, "b": 2})
    assert not arrivals.owes(0)
    arrivals.put(1, 3, 0)  # nobody else owns a chunk of `b`
    assert not arrivals.owes(0)
    arrivals.put(1, 2, 0)
    assert arrivals.owes(0) and not arrivals.owes(1)
    arrivals.put(0, 0, 0)
    assert arrivals.owes(0)
    arrivals.put(0, 1, 0)
    assert not arrivals.owes(0)


class Histories(RuleBasedStateMachine):
    """Any bridges that keep to the rules, one that does not, and a model of what the node must say."""

    steps = Bundle("steps")  # complete and not released

    @initialize(
        counts=st.lists(
            st.fixed_dictionaries({}, optional={"a": st.integers(0, 2), "b": st.integers(1, 2)}),
            min_size=1,
            max_size=3,
        ),
        slots=st.fixed_dictionaries({}, optional={"a": st.integers(1, 3), "b": st.integers(1, 3)}),
        consumers=st.integers(1, 2),
    )
    def start(self, counts: list[dict[str, int]], slots: dict[str, int], consumers: int) -> None:
        bridges = dict(enumerate(counts))
        everything = number_counted(bridges, {"a": None, "b": None})
        self.owner: dict[int, tuple[int, str]] = {
            part.region: (part.bridge_id, array) for array, parts in everything.items() for part in parts
        }
        self.slots = slots
        self.consumers = [f"c{i}" for i in range(consumers)]
        self.arrivals = started(bridges, slots, tuple(self.consumers))
        self.wanted = [r for r, (_, array) in self.owner.items() if array in slots]
        self.regions = {array: sorted(r for r in self.wanted if self.owner[r][1] == array) for array in slots}
        self.at: list[float] = [-math.inf] * len(counts)
        self.slot_of = {array: list(range(count)) for array, count in slots.items()}
        self.number = dict.fromkeys(self.wanted, 0)
        self.sent: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)
        self.held: dict[tuple[str, int], set[str]] = {}
        self.passed: dict[str, float] = dict.fromkeys(slots, -math.inf)
        self.newest: dict[str, float] = dict.fromkeys(slots, -math.inf)  # complete
        self.torn: set[tuple[str, int]] = set()

    def told(self, bridge: int | None = None, t: float | None = None) -> list[Any]:
        """Check the events of one action that brought `bridge` to `t`; returns those left over."""
        if bridge is not None and t is not None:
            self.at[bridge] = t
        expected: list[Any] = []
        for array, regions in self.regions.items():
            owners = {self.owner[r][0] for r in regions}
            if not owners or bridge not in owners:
                continue
            passed = min(self.at[b] for b in owners)
            if passed > self.passed[array]:
                self.passed[array] = passed
                for (name, step), sent in sorted(self.sent.items()):
                    torn = name == array and step < passed and len(sent) < len(regions)
                    if torn and (name, step) not in self.torn:
                        self.torn.add((name, step))
                        missing = {self.owner[r][0] for r in regions if r not in sent}
                        expected.append(StepTorn(array, step, tuple(sorted(missing))))
                if passed > self.newest[array] + 1:
                    expected.append(OwnersPassed(array, None if passed == math.inf else int(passed)))
        events = self.arrivals.take_events()
        for event in expected:
            assert event in events
            events.remove(event)
        assert not any(isinstance(event, StepTorn | OwnersPassed) for event in events)
        return events

    def sendable(self) -> list[int]:
        return [r for r in self.wanted if self.may_send(r) and self.at[self.owner[r][0]] < math.inf]

    def may_send(self, region: int) -> bool:
        return self.number[region] < len(self.slot_of[self.owner[region][1]])

    def next_step(self, data: st.DataObject, bridge: int) -> int:
        at = self.at[bridge]
        low = -2 if at == -math.inf else int(at)
        return data.draw(st.integers(low, low + 2), label="timestep")

    @precondition(lambda self: self.sendable())
    @rule(target=steps, data=st.data())
    def put(self, data: st.DataObject) -> Any:
        region = data.draw(st.sampled_from(self.sendable()), label="region")
        bridge, array = self.owner[region]
        t = self.next_step(data, bridge)
        if region in self.sent.get((array, t), {}):
            t += 1
        self.arrivals.put(bridge, region, t)
        self.sent[array, t][region] = slot = self.slot_of[array][self.number[region]]
        self.number[region] += 1
        if set(self.sent[array, t]) == set(self.regions[array]):
            self.newest[array] = t
        events = self.told(bridge, t)
        if set(self.sent[array, t]) == set(self.regions[array]) and set(self.sent[array, t].values()) == {
            slot
        }:
            assert events == [StepComplete(array, t, slot)]
            self.held[array, t] = set(self.consumers)
            return multiple(*((array, t, consumer) for consumer in self.consumers))
        assert events == []
        return multiple()

    @rule(step=consumes(steps))
    def release(self, step: tuple[str, int, str]) -> None:
        array, t, consumer = step
        grant = self.arrivals.release(consumer, array, t)
        self.held[array, t].discard(consumer)
        if self.held[array, t]:
            assert grant is None
        else:
            (slot,) = set(self.sent[array, t].values())
            assert grant == Grant(len(self.slot_of[array]), slot)
            self.slot_of[array].append(slot)
            assert set(self.slot_of[array][-self.slots[array] :]) >= {slot}
        assert self.told() == []

    def open_bridges(self) -> list[int]:
        return [b for b, at in enumerate(self.at) if at < math.inf]

    @precondition(lambda self: self.open_bridges())
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        bridge = data.draw(st.sampled_from(self.open_bridges()))
        t = self.next_step(data, bridge)
        self.arrivals.advance(bridge, t)
        assert self.told(bridge, t) == []

    @precondition(lambda self: self.open_bridges())
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        bridge = data.draw(st.sampled_from(self.open_bridges()))
        self.arrivals.close(bridge, BridgeStats(chunks=3))
        assert self.told(bridge, math.inf) == [BridgeClosed(bridge, BridgeStats(chunks=3))]

    @rule(bridge=st.integers(0, 3), region=st.integers(0, 12), t=st.integers(-3, 6))
    def misbehave(self, bridge: int, region: int, t: int) -> None:
        owner, array = self.owner.get(region, (None, ""))
        fine = (
            owner == bridge
            and region in self.number
            and self.may_send(region)
            and t >= self.at[bridge]
            and region not in self.sent.get((array, t), {})
        )
        if fine:
            return
        with pytest.raises(ProtocolError, match=f"bridge {bridge}"):
            self.arrivals.put(bridge, region, t)
        assert self.told() == []

    def waiting(self) -> list[int]:
        return [r for r in self.wanted if self.at[self.owner[r][0]] < math.inf and not self.may_send(r)]

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def send_without_a_slot(self, data: st.DataObject) -> None:
        region = data.draw(st.sampled_from(self.waiting()))
        bridge, _ = self.owner[region]
        with pytest.raises(ProtocolError, match=f"region {region} has no free slot"):
            self.arrivals.put(bridge, region, int(self.at[bridge]) + 1)
        assert self.told() == []

    @invariant()
    def no_slot_is_given_twice(self) -> None:
        if hasattr(self, "arrivals"):
            for array, t in self.held:
                if self.held[array, t]:
                    others = [
                        s
                        for (a, o), h in self.held.items()
                        if a == array and h and o != t
                        for s in self.sent[a, o].values()
                    ]
                    assert not set(self.sent[array, t].values()) & set(others)

    @invariant()
    def nothing_is_said_twice(self) -> None:
        if hasattr(self, "arrivals"):
            assert self.arrivals.take_events() == []
            assert [r for r in self.wanted if self.arrivals.must_wait(self.owner[r][0], r)] == [
                r for r in self.wanted if not self.may_send(r)
            ]


TestHistories = Histories.TestCase
