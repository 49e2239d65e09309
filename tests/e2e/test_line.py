"""How the analytics hears of its own node: over its line to the agent, or by polls where there is none."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from deisa.ray import DeisaArray, Settings
from deisa.ray._engine import ray_agents, ray_polls
from deisa.ray._engine.ray_polls import Polls
from deisa.ray._state.events import Event
from deisa.ray.errors import AgentLostError, AnalyticsLostError
from tests.e2e.simulation import QUICK_TO_GIVE_UP, Site, ranks, rows, values
from tests.support.patience import PATIENCE_S, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture
def site(session_name: str) -> Any:
    site = Site("ray", Settings(session=session_name, **QUICK_TO_GIVE_UP))
    yield site
    site.close()


def no_line(*arguments: Any, **named: Any) -> None:
    raise ConnectionRefusedError("another network namespace")


@pytest.mark.parametrize("reached", [True, False], ids=["line", "polls"])
def test_events_of_the_own_node(site: Site, reached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node is polled only where it cannot be reached."""
    told: list[int] = []
    take = Polls._take

    def count(polls: Polls, node_id: str, actor: Any, answer: Any) -> None:
        told.append(len(answer.result()))
        take(polls, node_id, actor, answer)

    monkeypatch.setattr(Polls, "_take", count)
    if not reached:
        monkeypatch.setattr(ray_agents, "AnalyticsLine", no_line)
    heard: list[Event] = []
    hear = ray_agents.RayAgents._hear

    def note(agents: ray_agents.RayAgents, node_id: str, events: Sequence[Event]) -> None:
        heard.extend(events)
        hear(agents, node_id, events)

    monkeypatch.setattr(ray_agents.RayAgents, "_hear", note)
    seen: dict[int, float] = {}
    deisa = site.deisa()

    @deisa.register("x")
    def add_up(x: list[DeisaArray]) -> None:
        seen[x[-1].t] = x[-1].sum().compute()

    with ranks(*(partial(site.send_rows, rank, 2, range(6)) for rank in range(2))):
        deisa.execute_callbacks()
    assert seen == {t: values((8,), t).sum() for t in range(6)}
    assert len(heard) >= 6 and bool(told) != reached


def test_releases_ride_on_polls(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here ranks have two other slots, and each complete timestep causes a poll; the last release goes without one."""
    monkeypatch.setattr(ray_agents, "AnalyticsLine", no_line)
    monkeypatch.setattr(ray_polls, "RIDE_S", PATIENCE_S)
    monkeypatch.setattr(ray_polls, "POLL_S", PATIENCE_S)
    own_calls: list[tuple[str, int]] = []
    call_release = Polls._call_release

    def count(polls: Polls, node_id: str, steps: Sequence[tuple[str, int]]) -> None:
        own_calls.extend(steps)
        call_release(polls, node_id, steps)

    monkeypatch.setattr(Polls, "_call_release", count)
    deisa = site.deisa(max_simulation_ahead=2)
    handled = threading.Semaphore(0)
    seen: list[int] = []

    @deisa.register("x")
    def note(x: list[DeisaArray]) -> None:
        seen.append(x[-1].t)
        handled.release()

    def send_in_step() -> None:
        with site.bridge(0, 1, {"x": rows(0, 1)}) as bridge:
            for timestep in range(8):
                bridge.send("x", values((4,), timestep), timestep)
                handled.acquire()
                wait_until(lambda: not deisa._session.leases.live(), "it is released")
            assert not own_calls
            monkeypatch.setattr(ray_polls, "RIDE_S", 0.1)
            bridge.send("x", values((4,), 8), 8)
            handled.acquire()
            polls = deisa._engine.agents._polls  # type: ignore[attr-defined]
            wait_until(lambda: not (deisa._session.leases.live() or polls._releases), "it is released")

    with ranks(send_in_step):
        deisa.execute_callbacks()
    assert seen == list(range(9))


def test_a_line_that_breaks_ends_the_run(site: Site) -> None:
    """The agent cannot know whether its analytics lives; ranks hear that there is none."""
    deisa = site.deisa()

    @deisa.register("x")
    def break_line(x: list[DeisaArray]) -> None:
        deisa._engine.agents._line._socket.shutdown(socket.SHUT_RDWR)  # type: ignore[attr-defined]

    with ranks(partial(site.send_rows, 0, 1, range(100))) as simulation:
        with pytest.raises(
            AgentLostError, match=r"the connection to it has ended .* though its process lives"
        ):
            deisa.execute_callbacks()
        (error,) = simulation.errors()
        assert isinstance(error, (AnalyticsLostError, AgentLostError))
        simulation.errors().clear()
