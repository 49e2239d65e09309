"""Bridges without analytics: switched off, or left behind by one that has gone."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest

from deisa.ray._state.events import BridgeClosed, BridgeJoined
from deisa.ray.bridge import Bridge
from deisa.ray.config import Settings, disabled_by_environment
from deisa.ray.errors import (
    AnalyticsLostError,
    AnalyticsStoppedError,
    ClosedError,
    ConfigurationError,
    NoAnalyticsError,
)
from tests.support.patience import PATIENCE_S
from tests.unit.agent import CONSUMER, Agent, Client, descriptors, new_settings, running, settings_with

METADATA = {"a": {"chunk_shape": (4,), "nb_chunks_per_dim": (1,), "chunk_position": (0,), "dtype": float}}


pytestmark = pytest.mark.usefixtures("client")


def without_analytics(client: Client, **more: Any) -> Bridge:
    """Of a session that has none, so that a bridge which is not switched off fails."""
    return client(
        bridge_id=0,
        arrays_metadata=METADATA,
        system_metadata={"world_size": 1},
        settings=new_settings(connect_timeout_s=0.01),
        **more,
    )


def use(bridge: Bridge) -> None:
    """Whatever a simulation does with a bridge."""
    for timestep in range(3):
        bridge.send("a", np.zeros(4), timestep)
        slot = bridge.slot("a", timestep)
        assert slot.shape == (4,) and slot.dtype == float and slot.flags.writeable
        slot[...] = timestep
        bridge.send("a", slot, timestep)
        bridge.advance(timestep)


def test_switched_off(client: Client) -> None:
    before = descriptors()
    with without_analytics(client, enabled=False) as bridge:
        use(bridge)
        assert descriptors() == before
        assert bridge.slot("a", 7) is bridge.slot("a", 7)  # fresh memory at each timestep would be slow
        assert bridge.stats.chunks == 0
    with pytest.raises(ClosedError):
        bridge.send("a", np.zeros(4), 9)


@pytest.mark.parametrize("text", ["1", "true", "ON"])
def test_switched_off_by_the_environment(client: Client, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("DEISA_RAY_DISABLED", text)
    bridge = without_analytics(client)
    use(bridge)
    bridge.close(3)


def test_the_argument_wins(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEISA_RAY_DISABLED", "1")
    with pytest.raises(NoAnalyticsError):
        without_analytics(client, enabled=True)


def test_the_switch_is_checked() -> None:
    assert [disabled_by_environment({"DEISA_RAY_DISABLED": t}) for t in ("0", "", "no", "1")] == [0, 0, 0, 1]
    assert not disabled_by_environment({})
    with pytest.raises(ConfigurationError, match="DEISA_RAY_DISABLED='maybe': use 1 or 0"):
        disabled_by_environment({"DEISA_RAY_DISABLED": "maybe"})


def test_the_policy_is_checked() -> None:
    with pytest.raises(
        ConfigurationError, match="on_analytics_lost is 'hope'; it must be one of wait, continue, raise"
    ):
        Settings(on_analytics_lost="hope")


def opened(agent: Agent, policy: str) -> Bridge:
    opening = agent.open_bridge(0, 1, METADATA, settings_with(agent, on_analytics_lost=policy))
    agent.wait(BridgeJoined)
    agent.start({"a": 2})
    return opening.result(PATIENCE_S)


def test_going_on_without(caplog: pytest.LogCaptureFixture) -> None:
    with running() as agent:
        bridge = opened(agent, "continue")
        bridge.send("a", np.zeros(4), 0)
        agent.server.abandon("the analytics has died")
        with caplog.at_level(logging.WARNING):
            use_later = [bridge.send("a", np.zeros(4), t) for t in range(1, 100)]
        assert use_later == [None] * 99
        assert "bridge 0 goes on without analytics: the analytics has died" in caplog.text
        bridge.close(100)


def test_raising() -> None:
    with running() as agent:
        bridge = opened(agent, "raise")
        agent.server.abandon("the analytics has died")
        for timestep in range(2):
            with pytest.raises(AnalyticsLostError, match="the analytics has died"):
                bridge.send("a", np.zeros(4), timestep)


def test_waiting() -> None:
    """Slots can still be filled; then the bridge waits, and goes on when there is an analytics again."""
    with running() as agent:
        bridge = opened(agent, "wait")
        agent.server.abandon("the analytics has died")
        for timestep in range(2):
            bridge.send("a", np.zeros(4), timestep)
        third = agent.in_thread(bridge.send, "a", np.zeros(4), 2)
        state = agent.server.take_over("another")
        assert sorted(state.held["a"].held) == [0, 1]
        agent.server.release(CONSUMER, [("a", 0)])
        third.result(PATIENCE_S)
        bridge.close()


def test_closing_after_the_analytics_was_lost() -> None:
    """Another analytics learns that this was all, and that the bridge was not lost."""
    with running() as agent:
        bridge = opened(agent, "raise")
        bridge.send("a", np.zeros(4), 0)
        agent.server.abandon("the analytics has died")
        with pytest.raises(AnalyticsLostError):
            bridge.send("a", np.zeros(4), 1)
        bridge.close()
        agent.server.take_over("another")
        closed = agent.server.take_over("a third one").since
        assert [type(event) for event in closed] == [BridgeClosed]


def test_an_analytics_that_dies_after_it_has_ended_the_run() -> None:
    """Its agents end: nobody is to take the run over."""
    with running() as agent:
        line = agent.follow()
        bridge = opened(agent, "wait")
        agent.server.dismiss(AnalyticsStoppedError("it has seen enough"))
        with pytest.raises(AnalyticsStoppedError, match="it has seen enough"):
            bridge.send("a", np.zeros(4), 0)
        late = agent.open_bridge(0, 1, METADATA, settings_with(agent, connect_timeout_s=0.5))
        assert "is just ending its run, and no other analytics" in str(late.exception(PATIENCE_S))
        line.close()
        assert agent.server.closed.wait(PATIENCE_S)
