"""From the windows of callbacks to streams: what each window wants of its array, in elements of the array."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from deisa.ray._state.dtypes import converts
from deisa.ray._state.layout import ArrayLayout
from deisa.ray._state.streams import Stream, whole
from deisa.ray.errors import WindowError
from deisa.ray.labels import import_xarray
from deisa.ray.types import WindowSpec

Positions = int | slice  # along one dimension; of a slice, start, stop and step are numbers


class Streams:
    """The streams of a session, by the windows that ask for them.

    Parameters
    ----------
    layouts : mapping of str to ArrayLayout
        The arrays of the simulation.
    """

    def __init__(self, layouts: Mapping[str, ArrayLayout]) -> None:
        self._layouts = layouts
        self.by_name: dict[str, Stream] = {}

    def of(self, window: WindowSpec) -> Stream:
        """Return the stream that a window asks for.

        Raises
        ------
        WindowError
            When it selects what the array does not have, or a dtype that its elements do not convert to.
        """
        layout = self._layouts[window.name]
        stream = _stream(window, layout)
        if stream.name != layout.name:
            while stream.name in self._layouts:  # an array has that very name
                stream = _renamed(stream, f"{stream.name}'")
        return self.by_name.setdefault(stream.name, stream)


def _stream(window: WindowSpec, layout: ArrayLayout) -> Stream:
    everything = whole(layout)
    dtype = _dtype(window, layout)
    positions = _positions(window, layout)
    start, step, shape, dropped = [], [], [], []
    for d, chosen in enumerate(positions):
        if isinstance(chosen, slice):
            taken = range(chosen.start, chosen.stop, chosen.step)
            start.append(chosen.start)
            step.append(chosen.step if len(taken) > 1 else 1)
            shape.append(len(taken))
        else:
            start.append(chosen)
            step.append(1)
            shape.append(1)
            dropped.append(d)
    stream = Stream(
        layout.name, layout.name, window.every, tuple(start), tuple(step), tuple(shape), tuple(dropped), dtype
    )
    is_whole = dtype is None and stream == everything
    return stream if is_whole else _renamed(stream, _name(stream, layout))


def _renamed(stream: Stream, name: str) -> Stream:
    return Stream(
        name,
        stream.array,
        stream.every,
        stream.start,
        stream.step,
        stream.shape,
        stream.dropped,
        stream.dtype,
    )


def _name(stream: Stream, layout: ArrayLayout) -> str:
    """Write a stream as its window would be written."""
    name = layout.name
    if stream.shape != layout.shape or stream.dropped:
        name += f"[{', '.join(_index(stream, d) for d in range(len(layout.shape)))}]"
    if stream.every != 1:
        name += f" every {stream.every}"
    if stream.dtype is not None:
        name += f" as {stream.dtype}"
    return name


def _index(stream: Stream, d: int) -> str:
    start, step = stream.start[d], stream.step[d]
    if d in stream.dropped:
        return str(start)
    stop = start + (stream.shape[d] - 1) * step + 1
    return f"{start}:{stop}" + (f":{step}" if step != 1 else "")


def _dtype(window: WindowSpec, layout: ArrayLayout) -> np.dtype | None:
    wanted = window.astype
    own = layout.dtype
    if wanted is None or (own is not None and wanted == own):  # to NumPy, None is double precision
        return None
    if own is not None:
        check_conversion(window.name, own, wanted)
    return wanted


def check_conversion(array: str, own: np.dtype, wanted: np.dtype) -> None:
    """Raise `WindowError` where elements of an array cannot be handed over as another dtype."""
    if wanted != own and not converts(own, wanted):
        raise WindowError(
            f"window of {array!r}: elements of dtype {own} are not converted to {wanted} where they are sent: that "
            "works to floating-point and complex numbers, and to wider integers; use .dask.astype(...) in the callback"
        )


# Positions.


def _positions(window: WindowSpec, layout: ArrayLayout) -> list[Positions]:
    select = window.select
    if select is None:
        return [slice(0, n, 1) for n in layout.shape]
    chosen = _by_name(window, layout, select) if isinstance(select, Mapping) else _in_order(window, layout)
    return [_resolved(window, layout, d, index) for d, index in enumerate(chosen)]


def _in_order(window: WindowSpec, layout: ArrayLayout) -> list[Any]:
    """Read a selection as NumPy reads an index."""
    select, ndim = window.select, len(layout.shape)
    index: Sequence[Any] = select if isinstance(select, tuple) else (select,)
    gaps = [place for place, item in enumerate(index) if item is Ellipsis]
    given = len(index) - len(gaps)
    if len(gaps) > 1 or given > ndim:
        raise WindowError(
            f"window of {window.name!r}: select={select!r} has {given} indices, the array has {ndim} dimensions"
        )
    gap = gaps[0] if gaps else len(index)
    rest: Iterable[Any] = [slice(None)] * (ndim - given)
    return [*index[:gap], *rest, *index[gap + 1 :]]


def _by_name(window: WindowSpec, layout: ArrayLayout, select: Mapping[Any, Any]) -> list[Any]:
    """Read a selection as xarray's ``sel`` does: labels along dimensions that have a coordinate, else positions."""
    chosen: list[Any] = [slice(None)] * len(layout.shape)
    for name, index in select.items():
        d = _dimension(window, layout, name)
        labels = next((c.values for c in layout.labels.coords if c.name == c.dim == name), None)
        chosen[d] = index if labels is None else _labelled(window, name, labels, index)
    return chosen


def _labelled(window: WindowSpec, name: str, labels: np.ndarray, index: Any) -> Positions:
    """Find the positions of labels along a dimension."""
    positions = import_xarray().DataArray(np.arange(len(labels)), {name: labels}, [name])
    where = f"window of {window.name!r}: select={window.select!r}"
    try:
        found = positions.sel({name: index}).values
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise WindowError(
            f"{where}: {index!r} is not found along {name!r}, whose labels go from {labels[0]} to {labels[-1]} "
            f"({type(error).__name__}: {error})"
        ) from error
    if found.ndim == 0:
        return int(found)
    steps = set(np.diff(found).tolist())
    if not found.size or len(steps) > 1 or min(steps, default=1) < 1:
        what = (
            "selects nothing"
            if not found.size
            else "selects positions that no slice with a positive step has"
        )
        raise WindowError(f"{where}: {index!r} along {name!r} {what}; select anything else in the callback")
    return slice(int(found[0]), int(found[-1]) + 1, min(steps, default=1))


def _dimension(window: WindowSpec, layout: ArrayLayout, name: Any) -> int:
    ndim, dims = len(layout.shape), layout.labels.dims
    if dims is not None and name in dims:
        return dims.index(name)
    if not isinstance(name, str):
        try:
            d = operator.index(name)
        except TypeError:
            d = ndim
        if -ndim <= d < ndim:
            return d % ndim
    there = ", ".join(map(repr, dims)) if dims is not None else f"{ndim} without names, counted from 0"
    raise WindowError(
        f"window of {window.name!r}: select={window.select!r} names {name!r}, which is no dimension of the array; it "
        f"has {there}"
    )


def _resolved(window: WindowSpec, layout: ArrayLayout, d: int, index: Any) -> Positions:
    length = layout.shape[d]
    where = f"window of {window.name!r}: select={window.select!r}, dimension {d} of {length} elements"
    try:
        if isinstance(index, slice):
            start, stop, step = index.indices(length)
        else:
            position = operator.index(index)
            if not -length <= position < length:
                raise WindowError(f"{where}: there is no element {position}")
            return position % length
    except (TypeError, ValueError) as error:
        raise WindowError(
            f"{where}: expected a slice or an integer, got {index!r}; select anything else in the callback ({error})"
        ) from error
    if step < 0:
        raise WindowError(
            f"{where}: the step of {index!r} must be positive; reverse the array in the callback"
        )
    if start >= stop:
        raise WindowError(f"{where}: {index!r} selects nothing")
    return slice(start, stop, step)
