"""Saving to files: Zarr, HDF5 and NetCDF, by one line in a callback or by `Deisa.save` without any."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import dask.array as da

from deisa.ray._files import virtual
from deisa.ray._files.continuing import Progress
from deisa.ray._files.failures import saving
from deisa.ray._files.fields import TIMESTEP, Step, steps_of
from deisa.ray._files.formats import Format, Target, target_of
from deisa.ray._files.hdf5_series import Hdf5Series, write_new
from deisa.ray._files.lock import PathLock
from deisa.ray._files.packages import package
from deisa.ray._files.zarr_series import ZarrSeries
from deisa.ray.errors import SaveFormatError

__all__ = ["Writer", "to_hdf5"]


class Writer:
    """Appends timesteps to what is saved under a path.

    A path with ``{timestep}`` in it is a file for each timestep. Any other one is a *series*, which grows along a
    dimension ``time``. A series that is there already goes on: the first timestep of this writer takes the place of
    those of an earlier run from there on, so none is there twice.

    Parameters
    ----------
    path : str, path, or Zarr store
        The format follows from its end: ``.zarr``, ``.h5``, ``.hdf5``, ``.nc`` or ``.nc4``. For Zarr also a URL, or a
        store object. Nodes must share it where they write: Zarr, and with `virtual`.
    format : {"zarr", "hdf5", "netcdf"}, optional
        Where the path does not say it.
    virtual : bool
        With a file for each timestep in HDF5 or NetCDF: every node writes its blocks into files of their own, which a
        virtual data set joins. Otherwise one process writes.
    encoding : mapping of str to mapping, optional
        By name of the array, what it is created with: as of `zarr.create_array` (`compressors`, `chunks`, `shards`
        ...; chunks with the one of time in front), or of `h5py.Group.create_dataset` (`compression`, `chunks` ...).

    Raises
    ------
    SaveFormatError
        When something else is at the path, or it says no format.
    SaveError
        When nothing can be written there.
    MissingPackageError
        When the package of the format is not installed.

    Examples
    --------
    >>> writer = Writer("results.zarr")  # doctest: +SKIP
    >>> @deisa.register("temperature")  # doctest: +SKIP
    ... def keep(temperature):
    ...     writer.append(temperature=temperature[-1], profile=temperature[-1].mean(axis=0))
    """

    def __init__(
        self,
        path: Any,
        *,
        format: Format | None = None,
        virtual: bool = False,
        encoding: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._target = target = target_of(path, format)
        self._virtual = virtual
        self._encoding = dict(encoding or {})
        self._lock: PathLock | None = None
        if virtual and (not target.each or target.format == "zarr"):
            raise SaveFormatError(
                f"{target}: virtual=True is for HDF5 and NetCDF with a file for each timestep, as in "
                "'out-{timestep}.h5'; nodes write a Zarr store by themselves anyway"
            )
        self._series: _Series | None = None
        self._earlier: int | None = None  # what `Progress` has noted of a series that is to be opened again
        self._files = Progress(str(target), [])
        for name in _PACKAGES[target.format]:
            package(name, f"{target}, in format {target.format!r},")
        with saving(str(target), "anything"):
            if target.path is not None:
                target.path.parent.mkdir(parents=True, exist_ok=True)
            if not target.each:
                self._series = self._open()

    @property
    def path(self) -> str:
        """Where it writes."""
        return str(self._target)

    @property
    def timesteps(self) -> tuple[int, ...]:
        """The timesteps that are saved there."""
        if not self._target.each:
            return tuple((self._series or self._open()).progress.stored)
        pattern = _pattern_of(self._target)
        folder = self._target.at(0).parent
        found = (pattern.fullmatch(str(path)) for path in folder.iterdir())
        return tuple(sorted(int(match[1]) for match in found if match))

    def append(
        self, /, *arrays: Any, timestep: int | None = None, time: float | None = None, **named: Any
    ) -> None:
        """Save arrays for a timestep; all of a window, if it is given whole.

        It returns when they are saved. What it computes is computed once, whatever is saved of it.

        Parameters
        ----------
        *arrays : DeisaArray, window, xarray.DataArray or xarray.Dataset
            What has a name of its own. Of a window, those timesteps are saved which this writer has not saved.
        timestep : int, optional
            By default that of the arrays.
        time : float, optional
            The simulation's time; by default that of the arrays, if they have one.
        **named : DeisaArray, window, dask.array.Array, or what NumPy makes an array of
            By the name under which it is saved.

        Raises
        ------
        SaveMismatchError
            When the arrays are not those of the series, or do not fit together.
        SaveOrderError
            When this writer has saved a later timestep.
        SaveConflictError
            When another process writes there, too.
        SaveError
            When the disk is full, or the path cannot be written. What was saved before stays as it is.
        """
        steps = steps_of(arrays, named, timestep, time)
        with saving(str(self._target), f"timestep {steps[0].timestep}"):
            progress = self._begin()
        if len(steps) > 1:
            steps = [step for step in steps if not progress.has_own(step.timestep)]
        for step in steps:
            with saving(str(self._target), f"timestep {step.timestep}"):
                self._append(step)

    def close(self) -> None:
        """Let another process write there. Done by itself when the writer is dropped, or its process ends."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Writer of {self._target}>"

    def _begin(self) -> Progress:
        """Be the one that writes, and know what is there."""
        if self._target.each:
            return self._files
        if self._lock is None and self._target.path is not None:
            self._lock = PathLock(self._target.path)
            self._series = None  # whoever had it may have gone on with it
        if self._series is None:
            self._series = self._open()
            if self._earlier is not None:
                self._series.progress.earlier = min(self._earlier, len(self._series.progress.stored))
        return self._series.progress

    def _open(self) -> _Series:
        target = self._target
        path = target.path
        if target.format == "zarr":
            if path is not None and path.is_file():
                raise SaveFormatError(f"{target} is a file, and a Zarr store is a folder; give another path")
            return ZarrSeries(target.place, str(target), self._encoding)
        assert path is not None
        if path.is_dir():
            raise SaveFormatError(f"{target} is a folder, and {target.format} is a file; give another path")
        return Hdf5Series(path, self._encoding, netcdf=target.format == "netcdf")

    def _append(self, step: Step) -> None:
        if self._series is None:
            self._files.place(step.timestep)
            self._write_file(self._target.at(step.timestep), step)
            self._files.note(len(self._files.stored), step.timestep)
            return
        try:
            self._series.append(step)
        except BaseException:
            # It may have left off anywhere: the next timestep reads what there is.
            self._earlier = self._series.progress.earlier
            self._series = None
            raise

    def _write_file(self, path: Path, step: Step) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._target.format == "zarr":
            _write_folder(path, step, self._encoding)
        elif self._virtual:
            virtual.write_virtual(path, step, self._encoding, netcdf=self._target.format == "netcdf")
        else:
            write_new(path, step, self._encoding, netcdf=self._target.format == "netcdf")


class _Series(Protocol):
    """What grows by timesteps."""

    progress: Progress

    def append(self, step: Step) -> None:
        """Add a timestep."""


_PACKAGES = {"zarr": ("zarr",), "hdf5": ("h5py", "h5netcdf"), "netcdf": ("h5py", "h5netcdf")}


def _write_folder(path: Path, step: Step, encoding: Mapping[str, Mapping[str, Any]]) -> None:
    part, old = (path.with_name(f".{path.name}.{what}") for what in ("part", "old"))
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    ZarrSeries(str(part), str(path), encoding).append(step)
    if path.exists():
        path.rename(old)
    part.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _pattern_of(target: Target) -> re.Pattern[str]:
    pieces = re.split(rf"\{{{TIMESTEP}(?::[^}}]*)?\}}", str(target.place))
    begin, *rest = (re.escape(piece.replace("{{", "{").replace("}}", "}")) for piece in pieces)
    return re.compile(
        begin + "".join((r"(\d+)" if not n else r"\d+") + piece for n, piece in enumerate(rest))
    )


def to_hdf5(path: str | os.PathLike[str], arrays: Mapping[str, Any], **encoding: Any) -> None:
    """Save arrays as data sets of an HDF5 file, each block by a task where it is.

    The blocks lie in files of their own, in the folder ``<path>.parts``, and virtual data sets join them: move the two
    together. Data sets of these names are replaced, others stay.

    Parameters
    ----------
    path : str or path
        On a file system that all nodes share.
    arrays : mapping of str to array
        By name of the data set; `DeisaArray`, ``dask.array.Array``, or what NumPy makes an array of.
    **encoding
        What `h5py.Group.create_dataset` gets for the blocks, such as ``compression="gzip"``.

    Raises
    ------
    SaveError
    """
    whole = Path(os.path.abspath(os.path.expanduser(os.fspath(path))))
    lazy = {name: _dask_array(array) for name, array in arrays.items()}
    with saving(str(whole), ", ".join(map(repr, lazy))):
        virtual.to_hdf5(whole, lazy, dict.fromkeys(lazy, encoding))


def _dask_array(array: Any) -> da.Array:
    if hasattr(array, "to_dask_array"):
        return array.to_dask_array()
    return array if isinstance(array, da.Array) else da.asanyarray(array)
