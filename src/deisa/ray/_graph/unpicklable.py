"""What cannot be pickled, said in the words of whoever wrote it."""

from __future__ import annotations

import io
import os
import types
from collections.abc import Iterator, Sequence
from typing import Any

from deisa.ray._graph._dask import DataNode, GraphNode, Task, funcname
from deisa.ray._graph.purity import pack
from deisa.ray.errors import NotPicklableError


def unpicklable(tasks: Sequence[GraphNode]) -> Iterator[tuple[GraphNode, Exception]]:
    """Find the tasks that cannot be pickled, and why not."""
    for task in tasks:
        error = _why_not(task)
        if error is not None:
            yield task, error


def _why_not(thing: Any) -> Exception | None:
    try:
        pack(thing)
    except Exception as error:  # whatever a foreign __reduce__ raises
        return error
    return None


def explain(task: GraphNode, error: Exception) -> NotPicklableError:
    """Name what a task holds that cannot be pickled, how it comes to hold it, and the way out."""
    path, thing = [], task
    while (found := next(((name, part) for name, part in _parts(thing) if _why_not(part)), None)) is not None:
        name, thing = found
        path.append(name)
    what = f"{type(thing).__module__}.{type(thing).__qualname__}".removeprefix("builtins.")
    held = " -> ".join(name for name in path if name) or "it"
    return NotPicklableError(
        f"a task of this computation cannot go to a worker process: {held} is a {what}, which cannot be pickled "
        f"({str(error).splitlines()[0]:.200}). {_way_out(thing)}"
    )


def _parts(thing: Any) -> Iterator[tuple[str, Any]]:
    """What an object refers to, each with a name that its author would recognise."""
    if isinstance(thing, DataNode):
        yield "", thing.value
    elif isinstance(thing, Task):
        yield "", thing.func
        for argument in (*thing.args, *thing.kwargs.values()):
            yield f"an argument of {funcname(thing.func)}()", argument
    elif isinstance(thing, types.FunctionType):
        where = f"{os.path.basename(thing.__code__.co_filename)}:{thing.__code__.co_firstlineno}"
        about = f"function {thing.__name__!r} ({where})"
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        for name, cell in cells:
            try:
                yield f"{about} uses the variable {name!r}, which", cell.cell_contents
            except ValueError:  # not assigned yet
                continue
        for name in thing.__code__.co_names:
            if name in thing.__globals__ and not isinstance(thing.__globals__[name], types.ModuleType):
                yield f"{about} uses the global {name!r}, which", thing.__globals__[name]
        for value in (*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()):
            yield f"{about} has a default that", value
    elif isinstance(thing, types.MethodType):
        yield f"the object of the method {thing.__name__!r}", thing.__self__
    elif isinstance(thing, list | tuple | set | frozenset):
        for item in thing:
            yield "", item
    elif isinstance(thing, dict):
        for name, item in thing.items():
            yield f"[{name!r:.40}]", item
    elif hasattr(thing, "func") and hasattr(thing, "keywords"):  # functools.partial
        yield from (
            ("", thing.func),
            *(("", a) for a in thing.args),
            *(("", a) for a in thing.keywords.values()),
        )
    elif hasattr(thing, "__dict__") and not isinstance(thing, type):
        for name, value in vars(thing).items():
            yield f"attribute {name!r} of a {type(thing).__name__}", value


def _way_out(thing: Any) -> str:
    name = type(thing).__name__
    if "lock" in name.lower():
        return "Make the lock inside the function, or use dask.utils.SerializableLock."
    if (
        isinstance(thing, io.IOBase)
        or "File" in name
        or type(thing).__module__.split(".")[0] in ("h5py", "netCDF4")
    ):
        return "Open the file inside the function, by its path; or write with da.store, which writes in the analytics."
    if isinstance(thing, types.GeneratorType):
        return "Give a list in place of the generator."
    return "Make it inside the function, or give the function plain values instead."
