"""One session, seen from the analytics: its bridges register, it is started, it runs, it ends.

::

    Bridges (registration) ---+
    Predecessor --------------+--> PlacedArray (tiling) --> StartPlan (start) --> Run
    callbacks' windows -------+
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from deisa.ray._session.end_request import EndRequest
from deisa.ray._session.engine import AgentGroup
from deisa.ray._session.feedback import Feedback
from deisa.ray._session.leases import Leases, Step
from deisa.ray._session.predecessor import Predecessor, find_predecessor
from deisa.ray._session.registration import Bridges, wait_registered
from deisa.ray._session.run import Run, Windows
from deisa.ray._session.stalls import Stalls
from deisa.ray._session.start import CONSUMER, announce, count_slots, make_plan, plan_nodes
from deisa.ray._session.tiling import PlacedArray, place_stream
from deisa.ray._state.journal import Handled, Journal
from deisa.ray._state.layout import ArrayLayout
from deisa.ray._state.stats import BridgeStats
from deisa.ray._state.streams import Stream, cut, number_regions
from deisa.ray._state.timeline import Firing, Subscription, Timeline
from deisa.ray.config import Settings
from deisa.ray.errors import DeisaError
from deisa.ray.report import ArrayFigures

ARRAYS_TIMEOUT_S = 0.5  # for arrays to be dropped that nobody refers to any more


class Session:
    """The analytics' side of one session.

    Parameters
    ----------
    agents : AgentGroup
        Open already.
    settings : Settings
    computing : callable
        Whether bundles are under way.
    cuts : mapping of str to sequence of sequence of int
        For some arrays, how they are cut into cells besides.

    Attributes
    ----------
    bridges : Bridges
        Those that have registered.
    leases : Leases
    feedback : Feedback
    bound_bytes : mapping of str to int
        Chunk memory reserved on each node, once started.
    """

    def __init__(
        self,
        agents: AgentGroup,
        settings: Settings,
        computing: Callable[[], bool] = lambda: False,
        cuts: Mapping[str, Sequence[Sequence[int]]] | None = None,
    ) -> None:
        self._agents = agents
        self._settings = settings
        self._computing = computing
        self._cuts = cuts or {}
        self._end = EndRequest()
        self._predecessor = Predecessor()
        self._layouts: dict[str, ArrayLayout] = {}
        self._owners: dict[str, Mapping[str, tuple[int, ...]]] = {}
        self._run: Run | None = None
        self.bridges = Bridges(settings.session)
        self.leases = Leases(self._release)
        self.feedback = Feedback(agents, settings)
        self.bound_bytes: Mapping[str, int] = {}

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
        self._predecessor = find_predecessor(self._agents, self._settings)
        self.bridges = Bridges(self._settings.session, self._predecessor.waiting_bridges)
        self._predecessor.register(self.bridges)
        if not wait_registered(self.bridges, self._agents, self._settings, self._end):
            return None
        self._layouts = self.bridges.layouts()
        return self._layouts

    def start(self, subscriptions: Sequence[Subscription], streams: Mapping[str, Stream]) -> None:
        """Reserve the slots and let the simulation go; or hear again what it has sent, where it is under way.

        Parameters
        ----------
        subscriptions : sequence of Subscription
        streams : mapping of str to Stream
            Those that the subscriptions name.

        Raises
        ------
        MemoryBoundError
            Before anything is allocated.
        WindowError
            When a session that is under way has too few slots.
        """
        started_with = self._predecessor.plan
        counts = count_slots(subscriptions, self._settings.max_simulation_ahead, started_with)
        if started_with is not None:
            streams = started_with.streams
        arrays = self._place([streams[name] for name in counts.slots])
        self._owners = {name: array.owners() for name, array in arrays.items()}
        handled = self._predecessor.handled
        self._run = run = Run(
            self._agents,
            self.bridges,
            arrays,
            Timeline(
                self._owners,
                subscriptions,
                [noted.timestep for noted in handled],
                {name: stream.every for name, stream in streams.items()},
            ),
            Stalls(self._agents, self.leases, counts, self._settings, self._computing),
            self.leases,
            self.feedback,
            self._open_journal(len(subscriptions), handled),
            self._settings,
            self._end,
        )
        if started_with is not None:
            resumption = self._predecessor.resumption(self._settings.session)
            self._agents.release(CONSUMER, resumption.releases)
            self.feedback.resume(self.bridges.nodes, self._predecessor.feedback)
            run.absorb(resumption.events)
            return
        with self.feedback.starting(self.bridges.nodes) as feedback:
            plan, nodes = make_plan(arrays, counts.slots, feedback), plan_nodes(arrays)
            self.bound_bytes = self._agents.bound_bytes(plan, nodes)
            announce(arrays, counts.slots, self.bound_bytes)
            self._agents.start(plan, nodes)

    def _place(self, streams: Sequence[Stream]) -> dict[str, PlacedArray]:
        layouts = {stream.name: cut(self._layouts[stream.array], stream) for stream in streams}
        regions = number_regions(layouts.values(), self.bridges.node_of)
        return {
            stream.name: place_stream(
                stream,
                layouts[stream.name],
                regions[stream.name],
                self.bridges,
                self._predecessor.plan,
                self._settings.merge_chunks_beyond,
                self._agents.cpus,
                self._cuts.get(stream.name),
            )
            for stream in streams
        }

    def _open_journal(self, callbacks: int, handled: Sequence[Handled]) -> Journal | None:
        journal = self._agents.follow(callbacks)
        if journal is not None:
            for callback, noted in enumerate(handled[:callbacks]):
                journal.note(callback, noted)
        return journal

    def following(self, callback: int) -> int:
        """At how many timesteps a callback still was to run, whatever its trigger says, when a predecessor died."""
        handled = self._predecessor.handled
        return handled[callback].following if callback < len(handled) else 0

    def run(self, deliver: Callable[[Firing, Windows], int]) -> None:
        """Call `deliver` for each callback and timestep, until every bridge has closed; see `Run.deliver`.

        Raises
        ------
        IncompleteTimestepError, BridgeLostError, AgentLostError, WaitTimeoutError
            After everything that was complete before has been delivered.
        """
        if self._run is None:
            raise RuntimeError("the session has not been started")
        try:
            self._run.deliver(deliver)
        finally:
            self.feedback.end()

    def _release(self, steps: Sequence[Step]) -> None:
        by_node: dict[str, list[Step]] = defaultdict(list)
        for step in steps:
            for node_id in self._owners[step[0]]:
                by_node[node_id].append(step)
        self._agents.release(CONSUMER, by_node)

    # The end.

    def drop_arrays(self) -> bool:
        """Drop the windows; returns whether no array of this session is alive any more."""
        if self._run is not None:
            self._run.drop_arrays()
        if self.leases.wait_gone(ARRAYS_TIMEOUT_S):
            return True
        gc.collect()
        return self.leases.wait_gone(ARRAYS_TIMEOUT_S)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._end.stopped

    def stop(self, error: DeisaError) -> None:
        """End `wait_registered` and `run` at the next moment between callbacks; ranks learn `error` at once."""
        if self._end.stop():
            self._agents.dismiss(error)

    def close(self, error: DeisaError) -> None:
        """End the session on every node; ranks that are still there learn `error`."""
        self._end.close()
        self.feedback.end()
        if self._run is not None:
            self._run.drop_arrays()
        self._agents.close(error)
        self.leases.stop()
        if self._run is not None:
            self._run.close()

    def abandon(self, error: DeisaError) -> None:
        """Leave the session to another analytics, with all that has not been handled."""
        self._end.close()
        self.feedback.end()
        self.leases.stop()
        self._agents.abandon(error)
        if self._run is not None:
            self._run.close()

    @property
    def array_figures(self) -> dict[str, ArrayFigures]:
        """What has become of each array that a callback asked for."""
        return self._run.array_figures if self._run is not None else {}

    @property
    def bridge_stats(self) -> dict[int, BridgeStats]:
        """What each bridge that has closed did, by bridge id."""
        return self._run.bridge_stats if self._run is not None else {}
