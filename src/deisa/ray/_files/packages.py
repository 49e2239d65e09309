"""Packages that only those need who save: imported when they are asked for."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from deisa.ray.errors import MissingPackageError

_EXTRAS = {"zarr": "zarr", "h5py": "hdf5", "h5netcdf": "netcdf"}


def package(name: str, needed_for: str) -> ModuleType:
    """Import a package.

    Raises
    ------
    MissingPackageError
        When it is not installed; the message says how to install it.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name != name.partition(".")[0]:
            raise
        extra = _EXTRAS[exc.name]
        raise MissingPackageError(
            f"{needed_for} needs {exc.name}, which is not installed here: pip install 'deisa-ray[{extra}]'"
        ) from exc
