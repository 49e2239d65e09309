"""Arrays under their labels: as xarray has them, and as they are shown.

xarray is imported when it is first asked for. What it makes of an array refers to the array's Dask graph, so that every
operation computes with the scheduler of the run.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np

from deisa.ray._state.agreement import Labels
from deisa.ray.errors import LabelError, MissingPackageError

if TYPE_CHECKING:
    import xarray

    from deisa.ray.types import DeisaArray


@dataclass(frozen=True, slots=True, eq=False)
class About:
    """What is known of an array at a timestep, beside its elements.

    Attributes
    ----------
    array : str or None
        The name under which bridges have described it.
    time : float or None
        The physical time.
    labels : Labels
    """

    array: str | None = None
    time: float | None = None
    labels: Labels = field(default_factory=Labels)


def import_xarray() -> Any:
    """Import xarray.

    Raises
    ------
    MissingPackageError
    """
    try:
        import xarray
    except ImportError as exc:
        raise MissingPackageError(
            f"xarray cannot be imported ({exc}); install it, with pip install 'deisa-ray[xarray]' for example"
        ) from exc
    return xarray


# Making arrays of xarray.

_coords_of: weakref.WeakKeyDictionary[Labels, Any] = weakref.WeakKeyDictionary()  # the same at every timestep


def _coords(labels: Labels, more: Mapping[str, Any]) -> Any:
    """Return the coordinates of an array, and more that have no index; those with one are made once in a run."""
    xr = import_xarray()
    own = _coords_of.get(labels)
    if own is None:
        given = {
            c.name: (c.dim if c.dim is not None else (), _indexable(c.values), deepcopy(dict(c.attrs)))
            for c in labels.coords
        }
        own = _coords_of[labels] = xr.Coordinates(given)
    return xr.Coordinates({**own.variables, **more}, indexes=own.xindexes)


def _indexable(values: np.ndarray) -> np.ndarray:
    """Return values in a dtype that pandas has an index for: it has none of half and of extended precision."""
    if values.dtype.kind == "f" and values.dtype.itemsize not in (4, 8):
        return values.astype(np.float32 if values.dtype.itemsize < 4 else np.float64)
    return values


def _dims(labels: Labels, ndim: int) -> tuple[str, ...]:
    return labels.dims if labels.dims is not None else tuple(f"dim_{d}" for d in range(ndim))


def data_array(array: DeisaArray) -> xarray.DataArray:
    """Return an array as a lazy `xarray.DataArray`, with its labels and its timestep."""
    xr = import_xarray()
    about = array.about
    times = {"timestep": xr.Variable((), array.t)}
    if about.time is not None:
        times["time"] = xr.Variable((), about.time)
    made = xr.DataArray(
        array.dask,
        coords=_coords(about.labels, times),
        dims=_dims(about.labels, array.ndim),
        attrs=deepcopy(dict(about.labels.attrs)),
    )
    made.name = about.array  # given as None, it would be that of the Dask array
    return made


def stacked(window: Sequence[DeisaArray]) -> xarray.DataArray:
    """Return the arrays of a window as one lazy `xarray.DataArray`, whose first dimension is ``time``.

    Raises
    ------
    LabelError
        For a window of no timesteps, and for arrays of different shapes.
    """
    xr = import_xarray()
    if not window:
        raise LabelError("a window of no timesteps has no shape")
    newest = window[-1].about
    shapes = {array.shape for array in window}
    if len(shapes) > 1:
        raise LabelError(
            f"array {newest.array!r} has another shape at each timestep ({', '.join(map(str, shapes))}); take one "
            "timestep's .xarray"
        )
    along = {"timestep": xr.Variable("time", np.array([array.t for array in window]))}
    made = xr.DataArray(
        da.stack([array.dask for array in window]),
        coords=_coords(newest.labels, along),
        dims=("time", *_dims(newest.labels, window[-1].ndim)),
        attrs=deepcopy(dict(newest.labels.attrs)),
    )
    made.name = newest.array
    times = [array.about.time for array in window]
    return made if None in times else made.assign_coords(time=("time", np.array(times)))


def to_dataset(*items: Any) -> xarray.Dataset:
    """Put several arrays, or several windows, into one lazy `xarray.Dataset`.

    Parameters
    ----------
    *items : DeisaArray, or windows of them, or xarray.DataArray
        Of different arrays, at the same timesteps.

    Raises
    ------
    LabelError
        Where timesteps, physical times or coordinates differ, or two items have one name.

    Examples
    --------
    >>> def callback(temperature, pressure):
    ...     dataset = to_dataset(temperature[-1], pressure[-1])
    ...     print(dataset.mean("x").compute())
    """
    xr = import_xarray()
    arrays: dict[str, Any] = {}
    for item in items:
        array = item if isinstance(item, xr.DataArray) else getattr(item, "xarray", None)
        if array is None:
            raise LabelError(f"expected arrays or windows of a callback, got {type(item).__name__}")
        if array.name is None:
            raise LabelError("an array without a name cannot be part of a Dataset; give it one with rename()")
        if array.name in arrays:
            raise LabelError(
                f"two arrays are called {array.name!r}; rename one of them: x.xarray.rename(...)"
            )
        arrays[array.name] = array
    _check_same_timesteps(arrays)
    try:
        datasets = [array.to_dataset() for array in arrays.values()]
        return xr.merge(datasets, join="exact", compat="equals", combine_attrs="drop_conflicts")
    except (ValueError, xr.MergeError) as exc:
        raise LabelError(
            f"{', '.join(map(repr, arrays))} do not fit into one Dataset: {exc}. Where coordinates differ, align the "
            "arrays first (xarray.align), or give the dimensions names of their own"
        ) from exc


def _check_same_timesteps(arrays: Mapping[str, Any]) -> None:
    """Say so where arrays are of different timesteps."""
    said = {}
    for name, array in arrays.items():
        if "timestep" in array.coords:
            said[name] = array.coords["timestep"].values.tolist()
    if len({str(steps) for steps in said.values()}) > 1:
        told = "; ".join(f"{name!r}: {_listed(steps)}" for name, steps in said.items())
        raise LabelError(
            f"the arrays are of different timesteps: {told}; a Dataset has them all at the same, so take the same ones "
            "of each (with when='AND', window[-1] has)"
        )


def _listed(steps: Any) -> str:
    if not isinstance(steps, list):
        return f"timestep {steps}"
    shown = ", ".join(map(str, steps[:10]))
    return f"timesteps {shown}{' ...' if len(steps) > 10 else ''}"
