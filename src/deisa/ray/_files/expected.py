"""Whether what is to be appended is what a series holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deisa.ray._files.coordinates import encoded
from deisa.ray._files.fields import TIME, Field, Step, plain, same_values
from deisa.ray.errors import SaveMismatchError


@dataclass(frozen=True)
class Known:
    """What a series knows of an array, without its time.

    Attributes
    ----------
    dims : tuple of str
    shape : tuple of int
    dtype : numpy.dtype
    attrs : mapping of str to value
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    attrs: Mapping[str, Any]


def growing(step: Step) -> tuple[Field, ...]:
    """What is appended at each timestep: the values, and the coordinates of the new one."""
    times = (step.timestep_field,) if step.time is None else (step.timestep_field, step.time)
    return (*step.fields, *times)


def with_time(known: Mapping[str, Known], step: Step) -> Step:
    """A step with a time, if the series has times: NaN, where the simulation has given none."""
    if TIME not in known or step.time is not None:
        return step
    return replace(step, time=Field(TIME, (), np.asarray(np.nan), known[TIME].attrs))


def check_step(where: str, known: Mapping[str, Known], step: Step) -> None:
    """Check that a step has the arrays of a series, as they are there.

    Raises
    ------
    SaveMismatchError
        Naming what is stored, and what came.
    """
    fields = {found.name: found for found in growing(step)}
    if fields.keys() - {TIME} != known.keys() - {TIME}:
        raise SaveMismatchError(
            f"{where} holds {_list(known)}, and timestep {step.timestep} has {_list(fields)}: every timestep of a "
            "series has the same arrays; give another path"
        )
    for name, found in fields.items():
        stored = known.get(name)
        if stored is None:  # a time, for the first time
            continue
        for what, here, there in (
            ("shape", found.shape, stored.shape),
            ("dtype", found.dtype, stored.dtype),
            ("dimensions", found.dims, stored.dims),
            ("attributes", comparable(found.attrs), comparable(stored.attrs)),
        ):
            if here != there:
                raise SaveMismatchError(
                    f"{where} holds {name!r} with {what} {there}, and at timestep {step.timestep} it has {what} "
                    f"{here}; give another path{_ONE_FILE_EACH if what == 'shape' else ''}"
                )


def comparable(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as two formats may give them back, without those that are not the user's alone."""
    given = plain({name: value for name, value in attrs.items() if name not in ("coordinates", "_FillValue")})
    return {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value
        for name, value in given.items()
    }


_ONE_FILE_EACH = ", or one file for each timestep ('...{timestep}...') where shapes change"


def check_coords(where: str, known: Mapping[str, np.ndarray], coords: Sequence[Field]) -> None:
    """Check that coordinates are those of a series.

    Raises
    ------
    SaveMismatchError
    """
    given = {coord.name: encoded(coord).data for coord in coords}
    if given.keys() != known.keys():
        raise SaveMismatchError(
            f"{where} holds coordinates {_list(known)}, and what is appended has {_list(given)}; give another path"
        )
    for name, values in given.items():
        if not same_values(known[name], values):
            raise SaveMismatchError(
                f"{where} holds a coordinate {name!r} of {_range(known[name])}, and what is appended has "
                f"{_range(values)}; give another path"
            )


def _list(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


def _range(values: np.ndarray) -> str:
    if not values.size:
        return "no values"
    return f"{values.size} values from {values.flat[0]} to {values.flat[-1]}"
