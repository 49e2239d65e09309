"""One run, from the first bridge to the last callback: feeds the agents' events to the timeline.

::

    agents --events--> Session --events--> Timeline --firings--> callbacks
      ^                   |
      +--- leases ended --+
"""

from __future__ import annotations

import gc
import logging
import math
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from deisa.ray._engine.base import AgentGroup
from deisa.ray._engine.leases import Leases
from deisa.ray._engine.mpi_job import explain_missing, place_in_job
from deisa.ray._engine.stalls import Stalls
from deisa.ray._graph.assemble import ArrayHome
from deisa.ray._graph.leaves import StepSlots
from deisa.ray._state import events
from deisa.ray._state.boxes import Tiling, merge, separate
from deisa.ray._state.events import BridgeStats, Event
from deisa.ray._state.layout import (
    ArrayLayout,
    check_bridge_ids,
    missing_bridges,
    name_bridges,
    resolve_layout,
    two_programs,
)
from deisa.ray._state.plan import SharedBox, StartPlan
from deisa.ray._state.takeover import find_wreck, merge_journals, resume
from deisa.ray._state.timeline import CompleteStep, Firing, Subscription, Timeline
from deisa.ray._transport.limits import human_bytes
from deisa.ray.config import Settings
from deisa.ray.errors import (
    AgentLostError,
    BridgeLostError,
    ClosedError,
    DeisaError,
    DescriptionMismatchError,
    LayoutError,
    LostError,
    WaitTimeoutError,
    WindowError,
)
from deisa.ray.report import SHOWN_NODE_ID, ArrayFigures
from deisa.ray.types import DeisaArray

logger = logging.getLogger("deisa.ray")

CONSUMER = "analytics"
TICK_S = 0.5
TELL_EVERY_S = 0.5  # at most so often the waiting ranks are told whom the analytics waits for
STRAGGLERS_S = 0.5  # for events that other nodes reported before a failure
LATECOMERS_S = 2.0

Windows = list[list[DeisaArray]]


class Session:
    """The analytics' side of one run.

    Parameters
    ----------
    agents : AgentGroup
        Open already.
    settings : Settings
    computing : callable
        Whether bundles are under way.
    """

    def __init__(
        self, agents: AgentGroup, settings: Settings, computing: Callable[[], bool] = lambda: False
    ) -> None:
        self._agents = agents
        self._settings = settings
        self._joined: dict[int, tuple[str, events.BridgeJoined]] = {}
        self._world_size: int | None = None
        self._stats: dict[int, BridgeStats] = {}
        self._layouts: dict[str, ArrayLayout] = {}
        self._tilings: dict[str, Tiling] = {}
        self._homes: dict[str, ArrayHome] = {}
        self._nodes_of: dict[str, list[str]] = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._timeline: Timeline | None = None
        self._arrays: dict[tuple[str, int], DeisaArray] = {}
        self._failure: DeisaError | None = None
        self.leases = Leases(self._release)
        self._stalls = Stalls(agents, self.leases, settings, computing)
        self._slots: dict[str, int] = {}
        self._largest: dict[str, int] = {}
        self._inherited: set[int] = (
            set()
        )  # bridges that an analytics that died had registered, without starting
        self._early: list[
            tuple[str, Event]
        ] = []  # what came of a session that is taken over, before the start
        self._stopping = threading.Event()
        self.bound_bytes: Mapping[str, int] = {}
        self._closed = False
        self._journal: memoryview | None = None  # for each callback, the last timestep it has handled

    # Registration.

    def wait_registered(self) -> dict[str, ArrayLayout] | None:
        """Wait for every bridge, check that their descriptions fit together, and return the arrays.

        Returns
        -------
        dict of str to ArrayLayout, or None
            None where `stop` was called.

        Raises
        ------
        LayoutError, WaitTimeoutError, BridgeLostError, AgentLostError
        """
        started = said = time.monotonic()
        told, told_at = "", -math.inf
        self._look_at_left()
        if self._left_plan is not None:
            self._take_over_bridges()
        while self._world_size is None or len(self._joined) < self._world_size:
            self._check_open()
            now = time.monotonic()
            if now - started > self._settings.start_timeout_s:
                raise WaitTimeoutError(
                    f"{self._waiting_for_bridges()}; gave up after {self._settings.start_timeout_s:g} s "
                    "(DEISA_RAY_START_TIMEOUT_S sets how long)"
                )
            if now - told_at > TELL_EVERY_S:
                told_at = now
                waiting = self._waiting_for_bridges()
                if waiting != told:
                    told = waiting
                    self._agents.report_progress(waiting)
                if now - said > self._settings.warn_every_s:
                    said = now
                    logger.warning("%s (%.0f s so far)", waiting, now - started)
            arrived = self._agents.events(TICK_S)
            if self._stopping.is_set():
                return None
            for node_id, event in arrived:
                try:
                    self._register(node_id, event)
                except LayoutError:
                    self._await_latecomers()
                    raise
        self._layouts = resolve_layout({b: joined.arrays for b, (_, joined) in self._joined.items()})
        return self._layouts

    def _await_latecomers(self) -> None:
        """Let the bridges that are just starting connect, so that they too learn what is wrong."""
        deadline = time.monotonic() + LATECOMERS_S
        while time.monotonic() < deadline:
            self._agents.events(deadline - time.monotonic())

    def _waiting_for_bridges(self) -> str:
        if self._world_size is None:
            waiting = f"waiting for the first bridge of session {self._settings.session!r}"
        else:
            waiting = f"waiting for {missing_bridges(self._joined, self._world_size)}"
        return waiting + explain_missing(self._joined, self._world_size, place_in_job())

    def _register(self, node_id: str, event: Event) -> None:
        match event:
            case events.BridgeJoined():
                self._join(node_id, event)
            case events.BridgeLost(bridge_id, _, reason) if bridge_id in self._inherited:
                logger.warning("bridge %d of the run before has gone: %s", bridge_id, reason)
                self._inherited.discard(bridge_id)
                del self._joined[bridge_id]
                self._world_size = self._world_size if self._joined else None
            case events.BridgeLost(bridge_id, _, reason):
                raise BridgeLostError(f"bridge {bridge_id} left before the session started: {reason}")
            case events.AgentLost(reason):
                self._lose_agent(node_id, reason)

    def _join(self, node_id: str, event: events.BridgeJoined) -> None:
        bridge_id, world_size = event.bridge_id, event.world_size
        fits = self._world_size in (None, world_size) and 0 <= bridge_id < world_size
        same = self._joined.get(bridge_id)
        if same is not None or not fits:
            _, other = same or next(iter(self._joined.values()), (node_id, event))
            known = [(b, joined.world_size) for b, (_, joined) in self._joined.items()]
            try:
                check_bridge_ids([*known, (bridge_id, world_size)])
            except LayoutError as error:
                raise type(error)(f"{error}{_origins(other, event, self._settings.session)}") from None
        self._joined[bridge_id] = (node_id, event)
        self._world_size = world_size

    def _lose_agent(self, node_id: str, reason: str) -> None:
        ranks = sorted(bridge_id for bridge_id, (node, _) in self._joined.items() if node == node_id)
        if ranks:
            raise AgentLostError(
                f"the agent of node {node_id[:SHOWN_NODE_ID]}, with {name_bridges(ranks)}, has gone: {reason}"
            )
        logger.warning("the agent of node %s, which has no bridges, has gone: %s", node_id, reason)

    # The start.

    def start(self, subscriptions: Sequence[Subscription]) -> None:
        """Reserve the slots and let the simulation go.

        Raises
        ------
        MemoryBoundError
            Before anything is allocated.
        """
        largest: dict[str, int] = defaultdict(int)
        for subscription in subscriptions:
            for name, size in subscription.windows:
                largest[name] = max(largest[name], size)
        left = self._left_plan
        if left is not None:
            _check_windows(largest, left)
            slots = dict(left.slots)
        else:
            slots = {name: size + self._settings.max_simulation_ahead for name, size in largest.items()}
        owners: dict[str, dict[str, tuple[int, ...]]] = {}
        for name in slots:
            self._tilings[name] = self._tile(self._layouts[name], left)
            by_node: dict[str, set[int]] = defaultdict(set)
            for chunk in self._layouts[name].chunks:
                by_node[self._joined[chunk.bridge_id][0]].add(chunk.bridge_id)
            owners[name] = {node: tuple(sorted(bridges)) for node, bridges in by_node.items()}
            self._nodes_of[name] = list(by_node)
        self._slots, self._largest = slots, dict(largest)
        dtypes = {name: self._layouts[name].dtype for name in slots}
        self._dtypes = {name: dtype for name, dtype in dtypes.items() if dtype is not None}
        handled = merge_journals(state.handled for state in self._agents.left.values())
        self._timeline = Timeline(owners, subscriptions, handled)
        self._journal = self._agents.follow(len(subscriptions))
        if self._journal is not None:
            for callback, timestep in enumerate(handled[: len(subscriptions)]):
                self._journal[callback] = timestep
        if left is not None:
            self._resume()
            return
        merged = {
            name: tiling
            for name, tiling in self._tilings.items()
            if len(tiling.boxes) < len(self._layouts[name].chunks)
        }
        plan = StartPlan(slots, dtypes, (CONSUMER,), merged)
        boxes = self._shared_boxes()
        self.bound_bytes = self._agents.bound_bytes(plan, boxes)
        self._announce_bound(slots)
        self._agents.start(plan, boxes)

    # Where another analytics was.

    @property
    def _left_plan(self) -> StartPlan | None:
        """What an analytics that died had started the session with."""
        return next((s.plan for s in self._agents.left.values() if s.plan is not None), None)

    def _look_at_left(self) -> None:
        """See whether what is to be taken over has been lost since, or can be registered like a new session."""
        left = self._agents.left
        if self._left_plan is None:
            self._inherited = {event.bridge_id for state in left.values() for event in state.joined}
            return
        self._early = self._agents.events(0)
        lost = [(n, e) for n, e in self._early if isinstance(e, events.BridgeLost) and n in left]
        since = {n: (*state.since, *(e for node, e in lost if node == n)) for n, state in left.items()}
        wreck = find_wreck({n: replace(state, since=since[n]) for n, state in left.items()})
        if wreck is not None and self._settings.leftover == "drop":
            self._early.clear()
            self._agents.clear_away(wreck)

    def _take_over_bridges(self) -> None:
        """Register the bridges of a session that has been started already."""
        for node_id, state in self._agents.left.items():
            for event in state.joined:
                self._register(node_id, event)
        unstarted = [node_id for node_id, state in self._agents.left.items() if state.plan is None]
        if unstarted or self._world_size is None or len(self._joined) < self._world_size:
            missing = missing_bridges(self._joined, self._world_size or 1)
            what = (
                f"{missing} went with their agents"
                if not unstarted
                else "it died while it started the session"
            )
            raise AgentLostError(f"the session of an analytics that died cannot go on: {what}")

    def _resume(self) -> None:
        """Hear again what the agents still hold."""
        left = self._agents.left
        resumption = resume({node_id: state.held for node_id, state in left.items()})
        since = [(node_id, event) for node_id, state in left.items() for event in state.since]
        logger.warning(
            "taking over session %r from an analytics that has gone: %d complete timesteps of its arrays are held",
            self._settings.session,
            len({(e.array, e.timestep) for _, e in resumption.events if isinstance(e, events.StepComplete)}),
        )
        self._agents.release(CONSUMER, resumption.releases)
        losses = (events.BridgeLost, events.StepTorn)
        self._absorb([(n, e) for n, e in since if isinstance(e, events.DtypeDeclared)])
        self._absorb(resumption.events)
        self._absorb([(n, e) for n, e in since if not isinstance(e, (events.DtypeDeclared, *losses))])
        self._absorb([(n, e) for n, e in since if isinstance(e, losses)])
        self._absorb(self._early)

    def _tile(self, layout: ArrayLayout, left: StartPlan | None) -> Tiling:
        """Decide which chunks of an array share memory, if that has not been decided."""
        nodes = [self._joined[chunk.bridge_id][0] for chunk in layout.chunks]
        if left is not None:
            return left.merged.get(layout.name) or separate(layout, nodes)
        if layout.dtype is None or len(layout.chunks) <= self._settings.merge_chunks_beyond:
            return separate(layout, nodes)
        cpus = self._agents.cpus()
        return merge(layout, nodes, {node_id: cpus.get(node_id, 1) for node_id in set(nodes)})

    def _region(self, layout: ArrayLayout, number: int) -> int:
        chunk = layout.chunks[number]
        return self._joined[chunk.bridge_id][1].regions[layout.name][chunk.index]

    def _shared_boxes(self) -> dict[str, dict[str, list[SharedBox]]]:
        """The boxes with several chunks, by node and array."""
        shared: dict[str, dict[str, list[SharedBox]]] = defaultdict(lambda: defaultdict(list))
        for name, tiling in self._tilings.items():
            layout = self._layouts[name]
            if len(tiling.boxes) == len(layout.chunks):
                continue
            for box in tiling.boxes:
                places = []
                for number in box.chunks:
                    corner = zip(layout.chunks[number].offset, box.offset, strict=True)
                    places.append((self._region(layout, number), tuple(c - b for c, b in corner)))
                shared[box.node_id][name].append(SharedBox(box.shape, tuple(places)))
        return {node_id: dict(by_array) for node_id, by_array in shared.items()}

    def _home(self, name: str) -> ArrayHome:
        if name not in self._homes:
            layout, tiling = self._layouts[name], self._tilings[name]
            homes = [
                (self._agents.address(b.node_id), self._region(layout, b.chunks[0])) for b in tiling.boxes
            ]
            self._homes[name] = ArrayHome(name, layout.shape, self._dtypes[name], tiling, homes)
        return self._homes[name]

    def _announce_bound(self, slots: Mapping[str, int]) -> None:
        for name, count in slots.items():
            layout = self._layouts[name]
            size = (
                human_bytes(math.prod(layout.shape) * layout.dtype.itemsize)
                if layout.dtype is not None
                else "dtype not declared"
            )
            boxes = len(self._tilings[name].boxes)
            merged = f" merged into {boxes}" if boxes < len(layout.chunks) else ""
            print(
                f"deisa-ray: array {name!r} {layout.shape}, {size} a timestep, {len(layout.chunks)} chunks{merged}, "
                f"{count} slots each",
                file=sys.stderr,
            )
        reserved = [n for n in self.bound_bytes.values() if n]
        if reserved:
            print(
                f"deisa-ray: chunk memory reserved: {human_bytes(max(reserved))} at most on one node, "
                f"{len(reserved)} node{'s' if len(reserved) > 1 else ''}",
                file=sys.stderr,
            )

    # The run.

    def run(self, deliver: Callable[[Firing, Windows], None]) -> None:
        """Call `deliver` for each callback and timestep, until every bridge has closed.

        Raises
        ------
        IncompleteTimestepError, BridgeLostError, AgentLostError, WaitTimeoutError
            After everything that was complete before has been delivered.
        """
        timeline = self._running
        heard = said = time.monotonic()
        while not self._stopping.is_set():
            while (firing := timeline.next_firing()) is not None:
                self._deliver(firing, deliver)
                if self._stopping.is_set():
                    return
                self._absorb(self._agents.events(0))
                heard = time.monotonic()
            self._forget()
            if self._failure is not None:
                if not self._gather_stragglers():
                    raise self._failure
                continue
            if self._finished:
                return
            self._check_open()
            arrived = self._agents.events(TICK_S)
            now = time.monotonic()
            self._absorb(arrived)
            if any(not isinstance(event, events.SendersBlocked) for _, event in arrived):
                heard = said = now
            self._stalls.look(timeline, self._slots, self._largest, self._arrays.keys(), self._stats)
            if now - said > self._settings.warn_every_s:
                said = now
                waiting = self._stalls.told or timeline.waiting_for()
                logger.info("waiting for %s (%.0f s so far)", waiting, now - heard)
            if now - heard > self._settings.data_timeout_s:
                raise WaitTimeoutError(
                    f"nothing came from the simulation for {self._settings.data_timeout_s:g} s "
                    f"(DEISA_RAY_DATA_TIMEOUT_S sets how long); waiting for "
                    f"{timeline.waiting_for(self._agents.positions())}"
                )

    @property
    def _running(self) -> Timeline:
        if self._timeline is None:
            raise RuntimeError("the session has not been started")
        return self._timeline

    @property
    def _finished(self) -> bool:
        return len(self._stats) == self._world_size and self._running.resolved_entirely

    def _deliver(self, firing: Firing, deliver: Callable[[Firing, Windows], None]) -> None:
        names = self._running.arrays_of(firing.callback)
        windows = [
            [self._arrays[name, timestep] for timestep in timesteps]
            for name, timesteps in zip(names, firing.windows, strict=True)
        ]
        self._stalls.moved(names)
        deliver(firing, windows)
        self._stalls.moved(names)
        journal = self._journal
        if journal is not None:
            journal[firing.callback] = firing.timestep
        del windows
        self._forget()

    def _forget(self) -> None:
        for step in self._running.forget():
            self._arrays.pop(step, None)

    def _gather_stragglers(self) -> bool:
        """After a loss, see what other nodes completed before it; returns whether that was anything."""
        if not isinstance(self._failure, LostError):
            return False
        deadline = time.monotonic() + (
            STRAGGLERS_S if len({node for node, _ in self._joined.values()}) > 1 else 0
        )
        while not (arrived := self._agents.events(max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                return False
        self._absorb(arrived)
        return True

    def _absorb(self, arrived: Sequence[tuple[str, Event]]) -> None:
        for node_id, event in arrived:
            lost = isinstance(self._failure, LostError)
            if self._failure is None or (lost and isinstance(event, events.StepComplete)):
                try:
                    self._apply(node_id, event)
                except DeisaError as error:
                    self._failure = self._failure or error

    def _apply(self, node_id: str, event: Event) -> None:
        timeline = self._running
        match event:
            case events.StepComplete():
                step = timeline.step_complete(node_id, event)
                if step is not None:
                    self._stalls.complete(event)
                    self._assemble(step)
            case events.OwnersPassed():
                timeline.owners_passed(node_id, event)
            case events.SendersBlocked():
                self._stalls.wait_for_slots(event)
            case events.DtypeDeclared(bridge_id, array, dtype):
                known = self._dtypes.setdefault(array, dtype)
                if known != dtype:
                    raise DescriptionMismatchError(
                        f"array {array!r}: bridge {bridge_id} sends dtype {dtype}, others send {known}"
                    )
            case events.StepTorn():
                raise timeline.step_torn(event)
            case events.BridgeClosed(bridge_id, stats):
                self._stats[bridge_id] = stats
            case events.BridgeLost(bridge_id, last_timestep, reason):
                raise self._loss(node_id, bridge_id, last_timestep, reason)
            case events.AgentLost(reason):
                self._lose_agent(node_id, reason)

    def _loss(self, node_id: str, bridge_id: int, last_timestep: int | None, reason: str) -> DeisaError:
        last = "before it sent anything" if last_timestep is None else f"after timestep {last_timestep}"
        where = f"bridge {bridge_id} on node {node_id[:SHOWN_NODE_ID]}"
        if self._stalls.told and self._stalls.waited(bridge_id):
            return WaitTimeoutError(
                f"the simulation waited for {self._stalls.told}; {where}, which waited for a slot {last}, has given "
                f"up: {reason}"
            )
        return BridgeLostError(f"{where} was lost {last}: {reason}")

    def _release(self, steps: Sequence[tuple[str, int]]) -> None:
        by_node: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for step in steps:
            for node_id in self._nodes_of[step[0]]:
                by_node[node_id].append(step)
        self._agents.release(CONSUMER, by_node)

    def _assemble(self, step: CompleteStep) -> None:
        name, timestep = step.array, step.timestep
        slots = StepSlots(step.slots, self.leases.grant(name, timestep))
        self._arrays[name, timestep] = DeisaArray(self._home(name).assemble(slots), timestep)

    # The end.

    def drop_arrays(self) -> bool:
        """Drop the windows; returns whether no array of this session is alive any more."""
        self._arrays.clear()
        if self.leases.wait_gone(TICK_S):
            return True
        gc.collect()
        return self.leases.wait_gone(TICK_S)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopping.is_set()

    def stop(self, error: DeisaError) -> None:
        """End `wait_registered` and `run` at the next moment between callbacks; ranks learn `error` at once."""
        if not self._stopping.is_set():
            self._stopping.set()
            self._agents.dismiss(error)

    def close(self, error: DeisaError) -> None:
        """End the session on every node; ranks that are still there learn `error`."""
        self._closed = True
        self._arrays.clear()
        self._agents.close(error)
        self.leases.stop()
        self._journal = None

    def abandon(self, error: DeisaError) -> None:
        """Leave the session to another analytics, with all that has not been handled."""
        self._closed = True
        self.leases.stop()
        self._agents.abandon(error)
        self._arrays.clear()
        self._journal = None

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError("the analytics was closed while it waited for the simulation")

    @property
    def array_figures(self) -> dict[str, ArrayFigures]:
        """What has become of each array that a callback asked for."""
        if self._timeline is None:
            return {}
        delivered = self._timeline.timesteps_delivered()
        return {
            name: ArrayFigures(seen, delivered[name], seen * self._timestep_bytes(name) if seen else 0)
            for name, seen in self._timeline.timesteps_seen().items()
        }

    def _timestep_bytes(self, name: str) -> int:
        return math.prod(self._layouts[name].shape) * self._dtypes[name].itemsize

    @property
    def bridge_stats(self) -> dict[int, BridgeStats]:
        """What each bridge that has closed did, by bridge id."""
        return dict(sorted(self._stats.items()))


def _check_windows(largest: Mapping[str, int], left: StartPlan) -> None:
    """Check that the slots of a session that was taken over are enough for the windows asked for now."""
    for name, size in largest.items():
        slots = left.slots.get(name, 0)
        if size >= slots:
            raise WindowError(
                f"a window of {size} timesteps of array {name!r} is asked for, but the session was started with "
                f"{slots} slots for it, so that windows have {max(0, slots - 1)} at most; an analytics that takes over "
                "uses the windows of the one before"
            )


def _origins(one: events.BridgeJoined, other: events.BridgeJoined, session: str) -> str:
    """Say which processes two bridges are that don't fit together, and what to do."""
    if one is other:
        return ""
    names = " and ".join(f"bridge {e.bridge_id} is pid {e.pid} on host {e.host}" for e in (one, other))
    one_program = "If both belong to one program, give each a bridge_id of its own"
    return f" ({names}). {one_program}. If not, {two_programs(session)}"
