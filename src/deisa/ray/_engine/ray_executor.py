"""Each bundle is one Ray task on its node, unless it was short the last time.

A Ray task is accounted for with a CPU, and pays for it: its worker process is leased from the node first.
For a bundle of a few milliseconds that takes longer than the bundle itself, and there is nothing to account for. A
plan's bundles are submitted again at every timestep, so what one takes is known from the time before:

- A short one goes to a worker that stands ready on its node.
- A very short one that only the caller waits for, as the last step of a reduction is, runs in this process:
  when it is pure (see `deisa.ray._graph.purity`), and reads no chunks and little else, or chunks of this node.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import threading
import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deisa.ray._engine.cpus import CpuShares, CpuWait, available_cpus, holders
from deisa.ray._engine.local import NODE_ID as LOCAL
from deisa.ray._engine.local import LocalBundle, LocalExecutor
from deisa.ray._engine.ray_cluster import connect, node_cpus
from deisa.ray._engine.ray_losses import loss_error
from deisa.ray._graph.bundles import CALLER, Bundle
from deisa.ray._graph.directory import enter, in_directory
from deisa.ray._graph.execute import Picks, threads_that_pay
from deisa.ray._graph.failures import Failure
from deisa.ray._graph.leaves import GroupHere, Handle, StepSlots
from deisa.ray._graph.scheduler import BundleStats
from deisa.ray._graph.work import (
    Ended,
    PackedWork,
    Work,
    do_work,
    do_work_for_others,
    independent,
    pack_work,
    result_error,
)
from deisa.ray._session.mpi_job import forget_rank
from deisa.ray.config import Settings
from deisa.ray.errors import ComputationLostError, NoFreeCpusError, PeerError, SessionEndedError
from deisa.ray.report import SHOWN_NODE_ID

logger = logging.getLogger("deisa.ray")

if ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
    forget_rank()  # that of whoever started Ray, before anything that a bundle brings along imports mpi4py

NODES_FRESH_S = 5.0
RETRIES = 3  # of a bundle whose worker process died
SHORT_S = 0.02  # bundles that ran no longer go to standing workers
HERE_S, HERE_BYTES = (
    0.005,
    2**20,
)  # bundles that ran no longer, and took no more from others, run in this process

_NOT_HERE = (
    PeerError, SessionEndedError,  # this process and its node's agent cannot reach each other
    FloatingPointError, Warning,  # the script has NumPy or Python raise these, which workers do not know of
)  # fmt: skip
_NOT_PICKLABLE = (TypeError, ValueError, AttributeError, pickle.PicklingError)  # as pickle says it
INLINE_BYTES = 32 * 1024  # work up to this size travels with every call, larger work once to each node
BRING_S = 300.0  # for an object that exists to come from another node


def _bring(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=BRING_S)
    except RayError as exc:
        raise loss_error(exc, 0) from exc


def _put(value: Any) -> Any:
    try:
        return ray.put(value)
    except (ObjectStoreFullError, OutOfDiskError) as exc:
        raise loss_error(exc, 0) from exc


def _do(
    work: PackedWork,
    returns: int,
    most_threads: int,
    steps: Mapping[Hashable, StepSlots],
    *groups: Sequence[Any],
) -> Any:
    return do_work_for_others(work, returns, steps, groups, _bring, most_threads)


@ray.remote
def run_on_node(directory: str, *arguments: Any) -> Any:
    """Run a bundle, in the directory of the analytics where this node has it."""
    with in_directory(directory):
        return _do(*arguments)


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=RETRIES, enable_task_events=False)
class StandingWorker:
    """A process on a node that waits for short bundles."""

    def __init__(self, directory: str) -> None:
        enter(directory)

    def run(self, *arguments: Any) -> Any:
        """Run a bundle, as `run_on_node` does."""
        return _do(*arguments)


@dataclass(slots=True)
class PreparedBundle:
    """A bundle as `submit` takes it."""

    node_id: str | None
    call: Any  # run_on_node with its options
    work: PackedWork
    threads: int  # at most, and if they are free
    crossings: tuple[int, ...]  # for each group, how often it leaves the node
    may_run_here: bool
    run_s: float = math.inf  # how long it ran the last time (seconds)
    taken_bytes: float = math.inf  # what it took from other bundles then


@dataclass(frozen=True, slots=True)
class RayGroup:
    """Values in Ray's object store.

    Attributes
    ----------
    reference : ObjectRef
    executor : RayExecutor or None
        What computes them; None in other processes.
    """

    reference: Any
    executor: RayExecutor | None = field(default=None, compare=False, repr=False)

    def __reduce__(self) -> Any:
        return RayGroup, (self.reference,)

    def fetch(self) -> Sequence[Any]:
        """Bring them here."""
        if self.executor is not None:
            return self.executor.fetch([self])[0]
        return _received([_bring(self.reference)])[0]


class RayExecutor:
    """Submits bundles as Ray tasks, pinned to their nodes and accounted for with one CPU each."""

    ships = True

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cpus: dict[str, int] = {}
        self._looked = 0.0
        self._own_node: str | None = None
        self._counting = threading.Condition()
        self._standing: dict[str, Any] = {}
        self._under_way: Counter[str | None] = Counter()  # bundles on each node
        self._shares = CpuShares()
        self._tasks: dict[
            Any, str | None
        ] = {}  # bundles that are Ray tasks: what they return last, their nodes
        self._directory = os.getcwd()
        self._local = LocalExecutor(settings)  # for chunks of the local engine, which no worker can read
        self.stats = BundleStats()

    def nodes(self) -> Sequence[str | None]:
        """The nodes that have CPUs, this process's own first."""
        found = self._node_cpus()  # connects
        return sorted((n for n, cpus in found.items() if cpus), key=lambda n: n != self._own_node) or [None]

    def _node_cpus(self) -> dict[str, int]:
        connect(self._settings)
        if self._own_node is None:
            self._own_node = ray.get_runtime_context().get_node_id()
        if time.monotonic() - self._looked > NODES_FRESH_S:
            self._cpus = node_cpus()
            self._looked = time.monotonic()
        return self._cpus

    def warm_up(self) -> None:
        """Have every node start its worker processes and import what bundles need; does not wait."""
        nothing = pack_work(Work((), (), (), 1))
        for node_id, cpus in self._node_cpus().items():
            self._options(node_id, 0, 1).remote(self._directory, nothing, 1, 1, {})
            self._standing[node_id] = StandingWorker.options(  # type: ignore[attr-defined]
                max_concurrency=max(1, cpus),
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            ).remote(self._directory)
            self._standing[node_id].run.remote(nothing, 1, 1, {})

    def close(self) -> None:
        """Let the standing workers end, once they have done what they were given."""
        self._standing.clear()

    def _options(self, node_id: str | None, cpus: int, returns: int) -> Any:
        strategy = "DEFAULT" if node_id is None else NodeAffinitySchedulingStrategy(node_id, soft=False)
        return run_on_node.options(
            num_cpus=cpus,
            num_returns=returns,
            max_retries=RETRIES,
            scheduling_strategy=strategy,
            enable_task_events=False,  # Ray's head would keep a record of every bundle
        )

    def prepare(self, bundle: Bundle, picks: Sequence[Picks]) -> PreparedBundle | LocalBundle:
        """Decide how many threads a bundle gets, and pack what it does.

        Raises
        ------
        UnpicklableTasksError
        """
        if bundle.node_id == LOCAL:
            return self._local.prepare(bundle, picks)
        found = self._node_cpus()
        cpus = found.get(bundle.node_id, 1) if bundle.node_id is not None else max(found.values(), default=1)
        limit = self._settings.threads_per_bundle or max(1, cpus)
        threads = threads_that_pay(bundle, min(limit, max(1, cpus)))
        work = pack_work(Work(bundle.tasks, picks, bundle.outputs, threads))
        if work.nbytes > INLINE_BYTES:
            work = replace(work, packed=[_put(work.packed[0])])
        here = self._own_node
        crossings = tuple(
            sum(bundle.node_id != (here if taker == CALLER else taker) for taker in takers)
            for takers in bundle.takers
        )
        call = self._options(bundle.node_id, min(1, cpus), len(bundle.outputs) + 1)
        may_run_here = work.pure and bundle.last and (bundle.node_id == here or not bundle.leaves)
        return PreparedBundle(bundle.node_id, call, work, threads, crossings, may_run_here)

    def submit(
        self,
        prepared: PreparedBundle | LocalBundle,
        groups: Sequence[Handle],
        steps: Mapping[Hashable, StepSlots],
    ) -> list[Handle]:
        """Start a bundle once its inputs are there; the leases of `steps` are held until it has ended."""
        if isinstance(prepared, LocalBundle):
            return self._local.submit(prepared, groups, steps)
        here = {key: step.on(prepared.node_id) for key, step in steps.items()}
        returns = len(prepared.crossings) + 1
        threads = self._threads_now(prepared)
        standing = self._standing.get(prepared.node_id or "") if prepared.run_s <= SHORT_S else None
        if standing is None:
            call = partial(prepared.call.remote, self._directory)
        else:
            call = standing.run.options(num_returns=returns).remote
        references = call(prepared.work, returns, threads, here, *map(self._reference, groups))
        *returned, ended = references
        with self._counting:
            self.stats.submitted += 1
            self._under_way[prepared.node_id] += 1
            if standing is None:
                self._tasks[ended] = prepared.node_id
                self._shares.took(prepared.node_id or "")
        held = [steps]

        def count(future: Any) -> None:
            held.clear()
            with self._counting:
                self.stats.ended += 1
                self._under_way[prepared.node_id] -= 1
                if standing is None:
                    del self._tasks[ended]
                    self._shares.gave_back(prepared.node_id or "")
                result = future.result() if future.exception() is None else None
                if isinstance(result, Ended):
                    prepared.run_s, prepared.taken_bytes = result.run_s, result.taken_bytes
                    self.stats.run_s += result.run_s
                    self.stats.moved_bytes += sum(
                        times * nbytes
                        for times, nbytes in zip(prepared.crossings, result.nbytes, strict=True)
                    )
                self._counting.notify_all()

        # Also where there is no lease: Ray logs the error of a reference that nobody has looked at.
        ended.future().add_done_callback(count)
        return [RayGroup(reference, self) for reference in returned]

    def _threads_now(self, prepared: PreparedBundle) -> int:
        """How many threads a bundle gets of those that it is worth: as many as others leave CPUs."""
        if prepared.threads == 1 or prepared.node_id is None:
            return prepared.threads
        if not self._shares.fresh:
            self._shares.look(self._node_cpus(), available_cpus())
        return min(
            prepared.threads, self._shares.remaining(prepared.node_id, self._cpus.get(prepared.node_id, 1))
        )

    @staticmethod
    def _reference(group: Handle) -> Any:
        if isinstance(group, RayGroup):
            return group.reference
        try:
            return _put(list(group.fetch()))
        except _NOT_PICKLABLE as exc:
            error = result_error(exc)
        raise error

    def runs_here(self, prepared: PreparedBundle | LocalBundle) -> bool:
        """Whether a bundle that only the caller waits for is too short to be worth a Ray call."""
        if isinstance(prepared, LocalBundle):
            return False
        return prepared.may_run_here and prepared.run_s <= HERE_S and prepared.taken_bytes <= HERE_BYTES

    def run_here(
        self, prepared: PreparedBundle, groups: Sequence[Handle], steps: Mapping[Hashable, StepSlots]
    ) -> list[Handle]:
        """Wait for a bundle's inputs, and run it in this thread."""
        values = self.fetch(groups)
        with self._counting:
            self.stats.submitted += 1
        try:
            own = {key: step.borrowed for key, step in steps.items()}
            *returned, ended = do_work(prepared.work, own, values, _bring)
        except _NOT_HERE:
            prepared.may_run_here = False
            return self.submit(prepared, groups, steps)
        finally:
            with self._counting:
                self.stats.ended += 1
        prepared.run_s, prepared.taken_bytes = ended.run_s, ended.taken_bytes
        self.stats.run_s += ended.run_s
        return [GroupHere([independent(value, copy_all=True) for value in group]) for group in returned]

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
        NoFreeCpusError
            When others have held all CPUs of a node for too long.
        StoreFullError
            When Ray has no room for a result.
        Exception
            What a bundle raised.
        """
        references = [handle.reference for handle in handles]  # type: ignore[attr-defined]
        warn_every_s, cpu_timeout_s = self._settings.warn_every_s, self._settings.cpu_timeout_s
        started = said = time.monotonic()
        cpu_wait = CpuWait(cpu_timeout_s)
        while True:
            try:
                values = ray.get(references, timeout=min(warn_every_s, cpu_timeout_s))
                break
            except GetTimeoutError:
                self._check_nodes()
                shortage = self._check_cpus(cpu_wait)
                now = time.monotonic()
                if now - said >= warn_every_s:
                    said = now
                    what = f"waits for a CPU: {shortage}" if shortage else "has been running"
                    logger.warning("a computation %s (%.0f s so far)", what, now - started)
            except RayTaskError as exc:  # not from a task, whose exceptions are returned: from handing it on
                if not isinstance(exc.cause, _NOT_PICKLABLE):
                    raise loss_error(exc, RETRIES) from exc
                values = [Failure.of(result_error(exc.cause))]
                break
            except RayError as exc:
                raise loss_error(exc, RETRIES) from exc
        return _received(values)

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

    def _check_cpus(self, wait: CpuWait) -> str:
        """Say who holds the CPUs that bundles wait for; raises when that has been so for too long."""
        cpus = node_cpus()
        self._shares.look(cpus, available_cpus())
        exhausted = self._shares.exhausted(cpus)
        held = holders() if exhausted else []
        short = self._shares.held_by_others(exhausted, held)
        try:
            return wait.check(short, held)
        except NoFreeCpusError:
            with self._counting:
                waiting = [ended for ended, node_id in self._tasks.items() if node_id in short]
            for ended in waiting:  # none runs, but each holds leases
                ray.cancel(ended)
            raise

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait for Ray to tell of the last bundles, which it does a little later than results are there."""
        with self._counting:
            return self._counting.wait_for(lambda: self.stats.ended == self.stats.submitted, timeout_s)


def _received(groups: Sequence[Any]) -> list[Any]:
    """Raise what a task has raised in place of returning its values."""
    for group in groups:
        if isinstance(group, Failure):
            raise group.error("in a worker process") from None
    return list(groups)
