"""The Dask scheduler: takes a whole graph, makes few bundles of it, and gathers what is wanted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from dask._task_spec import GraphNode, convert_legacy_graph
from dask.base import collections_to_expr, flatten

from deisa.ray._graph.bundles import Bundle, partition
from deisa.ray._graph.leaves import Handle, KeptResult, Leaf, fetch_kept, kept_of


@dataclass(frozen=True, slots=True)
class Input:
    """Values that a bundle takes from one group: ``(position in the group, key)`` pairs."""

    handle: Handle
    picks: tuple[tuple[int, Hashable], ...]


class BundleExecutor(Protocol):
    """What runs bundles: Ray, or this process."""

    def nodes(self) -> Sequence[str | None]:
        """Nodes that may run tasks without a place."""

    def submit(self, bundle: Bundle, inputs: Sequence[Input]) -> list[Handle]:
        """Start a bundle once its inputs are there; returns a handle for each group of outputs."""

    def fetch(self, handles: Sequence[Handle]) -> list[Sequence[Any]]:
        """Wait for groups of values and bring them here; raises what a task has raised."""


class BundleScheduler:
    """A Dask scheduler, for ``compute(scheduler=...)`` or ``dask.config.set(scheduler=...)``.

    `persist` leaves every value where it was computed; the collection it returns keeps them alive.
    """

    def __init__(self, executor: BundleExecutor) -> None:
        self._executor = executor

    def __call__(self, dsk: Any, keys: Any, **_ignored: Any) -> Any:
        """Compute the values of `keys` (a key, or nested lists of keys) in the graph `dsk`.

        Keywords meant for other schedulers (``num_workers``, ``pool`` ...) are accepted.
        """
        wanted = list(flatten([keys], container=list))
        kept = self._run(dsk, wanted)
        handles = list(dict.fromkeys(result.handle for result in kept.values()))
        groups = dict(zip(handles, self._executor.fetch(handles), strict=True))
        values = {key: _writable(groups[r.handle][r.index]) for key, r in kept.items()}
        return _nested(keys, values)

    def persist(self, collections: Sequence[Any], optimize_graph: bool = True, **_ignored: Any) -> list[Any]:
        """Start computing collections and return them with their chunks kept where they are made."""
        expression = collections_to_expr(collections, optimize_graph).optimize()
        keys_of = [list(flatten(keys)) for keys in expression.__dask_keys__()]
        kept = self._run(expression, [key for keys in keys_of for key in keys])
        rebuilt = []
        for collection, keys in zip(collections, keys_of, strict=True):
            rebuild, state = collection.__dask_postpersist__()
            rebuilt.append(rebuild({key: Leaf(key, fetch_kept, kept[key]) for key in keys}, *state))
        return rebuilt

    def _run(self, dsk: Any, wanted: Sequence[Hashable]) -> dict[Hashable, KeptResult]:
        graph = _materialize(dsk)
        given = {key: kept for key, task in graph.items() if (kept := kept_of(task)) is not None}
        at = {key: kept.node_id for key, kept in given.items()}
        parts = partition(graph, wanted, self._executor.nodes, at)
        returned: list[list[Handle]] = []
        for bundle in parts.bundles:
            inputs = [Input(returned[i.bundle][i.group], tuple(enumerate(i.keys))) for i in bundle.inputs]
            by_handle: dict[Handle, list[tuple[int, Hashable]]] = defaultdict(list)
            for key in bundle.given:
                by_handle[given[key].handle].append((given[key].index, key))
            inputs += [Input(handle, tuple(picks)) for handle, picks in by_handle.items()]
            returned.append(self._executor.submit(bundle, inputs))
        results = {key: given[key] for key in wanted if key in given}
        for key, (number, group, index) in parts.results.items():
            results[key] = KeptResult(returned[number][group], index, parts.bundles[number].node_id)
        return results


def _materialize(dsk: Any) -> dict[Hashable, GraphNode]:
    """Turn an expression, a high-level graph or a plain dict into tasks."""
    if hasattr(dsk, "__dask_graph__"):
        dsk = dsk.__dask_graph__()
    graph = dict(dsk)
    if not all(isinstance(task, GraphNode) for task in graph.values()):
        graph = convert_legacy_graph(graph)
    return graph


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
