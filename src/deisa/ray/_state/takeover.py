"""How an analytics goes on where another one of its session has died.

The agents outlive the analytics: they hold the chunks, and know what has arrived. The one that takes over asks every
agent what it still holds and hears it again as if it had just arrived. Two things must not be taken for what
they seem:

- Leases end on one node earlier than on another. A timestep that one node has given back already is no
  timestep of which that node's part is still to come: the other nodes' parts are given back too.
- What a callback had handled is still held as long as a later window needs it. So each callback notes in
  a journal, memory that outlives the analytics, the last timestep that it has handled.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from deisa.ray._state.events import BridgeJoined, BridgeLost, Event, OwnersPassed, StepComplete
from deisa.ray._state.feedback import FeedbackState
from deisa.ray._state.journal import NOTHING_HANDLED, Handled, merge_journals
from deisa.ray._state.naming import missing_bridges
from deisa.ray._state.plan import StartPlan


@dataclass(frozen=True, slots=True)
class HeldArray:
    """What one node knows of an array.

    Attributes
    ----------
    held : dict of int to int
        Timesteps complete there that are still leased, and the slot of each.
    newest : float
        The last timestep that was complete there, leased or not; minus infinity when none was.
    passed : float
        Nothing older than this timestep comes any more; infinity when nothing comes at all.
    times : dict of int to float
        The physical time of each timestep in `held` that has one.
    """

    held: dict[int, int]
    newest: float
    passed: float
    times: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NodeSnapshot:
    """What an agent tells an analytics that takes over.

    Attributes
    ----------
    agent_id : str
    plan : StartPlan or None
        None when the last one had not started the session yet.
    joined : tuple of BridgeJoined
    held : dict of str to HeldArray
    since : tuple of Event
        What else has happened since the start.
    handled : tuple of Handled
        The journal, where the last analytics was on this node.
    feedback : FeedbackState
    """

    agent_id: str
    plan: StartPlan | None
    joined: tuple[BridgeJoined, ...]
    held: dict[str, HeldArray]
    since: tuple[Event, ...]
    handled: tuple[Handled, ...]
    feedback: FeedbackState = field(default_factory=FeedbackState)


@dataclass(frozen=True, slots=True)
class Resumption:
    """What to do first: `events` as (node, event) pairs, and leases to end, as (array, timestep) pairs by node."""

    events: tuple[tuple[str, Event], ...]
    releases: Mapping[str, Sequence[tuple[str, int]]]


def resume(nodes: Mapping[str, Mapping[str, HeldArray]]) -> Resumption:
    """Turn what each node holds of each array into events, and into releases of what is held in part only."""
    events: list[tuple[str, Event]] = []
    releases: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for array in sorted({name for arrays in nodes.values() for name in arrays}):
        owners = {node: arrays[array] for node, arrays in nodes.items() if array in arrays}
        for timestep in sorted({t for owner in owners.values() for t in owner.held}):
            holders = [node for node, owner in owners.items() if timestep in owner.held]
            if any(timestep not in o.held and o.newest >= timestep for o in owners.values()):
                for node in holders:
                    releases[node].append((array, timestep))
            else:
                for node in holders:
                    slot, time = owners[node].held[timestep], owners[node].times.get(timestep)
                    events.append((node, StepComplete(array, timestep, slot, time)))
        for node, owner in owners.items():
            if owner.passed != -math.inf:
                passed = None if owner.passed == math.inf else int(owner.passed)
                events.append((node, OwnersPassed(array, passed)))
    return Resumption(tuple(events), dict(releases))


@dataclass(frozen=True, slots=True)
class Wreck:
    """A session that can't go on: why, and how many of its complete timesteps no callback has handled."""

    why: str
    unhandled: int


def find_wreck(nodes: Mapping[str, NodeSnapshot]) -> Wreck | None:
    """Judge the session of an analytics that died; None where another one can take it over.

    That is so when the simulation lives, or has closed in order. When a rank or an agent was lost as well, nobody will
    ever send the rest.
    """
    started = [state for state in nodes.values() if state.plan is not None]
    if not started:
        return None
    why = ""
    joined = {event.bridge_id: event.world_size for state in nodes.values() for event in state.joined}
    world_size = max(joined.values(), default=1)
    losses = sorted(
        ((e.bridge_id, e) for state in started for e in state.since if isinstance(e, BridgeLost)),
        key=lambda loss: loss[0],
    )
    if losses:
        _, first = losses[0]
        last = (
            "before it sent anything"
            if first.last_timestep is None
            else f"after timestep {first.last_timestep}"
        )
        more = f", and {len(losses) - 1} more" if len(losses) > 1 else ""
        why = f"bridge {first.bridge_id} was lost {last} ({first.reason}){more}"
    elif len(started) < len(nodes):
        why = "its analytics died while it started the session"
    elif len(joined) < world_size:
        why = f"{missing_bridges(joined, world_size)} went with their agents"
    return Wreck(why, count_unhandled(nodes)) if why else None


def count_unhandled(nodes: Mapping[str, NodeSnapshot]) -> int:
    """Count the timesteps that are complete and that some callback has not handled."""
    journal = merge_journals(state.handled for state in nodes.values())
    after = min((handled.timestep for handled in journal), default=NOTHING_HANDLED)
    complete: set[int] = set()
    for array in {name for state in nodes.values() for name in state.held}:
        parts = [set(state.held[array].held) for state in nodes.values() if array in state.held]
        complete |= set.intersection(*parts)
    return sum(timestep > after for timestep in complete)
