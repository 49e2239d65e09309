"""One node through any histories of bridges and subscribers, with the invariants checked after each step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from deisa.ray._state.arrivals import Entry
from deisa.ray._state.blocked import BLOCKED_S, PROGRESS_S
from deisa.ray._state.descriptions import ArrayDescription, ChunkDescription
from deisa.ray._state.effects import (
    CreateMemory,
    Effect,
    EndNode,
    GiveUp,
    GrantSlot,
    Refuse,
    SendAway,
    TellAnalytics,
    TellProgress,
)
from deisa.ray._state.events import (
    AgentLost,
    BridgeClosed,
    BridgeJoined,
    BridgeLost,
    DtypeDeclared,
    Event,
    OwnersPassed,
    SendersBlocked,
    StepComplete,
    StepTorn,
)
from deisa.ray._state.node import ENDING_S, Newcomer, Node
from deisa.ray._state.plan import StartPlan
from deisa.ray._state.presence import DRIVER_QUIET_S, HOLD_S, Presence
from deisa.ray._state.stats import BridgeStats
from deisa.ray._state.subscriber import EventLog, Subscriber
from deisa.ray.errors import AnalyticsLostError, HoleError, ProtocolError
from tests.unit.parts import number_counted, start_plan

F8 = np.dtype("f8")
TIMEOUT_S = 60.0


def subscriber(name: str = "analytics") -> Subscriber:
    return Subscriber(name, Presence(f"driver of {name}", "pid 1", 0.0, ends_alone=True))


def newcomer(peer: int, bridge_id: int, world_size: int = 3, **chunks: int) -> Newcomer:
    arrays = tuple(
        ArrayDescription(
            name, F8, (8,), None, tuple(ChunkDescription((1,), None, (i,)) for i in range(count))
        )
        for name, count in chunks.items()
    )
    return Newcomer(peer, 100 + peer, bridge_id, world_size, arrays)


def start(node: Node, plan: StartPlan) -> None:
    """Start with everything that the bridges which have come own of the arrays of the plan."""
    counts = {b: {a.name: len(a.chunks) for a in node.described(b)} for b in node.bridges}
    node.start(plan, number_counted(counts, plan.slots))


def node(*chunks: dict[str, int], slots: dict[str, int] | None = None, **dtypes: Any) -> Node:
    """A node whose bridges are peers of the same numbers; started if there are slots."""
    made = Node("s", "h", [subscriber()], TIMEOUT_S)
    for bridge_id, counts in enumerate(chunks):
        made.hello(newcomer(bridge_id, bridge_id, **counts), 0.0)
    if slots is not None:
        start(made, start_plan(slots, {**dict.fromkeys(slots, F8), **dtypes}, ("analytics",)))
    made.hear(made.subscribers[0])
    made.take_effects()
    return made


def news(node: Node, now: float = 0.0) -> list[Event]:
    node.look_over(now)
    return list(node.hear(node.subscribers[0]))


def test_a_bridge_joins_and_hears_whom_it_waits_for() -> None:
    here = node()
    here.report_progress("waiting for bridge 1 of 3", 0.0)
    here.hello(newcomer(7, 0, a=2), 0.0)
    assert here.take_effects() == [TellProgress(7, "waiting for bridge 1 of 3")]
    (joined,) = news(here)
    assert isinstance(joined, BridgeJoined) and len(joined.arrays[0].chunks) == 2
    here.report_progress("waiting for bridge 2 of 3", 0.0)
    assert here.take_effects() == [TellProgress(7, "waiting for bridge 2 of 3")]
    for peer, arrays in ((7, {}), (8, {"a": 1})):
        said = newcomer(peer, 1, **arrays)
        with pytest.raises(ProtocolError, match="twice"):
            here.hello(Newcomer(peer, 1, 1, 3, said.arrays * 2), 0.0)


def test_an_id_that_is_taken() -> None:
    here = node({"a": 1})
    here.hello(newcomer(5, 0, a=1), 0.0)
    here.answer_newcomers(HOLD_S)
    assert here.take_effects() == [] and here.bridge_of(5) is None
    here.answer_newcomers(HOLD_S + 1)  # the one before does not go: the analytics hears of both
    assert [type(event) for event in news(here)] == [BridgeJoined]
    assert here.sender(5) is None
    start(here, start_plan({"a": 1}, {"a": F8}, ("analytics",)))
    refused = here.take_effects()[-1]
    assert isinstance(refused, Refuse) and refused.peer == 5
    here.check()


def test_a_rank_that_cannot_join_is_lost_and_never_counts_as_one_that_has_come() -> None:
    here = node({"a": 1})
    here.cannot_join(1, "DescriptionError: no shape")
    assert news(here) == [BridgeLost(1, None, "DescriptionError: no shape")]
    start(here, start_plan({"a": 1}, {"a": F8}, ("analytics",)))
    here.cannot_join(0, "it belongs to no run of this session")
    assert news(here) == [] and here.sender(0) == 0
    here.check()


def test_slots_are_granted_as_leases_end() -> None:
    here = node({"a": 1}, slots={"a": 2})
    here.submitted(0, [Entry(0, 0), Entry(0, 1)], 2, 0, 0.0)
    assert news(here) == [StepComplete("a", 0, 0), StepComplete("a", 1, 1)]
    here.release("analytics", [("a", 0)])
    assert here.take_effects() == [GrantSlot("a", 2, 0)]
    here.check()


def test_blocked_bridges_are_reported_once_and_told_for_whom_they_wait() -> None:
    here = node({"a": 1}, {"a": 1}, slots={"a": 1})
    here.report_progress("the next timestep", 0.0)
    for bridge in (0, 1):
        here.submitted(bridge, [Entry(bridge, 0)], 1, None, 0.0)
    news(here)
    here.submitted(0, [], 1, 0, 1.0)
    here.submitted(1, [], 1, 1, 1.1)
    assert news(here, 1.0 + BLOCKED_S) == []  # the second one has just come
    assert news(here, 2.0) == [SendersBlocked("a", {0: 1, 1: 1})]
    assert here.take_effects() == [TellProgress(0, "the next timestep")]  # after a second
    assert news(here, 1.1 + PROGRESS_S) == []
    assert here.take_effects() == [TellProgress(1, "the next timestep")]
    here.report_progress("bridge 7", 3.0)
    assert here.take_effects() == [TellProgress(0, "bridge 7"), TellProgress(1, "bridge 7")]
    here.release("analytics", [("a", 0)])
    for bridge in (0, 1):
        here.submitted(bridge, [Entry(bridge, 1)], 1, None, 4.0)
    assert news(here, 5.0) == [StepComplete("a", 1, 0)]
    here.report_progress("bridge 8", 6.0)
    assert here.take_effects() == [GrantSlot("a", 1, 0)]


def test_a_dtype_is_declared_once() -> None:
    here = node({"a": 1}, {"a": 1}, slots={"a": 1}, a=None)
    assert here.check_declaration(0, "a") == [0, 1]
    here.declare(0, "a", F8)
    assert here.take_effects() == [CreateMemory(0, {"a": F8})]
    assert news(here) == [DtypeDeclared(0, "a", F8)]
    assert here.check_declaration(1, "a") == [1]
    for bridge, array in ((0, "a"), (1, "b")):
        with pytest.raises(ProtocolError, match=f"bridge {bridge} need not tell the dtype"):
            here.check_declaration(bridge, array)


def test_a_process_that_does_not_end_is_given_up_if_others_wait_for_it() -> None:
    here = node({"a": 1}, {"a": 1}, slots={"a": 1})
    here.begin_end(0, 0.0)
    here.submitted(1, [Entry(1, 0)], 0, None, 0.0)
    assert news(here, ENDING_S - 1) == []
    assert not here.take_effects()
    news(here, ENDING_S)
    (given_up,) = here.take_effects()
    assert isinstance(given_up, GiveUp) and given_up.peer == 0
    assert "has been ending for 5 s: MPI_Finalize waits" in given_up.reason


def test_one_that_owes_nothing_counts_as_passed() -> None:
    here = node({"a": 1}, slots={"a": 1})
    here.begin_end(0, 0.0)
    assert news(here, ENDING_S) == [OwnersPassed("a", None)]
    assert not here.take_effects()


def test_ranks_hear_whether_there_is_an_analytics() -> None:
    here = node({"a": 1}, slots={"a": 1})
    (there,) = here.subscribers
    there.connect(9, 0, listens=True)
    here.gone(9, "", 1.0)
    assert here.take_effects() == [TellAnalytics(0, "the analytics of session 's' has died")]
    here.take_over(there, "another", "pid 2", 2.0)
    assert here.take_effects() == [TellAnalytics(0, "")]
    assert here.subscriber_of("another") is there and here.subscriber_of("driver of analytics") is None


def test_an_analytics_that_was_silent_is_back_with_its_connection() -> None:
    here = node({"a": 1}, slots={"a": 1})
    (there,) = here.subscribers
    here.look_over(DRIVER_QUIET_S + 1)
    assert here.take_effects() == [TellAnalytics(0, "the analytics of session 's' does not answer")]
    here.connect(there, 9, 0, listens=True)
    assert here.take_effects() == [TellAnalytics(0, "")]
    here.look_over(100 * DRIVER_QUIET_S)
    assert not here.take_effects() and there.presence.state(0.0) == ("here", 0.0)


def test_what_owners_have_passed_does_not_pile_up() -> None:
    """A simulation may go on for long without the arrays that are asked for, while its analytics is stopped."""
    log = EventLog()
    one, two = subscriber("one"), subscriber("two")
    for timestep in range(1000):
        log.append(OwnersPassed("a", timestep))
        log.append(OwnersPassed("b", timestep))
    assert one.hear(log) == [OwnersPassed("a", 999), OwnersPassed("b", 999)]
    log.append(OwnersPassed("a", 1000))  # one of them has heard of what came before
    log.append(StepComplete("a", 1000, 0))
    log.append(OwnersPassed("a", 1001))
    log.append(OwnersPassed("a", 1002))
    new = [OwnersPassed("a", 1000), StepComplete("a", 1000, 0), OwnersPassed("a", 1002)]
    assert one.hear(log) == new
    assert two.hear(log) == [OwnersPassed("a", 999), OwnersPassed("b", 999), *new]


def test_a_message_holds_what_one_bridge_has_described() -> None:
    here = node({"a": 1}, {"a": 1})
    (there,) = here.subscribers
    here.report(OwnersPassed("a", 1))
    for bridge_id in (2, 3):
        here.hello(newcomer(bridge_id, bridge_id, a=1), 0.0)
    here.report(OwnersPassed("a", 2))
    kinds = [[type(event) for event in here.hear(there, 10)] for _ in range(3)]
    assert kinds == [[OwnersPassed, BridgeJoined], [BridgeJoined], [OwnersPassed]]
    assert not here.hear(there, 10)


def test_an_agent_that_nobody_wants_ends() -> None:
    here = node({"a": 1}, slots={"a": 1})
    heard = news(here, TIMEOUT_S + 1)
    assert isinstance(heard[-1], AgentLost)
    end = here.take_effects()[-1]
    assert isinstance(end, EndNode) and isinstance(end.error, AnalyticsLostError)


def test_an_agent_whose_run_was_dismissed_ends_with_the_analytics() -> None:
    here = node({"a": 1}, slots={"a": 1})
    error = HoleError("a hole")
    here.dismiss(error)
    assert here.take_effects() == [Refuse(0, error)]
    here.leave(here.subscribers[0], "it has ended", 1.0)
    here.look_over(1.0)
    assert here.take_effects()[-1] == EndNode(error)


def test_an_agent_without_data_or_analytics_steps_aside() -> None:
    here = node({"a": 1})
    here.step_aside(0.0)
    assert not here.take_effects()
    here.leave(here.subscribers[0], "it was interrupted", 1.0)
    here.take_effects()
    here.step_aside(1.0)
    away, end = here.take_effects()
    assert isinstance(away, SendAway) and away.peer == 0 and end == EndNode(None)


def test_each_subscriber_hears_everything_once() -> None:
    one, two = subscriber("one"), subscriber("two")
    here = Node("s", "h", [one, two], TIMEOUT_S)
    here.hello(newcomer(0, 0, a=1), 0.0)
    start(here, start_plan({"a": 1}, {"a": F8}, ("one", "two")))
    assert len(here.hear(one)) == 1
    here.submitted(0, [Entry(0, 5)], 5, None, 0.0)
    here.look_over(0.0)
    assert here.hear(one) == [StepComplete("a", 5, 0)]
    assert [type(event) for event in here.hear(two, 1)] == [BridgeJoined]
    assert here.hear(two) == [StepComplete("a", 5, 0)]
    assert here.log.first == here.log.end
    here.take_effects()
    here.release("one", [("a", 5)])
    assert here.take_effects() == []
    here.release("two", [("a", 5)])
    assert here.take_effects() == [GrantSlot("a", 1, 0)]
    here.check()


def test_check_finds_a_slot_that_is_given_twice() -> None:
    here = node({"a": 1}, slots={"a": 2})
    here.submitted(0, [Entry(0, 0)], 0, None, 0.0)
    here.check()
    here.arrivals._arrays["a"].slot_of[1] = 0
    with pytest.raises(AssertionError, match=r"'a': the slots in use are \[0, 0\] of 2"):
        here.check()


class Histories(RuleBasedStateMachine):
    """Bridges that submit, wait, close and go, one that breaks rules, and analytics that come and go."""

    @initialize(
        chunks=st.lists(
            st.fixed_dictionaries({}, optional={"a": st.integers(1, 2), "b": st.integers(1, 2)}),
            min_size=1,
            max_size=3,
        ),
        slots=st.fixed_dictionaries({}, optional={"a": st.integers(1, 3), "b": st.integers(1, 2)}),
        orderly=st.booleans(),
    )
    def start(self, chunks: list[dict[str, int]], slots: dict[str, int], orderly: bool) -> None:
        self.orderly = orderly
        self.now = 0.0
        self.node = node(*chunks, slots=slots)
        self.slots = slots
        regions = {b: self.node.arrivals.regions_of(b) for b in range(len(chunks))}
        self.owned = {
            b: [r for n in arrays if n in slots for r in arrays[n]] for b, arrays in regions.items()
        }
        self.at = dict.fromkeys(regions, -1)
        self.open = set(regions)
        self.leased: set[tuple[str, int]] = set()
        self.seen: list[Event] = []
        self.granted = dict(slots)
        self.gone: set[int] = set()
        self.drivers = 0

    def carry_out(self) -> None:
        for effect in self.node.take_effects():
            self.do(effect)

    def do(self, effect: Effect) -> None:
        match effect:
            case GrantSlot(array, number, slot):
                assert number == self.granted[array] and 0 <= slot < self.slots[array]
                self.granted[array] += 1
            case Refuse(peer) | GiveUp(peer):
                self.node.gone(peer, "refused", self.now)
                self.open.discard(peer)
            case TellProgress(peer) | TellAnalytics(peer):
                assert peer in self.open
            case _:
                raise AssertionError(f"{effect} is out of place")

    def look(self) -> None:
        self.node.look_over(self.now)
        for bridge_id, reason in self.node.take_losses():
            self.node.lose(bridge_id, reason)
            self.node.look_over(self.now)
        self.carry_out()
        for event in self.node.hear(self.node.subscribers[0]):
            if isinstance(event, StepComplete):
                assert (event.array, event.timestep) not in self.leased
                self.leased.add((event.array, event.timestep))
            self.seen.append(event)

    @rule()
    def step(self) -> None:
        """All bridges that are there send one timestep, as simulations do."""
        step = max(self.at.values()) + 1
        must_wait = self.node.arrivals.must_wait
        if any(must_wait(bridge, region) for bridge in self.open for region in self.owned[bridge]):
            return
        for bridge in self.open:
            self.at[bridge] = step
            entries = [Entry(region, step) for region in self.owned[bridge]]
            self.node.submitted(bridge, entries, step, None, self.now)
        self.look()

    @precondition(lambda self: not self.orderly and any(self.owned[b] for b in self.open))
    @rule(data=st.data())
    def submit(self, data: st.DataObject) -> None:
        """A bridge that keeps to the rules: it sends its next chunks, or waits for a slot."""
        bridge = data.draw(st.sampled_from(sorted(b for b in self.open if self.owned[b])), label="bridge")
        step = self.at[bridge] + data.draw(st.integers(1, 2), label="further")
        entries, blocked = [], None
        for region in data.draw(st.permutations(self.owned[bridge]), label="regions"):
            if self.node.arrivals.must_wait(bridge, region):
                blocked = region
                break
            entries.append(Entry(region, step))
        self.at[bridge] = step
        self.node.submitted(bridge, entries, step, blocked, self.now)

    @precondition(lambda self: not self.orderly and self.open)
    @rule(data=st.data())
    def move_on(self, data: st.DataObject) -> None:
        bridge = data.draw(st.sampled_from(sorted(self.open)))
        self.at[bridge] += 1
        self.node.submitted(bridge, [], self.at[bridge], None, self.now)

    @precondition(lambda self: not self.orderly and self.open)
    @rule(data=st.data(), region=st.integers(0, 9), timestep=st.integers(-2, 9))
    def write_nonsense(self, data: st.DataObject, region: int, timestep: int) -> None:
        bridge = data.draw(st.sampled_from(sorted(self.open)))
        try:
            self.node.submitted(bridge, [Entry(region, timestep)] * 2, timestep, region, self.now)
        except ProtocolError:
            self.node.gone(bridge, "it has written nonsense", self.now)
            self.open.discard(bridge)
            self.gone.add(bridge)

    @precondition(lambda self: self.open and (not self.orderly or self.now > 3))
    @rule(data=st.data(), how=st.sampled_from(["close", "die", "end"]))
    def leave(self, data: st.DataObject, how: str) -> None:
        bridge = data.draw(st.sampled_from(sorted(self.open)))
        if how == "end":
            self.node.begin_end(bridge, self.now)
            return
        self.open.discard(bridge)
        if how == "close":
            self.node.close(bridge, BridgeStats())
        else:
            self.gone.add(bridge)
        self.node.gone(bridge, "killed", self.now)
        assert self.node.sender(bridge) is None

    @precondition(lambda self: self.leased)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.leased)))
        self.leased.discard(step)
        before = self.granted[step[0]]
        self.node.release("analytics", [step])
        self.carry_out()
        assert self.granted[step[0]] == before + 1

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        there = self.node.subscribers[0]
        self.node.begin_poll(there)
        there.presence.end_poll(there.presence.driver_id, self.now)
        self.look()

    @rule(text=st.sampled_from(["", "bridge 1", "bridge 2"]))
    def progress(self, text: str) -> None:
        self.node.report_progress(text, self.now)
        self.carry_out()

    @rule(died=st.booleans())
    def take_over(self, died: bool) -> None:
        """Whoever comes next hears what is leased, and what has been lost."""
        there = self.node.subscribers[0]
        there.connect(1000 + self.drivers, 0, listens=True)
        if died:
            self.node.gone(1000 + self.drivers, "", self.now)
        else:
            there.disconnect()
        self.drivers += 1
        self.node.take_over(there, str(self.drivers), "pid 2", self.now)
        self.look()
        state = self.node.state_for(there, "agent", ())
        held = {(name, t) for name, array in state.held.items() for t in array.held}
        assert held == self.leased
        lost = {event.bridge_id for event in state.since if isinstance(event, BridgeLost)}
        assert self.gone <= lost
        assert not self.node.hear(there)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "node"):
            self.node.check()

    @invariant()
    def is_told_once(self) -> None:
        if hasattr(self, "node"):
            once = [e for e in self.seen if not isinstance(e, SendersBlocked)]
            assert len(once) == len(set(map(repr, once)))
            for name in self.slots:
                steps = [e.timestep for e in once if isinstance(e, StepComplete) and e.array == name]
                passed = [
                    math.inf if e.timestep is None else e.timestep
                    for e in once
                    if isinstance(e, OwnersPassed) and e.array == name
                ]
                assert steps == sorted(steps) and passed == sorted(passed)
            torn = {(e.array, e.timestep) for e in once if isinstance(e, StepTorn)}
            assert not torn & {(e.array, e.timestep) for e in once if isinstance(e, StepComplete)}
            assert all(e.bridge_id not in self.open for e in once if isinstance(e, BridgeClosed | BridgeLost))


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=200, stateful_step_count=40)
