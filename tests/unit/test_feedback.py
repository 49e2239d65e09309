"""Steering, decided without any process: the same answer for everybody, whatever comes in which order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deisa.ray._state.feedback import (
    Asked,
    FeedbackState,
    Proposal,
    Questions,
    Setting,
    Verdict,
    accepted,
    settlement,
)
from deisa.ray._state.feedback_log import FeedbackLog
from deisa.ray._state.questions import check_key, check_timestep, check_wait
from deisa.ray.errors import FeedbackError, FeedbackTypeError

Question = tuple[str, int]
NOT_SET = b""
NODES = 2
KEYS, TIMESTEPS = st.just("a"), st.integers(0, 1)


@dataclass
class ModelNode:
    """A node with its real `Questions`; what its pages would hold is in dicts."""

    questions: Questions = field(default_factory=Questions)
    values: dict[Question, bytes] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)

    def keep(self, setting: Setting | None) -> None:
        if setting is not None:
            self.values[setting.key, setting.timestep] = setting.value

    def propose(self, proposal: Proposal) -> Verdict:
        self.keep(self.questions.close(proposal))
        setting = proposal.setting
        if self.values.get((setting.key, setting.timestep)) == setting.value:
            return Verdict(known=True)
        newest = self.asked.get(setting.key, -1)
        return Verdict(Asked(0, newest) if newest >= setting.timestep else None)

    def settle(self, number: int, is_accepted: bool) -> None:
        self.keep(self.questions.settle(number, is_accepted=is_accepted))

    def ask(self, key: str, timestep: int) -> bytes | None:
        """The answer, or None where the question is closed."""
        self.asked[key] = max(self.asked.get(key, -1), timestep)
        closed = self.questions.closed
        if closed is not None and (closed.setting.key, closed.setting.timestep) == (key, timestep):
            return None
        return self.values.get((key, timestep), NOT_SET)


class Steering(RuleBasedStateMachine):
    """An analytics and two nodes; messages to a node arrive one by one, in any order among nodes, or never."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes = [ModelNode() for _ in range(NODES)]
        self.given: dict[Question, bytes] = {}  # what somebody has got
        self.number = self.last_accepted = 0
        self.proposal: Proposal | None = None
        self.verdicts: dict[int, Verdict] = {}
        self.late: dict[int, list[tuple[int, bool]]] = {n: [] for n in range(NODES)}  # settlements under way
        self.confirmed: dict[Question, bytes] = {}  # what `set` has said is set

    @rule(node=st.integers(0, NODES - 1), key=KEYS, timestep=TIMESTEPS)
    def ask(self, node: int, key: str, timestep: int) -> None:
        answer = self.nodes[node].ask(key, timestep)
        if answer is not None:
            assert self.given.setdefault((key, timestep), answer) == answer
            if (key, timestep) in self.confirmed and not self.late[node]:
                assert answer == self.confirmed[key, timestep]

    @precondition(lambda self: self.proposal is None)
    @rule(key=KEYS, timestep=TIMESTEPS, value=st.sampled_from([b"1", b"2"]))
    def set(self, key: str, timestep: int, value: bytes) -> None:
        self.number += 1
        setting = Setting(key, timestep, value)
        self.proposal = Proposal(self.number, setting, final=False, last_accepted=self.last_accepted)
        self.verdicts = {}

    @precondition(lambda self: self.proposal is not None and len(self.verdicts) < NODES)
    @rule(data=st.data())
    def propose(self, data: Any) -> None:
        node = data.draw(st.sampled_from([n for n in range(NODES) if n not in self.verdicts]))
        assert self.proposal is not None
        self.verdicts[node] = self.nodes[node].propose(self.proposal)

    @precondition(lambda self: len(self.verdicts) == NODES)
    @rule()
    def decide(self) -> None:
        assert self.proposal is not None
        is_accepted = accepted(self.verdicts.values())
        setting = self.proposal.setting
        if is_accepted:
            self.last_accepted = self.number
            self.confirmed[setting.key, setting.timestep] = setting.value
        for under_way in self.late.values():
            under_way.append((self.number, is_accepted))
        self.proposal, self.verdicts = None, {}

    @rule(data=st.data())
    def settle(self, data: Any) -> None:
        """One of the settlements that are under way arrives, be it the last one first."""
        waiting = [(node, message) for node, under_way in self.late.items() for message in under_way]
        if waiting:
            node, message = data.draw(st.sampled_from(waiting))
            self.late[node].remove(message)
            self.nodes[node].settle(*message)

    @rule()
    def die(self) -> None:
        """The analytics dies, what it had said last is lost, and another one takes over."""
        states = [node.questions.state for node in self.nodes]
        left = settlement(states)
        self.number = max(state.last for state in states)
        self.last_accepted = max(state.last_accepted for state in states)
        if left is not None:
            number, is_accepted = left
            self.last_accepted = number if is_accepted else self.last_accepted
            for node in self.nodes:
                node.settle(number, is_accepted)
        # What had been confirmed and has reached nobody is as if the analytics had died before.
        self.confirmed = {
            question: value
            for question, value in self.confirmed.items()
            if all(node.values.get(question) == value for node in self.nodes)
        }
        self.late = {n: [] for n in range(NODES)}
        self.proposal, self.verdicts = None, {}
        assert all(node.questions.closed is None for node in self.nodes)

    @invariant()
    def nodes_agree_when_all_is_settled(self) -> None:
        settled = self.proposal is None and not any(self.late.values())
        if settled and all(node.questions.closed is None for node in self.nodes):
            assert all(node.values == self.nodes[0].values for node in self.nodes)


TestSteering = Steering.TestCase


def test_what_was_left_behind_counts_only_where_some_node_has_kept_it() -> None:
    pending, dropped, kept = FeedbackState(2, 1, 2), FeedbackState(None, 1, 2), FeedbackState(None, 2, 2)
    assert settlement([FeedbackState(), FeedbackState(None, 3, 3)]) is None
    assert settlement([pending, pending]) == (2, False)
    assert settlement([pending, dropped]) == (2, False)
    assert settlement([pending, kept]) == (2, True)


@given(
    st.integers(1, 4),
    st.integers(4, 20),
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 6), st.integers(1, 40)), max_size=40),
)
def test_values_that_are_kept_do_not_overlap(
    queue_size: int, words: int, settings: list[tuple[str, int, int]]
) -> None:
    log = FeedbackLog(queue_size, words)
    memory: list[Any] = [None] * words
    newest: dict[Question, int] = {}
    for number, (key, timestep, nbytes) in enumerate(settings):
        if nbytes > 8 * words:
            with pytest.raises(ValueError, match="does not fit"):
                log.put(key, timestep, nbytes)
            continue
        kept = log.put(key, timestep, nbytes)
        assert kept.words * 8 >= nbytes
        memory[kept.first : kept.first + kept.words] = [number] * kept.words
        newest[key, timestep] = number
        for name, queue in log.queues.items():
            assert len(queue.values) <= queue_size
            assert [v.timestep for v in queue.values] == sorted({v.timestep for v in queue.values})
            for value in queue.values:
                assert (
                    memory[value.first : value.first + value.words]
                    == [newest[name, value.timestep]] * value.words
                )
    kept_now = {(key, value.timestep) for key, queue in log.queues.items() for value in queue.values}
    for key, timestep in newest.keys() - kept_now:
        assert timestep <= log.queues[key].dropped


def test_the_oldest_timestep_of_a_key_makes_way() -> None:
    log = FeedbackLog(2, 100)
    for timestep in (5, 7, 6):
        log.put("a", timestep, 1)
    assert [value.timestep for value in log.queues["a"].values] == [6, 7]
    assert log.queues["a"].dropped == 5


def test_changes_are_told_from_the_first_one_on() -> None:
    log = FeedbackLog(10, 100)
    for timestep in (1, 2, 4):
        log.put("a", timestep, 1)
    assert [(key, since) for key, _, since in log.take_changes()] == [("a", 0)]
    log.put("a", 3, 1)
    assert [(key, since) for key, _, since in log.take_changes()] == [("a", 2)]
    assert list(log.take_changes()) == []


def test_records_of_replaced_values_do_not_gather() -> None:
    log = FeedbackLog(10, 100_000)
    log.put("constant", 0, 1)
    for _ in range(5000):
        log.put("a", 1, 1)
    assert len(log._order) < 2000


@pytest.mark.parametrize("key", ["a", "x" * 255, "ü" * 127, "two words"])
def test_keys(key: str) -> None:
    assert check_key(key, "set()") == key


@pytest.mark.parametrize("key", ["", "x" * 256, "ü" * 128, "a\0b", "\ud800"])
def test_what_is_no_key(key: str) -> None:
    with pytest.raises(FeedbackError, match=r"set\(\)"):
        check_key(key, "set()")


@pytest.mark.parametrize("timestep", [None, 1.0, "1", True, np.True_])
def test_what_is_no_timestep(timestep: Any) -> None:
    with pytest.raises(TypeError, match="timestep is an integer") as raised:
        check_timestep(timestep, "set()")
    assert isinstance(raised.value, FeedbackTypeError)
    with pytest.raises(TypeError):
        check_key(1, "set()")


def test_timesteps_have_64_bits() -> None:
    assert check_timestep(np.int8(-3), "set()") == -3
    for timestep in (2**63, -(2**63)):
        with pytest.raises(FeedbackError, match="64 bits"):
            check_timestep(timestep, "set()")


@pytest.mark.parametrize("wait", [-1, float("nan"), "soon"])
def test_what_is_no_time_to_wait(wait: Any) -> None:
    with pytest.raises(FeedbackError, match="seconds"):
        check_wait(wait, 1, "get()")


def test_waiting_needs_a_timestep() -> None:
    with pytest.raises(FeedbackError, match="needs timestep="):
        check_wait(1, None, "get()")


@pytest.mark.parametrize("last_accepted", [0, 1])
def test_a_proposal_says_how_the_one_before_was_settled_where_that_was_not_heard(last_accepted: int) -> None:
    questions = Questions()
    first, second = Setting("a", 1, b"1"), Setting("a", 2, b"2")
    assert questions.close(Proposal(1, first, final=False, last_accepted=0)) is None
    kept = questions.close(Proposal(2, second, final=False, last_accepted=last_accepted))
    assert kept == (first if last_accepted else None)
    assert questions.state == FeedbackState(2, last_accepted, 2)
    assert questions.settle(1, is_accepted=True) is None
    assert questions.settle(2, is_accepted=True) == second
