"""The loop of a run: events of the agents go in, callbacks are called for the timesteps that are complete.

::

    agents --events--> Run --events--> Timeline --firings--> callbacks
      ^                  |
      +-- leases ended --+
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from deisa.ray._graph.assemble import ArrayHome
from deisa.ray._graph.leaves import StepSlots
from deisa.ray._session.end_request import EndRequest
from deisa.ray._session.engine import AgentGroup
from deisa.ray._session.feedback import Feedback
from deisa.ray._session.leases import Leases
from deisa.ray._session.registration import EVENTS_TIMEOUT_S, Bridges
from deisa.ray._session.selection import check_conversion
from deisa.ray._session.stalls import Stalls
from deisa.ray._session.tiling import PlacedArray
from deisa.ray._state import events
from deisa.ray._state.events import Event
from deisa.ray._state.journal import Handled, Journal
from deisa.ray._state.stats import BridgeStats
from deisa.ray._state.timeline import CompleteStep, Firing, Timeline
from deisa.ray._state.times import times_differ
from deisa.ray.config import Settings
from deisa.ray.errors import (
    BridgeLostError,
    DeisaError,
    DescriptionMismatchError,
    LostError,
    WaitTimeoutError,
)
from deisa.ray.labels import About
from deisa.ray.report import SHOWN_NODE_ID, ArrayFigures
from deisa.ray.types import DeisaArray

logger = logging.getLogger("deisa.ray")

STRAGGLERS_S = 0.5  # for events that other nodes reported before a failure

Windows = list[list[DeisaArray]]


class Run:
    """The timesteps of a session that has been started.

    Parameters
    ----------
    agents : AgentGroup
    bridges : Bridges
    arrays : mapping of str to PlacedArray
        Those that callbacks ask for.
    timeline : Timeline
    stalls : Stalls
    leases : Leases
    feedback : Feedback
    journal : Journal or None
        In which it is noted what each callback has handled.
    settings : Settings
    end : EndRequest
    """

    def __init__(
        self,
        agents: AgentGroup,
        bridges: Bridges,
        arrays: Mapping[str, PlacedArray],
        timeline: Timeline,
        stalls: Stalls,
        leases: Leases,
        feedback: Feedback,
        journal: Journal | None,
        settings: Settings,
        end: EndRequest,
    ) -> None:
        self._agents = agents
        self._bridges = bridges
        self._arrays = arrays
        self._timeline = timeline
        self._stalls = stalls
        self._leases = leases
        self._feedback = feedback
        self._journal = journal
        self._settings = settings
        self._end = end
        self._dtypes: dict[str, np.dtype] = {
            name: array.layout.dtype for name, array in arrays.items() if array.layout.dtype is not None
        }
        self._declared: dict[str, np.dtype] = {}  # by bridges that had described the array without one
        self._homes: dict[str, ArrayHome] = {}
        self._complete: dict[tuple[str, int], DeisaArray] = {}  # the steps that windows may still need
        self._stats: dict[int, BridgeStats] = {}
        self._failure: DeisaError | None = None

    def deliver(self, call: Callable[[Firing, Windows], int]) -> None:
        """Call `call` for each callback and timestep, until every bridge has closed or the run is to end.

        Parameters
        ----------
        call : callable
            Returns at how many further timesteps the callback runs whatever its trigger says.

        Raises
        ------
        IncompleteTimestepError, PhysicalTimeError, BridgeLostError, AgentLostError, WaitTimeoutError
            After everything that was complete before has been delivered.
        """
        timeline = self._timeline
        heard = said = time.monotonic()
        while not self._end.stopped:
            while (firing := timeline.next_firing()) is not None:
                self._deliver(firing, call)
                if self._end.stopped:
                    return
                self.absorb(self._agents.events(0))
                self._tell_finished()
                heard = time.monotonic()
            self._forget()
            self._tell_finished()
            if self._failure is not None:
                if not self._gather_stragglers():
                    raise self._failure
                continue
            if len(self._stats) == self._bridges.world_size and timeline.resolved_entirely:
                return
            self._end.check_open()
            arrived = self._agents.events(EVENTS_TIMEOUT_S)
            now = time.monotonic()
            self.absorb(arrived)
            if any(not isinstance(event, events.SendersBlocked) for _, event in arrived):
                heard = said = now
            self._stalls.check(timeline, self._complete.keys(), self._stats)
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

    def _deliver(self, firing: Firing, call: Callable[[Firing, Windows], int]) -> None:
        names = self._timeline.arrays_of(firing.callback)
        windows = [
            [self._complete[name, timestep] for timestep in timesteps]
            for name, timesteps in zip(names, firing.windows, strict=True)
        ]
        self._stalls.moved(names)
        following = call(firing, windows)
        self._stalls.moved(names)
        if self._journal is not None:
            self._journal.note(firing.callback, Handled(firing.timestep, following))
        del windows
        self._forget()

    def _tell_finished(self) -> None:
        """Tell nodes whose bridges wait for it how far all callbacks have come."""
        if self._feedback.is_awaited:
            self._feedback.finish(self._timeline.finished)

    def _forget(self) -> None:
        for step in self._timeline.forget():
            self._complete.pop(step, None)

    def _gather_stragglers(self) -> bool:
        """After a loss, see what other nodes completed before it; returns whether that was anything."""
        if not isinstance(self._failure, LostError):
            return False
        deadline = time.monotonic() + (STRAGGLERS_S if len(self._bridges.nodes) > 1 else 0)
        while not (arrived := self._agents.events(max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                return False
        self.absorb(arrived)
        return True

    def absorb(self, arrived: Sequence[tuple[str, Event]]) -> None:
        """Take in events, as (node, event); what one of them makes impossible is raised by `deliver`."""
        for node_id, event in arrived:
            lost = isinstance(self._failure, LostError)
            if self._failure is None or (lost and isinstance(event, events.StepComplete)):
                try:
                    self._apply(node_id, event)
                except DeisaError as error:
                    self._failure = self._failure or error

    def _apply(self, node_id: str, event: Event) -> None:
        timeline = self._timeline
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
                self._declare(bridge_id, array, dtype)
            case events.StepTorn():
                raise timeline.step_torn(event)
            case events.TimesDiffer(array, timestep, (one, other), (time, another)):
                raise times_differ(array, timestep, ([one], time), ([other], another))
            case events.BridgeClosed(bridge_id, stats):
                self._stats[bridge_id] = stats
            case events.BridgeLost(bridge_id, last_timestep, reason):
                raise self._loss(node_id, bridge_id, last_timestep, reason)
            case events.FeedbackAwaited():
                self._feedback.await_on(node_id)
            case events.AgentLost(reason):
                self._bridges.lose_agent(node_id, reason)

    def _declare(self, bridge_id: int, array: str, dtype: np.dtype) -> None:
        known = self._declared.setdefault(array, dtype)
        if known != dtype:
            raise DescriptionMismatchError(
                f"array {array!r}: bridge {bridge_id} sends dtype {dtype}, others send {known}"
            )
        for name, placed in self._arrays.items():
            if placed.stream.array == array:
                asked = placed.stream.dtype
                wanted = self._dtypes[name] = asked if asked is not None else dtype
                check_conversion(array, dtype, wanted)

    def _loss(self, node_id: str, bridge_id: int, last_timestep: int | None, reason: str) -> DeisaError:
        last = "before it sent anything" if last_timestep is None else f"after timestep {last_timestep}"
        where = f"bridge {bridge_id} on node {node_id[:SHOWN_NODE_ID]}"
        if self._stalls.told and self._stalls.waited(bridge_id):
            return WaitTimeoutError(
                f"the simulation waited for {self._stalls.told}; {where}, which waited for a slot {last}, has given "
                f"up: {reason}"
            )
        return BridgeLostError(f"{where} was lost {last}: {reason}")

    def _assemble(self, step: CompleteStep) -> None:
        name, timestep = step.array, step.timestep
        if name not in self._homes:
            self._homes[name] = self._arrays[name].home(self._dtypes[name], self._agents.address)
        slots = StepSlots(step.slots, self._leases.grant(name, timestep))
        about = About(self._arrays[name].stream.array, step.time, self._arrays[name].layout.labels)
        self._complete[name, timestep] = DeisaArray(self._homes[name].assemble(slots), timestep, about=about)

    # The end.

    def drop_arrays(self) -> None:
        """Drop the windows."""
        self._complete.clear()

    def close(self) -> None:
        """Drop the windows and the journal."""
        self._complete.clear()
        self._journal = None

    @property
    def array_figures(self) -> dict[str, ArrayFigures]:
        """What has become of each array that a callback asked for."""
        delivered = self._timeline.timesteps_delivered()
        return {
            name: ArrayFigures(seen, delivered[name], seen * self._timestep_bytes(name) if seen else 0)
            for name, seen in self._timeline.timesteps_seen().items()
        }

    def _timestep_bytes(self, name: str) -> int:
        return math.prod(self._arrays[name].layout.shape) * self._dtypes[name].itemsize

    @property
    def bridge_stats(self) -> dict[int, BridgeStats]:
        """What each bridge that has closed did, by bridge id."""
        return dict(sorted(self._stats.items()))
