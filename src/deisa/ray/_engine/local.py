"""The engine without Ray: one agent and every bundle in this process."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deisa.ray._graph.bundles import Bundle
from deisa.ray._graph.execute import Picks, pick, run_bundle, threads_that_pay
from deisa.ray._graph.leaves import AgentAddress, GroupHere, Handle, StepSlots
from deisa.ray._graph.scheduler import BundleStats
from deisa.ray._graph.work import PackedWork, Work, independent, pack_work
from deisa.ray._state.events import Event
from deisa.ray._state.feedback import Proposal, Verdict
from deisa.ray._state.plan import NodePlan, StartPlan
from deisa.ray._state.takeover import NodeSnapshot, Wreck
from deisa.ray._transport.address import agent_address, this_process
from deisa.ray._transport.server import AgentServer
from deisa.ray.config import Settings
from deisa.ray.errors import DeisaError

NODE_ID = "local"
_AS_IN_A_WORKER: Any = {
    "divide": "warn",
    "over": "warn",
    "under": "ignore",
    "invalid": "warn",
}  # NumPy's defaults


class LocalEngine:
    """Everything in this process: for tests, for one node, and for stepping through a callback."""

    def __init__(self, settings: Settings) -> None:
        self.agents = LocalAgents(settings)
        self.executor = LocalExecutor(settings)


class LocalAgents:
    """The one agent of this host."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._server: AgentServer | None = None
        self.predecessor: Mapping[str, NodeSnapshot] = {}  # none: an agent here ends with its analytics

    @property
    def _agent(self) -> AgentServer:
        if self._server is None:
            raise RuntimeError("the agent has not been opened")
        return self._server

    def open(self) -> None:
        """Start the agent."""
        self._server = AgentServer(
            self._settings, uuid.uuid4().hex, NODE_ID, holder=this_process(), ends_alone=False
        )

    def clear_away(self, wreck: Wreck) -> None:
        """Do nothing: an agent here ends with its analytics."""

    def events(self, timeout_s: float) -> list[tuple[str, Event]]:
        """Wait for events."""
        return [(NODE_ID, event) for event in self._agent.poll(timeout_s)]

    def address(self, node_id: str) -> AgentAddress:
        """Where readers find the agent."""
        return AgentAddress(node_id, self._agent.agent_id, agent_address(self._settings))

    def report_progress(self, text: str) -> None:
        """Tell the waiting ranks what the analytics waits for."""
        self._agent.report_progress(text)

    def positions(self) -> Mapping[int, float]:
        """The timestep that each bridge is at which has not closed."""
        return self._agent.positions()

    def cpus(self) -> Mapping[str, int]:
        """Threads that a bundle here uses."""
        return {NODE_ID: self._settings.threads_per_bundle or 1}

    def bound_bytes(self, plan: StartPlan, nodes: Mapping[str, NodePlan]) -> Mapping[str, int]:
        """Chunk memory needed."""
        return {NODE_ID: self._agent.bound_bytes(plan, nodes.get(NODE_ID, NodePlan()))}

    def start(self, plan: StartPlan, nodes: Mapping[str, NodePlan]) -> None:
        """Create the slots and let the ranks go."""
        self._agent.start(plan, nodes.get(NODE_ID, NodePlan()))

    def release(self, consumer: str, steps: Mapping[str, Sequence[tuple[str, int]]]) -> None:
        """End leases."""
        for node_steps in steps.values():
            self._agent.release(consumer, node_steps)

    def follow(self, callbacks: int) -> None:
        """No journal: nobody could read it."""

    def propose(self, proposal: Proposal, nodes: Collection[str]) -> Mapping[str, Verdict]:
        """Ask whether a value can be set."""
        return {NODE_ID: self._agent.propose(proposal)}

    def settle(self, number: int, is_accepted: bool, nodes: Collection[str]) -> None:
        """Say what has become of a proposal."""
        self._agent.settle(number, is_accepted)

    def finish(self, timestep: int, nodes: Collection[str]) -> None:
        """Say that a timestep is finished."""
        self._agent.finish(timestep)

    def dismiss(self, error: DeisaError) -> None:
        """Tell the ranks that the run ends."""
        self._agent.dismiss(error)

    def close(self, error: DeisaError | None) -> None:
        """End the session."""
        if self._server is not None:
            self._server.close(error)

    def abandon(self, error: DeisaError) -> None:
        """End the session: the chunks are in this process."""
        self.close(error)


@dataclass(frozen=True, slots=True)
class LocalBundle:
    """A bundle as `LocalExecutor.submit` takes it; `packed` where its tasks must be new ones for each run."""

    bundle: Bundle
    picks: Sequence[Picks]
    packed: PackedWork | None


class LocalExecutor:
    """Runs each bundle when it is submitted, by default in the caller's thread."""

    ships = False  # each graph is planned anew

    def __init__(self, settings: Settings) -> None:
        self._threads = settings.threads_per_bundle or 1
        self._counting = threading.Lock()
        self.stats = BundleStats()

    def nodes(self) -> Sequence[str | None]:
        """Only here."""
        return [None]

    def prepare(self, bundle: Bundle, picks: Sequence[Picks]) -> LocalBundle:
        """Pack what the user's code refers to: it gets a copy, as in a worker process.

        Raises
        ------
        UnpicklableTasksError
        """
        packed = pack_work(Work(bundle.tasks, picks, bundle.outputs, 1))
        return LocalBundle(bundle, picks, None if packed.pure else packed)

    def submit(
        self, prepared: LocalBundle, groups: Sequence[Handle], steps: Mapping[Hashable, StepSlots]
    ) -> list[Handle]:
        """Run a bundle to its end."""
        bundle = prepared.bundle
        values = pick([group.fetch() for group in groups], prepared.picks)
        values.update((key, step.borrowed) for key, step in steps.items())
        threads = threads_that_pay(bundle, self._threads)
        with self._counting:
            self.stats.submitted += 1
        started, run_s = time.perf_counter(), 0.0
        try:
            tasks = bundle.tasks if prepared.packed is None else prepared.packed.unpack(bytes).tasks
            with np.errstate(**_AS_IN_A_WORKER):
                returned = run_bundle(tasks, values, bundle.outputs, threads)
            run_s = time.perf_counter() - started
        finally:
            with self._counting:
                self.stats.ended += 1
                self.stats.run_s += run_s
        return [GroupHere([independent(value) for value in group]) for group in returned]

    def fetch(self, handles: Sequence[Handle]) -> list[Sequence[Any]]:
        """Return groups of values."""
        return [handle.fetch() for handle in handles]

    def wait_ended(self, timeout_s: float) -> bool:
        """Every bundle ends before `submit` returns."""
        return True

    def runs_here(self, prepared: LocalBundle) -> bool:
        """All do: that is what `submit` does."""
        return False

    def run_here(
        self, prepared: LocalBundle, groups: Sequence[Handle], steps: Mapping[Hashable, StepSlots]
    ) -> list[Handle]:
        """Run a bundle to its end."""
        return self.submit(prepared, groups, steps)

    def close(self) -> None:
        """Nothing stands ready."""
