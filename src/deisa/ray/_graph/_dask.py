"""All that deisa-ray uses of Dask beyond what Dask documents, and the releases of Dask that it was tested with.

No other module imports anything of Dask but `dask` and `dask.array` themselves, or names an attribute of Dask's
expressions, layers and arrays that is not documented. A release of Dask that changes these is dealt with here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self, SupportsIndex

import dask
import dask.array as da

from deisa.ray.errors import ConfigurationError, UntestedDaskError

OLDEST = (2026, 1)  # the first release in which a scheduler can bring its own persist()
BEYOND = (2026, 9)  # the first release that was not tested; as in pyproject.toml


def untested(installed: str, why: str = "") -> UntestedDaskError:
    """Say which Dask is installed, which were tested, and what to do."""
    tested = f">={_written(OLDEST)},<{_written(BEYOND)}"
    return UntestedDaskError(
        f"Dask {installed} is installed, and this deisa-ray was tested with Dask {tested} only"
        f"{f' ({why})' if why else ''}: pip install 'dask[array]{tested}', or install a deisa-ray that was tested "
        "with a newer one"
    )


def check_release(installed: str) -> None:
    """Check that a release of Dask is one of those that were tested.

    Raises
    ------
    UntestedDaskError
    """
    release = tuple(map(int, re.findall(r"\d+", installed)[:2]))
    if not OLDEST <= release < BEYOND:
        raise untested(installed)


def _written(release: Sequence[int]) -> str:
    return ".".join(map(str, release))


check_release(dask.__version__)
try:
    from dask._expr import Expr, HLGExpr
    from dask._task_spec import (
        Alias,
        DataNode,
        GraphNode,
        NestedContainer,
        Task,
        TaskRef,
        convert_legacy_graph,
    )
    from dask.array import core as _core
    from dask.array.chunk import getitem
    from dask.array.core import Array
    from dask.array.optimization import fuse_slice
    from dask.base import clone_key, collections_to_expr, flatten
    from dask.graph_manipulation import chunks as _chunks
    from dask.highlevelgraph import HighLevelGraph, Layer, MaterializedLayer
    from dask.sizeof import sizeof
    from dask.threaded import get as compute_in_threads
    from dask.utils import funcname, methodcaller

    bind = _chunks.bind
except (ImportError, AttributeError) as exc:
    raise untested(dask.__version__, str(exc)) from exc

__all__ = [
    "STORE_FUNCTIONS",
    "STORE_MODULE",
    "TARGET_AT",
    "Alias",
    "Array",
    "ArrayView",
    "DataNode",
    "GraphNode",
    "HighLevelGraph",
    "Layer",
    "MaterializedLayer",
    "NestedContainer",
    "Task",
    "TaskRef",
    "array_at",
    "bind",
    "check_kind_of_arrays",
    "clone_key",
    "compute_in_threads",
    "computing_with",
    "expression_of",
    "flatten",
    "funcname",
    "fuse_slice",
    "getitem",
    "graphs_in",
    "methodcaller",
    "optimization_settings",
    "sizeof",
    "state_of",
    "tasks_of",
]

STORE_MODULE = _core.__name__
TARGET_AT = {
    "load_store_chunk": 1,
    "store_chunk": 1,
    "load_chunk": 0,
}  # what they write to, or read, by position
STORE_FUNCTIONS = {  # not every release has all of them
    name: getattr(_core, name) for name in TARGET_AT if hasattr(_core, name)
}


def check_kind_of_arrays() -> None:
    """Check that ``dask.array`` has arrays of graphs, which chunks can be made into.

    Raises
    ------
    ConfigurationError
        When its query planning is on: arrays are expressions then.
    """
    if da.Array is not Array:
        raise ConfigurationError(
            "Dask's query planning for arrays is on, and deisa-ray cannot make such arrays yet: set "
            "DASK_ARRAY__QUERY_PLANNING=False, or dask.config.set({'array.query-planning': False}) before dask.array "
            "is imported for the first time"
        )


# Graphs and expressions.


def expression_of(collections: Sequence[Any], optimize_graph: bool) -> tuple[Any, list[list[Any]]]:
    """Join collections into one expression, and list the keys of each."""
    expression = collections_to_expr(collections, optimize_graph).optimize()
    return expression, [list(flatten(keys)) for keys in expression.__dask_keys__()]


def graphs_in(dsk: Any) -> list[tuple[HighLevelGraph, Any]] | None:
    """The graphs in what Dask hands to a scheduler, each with its optimizer; None for other expressions."""
    if isinstance(dsk, HighLevelGraph):
        return [(dsk, None)]
    if isinstance(dsk, HLGExpr):
        return [(dsk.hlg, dsk.low_level_optimizer)]
    parts = getattr(dsk, "operands", ())
    if parts and all(isinstance(part, HLGExpr) for part in parts):
        return [(part.hlg, part.low_level_optimizer) for part in parts]
    return None


def tasks_of(dsk: Any) -> dict[Hashable, GraphNode]:
    """Turn an expression, a high-level graph or a plain dict into tasks."""
    if hasattr(dsk, "__dask_graph__"):
        dsk = dsk.__dask_graph__()
    graph = dict(dsk)
    if not all(isinstance(task, GraphNode) for task in graph.values()):
        graph = convert_legacy_graph(graph)
    return graph


def state_of(layer: Layer) -> dict[str, Any]:
    """What a layer was made of, without what Dask has found out about it since."""
    state = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
    state.pop("has_legacy_tasks", None)
    return state


# Configuration.


def optimization_settings() -> Any:
    """How Dask optimizes graphs, which is a part of what a graph computes."""
    return dask.config.get("optimization", {})


def computing_with(
    scheduler: Any, split_every: int, on_new_array: Callable[[Array], None]
) -> AbstractContextManager[Any]:
    """Have Dask compute with a scheduler from this moment, until the context that is returned ends.

    Parameters
    ----------
    scheduler : callable
    split_every : int
        Blocks that a reduction combines at once.
    on_new_array : callable
        Called with every array that is made.
    """
    plugins = (*dask.config.get("array_plugins", ()), on_new_array)
    settings: AbstractContextManager[Any] = dask.config.set(
        {
            "scheduler": scheduler,
            "optimization.fuse.active": False,
            "split_every": split_every,
            "array_plugins": plugins,
        }
    )
    return settings


# Arrays.


def array_at(*given: Any, **named: Any) -> tuple[Array, Any]:
    """Read an array and a timestep, in one of three orders.

    That is an array and a timestep; or a timestep and what Dask makes an array of: graph, name, chunks and more
    (deisa-core); or the same with the timestep behind the chunks (deisa-ray 0.1.8).
    """
    if len(given) == 2 and isinstance(given[0], Array) and not named:
        return given[0], given[1]
    parts = list(given)
    if "t" in named:
        t = named.pop("t")
    elif parts and isinstance(parts[0], SupportsIndex) and not isinstance(parts[0], Array):
        t = parts.pop(0)
    elif len(parts) > 3:
        t = parts.pop(3)
    else:
        raise TypeError("a DeisaArray needs a timestep: DeisaArray(array, t)")
    made_of = [*parts, *named.values()]
    if len(made_of) == 1 and isinstance(made_of[0], Array):
        return made_of[0], t
    return Array(*parts, **named), t


def _of_held(name: str) -> property:
    """An attribute that is also that of the array held, whichever of the two is changed."""
    return property(
        lambda self: getattr(self._held, name), lambda self, value: setattr(self._held, name, value)
    )


class ArrayView(Array):
    """Another array, under a class of its own: what is assigned to one of the two shows in the other.

    Attributes
    ----------
    dask : dask.array.Array
        The other array. In Dask's own arrays this is the graph, which here is `__dask_graph__()`.
    """

    __slots__ = ("_held",)

    _held: Array

    def __new__(cls, array: Array) -> Self:
        """Hold an array; `Array.__new__`, which builds one from a graph, has nothing to do."""
        self = object.__new__(cls)
        self._held = array
        self.__dict__ = array.__dict__  # type: ignore[misc]  # where Dask caches what it derives from the chunks
        return self

    # What Dask's methods know of an array, but for its graph: Dask changes these when it assigns in place.
    name = _of_held("name")
    chunks = _of_held("chunks")
    _name = _of_held("_name")
    _chunks = _of_held("_chunks")
    _meta = _of_held("_meta")

    @property
    def dask(self) -> Array:
        """The same as an ordinary Dask array."""
        return self._held

    @dask.setter
    def dask(self, graph: HighLevelGraph) -> None:
        self._held.dask = graph  # in-place assignment and ``out=`` set an array's graph under this name

    def __dask_graph__(self) -> HighLevelGraph:
        return self._held.dask

    def __dask_keys__(self) -> Any:
        return self._held.__dask_keys__()

    @property
    def expr(self) -> Expr:
        """The array's graph, where Dask asks a collection for one."""
        return HLGExpr.from_collection(self._held)
