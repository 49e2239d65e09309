"""Physical times of timesteps: which numbers may be one, and what is said where bridges differ."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from deisa.ray._state.naming import name_bridges
from deisa.ray.errors import PhysicalTimeError

_FLOAT = np.dtype(float)


def physical_time(given: Any, what: str) -> float | None:
    """Return a physical time as a float, or None where none is given; `what` says where, for the error.

    Raises
    ------
    PhysicalTimeError
        For what is no finite number.
    """
    if given is None:
        return None
    is_number = not isinstance(given, str | bytes) and getattr(given, "dtype", _FLOAT).kind in "biuf"
    try:
        number = float(given) if is_number else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise PhysicalTimeError(f"{what}: a physical time is a finite number, got {given!r:.60}")
    return number


def times_differ(
    array: str,
    timestep: int,
    one: tuple[Iterable[int], float | None],
    other: tuple[Iterable[int], float | None],
) -> PhysicalTimeError:
    """Build the error for bridges that give different times for one timestep, as (bridges, time) pairs."""
    said = "; ".join(
        f"{name_bridges(ids)}: {'none' if time is None else f'time={time!r}'}" for ids, time in (one, other)
    )
    return PhysicalTimeError(
        f"array {array!r} at timestep {timestep}: the physical time differs between bridges: {said}; all bridges must "
        "give send() the same time= for a timestep, or none of them any"
    )
