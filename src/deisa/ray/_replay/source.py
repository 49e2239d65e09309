"""What is replayed: a recording, or a Zarr or NetCDF data set with a time dimension. xarray reads both."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import isnan, prod
from typing import Any

import numpy as np

from deisa.ray._replay.blocks import Block, Blocks
from deisa.ray._replay.datasets import TIME, TIMESTEP, check_exists, is_zarr, open_dataset, open_group
from deisa.ray._replay.recorded import RecordedArrays, group_of
from deisa.ray.config import ReplaySettings
from deisa.ray.errors import ReplayError

logger = logging.getLogger("deisa.ray")

READ_AT_ONCE_BYTES = 64 * 2**20  # of the timesteps that lie in one chunk of the file
_NUMBERS = "biufc"


@dataclass(frozen=True, eq=False)
class SourceArray:
    """An array, and the timesteps at which it is there.

    Attributes
    ----------
    name : str
    variable : xarray.DataArray
        Not loaded; its timesteps are along its first dimension.
    steps : mapping of int to int
        The position of each timestep along that dimension, in increasing order.
    times : numpy.ndarray or None
        The physical time at each position.
    blocks : Blocks
    per_chunk : int
        Timesteps in one chunk of the file.
    """

    name: str
    variable: Any
    steps: Mapping[int, int]
    times: np.ndarray | None
    blocks: Blocks
    per_chunk: int = 1
    _read: dict[Block, tuple[int, np.ndarray]] = field(default_factory=dict, init=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each dimension, at one timestep."""
        return tuple(self.variable.shape[1:])

    def time_at(self, timestep: int) -> float | None:
        """The physical time of a timestep, where there is one."""
        if self.times is None:
            return None
        time = float(self.times[self.steps[timestep]])
        return None if isnan(time) else time

    def descriptions(self, blocks: Sequence[Block]) -> list[dict[str, Any]]:
        """Describe some blocks as the chunks of a bridge, with the labels that are stored."""
        dims = self.variable.dims[1:]
        coords = [
            (str(name), dims.index(coord.dims[0]), _labels(coord.values), dict(coord.attrs))
            for name, coord in self.variable.coords.items()
            if len(coord.dims) == 1 and coord.dims[0] in dims and name not in (TIME, TIMESTEP)
        ]
        return [
            {
                "global_shape": self.shape,
                "offset": block.offset,
                "chunk_shape": block.shape,
                "dtype": self.variable.dtype,
                "dims": tuple(map(str, dims)),
                "attrs": dict(self.variable.attrs),
                "coords": {
                    name: (str(dims[d]), values[block.slices[d]], attrs) for name, d, values, attrs in coords
                },
            }
            for block in blocks
        ]

    def read(self, timestep: int, block: Block) -> np.ndarray:
        """Read a block at a timestep.

        Of a chunk of the file with several timesteps all are kept, up to `READ_AT_ONCE_BYTES` for the whole array.

        Raises
        ------
        ReplayError
        """
        position = self.steps[timestep]
        at_once = max(1, READ_AT_ONCE_BYTES // max(1, prod(self.shape) * self.variable.dtype.itemsize))
        length = min(self.per_chunk, at_once)
        start = position - position % self.per_chunk % length
        if length == 1 or self._read.get(block, (None,))[0] != start:
            try:
                values = self.variable[(slice(start, start + length), *block.slices)].values
            except Exception as error:  # of whichever library reads it
                raise ReplayError(
                    f"array {self.name!r} at timestep {timestep} cannot be read: {type(error).__name__}: {error}"
                ) from error
            self._read[block] = start, values
        start, values = self._read[block]
        return values[position - start]


@dataclass(frozen=True)
class Source:
    """All arrays of what is replayed.

    Attributes
    ----------
    path : str
    arrays : mapping of str to SourceArray
    is_recording : bool
        Whether a simulation was recorded, whose blocks are to be those of the replay.
    """

    path: str
    arrays: Mapping[str, SourceArray]
    is_recording: bool

    @property
    def timesteps(self) -> list[int]:
        """All timesteps, in increasing order."""
        return sorted({timestep for array in self.arrays.values() for timestep in array.steps})

    @property
    def cuts(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """How Dask is to see the arrays of a recording."""
        return {name: array.blocks.cuts for name, array in self.arrays.items()} if self.is_recording else {}


def open_source(settings: ReplaySettings) -> Source:
    """Open what is to be replayed.

    Raises
    ------
    ReplayError
    """
    path = settings.path
    check_exists(path)
    recorded = RecordedArrays.from_attributes(dict(open_group(path).attrs), path) if is_zarr(path) else None
    if recorded is not None:
        found = {name: _recorded_array(path, name, blocks) for name, blocks in recorded.arrays.items()}
        arrays = {name: array for name, array in found.items() if array is not None}
    else:
        arrays = _arrays_of(open_dataset(path), path)
    chosen = _choose(arrays, settings)
    if not any(array.steps for array in chosen.values()):
        raise ReplayError(f"{path}: there is no timestep to replay, {_range(settings, arrays)}")
    return Source(path, chosen, recorded is not None)


def _choose(arrays: Mapping[str, SourceArray], settings: ReplaySettings) -> dict[str, SourceArray]:
    """Name the arrays that are asked for, and leave out timesteps that are not."""
    pairs = settings.arrays or tuple((name, name) for name in arrays)
    chosen = {}
    for name, variable in pairs:
        array = arrays.get(variable)
        if array is None:
            there = ", ".join(map(repr, sorted(arrays))) or "none"
            raise ReplayError(
                f"{settings.path} has no array {variable!r} with a time dimension; it has {there}"
            )
        steps = {
            timestep: position
            for timestep, position in array.steps.items()
            if (settings.start is None or timestep >= settings.start)
            and (settings.stop is None or timestep < settings.stop)
        }
        chosen[name] = SourceArray(name, array.variable, steps, array.times, array.blocks, array.per_chunk)
    return chosen


def _range(settings: ReplaySettings, arrays: Mapping[str, SourceArray]) -> str:
    timesteps = [timestep for array in arrays.values() for timestep in array.steps]
    if not timesteps:
        return "its arrays have none"
    first = "" if settings.start is None else settings.start
    last = "" if settings.stop is None else settings.stop
    return f"it has timesteps {min(timesteps)} to {max(timesteps)}, and {first}:{last} are asked for"


def _labels(values: np.ndarray) -> np.ndarray:
    """Coordinates as a description takes them: texts have a fixed width there."""
    return values.astype(str) if values.dtype.kind in "OT" else values


# Recordings.


def _recorded_array(path: str, name: str, blocks: Blocks) -> SourceArray | None:
    """An array of a recording; None where the recording ended before its first timestep."""
    group = f"{path}/{group_of(name)}"
    if "://" not in path and not os.path.exists(group):
        return None
    dataset = open_dataset(group, mask_and_scale=False)
    if name not in dataset:
        return None
    return _array_of(dataset, name, TIME, blocks)


# Data sets.


def _arrays_of(dataset: Any, path: str) -> dict[str, SourceArray]:
    along = _time_dimension(dataset, path)
    arrays = {}
    for name, variable in dataset.data_vars.items():
        if along not in variable.dims or name == TIMESTEP:
            continue
        if variable.dtype.kind not in _NUMBERS or 0 in variable.shape[1:]:
            logger.info("%s: variable %r has dtype %s and is not replayed", path, name, variable.dtype)
            continue
        arrays[str(name)] = _array_of(dataset, name, along)
    if not arrays:
        raise ReplayError(f"{path} has no variable of numbers along dimension {along!r}")
    return arrays


def _time_dimension(dataset: Any, path: str) -> str:
    """Find the dimension along which the timesteps lie."""
    if TIME in dataset.dims:
        return TIME
    found = [
        name for name, coord in dataset.coords.items() if coord.dims == (name,) and _is_time(coord.attrs)
    ]
    found = found or [name for name in dataset.encoding.get("unlimited_dims", ()) if name in dataset.dims]
    found = found or [name for name in (TIMESTEP, "step", "t") if name in dataset.dims]
    if not found:
        sizes = ", ".join(f"{name} ({size})" for name, size in dataset.sizes.items()) or "none"
        raise ReplayError(
            f"{path} has no time dimension, which is one called 'time', one whose coordinate is a time (units like "
            f"'days since 2000-01-01'), or an unlimited one; its dimensions are {sizes}"
        )
    return str(found[0])


def _is_time(attrs: Mapping[str, Any]) -> bool:
    return (
        attrs.get("standard_name") == "time"
        or attrs.get("axis") == "T"
        or " since " in str(attrs.get("units"))
    )


def _array_of(dataset: Any, name: Any, along: str, blocks: Blocks | None = None) -> SourceArray:
    variable = dataset[name].transpose(along, ...)
    chunks: Mapping[Any, Any] = variable.encoding.get("preferred_chunks") or {}
    if blocks is None:
        sizes = [_sizes(chunks.get(dim), dataset.sizes[dim]) for dim in variable.dims[1:]]
        blocks = Blocks.of_grid(sizes)
    per_chunk = chunks.get(along, 1)
    return SourceArray(
        str(name),
        variable,
        _steps(dataset, along, str(name)),
        _times(dataset, along),
        blocks,
        per_chunk if isinstance(per_chunk, int) else 1,
    )


def _sizes(chunk: Any, length: int) -> tuple[int, ...]:
    """The lengths of a file's chunks along a dimension."""
    if isinstance(chunk, Sequence):
        return tuple(chunk)
    chunk = length if chunk is None else min(int(chunk), length)
    return tuple(min(chunk, length - start) for start in range(0, length, chunk))


def _steps(dataset: Any, along: str, name: str) -> dict[int, int]:
    length = dataset.sizes[along]
    known = dataset.variables.get(TIMESTEP)
    if known is None or known.dims != (along,) or known.dtype.kind not in "iu":
        return {n: n for n in range(length)}
    timesteps = known.values.tolist()
    for before, after in pairwise(timesteps):
        if before >= after:
            raise ReplayError(
                f"array {name!r}: its timesteps do not increase, {before} comes before {after}; a simulation "
                "sends them in increasing order"
            )
    return {timestep: position for position, timestep in enumerate(timesteps)}


def _times(dataset: Any, along: str) -> np.ndarray | None:
    for name in (along, TIME):
        known = dataset.variables.get(name)
        if name != TIMESTEP and known is not None and known.dims == (along,) and known.dtype.kind in "iuf":
            return known.values.astype(float)
    return None
