"""Which format a path means, and whether it stands for one series or for a file of each timestep."""

from __future__ import annotations

import os
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deisa.ray._files.fields import TIMESTEP
from deisa.ray.errors import SaveFormatError

Format = Literal["zarr", "hdf5", "netcdf"]
SUFFIXES: dict[str, Format] = {
    ".zarr": "zarr",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".nc": "netcdf",
    ".nc4": "netcdf",
}


@dataclass(frozen=True)
class Target:
    """Where something is saved.

    Attributes
    ----------
    place : str or zarr.abc.store.Store
        A path that does not depend on the working directory, a URL, or a store of Zarr's.
    format : {"zarr", "hdf5", "netcdf"}
    each : bool
        Whether there is a file for each timestep: then `place` has ``{timestep}`` in it.
    """

    place: Any
    format: Format
    each: bool = False

    @property
    def path(self) -> Path | None:
        """The path in the file system, if it is one."""
        return Path(self.place) if isinstance(self.place, str) and "://" not in self.place else None

    def at(self, timestep: int) -> Path:
        """The path of one timestep's file."""
        return Path(self.place.format(timestep=timestep))

    def __str__(self) -> str:
        return str(self.place)


def target_of(place: Any, format: str | None) -> Target:
    """Read what a user gives as the place to save to.

    Raises
    ------
    SaveFormatError
    """
    if format is not None and format not in SUFFIXES.values():
        raise SaveFormatError(f"format must be 'zarr', 'hdf5' or 'netcdf', got {format!r}")
    if not isinstance(place, str | os.PathLike):
        if not (hasattr(place, "get") and hasattr(place, "set")) or format not in (None, "zarr"):
            raise SaveFormatError(f"a place to save to is a path, or a Zarr store, got {place!r}")
        return Target(place, "zarr")
    text = os.fspath(place)
    each = _names_timesteps(text)
    known: Format | None = format or SUFFIXES.get(Path(text.rstrip("/")).suffix.lower())  # type: ignore[assignment]
    if known is None:
        raise SaveFormatError(
            f"{text!r} says no format: end it with {', '.join(SUFFIXES)}, or give format='zarr', 'hdf5' or 'netcdf'"
        )
    if "://" in text:
        if known != "zarr" or each:
            raise SaveFormatError(f"{text!r}: at a URL there can be one growing Zarr store, and nothing else")
        return Target(text, known)
    here = os.getcwd()
    if each:  # what is not the user's is no place for a timestep
        here = here.replace("{", "{{").replace("}", "}}")
    return Target(os.path.normpath(os.path.join(here, os.path.expanduser(text))), known, each)


def _names_timesteps(text: str) -> bool:
    """Whether a path has a place for the timestep in it."""
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
        if names == {TIMESTEP}:
            text.format(timestep=0)
    except ValueError as exc:
        raise SaveFormatError(
            f"{text!r}: {exc}; '{{timestep}}' or '{{timestep:06d}}' stands for the timestep"
        ) from exc
    if names - {TIMESTEP}:
        raise SaveFormatError(
            f"{text!r}: only '{{timestep}}' can be filled in, not {', '.join(map(repr, sorted(names - {TIMESTEP})))}"
        )
    return bool(names)
