"""The seam between deciding and doing: what an engine must offer, and the events it passes on."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from deisa.ray._graph.leaves import AgentAddress
from deisa.ray._graph.scheduler import BundleExecutor
from deisa.ray._state.events import Event
from deisa.ray._state.feedback import Proposal, Verdict
from deisa.ray._state.journal import Journal
from deisa.ray._state.plan import NodePlan, StartPlan
from deisa.ray._state.takeover import NodeSnapshot, Wreck
from deisa.ray.errors import DeisaError


class AgentGroup(Protocol):
    """The agents of one session, one for each node.

    Attributes
    ----------
    predecessor : mapping of str to NodeSnapshot
        Once open: by node, what the agents of an analytics that died still hold; empty where there was none.
    """

    predecessor: Mapping[str, NodeSnapshot]

    def open(self) -> None:
        """Start the agents, or take them over."""

    def clear_away(self, wreck: Wreck) -> None:
        """End the agents of an analytics that died, with what they hold, and start others."""

    def follow(self, callbacks: int) -> Journal | None:
        """A journal of so many callbacks, in memory that outlives this process; None where there is none."""

    def events(self, timeout_s: float) -> list[tuple[str, Event]]:
        """Wait for events of any node, as (node, event) in each node's order; empty after `timeout_s`."""

    def address(self, node_id: str) -> AgentAddress:
        """Where readers on a node find its agent."""

    def report_progress(self, text: str) -> None:
        """Tell the waiting ranks what the analytics waits for."""

    def positions(self) -> Mapping[int, float]:
        """The timestep that each bridge is at which has not closed, as far as its agent answers soon."""

    def cpus(self) -> Mapping[str, int]:
        """CPUs that bundles may use, by node."""

    def bound_bytes(self, plan: StartPlan, nodes: Mapping[str, NodePlan]) -> Mapping[str, int]:
        """Chunk memory that each node needs; raises `MemoryBoundError` where it does not fit."""

    def start(self, plan: StartPlan, nodes: Mapping[str, NodePlan]) -> None:
        """Create the slots and let the ranks go."""

    def release(self, consumer: str, steps: Mapping[str, Sequence[tuple[str, int]]]) -> None:
        """End leases on (array, timestep) pairs, by node; does not wait."""

    def propose(self, proposal: Proposal, nodes: Collection[str]) -> Mapping[str, Verdict]:
        """Ask nodes whether a value can be set for the simulation; raises `AgentLostError` if one does not answer."""

    def settle(self, number: int, is_accepted: bool, nodes: Collection[str]) -> None:
        """Tell nodes what has become of a proposal, and wait until all know; raises as `propose` does."""

    def finish(self, timestep: int, nodes: Collection[str]) -> None:
        """Tell nodes that no callback can run for a timestep, or one before, any more; does not wait."""

    def dismiss(self, error: DeisaError) -> None:
        """Tell the ranks that the run ends; chunks that have arrived stay until `close`. Does not wait."""

    def close(self, error: DeisaError | None) -> None:
        """End the session on every node; ranks that are still there learn `error`."""

    def abandon(self, error: DeisaError) -> None:
        """Go, and leave the agents to another analytics if they can outlive this one."""


class Engine(Protocol):
    """Agents and a place to run bundles."""

    agents: AgentGroup
    executor: BundleExecutor
