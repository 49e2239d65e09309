"""Steering with real agents and real bridges, on one node and on two; no Ray."""

from __future__ import annotations

import logging
import multiprocessing
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deisa.ray._session.feedback import Feedback
from deisa.ray._state.events import FeedbackAwaited
from deisa.ray._state.feedback import FeedbackPlan, Proposal, Setting, Verdict
from deisa.ray._state.values import encode_value
from deisa.ray._transport.feedback import FeedbackPages
from deisa.ray.bridge import Bridge
from deisa.ray.config import Settings
from deisa.ray.errors import (
    AnalyticsLostError,
    ClosedError,
    FeedbackDroppedError,
    FeedbackSizeError,
    ForkedProcessError,
    UnsupportedValueError,
    WaitTimeoutError,
)
from tests.support.patience import PATIENCE_S, wait_until
from tests.unit.agent import CLIENTS, Agent, new_settings, running, use_client, whole

METADATA = {"a": whole((2,))}


class Nodes:
    """Agents, each with one bridge or more: what an engine is for `Feedback`."""

    def __init__(self, agents: Mapping[str, Agent], settings: Settings) -> None:
        self.agents = agents
        self.feedback = Feedback(self, settings)  # type: ignore[arg-type]
        self.bridges: list[Bridge] = []
        self.between: Callable[[], None] = lambda: None  # called between the two steps
        self.finishes = 0

    def start(self, bridges: int) -> None:
        opening: list[Future[Bridge]] = []
        with self.feedback.starting(list(self.agents)) as plan:
            for agent in self.agents.values():
                opening += agent.connect(*[METADATA if n == 0 else {} for n in range(bridges)])
                everything, here = agent.plan({"a": 3})
                agent.server.start(replace(everything, feedback=plan), here)
        self.bridges = [bridge.result(PATIENCE_S) for bridge in opening]

    def propose(self, proposal: Proposal, nodes: Collection[str]) -> Mapping[str, Verdict]:
        verdicts = {node: self.agents[node].server.propose(proposal) for node in nodes}
        self.between()
        return verdicts

    def settle(self, number: int, is_accepted: bool, nodes: Collection[str]) -> None:
        for node in nodes:
            self.agents[node].server.settle(number, is_accepted)

    def finish(self, timestep: int, nodes: Collection[str]) -> None:
        for node in nodes:
            self.finishes += 1
            self.agents[node].server.finish(timestep)

    def answers(self, key: str, timestep: int | None, **more: Any) -> list[Any]:
        """What each bridge gets."""
        return [bridge.get(key, timestep, **more) for bridge in self.bridges]

    def in_thread(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Future[Any]:
        return next(iter(self.agents.values())).in_thread(function, *arguments, **named)


@contextmanager
def nodes_of(count: int, bridges: int = 1, **settings: Any) -> Iterator[Nodes]:
    """Nodes that have started, with so many bridges each."""
    with unstarted(count, **settings) as nodes:
        nodes.start(bridges)
        yield nodes


@contextmanager
def unstarted(count: int, **settings: Any) -> Iterator[Nodes]:
    agents = {f"node-{n}": Agent(new_settings(**settings)) for n in range(count)}
    try:
        yield Nodes(agents, new_settings(**settings))
    finally:
        for agent in agents.values():
            agent.close()


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_client(request.param):
        yield


pytestmark = pytest.mark.usefixtures("client")


@pytest.mark.parametrize(
    "value",
    [None, True, 7, -0.5, 1j, "Größe", b"\0bytes", [1, [2.5, "three"]], {"a": {"b": [None]}}, (1, 2)],
    ids=repr,
)
def test_values(value: Any) -> None:
    with nodes_of(1) as nodes:
        nodes.feedback.set("key", value, 3)
        (answer,) = nodes.answers("key", 3, default="default")
        assert answer == (list(value) if type(value) is tuple else value)
        assert type(answer) is (list if type(value) is tuple else type(value))


def test_arrays_are_copies() -> None:
    field = np.arange(300_000.0).reshape(3, -1)
    with nodes_of(2) as nodes:
        nodes.feedback.set("field", field.T, 3)
        for answer in nodes.answers("field", 3):
            np.testing.assert_array_equal(answer, field.T)
            answer[...] = 0
        np.testing.assert_array_equal(nodes.answers("field", 3)[0], field.T)


def test_what_was_set_before_the_start_is_there_from_the_start() -> None:
    with unstarted(2) as nodes:
        for feed in (0.03, 0.05):
            nodes.feedback.set("feed", feed, 0)
        nodes.feedback.set("stop", True, 9)
        nodes.start(bridges=1)
        assert nodes.answers("feed", 0) == [0.05, 0.05]
        assert nodes.answers("stop", 9) == [True, True]


@pytest.mark.parametrize("count", [1, 2])
def test_a_default_is_final(count: int, caplog: pytest.LogCaptureFixture) -> None:
    with nodes_of(count) as nodes:
        assert nodes.bridges[-1].get("feed", 4, 0.1) == 0.1
        for timestep in (3, 4, 4):
            nodes.feedback.set("feed", 0.2, timestep)
        assert nodes.answers("feed", 4, default=0.1) == [0.1] * count
        nodes.feedback.set("feed", 0.3, 5)
        nodes.feedback.set("other", 1, 4)
        assert nodes.answers("feed", 5) == [0.3] * count
        assert nodes.answers("other", 4) == [1] * count
        assert nodes.feedback.figures.too_late == {"feed": 3}
        assert nodes.feedback.figures.values == 2
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "set('feed', timestep=3) comes too late" in warning
    assert "bridge 0 has asked for 'feed' at timestep 4" in warning
    assert "wait=" in warning


@pytest.mark.parametrize("count", [1, 2])
def test_the_last_value_counts_until_somebody_has_asked(count: int) -> None:
    with nodes_of(count) as nodes:
        for feed in (0.1, 0.2):
            nodes.feedback.set("feed", feed, 4)
        assert nodes.bridges[0].get("feed", 4) == 0.2
        nodes.feedback.set("feed", 0.3, 4)
        assert nodes.answers("feed", 4) == [0.2] * count
        nodes.feedback.set("feed", 0.2, 4)  # the same again, as from a callback that runs again
        assert nodes.feedback.figures.too_late == {"feed": 1}


def test_queues() -> None:
    with nodes_of(1, feedback_queue_size=3) as nodes:
        (bridge,) = nodes.bridges
        assert bridge.get("feed") is None
        assert bridge.get("feed", default="none") == "none"
        for timestep in (1, 4, 2, 3):
            nodes.feedback.set("feed", timestep / 10, timestep)
        queue = bridge.get("feed", None, "none")
        assert queue == deque([(2, 0.2), (3, 0.3), (4, 0.4)])
        queue.clear()
        assert len(bridge.get("feed")) == 3
        assert bridge.get("feed", 2) == 0.2
        with pytest.raises(FeedbackDroppedError, match=r"'feed' at timestep 1, .*feedback_queue_size"):
            bridge.get("feed", 1, "default")
        assert bridge.get("feed", 5, "default") == "default"


def test_the_bytes_of_all_values_are_bounded() -> None:
    with nodes_of(1, feedback_memory_mib=2**-7) as nodes:
        (bridge,) = nodes.bridges
        with pytest.raises(
            FeedbackSizeError, match=r"set\('mask', timestep=1\) takes 9.0 KiB.*FEEDBACK_MEMORY_MIB"
        ):
            nodes.feedback.set("mask", bytes(9216 - 5), 1)
        for timestep in range(5):
            nodes.feedback.set("mask", bytes([timestep]) * 3000, timestep)
        assert [(t, value[0]) for t, value in bridge.get("mask")] == [(3, 3), (4, 4)]
        assert bridge.get("mask", 4) == b"\4" * 3000
        with pytest.raises(FeedbackDroppedError, match="FEEDBACK_MEMORY_MIB"):
            bridge.get("mask", 2)


def test_values_that_no_message_can_carry(tmp_path: Any) -> None:
    with unstarted(1) as nodes, pytest.raises(UnsupportedValueError) as raised:
        nodes.feedback.set("key", {"where": [1, tmp_path]}, 1)
    assert str(raised.value).startswith("set('key', timestep=1): ['where'][1]: PosixPath is not supported")


def test_the_number_of_keys_is_bounded() -> None:
    with unstarted(1) as nodes:
        for number in range(250):
            nodes.feedback.set(f"key {number}", number, 0)
        nodes.start(1)
        for number in range(250, 256):
            nodes.feedback.set(f"key {number}", number, 0)
        with pytest.raises(FeedbackSizeError, match="256"):
            nodes.feedback.set("one more", 1, 0)
        nodes.feedback.set("key 7", 8, 1)
        (bridge,) = nodes.bridges
        assert [bridge.get(f"key {number}", 0) for number in range(256)] == list(range(256))
        for number in range(256, 512):
            assert bridge.get(f"key {number}", 0) is None
        with pytest.raises(FeedbackSizeError, match="512 different keys"):
            bridge.get("one more", 0)


# Waiting.


def test_a_wait_ends_with_the_value() -> None:
    with nodes_of(2) as nodes:
        waiting = [nodes.in_thread(bridge.get, "stop", 3, wait=PATIENCE_S) for bridge in nodes.bridges]
        wait_for_awaited(nodes)
        assert not any(future.done() for future in waiting)
        nodes.feedback.set("stop", True, 3)
        assert [future.result(PATIENCE_S) for future in waiting] == [True, True]


def test_a_wait_ends_with_the_default_when_the_analytics_has_finished_with_the_timestep() -> None:
    with nodes_of(2) as nodes:
        waiting = [
            nodes.in_thread(bridge.get, "stop", 3, default=False, wait=PATIENCE_S) for bridge in nodes.bridges
        ]
        wait_for_awaited(nodes)
        nodes.feedback.finish(2)
        assert not any(future.done() for future in waiting)
        nodes.feedback.finish(3)
        assert [future.result(PATIENCE_S) for future in waiting] == [False, False]
        assert nodes.answers("stop", 1, default=False, wait=0) == [False, False]


def wait_for_awaited(nodes: Nodes) -> None:
    for node, agent in nodes.agents.items():
        agent.wait(FeedbackAwaited)
        nodes.feedback.await_on(node)


def test_a_wait_that_is_over_is_no_answer() -> None:
    with nodes_of(1) as nodes:
        (bridge,) = nodes.bridges
        for wait in (0, 0.01):
            with pytest.raises(
                WaitTimeoutError, match=r"bridge 0 waits for 'stop' at timestep 3, .* has not set"
            ):
                bridge.get("stop", 3, False, wait=wait)
        nodes.feedback.set("stop", True, 3)
        assert bridge.get("stop", 3, False, wait=0) is True


def test_two_keys_of_one_timestep_do_not_touch_each_other() -> None:
    with nodes_of(1) as nodes:
        (bridge,) = nodes.bridges
        nodes.feedback.set("stop", False, 3)
        assert bridge.get("stop", 3, wait=PATIENCE_S) is False
        waiting = nodes.in_thread(bridge.get, "feed", 3, wait=PATIENCE_S)
        wait_for_awaited(nodes)
        nodes.feedback.set("feed", 0.5, 3)
        assert waiting.result(PATIENCE_S) == 0.5


def test_a_wait_ends_when_the_analytics_does() -> None:
    for policy in ("raise", "continue"):
        with nodes_of(1, on_analytics_lost=policy) as nodes:
            (bridge,), (agent,) = nodes.bridges, nodes.agents.values()
            waiting = nodes.in_thread(bridge.get, "stop", 3, "default", wait=PATIENCE_S)
            wait_for_awaited(nodes)
            agent.server.abandon("the analytics has died")
            if policy == "raise":
                with pytest.raises(AnalyticsLostError, match="has died"):
                    waiting.result(PATIENCE_S)
            else:
                assert waiting.result(PATIENCE_S) == "default"
                assert bridge.get("stop", 3, "default", wait=PATIENCE_S) == "default"


def test_a_wait_ends_when_another_thread_ends_the_bridge() -> None:
    with nodes_of(1) as nodes:
        (bridge,) = nodes.bridges
        waiting = nodes.in_thread(bridge.get, "stop", 3, wait=PATIENCE_S)
        wait_for_awaited(nodes)
        bridge.lose("RuntimeError: diverged")
        with pytest.raises(ClosedError, match="diverged"):
            waiting.result(PATIENCE_S)


def test_many_ranks_that_wait_make_one_event_of_their_node() -> None:
    with nodes_of(1, bridges=12) as nodes:
        (agent,) = nodes.agents.values()
        for timestep in range(3):
            waiting = [
                nodes.in_thread(b.get, "stop", timestep, False, wait=PATIENCE_S) for b in nodes.bridges
            ]
            if timestep == 0:
                wait_for_awaited(nodes)
            nodes.feedback.finish(timestep)
            assert [future.result(PATIENCE_S) for future in waiting] == [False] * 12
        assert nodes.finishes == 3
        assert not [event for event in agent.events() if isinstance(event, FeedbackAwaited)]


def test_who_only_looks_makes_no_traffic() -> None:
    with nodes_of(1) as nodes:
        (agent,) = nodes.agents.values()
        nodes.feedback.set("stop", True, 0)
        assert nodes.answers("stop", 0, wait=PATIENCE_S) == [True]
        assert nodes.answers("stop", 1) == [None]
        agent.server._exchange.look()
        assert agent.events() == []


# Between the steps.


def test_nobody_is_answered_between_the_steps() -> None:
    with nodes_of(2, bridges=2) as nodes:
        waiting: list[Future[Any]] = []

        def ask() -> None:
            for key, timestep in (("feed", 2), ("stop", 3)):
                assert nodes.answers(key, timestep, default="other question") == ["other question"] * 4
            waiting.extend(nodes.in_thread(bridge.get, "feed", 3, 0.1) for bridge in nodes.bridges)
            wait_until(lambda: asked_everywhere(nodes, "feed", 3), "a bridge of each node asks")
            assert not any(future.done() for future in waiting)

        nodes.between = ask
        nodes.feedback.set("feed", 0.2, 3)
        assert [future.result(PATIENCE_S) for future in waiting] == [0.2] * 4


def asked_everywhere(nodes: Nodes, key: str, timestep: int) -> bool:
    """Whether a bridge of every node has noted a question."""
    return all(asked_there(agent.server._store.feedback, key, timestep) for agent in nodes.agents.values())


def asked_there(pages: FeedbackPages | None, key: str, timestep: int) -> bool:
    assert pages is not None
    return pages.answered(key, timestep) is not None


def test_the_answer_is_the_default_where_another_node_has_answered() -> None:
    with nodes_of(2) as nodes:
        first, second = nodes.bridges
        assert first.get("feed", 3, 0.1) == 0.1
        waiting: list[Future[Any]] = []
        nodes.between = lambda: waiting.append(nodes.in_thread(second.get, "feed", 3, 0.1))
        nodes.feedback.set("feed", 0.2, 3)
        assert waiting[0].result(PATIENCE_S) == 0.1
        assert nodes.feedback.figures.too_late == {"feed": 1}


@pytest.mark.parametrize("settled", [0, 1], ids=["nowhere", "on one node"])
def test_an_analytics_that_dies_between_the_steps(settled: int) -> None:
    with nodes_of(2) as nodes:
        servers = [agent.server for agent in nodes.agents.values()]
        proposal = Proposal(1, Setting("feed", 3, encode_value(0.2)), final=False, last_accepted=0)
        for server in servers:
            assert server.propose(proposal).accepts
        for server in servers[:settled]:
            server.settle(1, True)
        for server in servers:
            server.abandon("the analytics has died")
        waiting = nodes.in_thread(nodes.bridges[1].get, "feed", 3, 0.1)
        wait_until(lambda: asked_there(servers[1]._store.feedback, "feed", 3), "a bridge asks")
        assert not waiting.done()
        states = [server.take_over("another").feedback for server in servers]
        heir = Nodes(nodes.agents, new_settings())
        heir.feedback.set("feed", 0.3, 4)
        heir.feedback.resume(list(nodes.agents), states)
        answer = 0.2 if settled else 0.1
        assert waiting.result(PATIENCE_S) == answer
        assert nodes.answers("feed", 3, default=0.1) == [answer] * 2
        assert nodes.answers("feed", 4) == [0.3] * 2


def test_a_call_that_is_interrupted_between_the_steps_sets_nothing() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with nodes_of(2) as nodes:
        nodes.between = interrupt
        with pytest.raises(KeyboardInterrupt):
            nodes.feedback.set("feed", 0.2, 3)
        assert nodes.answers("feed", 3, default=0.1) == [0.1] * 2


def test_all_bridges_get_the_same_answers_while_values_are_set() -> None:
    """Bridges ask, without waiting, for what is set at that moment, sooner or later than others."""
    rounds = 150
    with nodes_of(2, bridges=2) as nodes:
        at_once = threading.Barrier(5)

        def ask(bridge: Bridge) -> list[Any]:
            answers = []
            for timestep in range(rounds):
                at_once.wait(PATIENCE_S)
                answers.append(bridge.get("feed", timestep, "default"))
            return answers

        asking = [nodes.in_thread(ask, bridge) for bridge in nodes.bridges]
        for timestep in range(rounds):
            at_once.wait(PATIENCE_S)
            nodes.feedback.set("feed", [timestep] * 50, timestep)
        answers = [future.result(PATIENCE_S) for future in asking]
        assert all(one == answers[0] for one in answers)
        too_late = nodes.feedback.figures.too_late["feed"]
        assert answers[0].count("default") == too_late
        assert all(answer in ("default", [t] * 50) for t, answer in enumerate(answers[0]))


def test_values_are_whole_while_others_are_written() -> None:
    with nodes_of(1, feedback_memory_mib=9, feedback_queue_size=2) as nodes:
        (bridge,) = nodes.bridges
        done = threading.Event()

        def write() -> None:
            for timestep in range(60):
                nodes.feedback.set("field", np.full(500_000, timestep), timestep)
            done.set()

        writing = nodes.in_thread(write)
        while not done.is_set():
            for timestep, field in bridge.get("field", default=()):
                assert (field == timestep).all()
        writing.result(PATIENCE_S)


# Bridges that are not there.


def test_after_the_end() -> None:
    with nodes_of(1) as nodes:
        (bridge,) = nodes.bridges
        nodes.feedback.set("feed", 0.2, 3)
        nodes.feedback.end()
        with pytest.raises(ClosedError, match=r"set\('feed', timestep=4\): the run has ended"):
            nodes.feedback.set("feed", 0.2, 4)
        assert bridge.get("feed", 3) == 0.2
        bridge.close()
        with pytest.raises(ClosedError, match="bridge 0 is closed"):
            bridge.get("feed", 3)


def test_a_bridge_that_is_switched_off_gets_defaults() -> None:
    for client in CLIENTS.values():
        bridge = client(
            bridge_id=0, arrays_metadata=METADATA, system_metadata={"world_size": 1}, enabled=False
        )
        assert bridge.get("stop", 3, False, wait=PATIENCE_S) is False
        assert bridge.get("stop", default="none") == "none"
        bridge.close()


def _get_in_child(bridge: Bridge, answers: Any) -> None:
    try:
        answers.put(bridge.get("feed", 3))
    except ForkedProcessError as error:
        answers.put(type(error).__name__)


def test_a_forked_child_gets_an_error() -> None:
    with nodes_of(1) as nodes:
        nodes.feedback.set("feed", 0.2, 3)
        forking = multiprocessing.get_context("fork")
        answers = forking.Queue()
        child = forking.Process(target=_get_in_child, args=(nodes.bridges[0], answers))
        child.start()
        assert answers.get(timeout=PATIENCE_S) == "ForkedProcessError"
        child.join(PATIENCE_S)
        assert nodes.answers("feed", 3) == [0.2]


def test_the_pages_of_a_node_without_bridges_agree_to_everything() -> None:
    pages = FeedbackPages("test", replace(FeedbackPlan(), queue_size=2), ())
    assert pages.propose(Proposal(1, Setting("a", 1, b"\0"), final=True, last_accepted=0)).accepts
    assert pages.state.last_accepted == 1
    pages.close()


def test_an_agent_that_was_not_started_refuses() -> None:
    with running() as agent:
        verdict = agent.server.propose(Proposal(1, Setting("a", 1, b"\0"), final=True, last_accepted=0))
        assert "has not been started" in verdict.refusal
