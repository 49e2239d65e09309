"""Each bundle is one Ray task on its node."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cloudpickle
import ray
from dask._task_spec import GraphNode
from dask.sizeof import sizeof
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deisa.ray._engine.ray_cluster import connect, node_cpus
from deisa.ray._graph.bundles import CALLER, Bundle
from deisa.ray._graph.execute import pick, run_bundle, threads_that_pay
from deisa.ray._graph.leaves import Handle, StepSlots
from deisa.ray._graph.scheduler import BundleStats, Picks
from deisa.ray.config import Settings

logger = logging.getLogger("deisa.ray")

NODES_FRESH_S = 5.0
RETRIES = 3  # of a bundle whose worker process died


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


_unpacked: OrderedDict[str, tuple[Work, int]] = OrderedDict()
_unpacking = threading.Lock()


@dataclass(frozen=True, slots=True)
class Ended:
    """The last value that a bundle returns: how long it ran (seconds), and the sizes of its groups (bytes)."""

    run_s: float
    nbytes: tuple[int, ...]


@ray.remote
def run_on_node(work: Work | PackedWork, steps: Mapping[Hashable, StepSlots], *groups: Sequence[Any]) -> Any:
    """Run a bundle; returns its groups of values, and `Ended`."""
    started = time.perf_counter()
    if isinstance(work, PackedWork):
        work = work.unpack()
    values = run_bundle(work.tasks, {**pick(groups, work.picks), **steps}, work.outputs, work.threads)
    nbytes = tuple(sum(map(sizeof, group)) for group in values)
    return (*values, Ended(time.perf_counter() - started, nbytes))


@dataclass(frozen=True, slots=True)
class PreparedBundle:
    """A bundle as `run_on_node` takes it."""

    node_id: str | None
    call: Any  # run_on_node with its options
    work: Work | PackedWork
    crossings: tuple[int, ...]  # for each group, how often it leaves the node


@dataclass(frozen=True, slots=True)
class RayGroup:
    """Values in Ray's object store."""

    reference: Any

    def fetch(self) -> Sequence[Any]:
        """Bring them here."""
        return ray.get(self.reference)


class RayExecutor:
    """Submits bundles as Ray tasks, pinned to their nodes and accounted for with their threads."""

    ships = True

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cpus: dict[str, int] = {}
        self._looked = 0.0
        self._own_node: str | None = None
        self._counting = threading.Condition()
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
        """Have every node start a worker process and import what bundles need; does not wait."""
        for node_id in self._node_cpus():
            self._options(node_id, 1, 1).remote(Work((), (), (), 1), {})

    def _options(self, node_id: str | None, threads: int, returns: int) -> Any:
        cpus = self._cpus.get(node_id, 1) if node_id is not None else 1
        strategy = "DEFAULT" if node_id is None else NodeAffinitySchedulingStrategy(node_id, soft=False)
        return run_on_node.options(
            num_cpus=min(threads, cpus),
            num_returns=returns,
            max_retries=RETRIES,
            scheduling_strategy=strategy,
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
            work = PackedWork(uuid.uuid4().hex, len(packed), [packed if inline else ray.put(packed)])
        here = self._own_node
        crossings = tuple(
            sum(bundle.node_id != (here if taker == CALLER else taker) for taker in takers)
            for takers in bundle.takers
        )
        call = self._options(bundle.node_id, threads, len(bundle.outputs) + 1)
        return PreparedBundle(bundle.node_id, call, work, crossings)

    def submit(
        self, prepared: PreparedBundle, groups: Sequence[Handle], steps: Mapping[Hashable, StepSlots]
    ) -> list[Handle]:
        """Start a bundle once its inputs are there; the leases of `steps` are held until it has ended."""
        here = {key: step.on(prepared.node_id) for key, step in steps.items()}
        references = prepared.call.remote(
            prepared.work,
            here,
            *(group.reference for group in groups),  # type: ignore[attr-defined]
        )
        with self._counting:
            self.stats.submitted += 1
        *returned, ended = references
        held = [steps]

        def count(future: Any) -> None:
            held.clear()
            with self._counting:
                self.stats.ended += 1
                if future.exception() is None:
                    result: Ended = future.result()
                    self.stats.run_s += result.run_s
                    self.stats.moved_bytes += sum(
                        times * nbytes
                        for times, nbytes in zip(prepared.crossings, result.nbytes, strict=True)
                    )
                self._counting.notify_all()

        # Also where there is no lease: Ray logs the error of a reference that nobody has looked at.
        ended.future().add_done_callback(count)
        return [RayGroup(reference) for reference in returned]

    def fetch(self, handles: Sequence[Handle]) -> list[Sequence[Any]]:
        """Wait for groups of values; says every few seconds that it still waits."""
        references = [handle.reference for handle in handles]  # type: ignore[attr-defined]
        started = time.monotonic()
        while True:
            try:
                return ray.get(references, timeout=self._settings.warn_every_s)
            except GetTimeoutError:
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

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait for Ray to tell of the last bundles, which it does a little later than results are there."""
        with self._counting:
            return self._counting.wait_for(lambda: self.stats.ended == self.stats.submitted, timeout_s)
