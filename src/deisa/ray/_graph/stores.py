"""The tasks of a graph that belong in the process of the analytics, because they touch its own objects.

``da.store``, and all that is built on it (``to_hdf5``, xarray's ``to_netcdf``), make tasks that write into an array, an
open file or a store that exists in this process only. A worker would write into a copy of it, or could not be
sent it at all. So these tasks run here, and the chunks come to them. Two kinds of targets are different: a
Zarr array in files or in an object store is the same from everywhere, and workers write it where the chunks are, if
no two of them write to the same chunk of it.

Dask may have fused such a task with what comes before it, user code too. It is taken apart again then: only
the library's own part runs here.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from deisa.ray._graph._dask import (
    STORE_FUNCTIONS,
    TARGET_AT,
    DataNode,
    GraphNode,
    NestedContainer,
    Task,
    TaskRef,
    fuse_slice,
)
from deisa.ray._graph.leaves import chunk_of, kept_of
from deisa.ray._graph.purity import is_in

Key = Hashable
Graph = Mapping[Key, GraphNode]

_LIBRARIES = (
    "dask",
    "numpy",
    "xarray",
    "zarr",
    "h5py",
    "h5netcdf",
    "netCDF4",
    "operator",
    "_operator",
    "builtins",
)
_TARGET_AT = {  # functions that touch a target, by id, since not all functions have a hash; and where they take it
    id(function): TARGET_AT[name] for name, function in STORE_FUNCTIONS.items()
}
_MEMORY_FILES = ("memory", "reference")  # file systems of fsspec that are in this process


def with_stores_apart(graph: Graph, here: Iterable[Key] = ()) -> tuple[Graph, set[Key]]:
    """Find the tasks that must run in this process.

    Parameters
    ----------
    graph : mapping of key to GraphNode
    here : iterable of key
        Values, or tasks, that are known to be here, and here only.

    Returns
    -------
    graph, keys
        The graph, in which such tasks are not fused with others, and their keys.
    """
    whole = dict(graph)
    found = set(here)
    fused = [key for key, task in graph.items() if any(map(_holds_store, _fused(task)))]
    for key in fused:
        whole.update(unfused(whole[key]))
    stores = [key for key, task in whole.items() if _stores(task)]
    if not stores and not found:
        return graph, found
    targets: dict[int, list[Key]] = {}
    kept: list[Any] = []  # so that no two targets have the same id
    for key in stores:
        target = _target(whole, whole[key])
        kept.append(target)
        targets.setdefault(id(target), []).append(key)
    for target, keys in zip(_distinct(kept), targets.values(), strict=True):
        if not (_is_everywhere(target) and all(_is_aligned(whole, whole[key], target) for key in keys)):
            found.update(keys)
    if not found:
        return graph, found
    return closure(whole, found)


def closure(graph: Graph, here: set[Key]) -> tuple[Graph, set[Key]]:
    """Add the tasks of libraries that take what is here: it may be an object that cannot leave.

    Those that Dask has fused with code of the user are taken apart first.
    """
    whole = dict(graph)
    users: dict[Key, list[Key]] = {}

    def note(task: GraphNode) -> None:
        for needed in task.dependencies:
            users.setdefault(needed, []).append(task.key)

    for task in graph.values():
        note(task)
    found, new = set(here), list(here)
    while new:
        waiting = users.get(new.pop(), [])
        while waiting:
            task = whole[waiting.pop()]
            if task.key in found:
                continue
            if is_of_library(task):
                found.add(task.key)
                new.append(task.key)
                continue
            parts = unfused(task)
            if len(parts) > 1:
                whole.update(parts)
                for part in parts.values():
                    note(part)
                    if part.dependencies & found:
                        waiting.append(part.key)
    return whole, found


def is_of_library(task: GraphNode) -> bool:
    """Whether no code of the user runs in a task; then it may run in this process."""
    if chunk_of(task) is not None or kept_of(task) is not None:
        return False
    if not isinstance(task, Task):
        return True
    inner = list(_fused(task))
    if inner:
        return all(map(is_of_library, inner))
    parts = [] if isinstance(task, NestedContainer) else [task.func]
    return all(map(_is_librarys, (*parts, *task.args, *task.kwargs.values())))


def _is_librarys(part: Any) -> bool:
    if isinstance(part, GraphNode):
        return is_of_library(part)
    if isinstance(part, functools.partial):
        return all(map(_is_librarys, (part.func, *part.args, *part.keywords.values())))
    if not callable(part):
        return True
    return is_in(getattr(part, "__module__", None) or type(part).__module__, _LIBRARIES)


def _fused(task: GraphNode) -> Iterable[GraphNode]:
    """The tasks that Dask has fused into one."""
    return task.args[0].values() if isinstance(task, Task) and task.has_subgraph() else ()


def unfused(task: GraphNode) -> dict[Key, GraphNode]:
    """Take a task that Dask has fused apart; the last of its parts has its key."""
    if not isinstance(task, Task) or not task.has_subgraph():
        return {task.key: task}
    inner, last, names, *given = task.args
    new: dict[Key, Any] = {key: task.key if key == last else f"{key}-of-{task.key}" for key in inner}
    for name, value in zip(names, given, strict=True):
        new[name] = value.key if isinstance(value, TaskRef) else value
        if not isinstance(value, GraphNode | TaskRef):
            new[name] = DataNode(None, value)
    parts: dict[Key, GraphNode] = {}
    for key, part in inner.items():
        parts.update(unfused(part.substitute(new, key=new[key])))
    return parts


def _stores(task: GraphNode) -> bool:
    return isinstance(task, Task) and id(task.func) in _TARGET_AT


def _holds_store(task: GraphNode) -> bool:
    return _stores(task) or any(map(_holds_store, _fused(task)))


def _target(graph: Graph, task: GraphNode) -> Any:
    """What a task writes into; None where that is known only when it runs."""
    assert isinstance(task, Task)
    return _argument(graph, task, _TARGET_AT[id(task.func)], "out")


def _argument(graph: Graph, task: Task, position: int, name: str) -> Any:
    value = task.args[position] if len(task.args) > position else task.kwargs.get(name)
    seen = set()
    while isinstance(value, TaskRef) and value.key in graph and value.key not in seen:
        seen.add(value.key)
        value = graph[value.key]
    if isinstance(value, DataNode):
        return value.value
    if isinstance(value, NestedContainer):
        return value() if not value.dependencies else None
    return None if isinstance(value, GraphNode | TaskRef) else value


def _distinct(things: Sequence[Any]) -> Iterator[Any]:
    seen: set[int] = set()
    for thing in things:
        if id(thing) not in seen:
            seen.add(id(thing))
            yield thing


def _is_everywhere(target: Any) -> bool:
    """Whether a target is the same in every process: a Zarr array in files, or in an object store."""
    if not is_in(type(target).__module__, ("zarr",)):
        return target is None  # it is made by a task, where that runs
    store: Any = getattr(target, "store", None)
    kind = type(store).__name__
    if kind == "FsspecStore":
        protocol = store.fs.protocol
        return not {*([protocol] if isinstance(protocol, str) else protocol)} & {*_MEMORY_FILES}
    if kind == "ObjectStore":
        return type(store.store).__name__ != "MemoryStore"
    return kind in ("LocalStore", "DirectoryStore", "NestedDirectoryStore", "FSStore")


def _is_aligned(graph: Graph, task: GraphNode, target: Any) -> bool:
    """Whether a task writes whole chunks of a Zarr array, so that no other one writes to the same."""
    assert isinstance(task, Task)
    if target is None or _TARGET_AT[id(task.func)] == 0:
        return True
    index = _argument(graph, task, 2, "index")
    region = task.kwargs.get("region") or (task.args[3] if len(task.args) > 3 else None)
    if isinstance(region, TaskRef | GraphNode):
        region = _argument(graph, task, 3, "region")
    if isinstance(region, slice | tuple) and region:
        index = fuse_slice(region, index) if index else region
    whole = getattr(target, "shards", None) or target.chunks
    index = index if isinstance(index, tuple) else (index,)
    if len(index) != len(target.shape):
        return False
    for at, chunk, size in zip(index, whole, target.shape, strict=True):
        if not isinstance(at, slice):
            if not isinstance(at, int) or chunk != 1:
                return False
            continue
        start, stop, step = at.indices(size)
        if step != 1 or start % chunk or (stop % chunk and stop != size):
            return False
    return True
