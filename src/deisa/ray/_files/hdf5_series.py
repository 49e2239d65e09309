"""An HDF5 file whose arrays grow by one timestep at a time: a NetCDF-4 file, too, with ``time`` unlimited.

One process writes it. The values come to it piece by piece, so that it needs memory for a few of them only. Each
timestep is one change of the file (`journal`). A new file gets its name when its first timestep is whole.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np

from deisa.ray._files.chunking import chunk_shape
from deisa.ray._files.continuing import Progress
from deisa.ray._files.coordinates import as_read, encoded, is_text
from deisa.ray._files.expected import Known, check_coords, check_step, growing, with_time
from deisa.ray._files.fields import TIME, TIMESTEP, Field, Step, plain
from deisa.ray._files.journal import GrowingFile, NewFile, recover
from deisa.ray._files.packages import package
from deisa.ray.errors import SaveFormatError, SaveMismatchError

SMALL_BYTES = 4096  # of an array at a timestep: several timesteps share a chunk
SMALL_CHUNK_BYTES = 32768
Encoding = Mapping[str, Mapping[str, Any]]


class Hdf5Series:
    """The timesteps in an HDF5 file.

    Parameters
    ----------
    path : Path
    encoding : mapping of str to mapping
        For names of arrays, what `h5py.Group.create_dataset` gets beside what follows from the data.
    netcdf : bool
        Whether it must be readable by NetCDF.

    Raises
    ------
    SaveFormatError
        When something else is there.
    """

    def __init__(self, path: Path, encoding: Encoding, *, netcdf: bool) -> None:
        self._path = path
        self._encoding = encoding
        self._netcdf = netcdf
        self._known: dict[str, Known] = {}
        self._coords: dict[str, np.ndarray] = {}
        self.progress = Progress(str(path), [])
        package("h5netcdf", "a growing HDF5 or NetCDF file")
        if path.exists():
            self._read()

    def _read(self) -> None:
        recover(self._path)
        with opened(self._path, self._path) as (_, file):
            if TIMESTEP not in file.variables or TIME not in file.dimensions:
                raise SaveFormatError(
                    f"{self._path} is an HDF5 file without {TIMESTEP!r} along {TIME!r}; give another path"
                )
            self.progress = Progress(str(self._path), file.variables[TIMESTEP][:].tolist())
            self._note(file)

    def _note(self, file: Any) -> None:
        for name, variable in file.variables.items():
            if variable.dimensions[:1] == (TIME,):
                attrs, shape = plain(variable.attrs), tuple(variable.shape[1:])
                self._known[name] = Known(variable.dimensions[1:], shape, variable.dtype, attrs)
            else:
                self._coords[name] = as_read(variable[...])

    def append(self, step: Step) -> None:
        """Add a timestep; those of earlier runs from there on go.

        Raises
        ------
        SaveMismatchError, SaveOrderError
        """
        index = self.progress.place(step.timestep)
        if not self._known:
            write_new(self._path, step, self._encoding, netcdf=self._netcdf)
            with opened(self._path, self._path) as (_, file):
                self._note(file)
        else:
            step = with_time(self._known, step)
            check_step(str(self._path), self._known, step)
            check_coords(str(self._path), self._coords, step.coords)
            self.progress.warn(index)
            with GrowingFile(self._path) as growing_file:
                with opened(self._path, growing_file, "r+") as (plain_file, file):
                    file.resize_dimension(TIME, index + 1)
                    if step.time is not None and TIME not in self._known:
                        _create(file, step, step.time, {})
                        self._note(file)
                    fill(plain_file, step, index)
                growing_file.commit()
        self.progress.note(index, step.timestep)


def write_new(path: Path, step: Step, encoding: Encoding, *, netcdf: bool) -> None:
    """Write a file of one timestep; it gets its name when it is whole, in place of one that has it.

    Raises
    ------
    SaveMismatchError
        When NetCDF has no such dtype.
    """
    with replacing(path) as new, opened(path, new, "w", invalid_netcdf=not netcdf) as (plain_file, file):
        describe(file, step, encoding, netcdf=netcdf)
        fill(plain_file, step, 0)


@contextmanager
def replacing(path: Path, *, with_old: bool = False) -> Iterator[NewFile]:
    """Make a file that takes the place of the one at a path when it is whole; it may begin as a copy of that."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        if with_old and path.exists():
            shutil.copyfile(path, part)
        with NewFile(part) as new:
            yield new
            new.check()
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def describe(
    file: Any, step: Step, encoding: Encoding, *, netcdf: bool, without: Collection[str] = ()
) -> None:
    """Make the variables of a new file, with room for one timestep; not those that others make."""
    sizes = {dim: n for found in step.fields for dim, n in zip(found.dims, found.shape, strict=True)}
    file.dimensions = {TIME: None, **sizes}
    file.attrs.update(step.attrs)
    for coord in map(encoded, step.coords):
        text = is_text(coord.data)
        dtype = package("h5py", "an HDF5 file").string_dtype() if text else coord.dtype
        data = coord.data.astype(object) if text else coord.data
        variable = file.create_variable(coord.name, coord.dims, dtype, data=data)
        variable.attrs.update(coord.attrs)
    for found in growing(step):
        if netcdf and (found.dtype.kind in "bc" or found.dtype == np.float16):
            raise SaveMismatchError(
                f"{found.name}: NetCDF has no dtype {found.dtype}; convert it with astype(), or save to Zarr or HDF5"
            )
        if found.name in without:
            continue
        _create(file, step, found, encoding)
    file.resize_dimension(TIME, 1)


def _create(file: Any, step: Step, found: Field, encoding: Encoding) -> None:
    """Make the variable of a field."""
    variable = file.create_variable(
        found.name,
        (TIME, *found.dims),
        found.dtype,
        fillvalue=found.attrs.get("_FillValue", np.nan if found.dtype.kind == "f" else None),
        **({"chunks": _chunks(found)} | dict(encoding.get(found.name, {}))),
    )
    attrs = step.attributes(found)
    attrs.pop("_FillValue", None)
    variable.attrs.update(attrs)


def _chunks(found: Field) -> tuple[int, ...]:
    nbytes = math.prod(found.shape) * found.dtype.itemsize
    if nbytes <= SMALL_BYTES:
        return (max(1, SMALL_CHUNK_BYTES // max(1, nbytes)), *(max(1, n) for n in found.shape))
    return (1, *chunk_shape(found.blocks, found.dtype.itemsize))


def fill(file: Any, step: Step, index: int, without: Collection[str] = ()) -> None:
    """Write the values of a timestep."""
    writes: list[Any] = []
    small: list[Field] = []
    for found in growing(step):
        if found.name in without:
            continue
        if not isinstance(found.data, da.Array) or not found.shape:
            small.append(found)
            continue
        region = (slice(index, index + 1), *(slice(0, n) for n in found.shape))
        writes.append(
            da.store(found.data[np.newaxis], file[found.name], regions=region, lock=False, compute=False)
        )
    values = dask.compute(*writes, *(found.data for found in small))[len(writes) :]
    for found, value in zip(small, values, strict=True):
        file[found.name][index] = value


@contextmanager
def opened(
    path: Path, target: Path | NewFile, mode: str = "r", *, invalid_netcdf: bool = True
) -> Iterator[tuple[Any, Any]]:
    """Open a file, as HDF5 has it and as NetCDF has it."""
    h5py, h5netcdf = package("h5py", "an HDF5 file"), package("h5netcdf", "a growing HDF5 or NetCDF file")
    try:
        plain_file = h5py.File(target, mode, track_order=True) if mode == "w" else h5py.File(target, mode)
    except OSError as exc:
        if mode == "r" and exc.errno is None:
            raise SaveFormatError(
                f"{path} is no HDF5 file that can be read ({exc}); give another path"
            ) from exc
        raise
    with plain_file, h5netcdf.File(plain_file, mode, invalid_netcdf=invalid_netcdf) as file:
        yield plain_file, file
