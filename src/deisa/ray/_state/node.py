"""One node, as its agent decides it: what ranks and subscribers say goes in, what is to be done comes out.

::

    hello, submitted, gone, closed ...     -->  Node  -->  effects: tell, refuse, create memory, grant a slot ...
    connect, release, leave, take over ...               events: what subscribers have to hear

No sockets and no clock: methods that depend on time are told it (`now`, seconds of one monotonic clock). A connection
is a number here, a *peer*. `NodeArrivals` knows chunks and slots; this class knows who sends them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from deisa.ray._state.arrivals import FINISHED, Entry, NodeArrivals
from deisa.ray._state.blocked import BlockedBridges
from deisa.ray._state.descriptions import ArrayDescription
from deisa.ray._state.effects import (
    CreateMemory,
    Effect,
    EndNode,
    GiveUp,
    GrantSlot,
    Refuse,
    SendAway,
    TellAnalytics,
    TellProgress,
)
from deisa.ray._state.events import (
    AgentLost,
    BridgeJoined,
    BridgeLost,
    DtypeDeclared,
    Event,
    FeedbackAwaited,
)
from deisa.ray._state.feedback import FeedbackState
from deisa.ray._state.journal import Handled
from deisa.ray._state.newcomers import Run, answer_newcomer
from deisa.ray._state.plan import StartPlan
from deisa.ray._state.stats import BridgeStats
from deisa.ray._state.streams import Parts, Stream
from deisa.ray._state.subscriber import EventLog, Subscriber
from deisa.ray._state.takeover import NodeSnapshot
from deisa.ray.errors import AnalyticsLostError, BridgeIdError, DeisaError, ProtocolError

ENDING_S = 5.0  # that a process may take to end once it has said so, while others wait for it
NO_FEEDBACK = FeedbackState()
NOT_STARTED = "the analytics is up but has not called execute_callbacks() yet"


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A bridge that says hello."""

    peer: int
    pid: int
    bridge_id: int
    world_size: int
    arrays: tuple[ArrayDescription, ...]


@dataclass(slots=True)
class _Bridge:
    peer: int
    joined: BridgeJoined
    connected: bool = True
    closed: bool = False
    ending_since: float | None = None  # its process has said that it is ending


class Node:
    """The bridges and subscribers of one node.

    Parameters
    ----------
    session, host : str
        For messages.
    subscribers : sequence of Subscriber
    driver_timeout_s : float
        For how long data is kept for another analytics.
    """

    def __init__(
        self, session: str, host: str, subscribers: Sequence[Subscriber], driver_timeout_s: float
    ) -> None:
        self.arrivals = NodeArrivals()
        self.subscribers = tuple(subscribers)
        self.plan: StartPlan | None = None
        self.driver_timeout_s = driver_timeout_s
        self.log = EventLog()
        self._session = session
        self._host = host
        self._bridges: dict[int, _Bridge] = {}
        self._by_peer: dict[int, int] = {}  # also those that have come with an id which another one has
        self._newcomers: dict[int, tuple[Newcomer, float]] = {}  # whose place is taken; since when
        self._lost: list[tuple[int, str]] = []  # bridges, and why; still to be reported
        self._declared: dict[tuple[int, str], DtypeDeclared] = {}
        self._blocked = BlockedBridges()
        self._progress = NOT_STARTED
        self._feedback_awaited: tuple[FeedbackAwaited, ...] = ()  # one, once that is so
        self._dismissed: DeisaError | None = None  # what the analytics told the ranks when it ended the run
        self._effects: list[Effect] = []

    def take_effects(self) -> list[Effect]:
        """Hand over what is to be done."""
        effects, self._effects = self._effects, []
        return effects

    # Bridges come.

    def hello(self, newcomer: Newcomer, now: float) -> None:
        """A bridge wants to join.

        Raises
        ------
        ProtocolError
        """
        if newcomer.peer in self._by_peer or newcomer.peer in self._newcomers:
            raise ProtocolError("a bridge said hello twice")
        names = [described.name for described in newcomer.arrays]
        if len(set(names)) < len(names):
            raise ProtocolError("a bridge described an array twice")
        self._newcomers[newcomer.peer] = (newcomer, now)
        self._answer(newcomer, now, now)

    def answer_newcomers(self, now: float) -> None:
        """Decide on those that have been held."""
        for newcomer, since in list(self._newcomers.values()):
            self._answer(newcomer, since, now)

    def _answer(self, newcomer: Newcomer, since: float, now: float) -> None:
        same, bridges = self._bridges.get(newcomer.bridge_id), self._bridges.values()
        gone = self._gone
        run = Run(
            self._session,
            started=self.plan is not None,
            ends=self._dismissed is not None,
            analytics=(gone or self.subscribers[0]).presence.state(now)[0],
            gone=gone.presence.reason if gone is not None else "",
            lost=any(not bridge.connected and not bridge.closed for bridge in bridges),
            closed=all(bridge.closed for bridge in bridges),
            owner=f"pid {same.joined.pid} on this host ({self._host})" if same is not None else "",
        )
        answer, text = answer_newcomer(newcomer.bridge_id, newcomer.pid, now - since, run)
        if answer != "hold":
            del self._newcomers[newcomer.peer]
        match answer:
            case "join":
                self._join(newcomer)
            case "later":
                self._effects.append(SendAway(newcomer.peer, text))
            case "refuse":
                self._effects.append(Refuse(newcomer.peer, BridgeIdError(text)))

    def _join(self, newcomer: Newcomer) -> None:
        bridge_id, peer = newcomer.bridge_id, newcomer.peer
        self._by_peer[peer] = bridge_id
        self._effects.append(TellProgress(peer, self._progress))
        if self._gone is not None:
            self._effects.append(TellAnalytics(peer, self._gone.presence.reason))
        arrays = newcomer.arrays
        if bridge_id in self._bridges:  # the analytics will find it twice, and tell every rank
            arrays = ()
        else:
            self.arrivals.join(bridge_id)
        joined = BridgeJoined(bridge_id, newcomer.world_size, arrays, newcomer.pid, self._host)
        self._bridges.setdefault(bridge_id, _Bridge(peer, joined))
        self.log.append(joined)

    def cannot_join(self, bridge_id: int, reason: str) -> None:
        """A rank has refused its own description: nobody has to wait for it."""
        if self.plan is None:
            self.log.append(BridgeLost(bridge_id, None, reason))

    # The start.

    def start(self, plan: StartPlan, parts: Parts) -> None:
        """Let the bridges that have joined send: the parts of their chunks that streams take."""
        self.plan = plan
        self._progress = ""
        for peer, bridge_id in list(self._by_peer.items()):
            if self._bridges[bridge_id].peer != peer:  # too late to be noticed
                self._effects.append(Refuse(peer, BridgeIdError(f"bridge_id {bridge_id} is taken")))
        self.arrivals.subscribe(plan.slots, parts, plan.consumers)

    @property
    def bridges(self) -> Mapping[int, int]:
        """The peer of each bridge, connected or not."""
        return {bridge_id: bridge.peer for bridge_id, bridge in self._bridges.items()}

    def described(self, bridge_id: int) -> tuple[ArrayDescription, ...]:
        """What a bridge has said of its arrays."""
        return self._bridges[bridge_id].joined.arrays

    def bridge_of(self, peer: int) -> int | None:
        """The id with which a peer has joined."""
        return self._by_peer.get(peer)

    # Bridges send.

    def sender(self, peer: int) -> int | None:
        """The bridge of a peer that may send now: it is here, and has not closed."""
        bridge = self._bridges.get(self._by_peer.get(peer, -1))
        if self.plan is None or bridge is None or bridge.peer != peer or bridge.closed:
            return None
        return bridge.joined.bridge_id

    def has_closed(self, peer: int) -> bool:
        """Whether a peer is a bridge that has closed."""
        bridge = self._bridges.get(self._by_peer.get(peer, -1))
        return bridge is not None and bridge.peer == peer and bridge.closed

    def submitted(
        self,
        bridge_id: int,
        entries: Sequence[Entry],
        passed: int | None,
        blocked: int | None,
        now: float,
    ) -> None:
        """A bridge has submitted chunks, has come to a timestep, and waits for a slot of a region, or of none.

        Raises
        ------
        ProtocolError
            When it breaks a rule; what came before counts.
        """
        for entry in entries:
            self.arrivals.put(bridge_id, entry.region, entry.timestep, entry.time)
        if passed is not None:
            self.arrivals.advance(bridge_id, passed)
        waits = None
        if blocked is not None and self.arrivals.must_wait(bridge_id, blocked):
            at = self.arrivals.at(bridge_id)
            waits = (self.arrivals.array_of(blocked), int(at)) if abs(at) != FINISHED else None
        self._blocked.note(bridge_id, waits, now)

    def check_declaration(self, bridge_id: int, array: str) -> list[int]:
        """Check that a bridge has to declare the dtype of an array; returns all bridges that have it still to do.

        Raises
        ------
        ProtocolError
        """
        undeclared = {stream.name for stream in self._undeclared(array)}

        def has_still_to(other: int) -> bool:
            owns = not undeclared.isdisjoint(self.arrivals.regions_of(other))
            return owns and (other, array) not in self._declared

        if not has_still_to(bridge_id):
            raise ProtocolError(f"bridge {bridge_id} need not tell the dtype of array {array!r:.60}")
        return [other for other in self._bridges if has_still_to(other)]

    def _undeclared(self, array: str) -> list[Stream]:
        """The streams of an array whose bridges have described it without a dtype."""
        plan = self.plan
        return [s for s in plan.streams_of(array) if plan.dtypes[s.name] is None] if plan is not None else []

    def declare(self, bridge_id: int, array: str, dtype: np.dtype) -> None:
        """A bridge says which dtype an array has, and gets memory."""
        declared = DtypeDeclared(bridge_id, array, dtype)
        self._declared[bridge_id, array] = declared
        self.log.append(declared)
        self._effects.append(CreateMemory(bridge_id, self.dtypes_of(array, dtype)))

    def dtypes_of(self, array: str, dtype: np.dtype) -> dict[str, np.dtype]:
        """The dtypes of the streams of an array that is declared to have one."""
        return {s.name: s.dtype if s.dtype is not None else dtype for s in self._undeclared(array)}

    def await_feedback(self) -> None:
        """A bridge waits for what the analytics sets, or has waited before."""
        if not self._feedback_awaited:
            self._feedback_awaited = (FeedbackAwaited(),)
            self.log.append(*self._feedback_awaited)

    def close(self, bridge_id: int, stats: BridgeStats) -> None:
        """A bridge sends nothing more."""
        self._bridges[bridge_id].closed = True
        self._blocked.forget(bridge_id)
        self.arrivals.close(bridge_id, stats)

    def begin_end(self, bridge_id: int, now: float) -> None:
        """The process of a bridge is ending."""
        self._bridges[bridge_id].ending_since = now

    # Bridges and subscribers go.

    def gone(self, peer: int, reason: str, now: float) -> None:
        """A connection has ended."""
        self._newcomers.pop(peer, None)
        for subscriber in self.subscribers:
            if subscriber.line == peer:
                subscriber.disconnect()
                self.leave(subscriber, f"the analytics of session {self._session!r} has died", now)
        bridge_id = self._by_peer.pop(peer, None)
        bridge = self._bridges.get(bridge_id) if bridge_id is not None else None
        if bridge_id is None or bridge is None or bridge.peer != peer:
            return
        bridge.connected = False
        self._blocked.forget(bridge_id)
        if not bridge.closed:
            self._lost.append((bridge_id, reason))

    def take_losses(self) -> list[tuple[int, str]]:
        """Hand over the bridges that have been lost, for `lose` once all is heard that the others had sent by then."""
        lost, self._lost = self._lost, []
        return lost

    def lose(self, bridge_id: int, reason: str) -> None:
        """Report that a bridge has gone without closing."""
        self.arrivals.lose(bridge_id, reason)
        if self.plan is None:
            self._gather()
            del self._bridges[bridge_id]
            self.arrivals.leave(bridge_id)

    # What subscribers hear.

    def look_over(self, now: float) -> None:
        """Draw conclusions from all that has been heard, and from the time that has passed."""
        for event in self._blocked.news(now):
            self.log.append(event)
        self._tell_blocked(now)
        self._mind_endings(now)
        self._mind_subscribers(now)
        self._gather()

    def _gather(self) -> None:
        for event in self.arrivals.take_events():
            self.log.append(event)

    def _tell_blocked(self, now: float) -> None:
        for bridge_id in self._blocked.to_tell(self._progress, now):
            self._effects.append(TellProgress(self._bridges[bridge_id].peer, self._progress))

    def _mind_endings(self, now: float) -> None:
        """Wait no longer for a bridge whose process is ending and does not: it may wait for the other ranks."""
        for bridge_id, bridge in self._bridges.items():
            since = bridge.ending_since
            if since is None or now - since < ENDING_S or bridge.closed or not bridge.connected:
                continue
            if self.arrivals.owes(bridge_id):
                reason = (
                    f"it was not closed, and its process has been ending for {now - since:.0f} s: MPI_Finalize waits "
                    "for the other ranks. Call close() on all ranks, or start them with `python -m mpi4py`"
                )
                self._effects.append(GiveUp(bridge.peer, reason))
            else:
                self.arrivals.advance(bridge_id, FINISHED)  # ranks of other nodes may wait for it

    def report(self, event: Event) -> None:
        """Tell the subscribers something that the transport has found."""
        self.log.append(event)

    def hear(self, subscriber: Subscriber, most: int | None = None) -> Sequence[Event]:
        """What is new to a subscriber."""
        events = subscriber.hear(self.log, most)
        self.log.forget(min(other.cursor for other in self.subscribers))
        return events

    # What subscribers do.

    def subscriber_of(self, driver_id: str) -> Subscriber | None:
        """The subscriber that an analytics is."""
        return next((s for s in self.subscribers if s.presence.driver_id == driver_id), None)

    @property
    def _gone(self) -> Subscriber | None:
        """A subscriber that has gone."""
        return next((s for s in self.subscribers if s.presence.reason), None)

    def _tell_of_analytics(self) -> None:
        reason = self._gone.presence.reason if self._gone is not None else ""
        for bridge in self._bridges.values():
            if bridge.connected and not bridge.closed:
                self._effects.append(TellAnalytics(bridge.peer, reason))

    def connect(self, subscriber: Subscriber, peer: int, callbacks: int, *, listens: bool) -> None:
        """A subscriber has a connection, with events going there if it listens."""
        if subscriber.connect(peer, callbacks, listens=listens):
            self._tell_of_analytics()

    def begin_poll(self, subscriber: Subscriber) -> None:
        """A subscriber asks for news."""
        if subscriber.presence.begin_poll():
            self._tell_of_analytics()

    def leave(self, subscriber: Subscriber, reason: str, now: float) -> None:
        """A subscriber goes, and another one may take over."""
        if subscriber.presence.leave(reason, now):
            self._tell_of_analytics()

    def take_over(self, subscriber: Subscriber, driver_id: str, holder: str, now: float) -> None:
        """Another analytics takes the place of a subscriber."""
        if subscriber.presence.follow(driver_id, holder, now):
            self._tell_of_analytics()

    def state_for(
        self,
        subscriber: Subscriber,
        agent_id: str,
        handled: tuple[Handled, ...],
        feedback: FeedbackState = NO_FEEDBACK,
    ) -> NodeSnapshot:
        """What an analytics has to know that has taken over; it has heard all events by that."""
        self._gather()
        joined = tuple(bridge.joined for bridge in self._bridges.values())
        since = (
            *self._declared.values(),
            *self.arrivals.lasting_events,
            *self._blocked.all(),
            *self._feedback_awaited,
        )
        self.hear(subscriber)
        return NodeSnapshot(agent_id, self.plan, joined, self.arrivals.held(), since, handled, feedback)

    def _mind_subscribers(self, now: float) -> None:
        for subscriber in self.subscribers:
            presence = subscriber.presence
            silent = f"the analytics of session {self._session!r} does not answer"
            if presence.fall_silent(silent, now):
                self._tell_of_analytics()
        quiet_s = min(subscriber.presence.quiet_s(now) for subscriber in self.subscribers)
        if self._dismissed is not None and all(s.presence.reason for s in self.subscribers):
            self._effects.append(EndNode(self._dismissed))
        elif quiet_s > self.driver_timeout_s:
            gone = self._gone
            why = gone.presence.reason if gone else f"the analytics of session {self._session!r} has gone"
            error = AnalyticsLostError(
                f"{why}, and no other has taken over in {quiet_s:.0f} s (DEISA_RAY_DRIVER_TIMEOUT_S sets how long)"
            )
            self.report(AgentLost(str(error)))
            self._effects.append(EndNode(error))

    def step_aside(self, now: float) -> None:
        """Another agent wants the address: end, unless somebody is there or there is data."""
        if self.plan is None and all(s.presence.state(now)[0] == "gone" for s in self.subscribers):
            text = f"the analytics of session {self._session!r} has ended before the start"
            for peer in [*self._by_peer, *self._newcomers]:
                self._effects.append(SendAway(peer, text))
            self._effects.append(EndNode(None))

    def report_progress(self, text: str, now: float) -> None:
        """Pass on what the analytics waits for: to all ranks before the start, then to those that are blocked."""
        self._progress = text
        if self.plan is not None:
            self._tell_blocked(now)
            return
        for bridge in self._bridges.values():
            self._effects.append(TellProgress(bridge.peer, text))

    def dismiss(self, error: DeisaError) -> None:
        """The analytics ends the run: tell the ranks."""
        self._dismissed = error
        for peer in list(self._by_peer):
            self._effects.append(Refuse(peer, error))

    def release(self, consumer: str, steps: Sequence[tuple[str, int]]) -> None:
        """End a consumer's leases on (array, timestep) pairs."""
        for array, timestep in steps:
            grant = self.arrivals.release(consumer, array, timestep)
            if grant is not None:
                self._effects.append(GrantSlot(array, grant.number, grant.slot))

    def positions(self) -> dict[int, float]:
        """The timestep that each bridge is at which has not closed."""
        return self.arrivals.positions()

    def check(self) -> None:
        """Raise `AssertionError` if what this node knows contradicts itself."""
        self.arrivals.check()

        for bridge_id, bridge in self._bridges.items():
            if bridge.connected and self._by_peer.get(bridge.peer) != bridge_id:
                raise AssertionError(f"bridge {bridge_id} is connected as peer {bridge.peer}, which is none")
            if bridge_id in self._blocked and (bridge.closed or not bridge.connected):
                raise AssertionError(f"bridge {bridge_id} is blocked though it has gone")
        both = set(self._newcomers) & set(self._by_peer)
        if both:
            raise AssertionError(f"peers {both} have joined and wait to join")
        for subscriber in self.subscribers:
            if subscriber.presence.connected != (subscriber.line is not None):
                raise AssertionError("a subscriber is there by a connection that it does not have")
            if not self.log.first <= subscriber.cursor <= self.log.end:
                raise AssertionError(
                    f"a subscriber is at event {subscriber.cursor}, of {self.log.first} to {self.log.end}"
                )
