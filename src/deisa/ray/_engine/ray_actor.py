"""NodeAgent: the actor in which a node's agent runs, and how an analytics finds those of its session."""

from __future__ import annotations

import logging
import os
import pickle
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deisa.ray._state.presence import State
from deisa.ray._state.takeover import NodeSnapshot
from deisa.ray._transport.descriptor_limit import raise_descriptor_limit
from deisa.ray._transport.server import AgentServer
from deisa.ray.config import Settings
from deisa.ray.errors import MEMORY_MONITOR, DeisaError, SessionError

logger = logging.getLogger("deisa.ray")

NAMESPACE = "deisa-ray"
AGENT_CALLS = 8  # calls an agent serves at once: a long poll, and the short ones beside it
OPEN_TIMEOUT_S = 120.0
_IF_LOST = f"the node's memory is nearly full ({MEMORY_MONITOR})"
LINGER_S = 2.0  # that an agent which has ended stays for a last answer, if anyone asked


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=AGENT_CALLS)
class NodeAgent:
    """The actor around a node's `AgentServer`. It is detached, and ends itself when left alone."""

    def __init__(self, settings: Settings, run_id: str, node_id: str, driver_id: str, holder: str) -> None:
        self._identity = (settings, run_id, node_id, driver_id, holder)
        self._server: AgentServer | None = None
        self._opening = threading.Event()
        threading.Thread(target=self._end_unopened, daemon=True).start()

    def _end_unopened(self) -> None:
        """End where the analytics died in between: nobody else would ever call a detached actor."""
        if not self._opening.wait(OPEN_TIMEOUT_S):
            os._exit(0)

    def open(self) -> tuple[str, bool]:
        """Start serving; returns the agent's id, and whether ranks of this host come to it."""
        self._opening.set()
        raise_descriptor_limit()
        self._server = AgentServer(*self._identity, if_lost=_IF_LOST)
        threading.Thread(target=self._end_with_server, args=(self._server,), daemon=True).start()
        return self._server.agent_id, self._server.serving

    @staticmethod
    def _end_with_server(server: AgentServer) -> None:
        server.closed.wait()
        time.sleep(LINGER_S)
        os._exit(0)

    def call(self, driver_id: str, method: str, *arguments: Any) -> Any:
        """Pass a call on to the server, if it comes from the analytics that the server serves."""
        return self._opened.call(driver_id, method, arguments)

    def poll(
        self, driver_id: str, timeout_s: float, consumer: str = "", steps: Sequence[tuple[str, int]] = ()
    ) -> bytes:
        """End leases, and wait for events; they are pickled here because Ray takes longer over anything but bytes."""
        if steps:
            self.call(driver_id, "release", consumer, steps)
        return pickle.dumps(self.call(driver_id, "poll", timeout_s))

    def driver_presence(self) -> tuple[State, float, str]:
        """Say whether the analytics is there, for one that would take over."""
        return self._opened.driver_presence

    def take_over(self, driver_id: str, holder: str) -> NodeSnapshot:
        """Serve another analytics from now on."""
        return self._opened.take_over(driver_id, holder)

    @property
    def _opened(self) -> AgentServer:
        if self._server is None:
            raise SessionError("the agent has not been opened")
        return self._server


def start_agent(settings: Settings, run_id: str, node_id: str, driver_id: str, holder: str) -> Any:
    """Start the actor on a node; its arguments are those of `AgentServer`."""
    return NodeAgent.options(  # type: ignore[attr-defined]
        name=f"{settings.session}:{node_id}:{driver_id}",
        namespace=NAMESPACE,
        lifetime="detached",
        enable_task_events=False,  # Ray's head would keep a record of every call
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
    ).remote(settings, run_id, node_id, driver_id, holder)


def agents_of_session(session: str) -> dict[str, Any]:
    """The agents by name; a node may have several, if an analytics died while it started."""
    found = {}
    for named in ray.util.list_named_actors(all_namespaces=True):
        if named["namespace"] == NAMESPACE and named["name"].partition(":")[0] == session:
            with suppress(ValueError):  # it has just ended
                found[named["name"]] = ray.get_actor(named["name"], NAMESPACE)
    return found


def node_of(name: str) -> str:
    """The node that an agent of that name serves."""
    return name.split(":")[1]


def answers(calls: Mapping[str, Any], timeout_s: float = OPEN_TIMEOUT_S) -> dict[str, Any]:
    """The answers to calls, by node, without those that failed or did not come in time."""
    answered = {}
    there, _ = (
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
    )
    for node_id, call in calls.items():
        if call in there:
            try:
                answered[node_id] = ray.get(call)
            except (RayError, DeisaError) as error:
                logger.debug("the agent of node %s: %s", node_id, error)
    return answered
