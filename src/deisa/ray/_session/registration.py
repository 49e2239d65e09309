"""The bridges of a session as they register, and the wait until all have."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection

from deisa.ray._session.end_request import EndRequest
from deisa.ray._session.engine import AgentGroup
from deisa.ray._session.mpi_job import explain_missing, place_in_job
from deisa.ray._state import events
from deisa.ray._state.events import BridgeJoined, Event
from deisa.ray._state.layout import ArrayLayout, check_bridge_ids, resolve_layout
from deisa.ray._state.naming import missing_bridges, name_bridges, two_programs
from deisa.ray.config import Settings
from deisa.ray.errors import AgentLostError, BridgeLostError, LayoutError, WaitTimeoutError
from deisa.ray.report import SHOWN_NODE_ID

logger = logging.getLogger("deisa.ray")

EVENTS_TIMEOUT_S = 0.5
TELL_EVERY_S = 0.5  # at most so often the waiting ranks are told whom the analytics waits for
LATECOMERS_S = 2.0


class Bridges:
    """The bridges that have registered, and the node of each.

    Parameters
    ----------
    session : str
    inherited : collection of int
        Bridges that an analytics which died had registered, without starting the session. When one of these goes,
        another one may still come in its place.

    Attributes
    ----------
    world_size : int or None
        How many bridges there have to be; None until the first one has registered.
    """

    def __init__(self, session: str, inherited: Collection[int] = ()) -> None:
        self.world_size: int | None = None
        self._session = session
        self._inherited = set(inherited)
        self._joined: dict[int, tuple[str, BridgeJoined]] = {}

    def __len__(self) -> int:
        return len(self._joined)

    @property
    def complete(self) -> bool:
        """Whether all have registered."""
        return len(self._joined) == self.world_size

    @property
    def missing(self) -> str:
        """Names those that have not registered, as far as that is known."""
        return missing_bridges(self._joined, self.world_size or 1)

    @property
    def waiting_for(self) -> str:
        """Says whom the session waits for, and why they may be missing."""
        if self.world_size is None:
            waiting = f"waiting for the first bridge of session {self._session!r}"
        else:
            waiting = f"waiting for {self.missing}"
        return waiting + explain_missing(self._joined, self.world_size, place_in_job())

    @property
    def nodes(self) -> set[str]:
        """The nodes that have bridges."""
        return {node_id for node_id, _ in self._joined.values()}

    def node_of(self, bridge_id: int) -> str:
        """Return the node of a bridge."""
        return self._joined[bridge_id][0]

    def layouts(self) -> dict[str, ArrayLayout]:
        """Check that the descriptions of all bridges fit together, and return the arrays.

        Raises
        ------
        LayoutError
        """
        return resolve_layout({bridge_id: joined.arrays for bridge_id, (_, joined) in self._joined.items()})

    def register(self, node_id: str, event: Event) -> None:
        """Take in what a node tells before the session starts.

        Raises
        ------
        LayoutError, BridgeLostError, AgentLostError
        """
        match event:
            case events.BridgeJoined():
                self._join(node_id, event)
            case events.BridgeLost(bridge_id, _, reason) if bridge_id in self._inherited:
                logger.warning("bridge %d of the run before has gone: %s", bridge_id, reason)
                self._inherited.discard(bridge_id)
                del self._joined[bridge_id]
                self.world_size = self.world_size if self._joined else None
            case events.BridgeLost(bridge_id, _, reason):
                raise BridgeLostError(f"bridge {bridge_id} left before the session started: {reason}")
            case events.AgentLost(reason):
                self.lose_agent(node_id, reason)

    def _join(self, node_id: str, event: BridgeJoined) -> None:
        bridge_id, world_size = event.bridge_id, event.world_size
        fits = self.world_size in (None, world_size) and 0 <= bridge_id < world_size
        same = self._joined.get(bridge_id)
        if same is not None or not fits:
            _, other = same or next(iter(self._joined.values()), (node_id, event))
            known = [(b, joined.world_size) for b, (_, joined) in self._joined.items()]
            try:
                check_bridge_ids([*known, (bridge_id, world_size)])
            except LayoutError as error:
                raise type(error)(f"{error}{_origins(other, event, self._session)}") from None
        self._joined[bridge_id] = (node_id, event)
        self.world_size = world_size

    def lose_agent(self, node_id: str, reason: str) -> None:
        """Note that the agent of a node has gone; raises `AgentLostError` if it had bridges."""
        ranks = sorted(bridge_id for bridge_id, (node, _) in self._joined.items() if node == node_id)
        if ranks:
            raise AgentLostError(
                f"the agent of node {node_id[:SHOWN_NODE_ID]}, with {name_bridges(ranks)}, has gone: {reason}"
            )
        logger.warning("the agent of node %s, which has no bridges, has gone: %s", node_id, reason)


def wait_registered(bridges: Bridges, agents: AgentGroup, settings: Settings, end: EndRequest) -> bool:
    """Wait until all bridges have registered; tells those that have whom the others are.

    Returns
    -------
    bool
        False where the session was stopped.

    Raises
    ------
    LayoutError, WaitTimeoutError, BridgeLostError, AgentLostError, ClosedError
    """
    started = said = time.monotonic()
    told, told_at = "", -math.inf
    while not bridges.complete:
        end.check_open()
        now = time.monotonic()
        if now - started > settings.start_timeout_s:
            raise WaitTimeoutError(
                f"{bridges.waiting_for}; gave up after {settings.start_timeout_s:g} s "
                "(DEISA_RAY_START_TIMEOUT_S sets how long)"
            )
        if now - told_at > TELL_EVERY_S:
            told_at = now
            waiting = bridges.waiting_for
            if waiting != told:
                told = waiting
                agents.report_progress(waiting)
            if now - said > settings.warn_every_s:
                said = now
                logger.warning("%s (%.0f s so far)", waiting, now - started)
        arrived = agents.events(EVENTS_TIMEOUT_S)
        if end.stopped:
            return False
        for node_id, event in arrived:
            try:
                bridges.register(node_id, event)
            except LayoutError:
                _await_latecomers(agents)
                raise
    return True


def _await_latecomers(agents: AgentGroup) -> None:
    """Let the bridges that are just starting connect, so that they too learn what is wrong."""
    deadline = time.monotonic() + LATECOMERS_S
    while time.monotonic() < deadline:
        agents.events(deadline - time.monotonic())


def _origins(one: BridgeJoined, other: BridgeJoined, session: str) -> str:
    """Say which processes two bridges are that don't fit together, and what to do."""
    if one is other:
        return ""
    names = " and ".join(f"bridge {e.bridge_id} is pid {e.pid} on host {e.host}" for e in (one, other))
    one_program = "If both belong to one program, give each a bridge_id of its own"
    return f" ({names}). {one_program}. If not, {two_programs(session)}"
