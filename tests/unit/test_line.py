"""The line of an analytics to the agent of its node, with a real agent at its other end."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest

from deisa.ray._state.events import (
    AgentLost,
    BridgeClosed,
    BridgeJoined,
    Event,
    OwnersPassed,
    SendersBlocked,
    StepComplete,
)
from deisa.ray._state.feedback import Asked, Proposal, Setting, Verdict
from deisa.ray._state.journal import Handled
from deisa.ray._state.values import encode_value
from deisa.ray._transport import messages
from deisa.ray._transport.line import AnalyticsLine
from deisa.ray._transport.messages import FrameBuffer, encode
from deisa.ray.bridge import Bridge
from deisa.ray.errors import ProtocolError
from tests.support.patience import PATIENCE_S, wait_until
from tests.unit.agent import CONSUMER, Agent, running, whole
from tests.unit.test_hand_off import raw


class Ear:
    """What comes over a line, in order; and why it has ended, if it has."""

    def __init__(self, line: AnalyticsLine) -> None:
        self.events: list[Event] = []
        self.ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        line.start(self.hear, self.ended.put)

    def hear(self, events: Sequence[Event]) -> None:
        self.events += events

    def wait(self, *expected: type[Event]) -> None:
        """Wait until so many events have come, which must be of these kinds."""
        wait_until(lambda: len(self.events) >= len(expected), f"{expected}")
        assert [type(event) for event in self.events] == list(expected)


@contextmanager
def listening(agent: Agent) -> Iterator[tuple[AnalyticsLine, Ear]]:
    line = agent.follow(listens=True)
    try:
        yield line, Ear(line)
    finally:
        line.close()


def started(agent: Agent, ear: Ear, slots: int = 2) -> Bridge:
    """A bridge with an array of one chunk; what it has joined with has come over the line."""
    opening = agent.open_bridge(0, 1, {"a": whole((4,))})
    wait_until(lambda: ear.events, "the bridge has joined")
    agent.start({"a": slots})
    return opening.result(PATIENCE_S)


def test_events_come_over_the_line_in_order_and_not_in_answers_to_polls() -> None:
    with running() as agent, listening(agent) as (line, ear):
        assert line.agent_id == agent.server.agent_id
        polling = agent.in_thread(agent.server.poll, 0.5)
        bridge = started(agent, ear, slots=3)
        for timestep in range(3):
            bridge.send("a", np.zeros(4), timestep)
        bridge.close()
        ear.wait(BridgeJoined, *[StepComplete] * 3, BridgeClosed, OwnersPassed)
        assert [event.timestep for event in ear.events if isinstance(event, StepComplete)] == [0, 1, 2]
        with agent.server._lock:
            agent.server._node.report(AgentLost("a last one"))
            assert not agent.server.poll(0)
        wait_until(lambda: AgentLost("a last one") in ear.events, "it has come")
        assert not polling.result(PATIENCE_S)


def test_a_released_step_gives_its_slot_back() -> None:
    with running() as agent, listening(agent) as (line, ear):
        bridge = started(agent, ear, slots=1)
        for timestep in range(5):
            bridge.send("a", np.zeros(4), timestep)
            ear.wait(BridgeJoined, *[StepComplete] * (timestep + 1))
            line.release(CONSUMER, [("a", timestep)])
        bridge.close()


def test_nothing_is_lost_or_doubled_where_a_line_takes_over_from_polls() -> None:
    with running() as agent:
        bridge, *_ = agent.bridges({"a": whole((4,))}, slots={"a": 3})
        bridge.send("a", np.zeros(4), 0)
        assert agent.wait(StepComplete).timestep == 0
        bridge.send("a", np.zeros(4), 1)  # while nobody asks
        with listening(agent) as (_, ear):
            bridge.send("a", np.zeros(4), 2)
            ear.wait(StepComplete, StepComplete)
            assert [event.timestep for event in ear.events if isinstance(event, StepComplete)] == [1, 2]
            assert not agent.server.poll(0)
            bridge.close()


def test_a_line_that_does_not_listen_leaves_events_to_polls() -> None:
    with running() as agent:
        line = agent.follow()
        ear = Ear(line)
        agent.open_bridge(0, 1, {"a": whole((4,))})
        assert agent.wait(BridgeJoined).bridge_id == 0
        line.close()
        assert not ear.events and ear.ended.empty()


def test_journals_and_events_share_a_line() -> None:
    with running() as agent, listening(agent) as (line, ear):
        bridge = started(agent, ear)
        journal = line.journal(2)
        bridge.send("a", np.zeros(4), 0)
        ear.wait(BridgeJoined, StepComplete)
        journal.note(1, Handled(8, following=2))
        assert agent.server.take_over("another").handled == (Handled(), Handled(8, 2))
        bridge.close()


def test_an_analytics_that_does_not_read_hears_everything_later() -> None:
    """Meanwhile one message waits in the agent: the others are not made before there is room for them."""
    said = [SendersBlocked("a" * 1000, {0: timestep}) for timestep in range(5000)]
    with running() as agent:
        line = agent.follow(listens=True)
        server = agent.server
        (connection,) = server._connections
        with server._lock:
            for event in said:
                server._node.report(event)
        server._connections.wake()
        wait_until(lambda: connection.outgoing, "the socket is full")
        with server._lock:
            server._node.report(AgentLost("the last one"))
            server._exchange.tell_subscribers()
            assert len(connection.outgoing) == 1
        ear = Ear(line)
        wait_until(lambda: len(ear.events) > len(said), "everything has come")
        assert ear.events == [*said, AgentLost("the last one")]
        line.close()


def test_an_agent_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as agent, listening(agent) as (_, ear):

        def fail() -> None:
            raise RuntimeError("on purpose")

        monkeypatch.setattr(agent.server._exchange, "look", fail)
        monkeypatch.setattr("threading.excepthook", lambda _: None)
        agent.server._connections.wake()
        assert ear.ended.get(timeout=PATIENCE_S) == "the agent has hung up"
        assert ear.events == [AgentLost("RuntimeError: on purpose")]


def test_a_line_that_breaks_says_so_and_leaves_what_was_not_heard_to_another_analytics() -> None:
    with running() as agent, listening(agent) as (line, ear):
        bridge = started(agent, ear)
        bridge.send("a", np.zeros(4), 0)
        ear.wait(BridgeJoined, StepComplete)
        line.release(CONSUMER, [("a", 5)])
        reason = ear.ended.get(timeout=PATIENCE_S)
        assert reason == f"'{CONSUMER}' has no lease on array 'a' at timestep 5"
        wait_until(lambda: agent.server.driver_presence[0] == "gone", "the agent knows")
        assert list(agent.server.take_over("another").held["a"].held) == [0]
        with pytest.raises((ProtocolError, OSError)):
            line.journal(1)
        line.release(CONSUMER, [("a", 0)])  # of which nobody hears
        bridge.close()


def test_the_end_of_the_line_is_the_end_of_the_analytics() -> None:
    with running() as agent:
        bridge, *_ = agent.bridges({"a": whole((4,))}, slots={"a": 1})
        agent.follow(listens=True).close()
        wait_until(lambda: agent.server.driver_presence[0] == "gone", "the analytics is taken for gone")
        agent.server.take_over("another")
        bridge.send("a", np.zeros(4), 0)
        assert agent.wait(StepComplete).timestep == 0  # by polls
        bridge.close()


def test_only_a_line_that_the_analytics_has_closed_ends_without_a_word() -> None:
    with running() as agent:
        first, second = agent.follow(listens=True), agent.follow(listens=True)
        ears = Ear(first), Ear(second)
        first.close()
        agent.close()
        assert ears[1].ended.get(timeout=PATIENCE_S) == "the agent has hung up"
        assert ears[0].ended.empty()
        second.close()


def test_nobody_else_gets_a_line() -> None:
    with running() as agent:
        agent.server.take_over("another")
        with pytest.raises(ProtocolError, match="only the analytics itself may follow its agent"):
            agent.follow(listens=True)


def test_only_who_follows_may_release() -> None:
    with running() as agent:
        bridge, *_ = agent.bridges({"a": whole((4,))}, slots={"a": 1})
        bridge.send("a", np.zeros(4), 0)
        agent.wait(StepComplete)
        with raw(agent) as stranger:
            stranger.sendall(encode(messages.Release(CONSUMER, (messages.ReleasedStep("a", 0),))))
            assert b"only an analytics that follows its agent may release" in stranger.recv(4096)
        bridge.close()


def test_events_may_be_longer_than_what_a_bridge_said() -> None:
    message = messages.Events((AgentLost("x" * (messages.MAX_MESSAGE_BYTES + 1)),))
    frame = encode(message)
    assert list(FrameBuffer(messages.Events.most_bytes).feed(frame)) == [message]
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        list(FrameBuffer().feed(frame))


def test_values_are_proposed_over_the_line() -> None:
    with running() as agent, listening(agent) as (line, ear):
        bridge = started(agent, ear)
        for number, timestep in enumerate((3, 4), 1):
            line.propose(Proposal(number, Setting("feed", timestep, encode_value(0.5)), number == 1, 1))
            assert line.verdict(number, PATIENCE_S) == Verdict()
        line.settle(2, True)
        assert bridge.get("feed", 4) == 0.5
        line.propose(Proposal(3, Setting("feed", 3, encode_value(0.7)), True, 2))
        assert line.verdict(3, PATIENCE_S) == Verdict(Asked(0, 4))
        line.finish(7)
        assert bridge.get("feed", 7, "default", wait=PATIENCE_S) == "default"
        bridge.close()


def test_the_answer_to_an_earlier_proposal_is_passed_over() -> None:
    with running() as agent, listening(agent) as (line, ear):
        bridge = started(agent, ear)
        for number in (1, 2):
            line.propose(Proposal(number, Setting("feed", number, encode_value(number)), True, 0))
        assert line.verdict(2, PATIENCE_S) == Verdict()
        assert line.verdict(3, 0.0) is None
        bridge.close()
        agent.close()
        ear.ended.get(timeout=PATIENCE_S)
        assert line.verdict(3, PATIENCE_S) is None


def test_only_the_analytics_may_steer() -> None:
    with running() as agent, listening(agent) as (_, ear):
        bridge = started(agent, ear)
        for message in (
            messages.Propose(1, "feed", 0, encode_value(1), 1, 0),
            messages.Settle(1, 1),
            messages.Finish(9),
        ):
            with raw(agent) as peer:
                peer.sendall(encode(message))
                (answer,) = FrameBuffer().feed(peer.recv(65536))
                assert isinstance(answer, messages.Fail)
                assert "may steer" in answer.text
        assert bridge.get("feed", 0) is None
        bridge.close()
