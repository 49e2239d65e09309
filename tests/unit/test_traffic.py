"""How much is said on a node with many ranks: messages and events follow nodes and timesteps, not ranks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from deisa.ray._state.events import Event, OwnersPassed, SendersBlocked, StepComplete
from deisa.ray._transport import connections, messages
from deisa.ray._transport.connections import Connection
from deisa.ray._transport.exchange import Exchange
from deisa.ray._transport.messages import Message
from deisa.ray.bridge import Bridge
from tests.support.patience import PATIENCE_S, wait_until
from tests.unit.agent import Agent, running, whole

RANKS, STEPS = 64, 5


class Traffic:
    """What goes over the connections of an agent, by kind."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.heard: Counter[type[Message]] = Counter()
        self.said: Counter[type[Message]] = Counter()
        handle, queue = Exchange._handle, Connection.queue

        def noting_heard(exchange: Exchange, connection: Connection, message: Message) -> None:
            self.heard[type(message)] += 1
            handle(exchange, connection, message)

        def noting_said(connection: Connection, message: Message, descriptors: Any) -> None:
            self.said[type(message)] += 1
            queue(connection, message, descriptors)

        monkeypatch.setattr(Exchange, "_handle", noting_heard)
        monkeypatch.setattr(connections.Connection, "queue", noting_said)


class Node:
    """An agent with many ranks in threads, and what has gone over its connections since the start."""

    def __init__(self, agent: Agent, bridges: list[Bridge], monkeypatch: pytest.MonkeyPatch) -> None:
        self.agent = agent
        self.bridges = bridges
        self.events: list[Event] = []
        self._pool = ThreadPoolExecutor(RANKS)
        self.traffic = Traffic(monkeypatch)

    def step(self, act: Callable[[Bridge], None]) -> None:
        """Have all ranks act at the same time, and wait until they have."""
        done, _ = wait([self._pool.submit(act, bridge) for bridge in self.bridges], PATIENCE_S)
        assert len(done) == RANKS
        for acted in done:
            acted.result()

    def hear(self, kind: type[Event], count: int) -> None:
        """Wait for so many events of a kind since the start."""
        wait_until(
            lambda: self.events.extend(self.agent.events()) or self.count(kind) >= count,
            f"{count} events {kind.__name__}",
        )

    def count(self, kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in self.events)


@contextmanager
def many_ranks(monkeypatch: pytest.MonkeyPatch, slots: dict[str, int], *unwanted: str) -> Iterator[Node]:
    with running() as agent:
        agent._threads = ThreadPoolExecutor(RANKS)
        arrays = [
            {
                name: whole((RANKS,)) | {"chunk_shape": (1,), "offset": (number,)}
                for name in (*slots, *unwanted)
            }
            for number in range(RANKS)
        ]
        node = Node(agent, agent.bridges(*arrays, slots=slots), monkeypatch)
        yield node
        node._pool.shutdown()


def check(node: Node, steps: int) -> None:
    """At most one message a timestep to the agent, and none from it."""
    heard = node.traffic.heard
    assert set(heard) <= {messages.Notify}
    assert heard[messages.Notify] <= steps
    assert not node.traffic.said


@pytest.mark.parametrize("lent", [False, True], ids=["send", "slot and send"])
def test_sending(monkeypatch: pytest.MonkeyPatch, lent: bool) -> None:
    def send(bridge: Bridge, timestep: int) -> None:
        chunk = bridge.slot("a", timestep) if lent else np.zeros(1)
        chunk[...] = timestep
        bridge.send("a", chunk, timestep)

    with many_ranks(monkeypatch, {"a": STEPS}) as node:
        for timestep in range(STEPS):
            node.step(lambda bridge: send(bridge, timestep))  # noqa: B023
            node.hear(StepComplete, timestep + 1)
        check(node, STEPS)
        assert len(node.events) - node.count(OwnersPassed) == STEPS
        assert node.count(OwnersPassed) <= 1  # that nothing comes before the first


def test_arrays_that_nobody_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(bridge: Bridge, timestep: int) -> None:
        bridge.send("other", np.zeros(1), timestep)
        bridge.send("a", np.zeros(1), timestep)

    with many_ranks(monkeypatch, {"a": STEPS}, "other") as node:
        for timestep in range(STEPS):
            node.step(lambda bridge: send(bridge, timestep))  # noqa: B023
            node.hear(StepComplete, timestep + 1)
        check(node, STEPS)
        assert len(node.events) - node.count(OwnersPassed) == STEPS
        assert node.count(OwnersPassed) <= 1


def test_a_slow_analytics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks wait for each slot; what they wait for is said once for all of them, if they wait for long."""
    with many_ranks(monkeypatch, {"a": 1}) as node:
        ahead = threading.Thread(
            target=lambda: [
                node.step(lambda bridge: bridge.send("a", np.zeros(1), timestep))  # noqa: B023
                for timestep in range(STEPS)
            ]
        )
        ahead.start()
        for timestep in range(STEPS):
            node.hear(StepComplete, timestep + 1)
            if timestep < STEPS - 1:
                rings = node.agent.server._store.rings.values()
                wait_until(lambda: all(ring.is_blocked for ring in rings), "all ranks wait")  # noqa: B023
            node.agent.release(("a", timestep))
        ahead.join(PATIENCE_S)
        assert not ahead.is_alive()
        assert set(node.traffic.heard) <= {messages.Notify}
        assert node.traffic.heard[messages.Notify] <= STEPS
        assert set(node.traffic.said) <= {messages.Progress}  # after a second
        assert node.count(StepComplete) == STEPS
        assert node.count(SendersBlocked) <= STEPS


def test_ranks_that_send_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each timestep is passed by all; one event says so."""
    every = 5

    def act(bridge: Bridge, timestep: int) -> None:
        if timestep % every:
            bridge.advance(timestep)
        else:
            bridge.send("a", np.zeros(1), timestep)

    with many_ranks(monkeypatch, {"a": STEPS}) as node:
        for timestep in range(2 * every + 1):
            node.step(lambda bridge: act(bridge, timestep))  # noqa: B023
        node.hear(StepComplete, 3)
        check(node, 2 * every + 1)
        assert len(node.events) <= 2 * every + 1 + 1
        told = [event.timestep for event in node.events if isinstance(event, OwnersPassed)]
        assert told == sorted(told)
