"""HDF5 files whose values lie in part files: each block is written where it is, and a virtual data set joins them.

The parts of ``out.h5`` are in the folder ``out.h5.parts`` beside it, and are named relative to it: the two may be moved
together. Each time a file is written its parts go to a new folder in there. The file takes its name when all of them
are there, and then parts that it does not name go. So no file ever shows parts of two runs.
"""

from __future__ import annotations

import math
import re
import shutil
import uuid
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np

from deisa.ray._files.fields import TIME, Field, Step
from deisa.ray._files.hdf5_series import SMALL_BYTES, Encoding, describe, fill, opened, replacing
from deisa.ray._files.journal import NewFile
from deisa.ray._files.packages import package

VALUES = "values"  # the data set of a part


def to_hdf5(path: Path, arrays: Mapping[str, da.Array], encoding: Encoding) -> None:
    """Save arrays as data sets of one file; other data sets that it has stay.

    Parameters
    ----------
    path : Path
        Absolute.
    arrays : mapping of str to dask.array.Array
        By name of the data set.
    encoding : mapping of str to mapping
        For names of data sets, what `h5py.Group.create_dataset` gets for each part.
    """
    h5py = package("h5py", "an HDF5 file")
    parts = _write_parts(path, {name: (array, False) for name, array in arrays.items()}, encoding)
    with replacing(path, with_old=True) as new, h5py.File(new, "r+" if path.exists() else "w") as file:
        for name, array in arrays.items():
            if name in file:
                del file[name]
            _join(file, name, array, parts[name], leading=())
    _remove_others(path)


def write_virtual(path: Path, step: Step, encoding: Encoding, *, netcdf: bool) -> None:
    """Save one timestep, with the dimensions and coordinates that it has."""
    large = {
        found.name: found
        for found in step.fields
        if isinstance(found.data, da.Array) and math.prod(found.shape) * found.dtype.itemsize > SMALL_BYTES
    }
    parts = _write_parts(path, {name: (found.data, True) for name, found in large.items()}, encoding)
    with replacing(path) as new:
        with opened(path, new, "w", invalid_netcdf=not netcdf) as (plain_file, file):
            describe(file, step, encoding, netcdf=netcdf, without=large.keys())
            fill(plain_file, step, 0, without=large.keys())
        with package("h5py", "an HDF5 file").File(new, "r+") as file:
            for name, found in large.items():
                joined = _join(file, name, found.data, parts[name], leading=(1,))
                _label(file, joined, step, found)
    _remove_others(path)


def _label(file: Any, joined: Any, step: Step, found: Field) -> None:
    for axis, dim in enumerate((TIME, *found.dims)):
        joined.dims[axis].attach_scale(file[dim])
    for key, value in step.attributes(found).items():
        if key != "_FillValue":
            joined.attrs[key] = value


def _write_parts(
    path: Path, arrays: Mapping[str, tuple[da.Array, bool]], encoding: Encoding
) -> dict[str, str]:
    """Write a part for each block; returns for each array how its parts' names begin, relative to the file's folder."""
    folder = parts_of(path) / uuid.uuid4().hex[:12]
    folder.mkdir(parents=True)
    begins, writes = {}, []
    for number, (name, (array, with_time)) in enumerate(arrays.items()):
        begin = folder / f"{number}-{re.sub('[^A-Za-z0-9_]+', '_', name)}"
        begins[name] = str(begin.relative_to(path.parent))
        writes.append(
            array.map_blocks(
                write_part,
                str(begin),
                with_time,
                dict(encoding.get(name, {})),
                dtype=bool,
                chunks=tuple((1,) * n for n in array.numblocks),
                meta=np.empty((0,) * array.ndim, bool),
            )
        )
    try:
        dask.compute(*writes)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return begins


def write_part(
    block: np.ndarray,
    begin: str,
    with_time: bool,
    encoding: Mapping[str, Any],
    block_id: tuple[int, ...] = (),
) -> np.ndarray:
    """Write one block into a file of its own."""
    with NewFile(Path(_part_name(begin, block_id))) as new:
        with package("h5py", "an HDF5 file").File(new, "w") as file:
            file.create_dataset(VALUES, data=block[np.newaxis] if with_time else block, **encoding)
        new.check()
    return np.ones((1,) * block.ndim, bool)


def _part_name(begin: str, block_id: tuple[int, ...]) -> str:
    return "-".join((begin, *map(str, block_id))) + ".h5"


def _join(file: Any, name: str, array: da.Array, begin: str, leading: tuple[int, ...]) -> Any:
    """Make a virtual data set of parts."""
    h5py = package("h5py", "an HDF5 file")
    layout = h5py.VirtualLayout((*leading, *array.shape), array.dtype)
    starts = [list(accumulate(sizes, initial=0)) for sizes in array.chunks]
    for block_id in np.ndindex(array.numblocks):
        shape = tuple(sizes[i] for sizes, i in zip(array.chunks, block_id, strict=True))
        if 0 in shape:
            continue
        box = tuple(slice(at[i], at[i] + n) for at, i, n in zip(starts, block_id, shape, strict=True))
        source = h5py.VirtualSource(_part_name(begin, block_id), VALUES, (*leading, *shape), array.dtype)
        layout[(*(slice(0, n) for n in leading), *box)] = source
    return file.create_virtual_dataset(name, layout, fillvalue=missing_value(array.dtype))


def missing_value(dtype: np.dtype) -> Any:
    """What a reader sees where a part is missing: nothing that looks like a result, as far as the dtype has that."""
    if dtype.kind in "fc":
        return np.nan
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return limits.min if dtype.kind == "i" else limits.max
    return None


def parts_of(path: Path) -> Path:
    """The folder with the parts of a file."""
    return path.with_name(f"{path.name}.parts")


def _remove_others(path: Path) -> None:
    """Remove the parts that a file does not name, of earlier runs or of one that was killed."""
    named: set[str] = set()

    def note(_name: str, item: Any) -> None:
        if getattr(item, "is_virtual", False):
            named.update(Path(source.file_name).parts[1] for source in item.virtual_sources())

    with package("h5py", "an HDF5 file").File(path, "r") as file:
        file.visititems(note)
    for folder in parts_of(path).iterdir():
        if folder.name not in named:
            shutil.rmtree(folder, ignore_errors=True)
