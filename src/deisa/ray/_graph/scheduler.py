"""The Dask scheduler: takes a whole graph, makes few bundles of it, and gathers what is wanted."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from deisa.ray._graph._dask import GraphNode, expression_of, flatten, tasks_of
from deisa.ray._graph.bundles import ANYWHERE, CALLER, Bundle, Partition, partition
from deisa.ray._graph.execute import Picks
from deisa.ray._graph.in_caller import launch_around_caller
from deisa.ray._graph.leaves import Handle, KeptResult, Leaf, StepSlots, fetch_kept, kept_of, step_of
from deisa.ray._graph.plans import Plan, Plans, structure_of
from deisa.ray._graph.stores import closure, is_of_library, unfused, with_stores_apart
from deisa.ray._graph.work import UnpicklableTasksError

Key = Hashable


@dataclass(slots=True)
class Usage:
    """What a scheduler has done so far.

    Attributes
    ----------
    computations, reused_plans : int
        Graphs computed, and those among them for which a plan was there already.
    planning_s : float
        Time from getting a graph to its last bundle being submitted (seconds).
    waiting_s : float
        Time spent waiting for results and fetching them, or running the last steps towards them (seconds).
    """

    computations: int = 0
    reused_plans: int = 0
    planning_s: float = 0.0
    waiting_s: float = 0.0


@dataclass(slots=True)
class BundleStats:
    """Bundles of one executor so far.

    Attributes
    ----------
    submitted, ended : int
    run_s : float
        Time in which those ran that raised nothing (seconds), all nodes together.
    moved_bytes : int
        Bytes of results that nodes, or this process, took from another node.
    """

    submitted: int = 0
    ended: int = 0
    run_s: float = 0.0
    moved_bytes: int = 0


class BundleExecutor(Protocol):
    """What runs bundles: Ray, or this process."""

    ships: bool  # whether bundles are pickled: then those of a plan may be prepared once and submitted often
    stats: BundleStats

    def nodes(self) -> Sequence[str | None]:
        """Nodes that may run tasks without a place."""

    def prepare(self, bundle: Bundle, picks: Sequence[Picks]) -> Any:
        """Make of a bundle what `submit` takes; `picks` says what it needs of each group of values.

        Raises
        ------
        UnpicklableTasksError
        """

    def submit(self, prepared: Any, groups: Sequence[Handle], steps: Mapping[Key, StepSlots]) -> list[Handle]:
        """Start a bundle once its inputs are there; returns a handle for each group of outputs.

        Holds on to `steps`, the slots that its leaves are in, until it has ended.
        """

    def runs_here(self, prepared: Any) -> bool:
        """Whether a bundle is better run by a caller that waits for it than submitted.

        Never for one whose outputs another bundle takes.
        """

    def run_here(
        self, prepared: Any, groups: Sequence[Handle], steps: Mapping[Key, StepSlots]
    ) -> list[Handle]:
        """Wait for a bundle's inputs and run it in this process; returns as `submit` does."""

    def fetch(self, handles: Sequence[Handle]) -> list[Sequence[Any]]:
        """Wait for groups of values and bring them here; raises what a task has raised."""

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait until `stats` has the end of every bundle; returns whether it has."""

    def close(self) -> None:
        """Let go of what stands ready for bundles; those that are under way run to their end."""


class BundleScheduler:
    """A Dask scheduler, for ``compute(scheduler=...)`` or ``dask.config.set(scheduler=...)``.

    `persist` leaves every value where it was computed; the collection it returns keeps them alive.
    """

    def __init__(self, executor: BundleExecutor) -> None:
        self._executor = executor
        self._plans = Plans()
        self.usage = Usage()

    def __call__(self, dsk: Any, keys: Any, **_ignored: Any) -> Any:
        """Compute the values of `keys` (a key, or nested lists of keys) in the graph `dsk`.

        Keywords meant for other schedulers (``num_workers``, ``pool`` ...) are accepted.
        """
        wanted = list(flatten([keys], container=list))
        kept = self._run(dsk, wanted, waits=True)
        handles = list(dict.fromkeys(result.handle for result in kept.values()))
        groups = dict(zip(handles, self._fetch(handles), strict=True))
        values = {key: _writable(groups[r.handle][r.index]) for key, r in kept.items()}
        return _nested(keys, values)

    def persist(self, collections: Sequence[Any], optimize_graph: bool = True, **_ignored: Any) -> list[Any]:
        """Start computing collections and return them with their chunks kept where they are made."""
        expression, keys_of = expression_of(collections, optimize_graph)
        kept = self._run(expression, [key for keys in keys_of for key in keys], waits=False)
        rebuilt = []
        for collection, keys in zip(collections, keys_of, strict=True):
            rebuild, state = collection.__dask_postpersist__()
            rebuilt.append(rebuild({key: Leaf(key, fetch_kept, kept[key]) for key in keys}, *state))
        return rebuilt

    def _fetch(self, handles: Sequence[Handle]) -> list[Sequence[Any]]:
        started = time.perf_counter()
        try:
            return self._executor.fetch(handles)
        finally:
            self.usage.waiting_s += time.perf_counter() - started

    def _run(self, dsk: Any, wanted: Sequence[Key], *, waits: bool) -> dict[Key, KeptResult]:
        """Start a graph; where the caller `waits` for it anyway, its last bundles may run in this process."""
        started = time.perf_counter()
        try:
            structure = structure_of(dsk, wanted) if self._executor.ships else None
            plan = self._plans.get(structure) if structure is not None else None
            self.usage.computations += 1
            if structure is not None and plan is not None:
                self.usage.reused_plans += 1
                bound: dict[Key, StepSlots] = dict(zip(plan.step_keys, structure.steps, strict=True))
                results = self._launch(plan, {}, bound, waits)
                return {new: results[old] for old, new in zip(plan.wanted, wanted, strict=True)}
            graph = tasks_of(dsk)
            kept = {key: found for key, task in graph.items() if (found := kept_of(task)) is not None}
            steps = {key: step for key, task in graph.items() if (step := step_of(task)) is not None}
            plan = self._plan(
                graph, wanted, kept, steps, structure.step_keys if structure is not None else None
            )
            if structure is not None and plan.may_be_kept:
                self._plans.keep(structure, plan)
            return self._launch(plan, kept, steps, waits)
        finally:
            self.usage.planning_s += time.perf_counter() - started

    def _plan(
        self,
        graph: Mapping[Key, GraphNode],
        wanted: Sequence[Key],
        kept: Mapping[Key, KeptResult],
        steps: Mapping[Key, StepSlots],
        step_keys: tuple[str, ...] | None,
    ) -> Plan:
        given = {key: result.node_id for key, result in kept.items()} | dict.fromkeys(steps, ANYWHERE)
        graph, here = with_stores_apart(graph, (key for key, node_id in given.items() if node_id == CALLER))
        while True:
            parts = partition(graph, wanted, self._executor.nodes, given, here)
            try:
                prepared = self._prepare(parts, kept)
                break
            except UnpicklableTasksError as exc:
                culprits, error = exc.keys, exc.error
            moved = _moved_here(graph, here, culprits)
            if moved is None:
                raise error  # without `exc`, whose frames would keep the timestep's slots
            graph, here = moved
        if step_keys is not None and not here:  # it will be kept
            parts = replace(parts, bundles=tuple(replace(bundle, tasks=()) for bundle in parts.bundles))
        return Plan(parts, tuple(prepared), tuple(wanted), step_keys or (), not here)

    def _prepare(self, parts: Partition, kept: Mapping[Key, KeptResult]) -> list[Any]:
        return [
            self._executor.prepare(
                bundle,
                [
                    *(tuple(enumerate(taken.keys)) for taken in bundle.inputs),
                    *_by_handle(bundle, kept).values(),
                ],
            )
            if bundle.node_id != CALLER
            else None
            for bundle in parts.bundles
        ]

    def _launch(
        self, plan: Plan, kept: Mapping[Key, KeptResult], steps: Mapping[Key, StepSlots], waits: bool
    ) -> dict[Key, KeptResult]:
        bundles, prepared = plan.partition.bundles, plan.prepared
        here = [waits and one is not None and self._executor.runs_here(one) for one in prepared]

        def start(number: int, groups: list[Handle]) -> list[Handle]:
            bundle = bundles[number]
            groups += _by_handle(bundle, kept)
            used = {key: steps[key] for key in bundle.given if key in steps}
            run = self._run_here if here[number] else self._executor.submit
            return run(prepared[number], groups, used)

        returned: dict[int, list[Handle]] = {}
        if any(bundle.node_id == CALLER for bundle in bundles):
            returned = launch_around_caller(bundles, kept, start, self._fetch)
        else:
            for number in sorted(range(len(bundles)), key=here.__getitem__):  # those elsewhere first
                groups = [returned[taken.bundle][taken.group] for taken in bundles[number].inputs]
                returned[number] = start(number, groups)
        results = {key: kept[key] for key in plan.wanted if key in kept}
        for key, (number, group, index) in plan.partition.results.items():
            results[key] = KeptResult(returned[number][group], index, bundles[number].node_id)
        return results

    def _run_here(
        self, prepared: Any, groups: Sequence[Handle], steps: Mapping[Key, StepSlots]
    ) -> list[Handle]:
        started = time.perf_counter()
        try:
            return self._executor.run_here(prepared, groups, steps)
        finally:
            seconds = time.perf_counter() - started
            self.usage.waiting_s += seconds
            self.usage.planning_s -= seconds  # of which `_run` counts the whole


def _moved_here(
    graph: Mapping[Key, GraphNode], here: set[Key], keys: Sequence[Key]
) -> tuple[Mapping[Key, GraphNode], set[Key]] | None:
    """Move tasks that hold what cannot leave this process here; None if code of the user runs in them.

    Those that Dask has fused with others are taken apart first.
    """
    tasks = [graph[key] for key in keys]
    if all(map(is_of_library, tasks)):
        return closure(graph, here | set(keys))
    apart = [unfused(task) for task in tasks]
    if all(len(parts) == 1 for parts in apart):
        return None
    return {**graph, **{key: part for parts in apart for key, part in parts.items()}}, here


def _by_handle(bundle: Bundle, kept: Mapping[Key, KeptResult]) -> dict[Handle, tuple[tuple[int, Key], ...]]:
    """What a bundle takes of results that exist already."""
    picks: dict[Handle, tuple[tuple[int, Key], ...]] = defaultdict(tuple)
    for key in bundle.given:
        if key in kept:
            picks[kept[key].handle] += ((kept[key].index, key),)
    return picks


def _writable(value: Any) -> Any:
    """Copy arrays that still lie in shared memory: callers may write into what they computed."""
    if type(value) is np.ndarray and not value.flags.writeable and not value.flags.owndata:
        return value.copy()
    if type(value) in (list, tuple):
        return type(value)(map(_writable, value))
    if type(value) is dict:
        return {key: _writable(item) for key, item in value.items()}
    return value


def _nested(keys: Any, values: Mapping[Hashable, Any]) -> Any:
    if isinstance(keys, list):
        return tuple(_nested(key, values) for key in keys)
    return values[keys]
