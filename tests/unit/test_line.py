"""The connection of an analytics to the agent of its node: events come on it, and releases go."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest

from deisa.ray._state.events import Event, StepComplete
from deisa.ray._transport import messages
from deisa.ray._transport.messages import encode
from tests.support.patience import PATIENCE_S, wait_until
from tests.unit.agent import ANALYTICS, CONSUMER, Agent, running, whole
from tests.unit.test_hand_off import raw


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running() as agent:
        yield agent


def listen(agent: Agent) -> socket.socket:
    line = raw(agent)
    line.sendall(encode(messages.Follow(messages.PROTOCOL_VERSION, ANALYTICS, 1, 1)))
    return line


def hear(line: socket.socket, kind: type[Event]) -> Event:
    frames = messages.FrameBuffer()
    while data := line.recv(65536):
        for message in frames.feed(data):
            if isinstance(message, messages.Events):
                for event in message.events:
                    if isinstance(event, kind):
                        return event
    raise AssertionError("the agent has hung up")


def test_events_come_and_releases_go(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    with listen(agent) as line:
        for timestep in range(3):
            bridge.send("a", np.zeros(4), timestep)  # waits for the slot of the one before
            assert hear(line, StepComplete) == StepComplete("a", timestep, 0)
            released = messages.ReleasedStep("a", timestep)
            line.sendall(encode(messages.Release(CONSUMER, (released,))))
        assert agent.events() == []  # nothing comes twice


def test_the_end_of_the_line_is_the_end_of_the_analytics(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    line = listen(agent)
    assert line.recv(4096)
    line.close()
    wait_until(lambda: agent.server.driver_presence[0] == "gone", "the analytics is taken for gone")
    agent.server.take_over("another")
    bridge.send("a", np.zeros(4), 0)
    assert agent.wait(StepComplete).timestep == 0  # by polls


def test_only_who_follows_may_release(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    bridge.send("a", np.zeros(4), 0)
    agent.wait(StepComplete)
    with raw(agent) as stranger:
        stranger.sendall(encode(messages.Release(CONSUMER, (messages.ReleasedStep("a", 0),))))
        assert b"only an analytics that follows its agent may release" in stranger.recv(4096)


def test_a_release_of_what_is_not_leased_is_refused(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    with listen(agent) as line:
        line.sendall(encode(messages.Release(CONSUMER, (messages.ReleasedStep("a", 7),))))
        while line.recv(4096):
            pass
    agent.server.take_over("another")
    bridge.send("a", np.zeros(4), 0)
    assert agent.wait(StepComplete).timestep == 0


def test_events_for_one_that_does_not_read_wait_in_the_node(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    with listen(agent) as line:
        line.settimeout(PATIENCE_S)
        server = agent.server
        wait_until(lambda: server._subscriber.listens, "the line is there")
        for number in range(100):
            with server._lock:
                server._node.report(StepComplete("x" * 10_000, number, 0))
        wait_until(lambda: server._subscriber.has_news(server._node.log), "some wait")
        (connection,) = [c for c in server._connections if c.number == server._subscriber.line]
        assert len(connection.outgoing) <= 1
        bridge.send("a", np.zeros(4), 0)
        seen: list[int] = []
        frames = messages.FrameBuffer()
        while len(seen) < 101:
            for message in frames.feed(line.recv(2**20)):
                if isinstance(message, messages.Events):
                    seen += [e.timestep for e in message.events if isinstance(e, StepComplete)]
        assert seen[:100] == list(range(100))
