"""Each bundle is one Ray task on its node, unless it was short the last time.

A Ray task is accounted for with its CPUs, and pays for it: its worker process is leased from the node first.
For a bundle of a few milliseconds that takes longer than the bundle itself, and there is nothing to account for. A
plan's bundles are submitted again at every timestep, so what one takes is known from the time before:

- A short one goes to a worker that stands ready on its node.
- A very short one that only the caller waits for, as the last step of a reduction is, runs in this process:
  when it reads no chunks and little else, or chunks of this node.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import ray
from dask._task_spec import GraphNode
from dask.sizeof import sizeof
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deisa.ray._engine.ray_cluster import connect, node_cpus
from deisa.ray._graph.bundles import CALLER, Bundle
from deisa.ray._graph.execute import independent, pick, run_bundle, threads_that_pay
from deisa.ray._graph.leaves import Handle, StepSlots
from deisa.ray._graph.scheduler import BundleStats, Picks
from deisa.ray.config import Settings
from deisa.ray.errors import ComputationLostError, PeerError, SessionEndedError
from deisa.ray.report import SHOWN_NODE_ID

logger = logging.getLogger("deisa.ray")

NODES_FRESH_S = 5.0
RETRIES = 3  # of a bundle whose worker process died
SHORT_S = 0.02  # bundles that ran no longer go to standing workers
HERE_S, HERE_BYTES = (
    0.005,
    2**20,
)  # bundles that ran no longer, and took no more from others, run in this process

INLINE_BYTES = 32 * 1024  # work up to this size travels with every call, larger work once to each node
WORK_KEPT_BYTES = 64 * 2**20  # pickled size of the work that a worker process keeps unpacked


@dataclass(frozen=True, slots=True)
class Work:
    """What a bundle does, without what differs from timestep to timestep."""

    tasks: Sequence[GraphNode]
    picks: Sequence[Picks]
    outputs: Sequence[Sequence[Hashable]]
    threads: int


@dataclass(frozen=True, slots=True)
class PackedWork:
    """Work that will be done again: pickled, or a reference to that; each worker process unpacks it once."""

    uid: str
    nbytes: int
    packed: Sequence[Any]  # one item: in a list Ray leaves a reference as it is

    def unpack(self) -> Work:
        """Return the work, from this process's memory if it has done it before."""
        with _unpacking:
            known = _unpacked.pop(self.uid, None)
            if known is None:
                (packed,) = self.packed
                known = (
                    cloudpickle.loads(packed if isinstance(packed, bytes) else ray.get(packed)),
                    self.nbytes,
                )
            _unpacked[self.uid] = known  # the last is the one used last
            while len(_unpacked) > 1 and sum(nbytes for _, nbytes in _unpacked.values()) > WORK_KEPT_BYTES:
                _unpacked.popitem(last=False)
        return known[0]


_PROCESS, _numbers = uuid.uuid4().hex, itertools.count()  # a random name for each would wait for the kernel
_unpacked: OrderedDict[str, tuple[Work, int]] = OrderedDict()
_unpacking = threading.Lock()


@dataclass(frozen=True, slots=True)
class Ended:
    """The last value that a bundle returns.

    Attributes
    ----------
    run_s : float
        How long it ran (seconds).
    nbytes : tuple of int
        Sizes of its groups of outputs (bytes).
    taken_bytes : int
        Size of what it took from other bundles.
    """

    run_s: float
    nbytes: tuple[int, ...]
    taken_bytes: int


def run_here(work: Work | PackedWork, steps: Mapping[Hashable, StepSlots], *groups: Sequence[Any]) -> Any:
    """Run a bundle; returns its groups of values, and `Ended`."""
    started = time.perf_counter()
    if isinstance(work, PackedWork):
        work = work.unpack()
    values = run_bundle(work.tasks, {**pick(groups, work.picks), **steps}, work.outputs, work.threads)
    run_s = time.perf_counter() - started
    return (*values, Ended(run_s, tuple(map(_size, values)), sum(map(_size, groups))))


def _size(group: Sequence[Any]) -> int:
    return sum(map(sizeof, group))


run_on_node = ray.remote(run_here)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=RETRIES, enable_task_events=False)
class StandingWorker:
    """A process on a node that waits for short bundles."""

    def run(self, *arguments: Any) -> Any:
        """Run a bundle, as `run_here` does."""
        return run_here(*arguments)


@dataclass(slots=True)
class PreparedBundle:
    """A bundle as `run_here` takes it."""

    node_id: str | None
    call: Any  # run_on_node with its options
    work: Work | PackedWork
    crossings: tuple[int, ...]  # for each group, how often it leaves the node
    may_run_here: bool
    run_s: float = math.inf  # how long it ran the last time (seconds)
    taken_bytes: float = math.inf  # what it took from other bundles then


@dataclass(frozen=True, slots=True)
class RayGroup:
    """Values in Ray's object store."""

    reference: Any

    def fetch(self) -> Sequence[Any]:
        """Bring them here."""
        return ray.get(self.reference)


@dataclass(frozen=True, slots=True, eq=False)
class GroupHere:
    """Values in this process, which nobody but the caller takes."""

    values: Sequence[Any]

    def fetch(self) -> Sequence[Any]:
        """Return them."""
        return self.values


class RayExecutor:
    """Submits bundles as Ray tasks, pinned to their nodes and accounted for with their threads."""

    ships = True

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cpus: dict[str, int] = {}
        self._looked = 0.0
        self._own_node: str | None = None
        self._counting = threading.Condition()
        self._standing: dict[str, Any] = {}
        self._under_way: Counter[str | None] = Counter()  # bundles on each node
        self.stats = BundleStats()

    def nodes(self) -> Sequence[str | None]:
        """The nodes that have CPUs, this process's own first."""
        found = self._node_cpus()  # connects
        return sorted((n for n, cpus in found.items() if cpus), key=lambda n: n != self._own_node) or [None]

    def _node_cpus(self) -> dict[str, int]:
        connect()
        if self._own_node is None:
            self._own_node = ray.get_runtime_context().get_node_id()
        if time.monotonic() - self._looked > NODES_FRESH_S:
            self._cpus = node_cpus()
            self._looked = time.monotonic()
        return self._cpus

    def warm_up(self) -> None:
        """Have every node start its worker processes and import what bundles need; does not wait."""
        nothing = Work((), (), (), 1)
        for node_id, cpus in self._node_cpus().items():
            self._options(node_id, 1, 1).remote(nothing, {})
            self._standing[node_id] = StandingWorker.options(  # type: ignore[attr-defined]
                max_concurrency=max(1, cpus),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            ).remote()
            self._standing[node_id].run.remote(nothing, {})

    def close(self) -> None:
        """Let the standing workers end, once they have done what they were given."""
        self._standing.clear()

    def _options(self, node_id: str | None, threads: int, returns: int) -> Any:
        cpus = self._cpus.get(node_id, 1) if node_id is not None else 1
        strategy = "DEFAULT" if node_id is None else NodeAffinitySchedulingStrategy(node_id, soft=False)
        return run_on_node.options(
            num_cpus=min(threads, cpus),
            num_returns=returns,
            max_retries=RETRIES,
            scheduling_strategy=strategy,
            enable_task_events=False,  # Ray's head would keep a record of every bundle
        )

    def prepare(self, bundle: Bundle, picks: Sequence[Picks], reusable: bool) -> PreparedBundle:
        """Decide how many threads a bundle gets, and pack what it does if that will be done again."""
        cpus = self._node_cpus().get(bundle.node_id, 1) if bundle.node_id is not None else 1
        limit = self._settings.threads_per_bundle or max(1, cpus)
        threads = threads_that_pay(bundle, min(limit, max(1, cpus)))
        work: Work | PackedWork = Work(bundle.tasks, picks, bundle.outputs, threads)
        if reusable:
            packed = cloudpickle.dumps(work, protocol=5)
            inline = len(packed) <= INLINE_BYTES
            work = PackedWork(
                f"{_PROCESS}-{next(_numbers)}", len(packed), [packed if inline else ray.put(packed)]
            )
        here = self._own_node
        crossings = tuple(
            sum(bundle.node_id != (here if taker == CALLER else taker) for taker in takers)
            for takers in bundle.takers
        )
        call = self._options(bundle.node_id, threads, len(bundle.outputs) + 1)
        may_run_here = bundle.last and (bundle.node_id == here or not bundle.leaves)
        return PreparedBundle(bundle.node_id, call, work, crossings, may_run_here)

    def submit(
        self, prepared: PreparedBundle, groups: Sequence[Handle], steps: Mapping[Hashable, StepSlots]
    ) -> list[Handle]:
        """Start a bundle once its inputs are there; the leases of `steps` are held until it has ended."""
        here = {key: step.on(prepared.node_id) for key, step in steps.items()}
        references = self._call(prepared).remote(
            prepared.work,
            here,
            *(group.reference for group in groups),  # type: ignore[attr-defined]
        )
        with self._counting:
            self.stats.submitted += 1
            self._under_way[prepared.node_id] += 1
        *returned, ended = references
        held = [steps]

        def count(future: Any) -> None:
            held.clear()
            with self._counting:
                self.stats.ended += 1
                self._under_way[prepared.node_id] -= 1
                if future.exception() is None:
                    result: Ended = future.result()
                    prepared.run_s, prepared.taken_bytes = result.run_s, result.taken_bytes
                    self.stats.run_s += result.run_s
                    self.stats.moved_bytes += sum(
                        times * nbytes
                        for times, nbytes in zip(prepared.crossings, result.nbytes, strict=True)
                    )
                self._counting.notify_all()

        # Also where there is no lease: Ray logs the error of a reference that nobody has looked at.
        ended.future().add_done_callback(count)
        return [RayGroup(reference) for reference in returned]

    def runs_here(self, prepared: PreparedBundle) -> bool:
        """Whether a bundle that only the caller waits for is too short to be worth a Ray call."""
        return prepared.may_run_here and prepared.run_s <= HERE_S and prepared.taken_bytes <= HERE_BYTES

    def run_here(
        self, prepared: PreparedBundle, groups: Sequence[Handle], steps: Mapping[Hashable, StepSlots]
    ) -> list[Handle]:
        """Wait for a bundle's inputs, and run it in this thread."""
        values = self.fetch(groups)
        with self._counting:
            self.stats.submitted += 1
        try:
            *returned, ended = run_here(prepared.work, steps, *values)
        except (PeerError, SessionEndedError):  # this process and its node's agent cannot reach each other
            prepared.may_run_here = False
            return self.submit(prepared, groups, steps)
        finally:
            with self._counting:
                self.stats.ended += 1
        prepared.run_s, prepared.taken_bytes = ended.run_s, ended.taken_bytes
        self.stats.run_s += ended.run_s
        return [GroupHere([independent(value, copy_all=True) for value in group]) for group in returned]

    def _call(self, prepared: PreparedBundle) -> Any:
        standing = self._standing.get(prepared.node_id or "") if prepared.run_s <= SHORT_S else None
        if standing is None:
            return prepared.call
        return standing.run.options(num_returns=len(prepared.crossings) + 1)

    def fetch(self, handles: Sequence[Handle]) -> list[Sequence[Any]]:
        """Wait for groups of values; says every few seconds that it still waits."""
        there = [handle for handle in handles if not isinstance(handle, GroupHere)]
        fetched = dict(zip(there, self._fetch(there), strict=True)) if there else {}
        return [h.values if isinstance(h, GroupHere) else fetched[h] for h in handles]

    def _fetch(self, handles: Sequence[Handle]) -> list[Sequence[Any]]:
        """Wait for groups of values from other processes.

        Raises
        ------
        ComputationLostError
            When workers died again and again, or a node with a bundle has gone.
        Exception
            What a bundle raised.
        """
        references = [handle.reference for handle in handles]  # type: ignore[attr-defined]
        started = time.monotonic()
        while True:
            try:
                return ray.get(references, timeout=self._settings.warn_every_s)
            except GetTimeoutError:
                self._check_nodes()
                logger.warning(
                    "a computation has been running for %.0f s (are CPUs of the cluster held by something else?)",
                    time.monotonic() - started,
                )
            except RayTaskError as exc:
                cause = exc.cause
                if isinstance(cause, Exception):
                    cause.add_note(str(exc))
                    raise cause from None
                raise
            except RayError as exc:
                raise ComputationLostError(
                    f"what computed a result has gone, after {RETRIES} retries where they could help: "
                    f"{type(exc).__name__}: {str(exc).strip()}"
                ) from exc

    def _check_nodes(self) -> None:
        """Raise when a bundle that has not ended is on a node that has gone: Ray may wait for it to come back."""
        alive = node_cpus()
        with self._counting:
            lost = [
                node
                for node, count in self._under_way.items()
                if count and node is not None and node not in alive
            ]
        if lost:
            raise ComputationLostError(
                f"node {', '.join(sorted(n[:SHOWN_NODE_ID] for n in lost))} has gone, with bundles on it"
            )

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait for Ray to tell of the last bundles, which it does a little later than results are there."""
        with self._counting:
            return self._counting.wait_for(lambda: self.stats.ended == self.stats.submitted, timeout_s)
