"""The analytics that had the session before and died, and how this one goes on with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from deisa.ray._session.engine import AgentGroup
from deisa.ray._session.registration import Bridges
from deisa.ray._state import events
from deisa.ray._state.events import Event
from deisa.ray._state.feedback import FeedbackState
from deisa.ray._state.journal import Handled, merge_journals
from deisa.ray._state.plan import StartPlan
from deisa.ray._state.takeover import NodeSnapshot, Resumption, find_wreck, resume
from deisa.ray.config import Settings
from deisa.ray.errors import AgentLostError

logger = logging.getLogger("deisa.ray")


@dataclass(frozen=True, slots=True)
class Predecessor:
    """What the agents of an earlier analytics that died still hold; nothing where there was none.

    Attributes
    ----------
    nodes : mapping of str to NodeSnapshot
        What each node holds.
    since : tuple of (str, Event)
        What has happened since the nodes were asked, as (node, event).
    """

    nodes: Mapping[str, NodeSnapshot] = field(default_factory=dict)
    since: tuple[tuple[str, Event], ...] = ()

    @property
    def plan(self) -> StartPlan | None:
        """What it had started the session with; None where it had not, or there was none."""
        return next((node.plan for node in self.nodes.values() if node.plan is not None), None)

    @property
    def waiting_bridges(self) -> set[int]:
        """The bridges that it had registered, if it had not started the session."""
        if self.plan is not None:
            return set()
        return {event.bridge_id for node in self.nodes.values() for event in node.joined}

    @property
    def handled(self) -> tuple[Handled, ...]:
        """What each callback has handled."""
        return merge_journals(node.handled for node in self.nodes.values())

    @property
    def feedback(self) -> tuple[FeedbackState, ...]:
        """What each node says of the values that it had set."""
        return tuple(node.feedback for node in self.nodes.values())

    def register(self, bridges: Bridges) -> None:
        """Register the bridges of a session that it had started.

        Raises
        ------
        AgentLostError
            When some of them went with their agents, or not every agent was started.
        """
        if self.plan is None:
            return
        for node_id, node in self.nodes.items():
            for event in node.joined:
                bridges.register(node_id, event)
        unstarted = [node_id for node_id, node in self.nodes.items() if node.plan is None]
        if unstarted or not bridges.complete:
            what = (
                "it died while it started the session"
                if unstarted
                else f"{bridges.missing} went with their agents"
            )
            raise AgentLostError(f"the session of an analytics that died cannot go on: {what}")

    def resumption(self, session: str) -> Resumption:
        """Return the leases to end, and all that the agents still hold as events, in the order in which they count."""
        resumed = resume({node_id: node.held for node_id, node in self.nodes.items()})
        logger.warning(
            "taking over session %r from an analytics that has gone: %d complete timesteps of its arrays are held",
            session,
            len({(e.array, e.timestep) for _, e in resumed.events if isinstance(e, events.StepComplete)}),
        )
        told = [(node_id, event) for node_id, node in self.nodes.items() for event in node.since]
        losses = (events.BridgeLost, events.StepTorn, events.TimesDiffer)
        dtypes = [(n, e) for n, e in told if isinstance(e, events.DtypeDeclared)]
        others = [(n, e) for n, e in told if not isinstance(e, (events.DtypeDeclared, *losses))]
        lost = [(n, e) for n, e in told if isinstance(e, losses)]
        return Resumption((*dtypes, *resumed.events, *others, *lost, *self.since), resumed.releases)


def find_predecessor(agents: AgentGroup, settings: Settings) -> Predecessor:
    """See what is there to go on with, after what has been lost since the agents were opened.

    A session that cannot go on is cleared away, unless `leftover` says otherwise.
    """
    predecessor = Predecessor(agents.predecessor)
    if predecessor.plan is None:
        return predecessor
    since = tuple(agents.events(0))
    lost = [(n, e) for n, e in since if isinstance(e, events.BridgeLost) and n in predecessor.nodes]
    nodes = {
        node_id: replace(node, since=(*node.since, *(e for n, e in lost if n == node_id)))
        for node_id, node in predecessor.nodes.items()
    }
    wreck = find_wreck(nodes)
    if wreck is not None and settings.leftover == "drop":
        agents.clear_away(wreck)
        return Predecessor(agents.predecessor)
    return Predecessor(predecessor.nodes, since)
