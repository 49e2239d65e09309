"""What is saved of one timestep: fields, and the coordinates along their dimensions."""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import dask.array as da
import numpy as np

from deisa.ray.errors import SaveMismatchError

TIME = "time"  # the dimension that grows, and the coordinate of it that is the simulation's time
TIMESTEP = "timestep"
_KINDS = "biufc"  # of dtypes: what every format here can hold, but for complex numbers in NetCDF


@dataclass(frozen=True, eq=False)
class Field:
    """An array with the names of its dimensions.

    Attributes
    ----------
    name : str
    dims : tuple of str
    data : dask.array.Array or numpy.ndarray
    attrs : mapping of str to value
        Such as units.
    """

    name: str
    dims: tuple[str, ...]
    data: Any
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each dimension."""
        return tuple(self.data.shape)

    @property
    def dtype(self) -> np.dtype:
        """The dtype."""
        return self.data.dtype

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of its blocks along each dimension."""
        return tuple(getattr(self.data, "chunks", None) or tuple((n,) for n in self.shape))


@dataclass(frozen=True, eq=False)
class Step:
    """One timestep of what is saved.

    Attributes
    ----------
    timestep : int
    time : Field or None
        The simulation's time, a number.
    fields : tuple of Field
        What is different at each timestep.
    coords : tuple of Field
        What is the same at all: along dimensions, or over several of them.
    attrs : mapping of str to value
        Of the whole.
    """

    timestep: int
    time: Field | None
    fields: tuple[Field, ...]
    coords: tuple[Field, ...] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def timestep_field(self) -> Field:
        """The timestep, as a coordinate."""
        return Field(TIMESTEP, (), np.asarray(self.timestep, np.int64), {"long_name": "timestep"})

    @property
    def coordinates(self) -> list[str]:
        """Names of the coordinates that are no dimensions: readers are told about them."""
        return [TIMESTEP, *(coord.name for coord in self.coords if coord.dims != (coord.name,))]

    def attributes(self, found: Field) -> dict[str, Any]:
        """The attributes of a field, and which coordinates it has, as the CF conventions say it."""
        if found.name in (TIME, TIMESTEP):
            return dict(found.attrs)
        return {**found.attrs, "coordinates": " ".join(self.coordinates)}


def steps_of(
    given: Sequence[Any], named: Mapping[str, Any], timestep: int | None, time: float | None
) -> list[Step]:
    """Read what is to be appended: arrays, windows of them, or what xarray has made of them.

    Returns
    -------
    list of Step
        By timestep.

    Raises
    ------
    SaveMismatchError
        Without names or timesteps, or where these do not fit together.
    """
    read = _Reader(timestep)
    for thing in given:
        read.positional(thing)
    for name, thing in named.items():
        read.named(name, thing)
    return read.steps(time)


class _Reader:
    """Sorts what is given by timestep."""

    def __init__(self, timestep: int | None) -> None:
        self._timestep = None if timestep is None else _integer(timestep)
        self._by_timestep: dict[int | None, dict[str, Field]] = {}
        self._coords: dict[str, Field] = {}
        self._times: dict[int | None, Field] = {}
        self._attrs: dict[str, Any] = {}

    def positional(self, thing: Any) -> None:
        if _is_window(thing):
            for array in thing:
                self.positional(array)
        elif _is_of_xarray(thing, "Dataset"):
            self._attrs |= plain(thing.attrs)
            for array in thing.data_vars.values():
                self._data_array(array.name, array)
        elif _is_of_xarray(thing, "DataArray"):
            self._data_array(thing.name, thing)
        elif hasattr(thing, "timestep"):
            self._deisa_array(None, thing)
        else:
            raise SaveMismatchError(
                f"what is saved needs a name: append(mean=...) instead of append({_what(thing)})"
            )

    def named(self, name: str, thing: Any) -> None:
        if _is_window(thing):
            for array in thing:
                self.named(name, array)
        elif _is_of_xarray(thing, "Dataset"):
            raise SaveMismatchError(f"{name}: a Dataset has names of its own: append(dataset)")
        elif _is_of_xarray(thing, "DataArray"):
            self._data_array(name, thing)
        elif hasattr(thing, "timestep"):
            self._deisa_array(name, thing)
        else:
            data = thing if isinstance(thing, da.Array) else np.asarray(thing)
            self._add(None, Field(name, default_dims(name, data.ndim), data))

    def _deisa_array(self, name: str | None, array: Any) -> None:
        about = getattr(array, "about", None)
        labels = getattr(about, "labels", None)
        name = name or getattr(about, "array", None)
        if name is None:
            raise SaveMismatchError(f"what is saved needs a name: append(temperature={_what(array)})")
        data = array.to_dask_array()
        dims = getattr(labels, "dims", None) or default_dims(name, data.ndim)
        for coord in getattr(labels, "coords", ()):
            self._coord(Field(coord.name, (coord.dim,), np.asarray(coord.values), plain(dict(coord.attrs))))
        time = getattr(about, "time", None)
        if time is not None:
            self._times[array.timestep] = Field(TIME, (), np.asarray(time))
        self._add(array.timestep, Field(name, tuple(dims), data, plain(dict(getattr(labels, "attrs", {})))))

    def _data_array(self, name: Any, array: Any) -> None:
        if name is None:
            raise SaveMismatchError("a DataArray without a name cannot be saved: append(temperature=array)")
        timestep = None
        scalars: list[Field] = []
        for label, coord in array.coords.items():
            found = Field(str(label), tuple(map(str, coord.dims)), coord.variable.values, plain(coord.attrs))
            if label == TIMESTEP and not coord.dims:
                timestep = _integer(found.data)
            elif label == TIME and not coord.dims:
                scalars.append(found)
            elif TIME in coord.dims or TIME in array.dims:
                raise SaveMismatchError(
                    f"{name}: it has a dimension {TIME!r} already; append one timestep, as in array.isel(time=-1)"
                )
            elif coord.dims:
                self._coord(found)
        for found in scalars:
            self._times[timestep] = found
        self._add(timestep, Field(str(name), tuple(map(str, array.dims)), array.data, plain(array.attrs)))

    def _coord(self, coord: Field) -> None:
        other = self._coords.setdefault(coord.name, coord)
        if other is not coord and not same_values(other.data, coord.data):
            raise SaveMismatchError(f"two arrays have different coordinates {coord.name!r}: save them apart")

    def _add(self, timestep: int | None, found: Field) -> None:
        if found.dtype.kind not in _KINDS:
            raise SaveMismatchError(
                f"{found.name}: dtype {found.dtype} cannot be saved; numbers can, so save fields of a structured "
                "array by themselves: append(x=array['x'])"
            )
        if any(size != size for size in found.shape):  # Dask writes NaN for sizes that it does not know
            raise SaveMismatchError(
                f"{found.name}: its shape {found.shape} is not known; call compute_chunk_sizes() on it first"
            )
        if why := why_not_called(found.name):
            raise SaveMismatchError(f"{why}; save the array under another name, as in append(temperature=x)")
        timestep = timestep if self._timestep is None else self._timestep
        fields = self._by_timestep.setdefault(timestep, {})
        if found.name in fields:
            raise SaveMismatchError(f"two things called {found.name!r} are to be saved for one timestep")
        fields[found.name] = found

    def steps(self, time: float | None) -> list[Step]:
        nameless = self._by_timestep.pop(None, {})
        if not self._by_timestep:
            if not nameless:
                raise SaveMismatchError("there is nothing to save: append(temperature[-1])")
            raise SaveMismatchError(
                f"{', '.join(nameless)}: of which timestep? append(..., timestep=temperature[-1].t)"
            )
        if nameless and len(self._by_timestep) > 1:
            raise SaveMismatchError(
                f"{', '.join(nameless)}: of which of the timesteps {sorted(map(str, self._by_timestep))}? Append one "
                "at a time"
            )
        for name in nameless:
            if any(name in fields for fields in self._by_timestep.values()):
                raise SaveMismatchError(f"two things called {name!r} are to be saved for one timestep")
        everything = {t: {**fields, **nameless} for t, fields in self._by_timestep.items() if t is not None}
        (first, names), *others = ((t, set(fields)) for t, fields in everything.items())
        for timestep, others_names in others:
            if others_names != names:
                raise SaveMismatchError(
                    f"timestep {first} has {', '.join(sorted(names))}, and timestep {timestep} has "
                    f"{', '.join(sorted(others_names))}: what is appended together must be of the same timesteps; "
                    f"give timestep= if it is meant to be one"
                )
        return [self._step(t, fields, time) for t, fields in sorted(everything.items())]

    def _step(self, timestep: int, fields: Mapping[str, Field], time: float | None) -> Step:
        known = self._times.get(timestep) or self._times.get(None)
        if time is not None:
            known = Field(TIME, (), np.asarray(float(time)), known.attrs if known is not None else {})
        if known is not None and known.dtype.kind not in "iuf":
            raise SaveMismatchError(f"the time of timestep {timestep} is no number: {known.data!r}")
        if known is not None:
            known = replace(known, data=np.asarray(known.data, np.float64))
        self._check_names(fields.values())
        self._check_sizes(fields.values())
        used = {dim for found in fields.values() for dim in found.dims}
        coords = tuple(coord for coord in self._coords.values() if used.issuperset(coord.dims))
        return Step(timestep, known, tuple(fields.values()), coords, self._attrs)

    def _check_names(self, fields: Collection[Field]) -> None:
        dims = {dim for found in fields for dim in found.dims}
        for found in fields:
            if found.name in self._coords or found.name in dims:
                raise SaveMismatchError(
                    f"{found.name!r} is the name of an array and of a coordinate or dimension: save the array under "
                    "another name, as in append(temperature=x)"
                )

    def _check_sizes(self, fields: Collection[Field]) -> None:
        sizes: dict[str, tuple[str, int]] = {}
        for found in (*fields, *self._coords.values()):
            for dim, size in zip(found.dims, found.shape, strict=True):
                name, other = sizes.setdefault(dim, (found.name, size))
                if size != other:
                    raise SaveMismatchError(
                        f"dimension {dim!r} has {other} elements in {name!r} and {size} in {found.name!r}: "
                        "give one of them another name"
                    )


def why_not_called(name: str) -> str:
    """Why an array cannot be saved under a name; empty if it can."""
    if name in (TIME, TIMESTEP):
        return f"{name!r} is the name of a coordinate in what is saved"
    if not name or "/" in name or name.startswith((".", "__")):
        return f"{name!r} cannot be the name of an array in a file: it is a path there, or hidden"
    return ""


def default_dims(name: str, ndim: int) -> tuple[str, ...]:
    """The dimensions of an array whose description names none."""
    return tuple(f"{name}_{axis}" for axis in range(ndim))


def same_values(one: Any, other: Any) -> bool:
    """Whether two arrays are equal, element by element; NaN equals NaN."""
    if one.shape != other.shape or one.dtype.kind != other.dtype.kind:
        return False
    return bool(np.array_equal(one, other, equal_nan=one.dtype.kind in "fc"))


def plain(attrs: Mapping[Any, Any]) -> dict[str, Any]:
    """Attributes as every format takes them: numbers, texts, and lists of these."""
    return {str(name): _plain(value) for name, value in attrs.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, int | float | str) else str(value)


def _is_window(thing: Any) -> bool:
    return isinstance(thing, list | tuple) and all(hasattr(array, "timestep") for array in thing)


def _is_of_xarray(thing: Any, kind: str) -> bool:
    xarray = sys.modules.get("xarray")
    return xarray is not None and isinstance(thing, getattr(xarray, kind))


def _integer(value: Any) -> int:
    try:
        return operator.index(value.item() if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError) as exc:
        raise SaveMismatchError(f"a timestep must be an integer, got {value!r}") from exc


def _what(thing: Any) -> str:
    return type(thing).__name__
