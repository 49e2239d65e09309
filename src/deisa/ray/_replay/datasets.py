"""Data sets as xarray opens them: a Zarr store, a file, or many files of which each has a part of the timesteps."""

from __future__ import annotations

import os
from glob import glob, has_magic
from typing import Any

from deisa.ray._files.packages import package
from deisa.ray.errors import ReplayError
from deisa.ray.labels import import_xarray

TIME, TIMESTEP = "time", "timestep"


def is_zarr(path: str) -> bool:
    """Whether something is a Zarr store: a URL, or a folder."""
    return "://" in path or os.path.isdir(path)


def check_exists(path: str) -> None:
    """Check that there is something to open.

    Raises
    ------
    ReplayError
    """
    if "://" not in path and not os.path.exists(path) and not (has_magic(path) and glob(path)):
        raise ReplayError(f"{path} is to be replayed, but there is no such file or folder")


def open_group(path: str) -> Any:
    """Open a Zarr group.

    Raises
    ------
    ReplayError
    """
    zarr = package("zarr", "a replay of a Zarr store")
    try:
        return zarr.open_group(path, mode="r")
    except Exception as error:
        raise ReplayError(f"{path} cannot be read as Zarr: {type(error).__name__}: {error}") from error


def open_dataset(path: str, **options: Any) -> Any:
    """Open a data set without loading it; times stay numbers.

    Raises
    ------
    ReplayError
    """
    xarray = import_xarray()
    options = {"decode_times": False} | options
    try:
        if is_zarr(path):
            # Where a series grows, or its writer was killed, its arrays agree in the consolidated document only.
            consolidated = open_group(path).metadata.consolidated_metadata is not None
            return xarray.open_dataset(path, engine="zarr", consolidated=consolidated, **options)
        if os.path.exists(path):
            return xarray.open_dataset(path, **options)
        return _open_many(xarray, sorted(glob(path)), options)
    except ReplayError:
        raise
    except Exception as error:  # of whichever library reads it
        raise ReplayError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _open_many(xarray: Any, paths: list[str], options: dict[str, Any]) -> Any:
    """Join files along time: in the order of their timesteps where they say them, else of their names."""
    with xarray.open_dataset(paths[0], **options) as first:
        along_time = TIME in first.dims
    whole = xarray.open_mfdataset(
        paths,
        combine="nested",
        concat_dim=TIME,
        data_vars="minimal" if along_time else "all",
        coords="different",
        compat="equals",
        join="exact",
        **options,
    )
    return whole.sortby(TIMESTEP) if TIMESTEP in whole.variables else whole
