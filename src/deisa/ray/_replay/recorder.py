"""Keeping what is delivered, for a replay: the callback behind `Deisa.record`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from deisa.ray._files.packages import package
from deisa.ray._replay.blocks import Blocks
from deisa.ray._replay.recorded import RecordedArrays, group_of
from deisa.ray._state.timeline import When
from deisa.ray.callbacks import ExceptionHandler, Registration
from deisa.ray.errors import RegistrationError, SaveFormatError
from deisa.ray.files import Writer
from deisa.ray.types import DeisaArray, WindowSpec

RESERVED = {"time", "timestep"}


def place_of(path: Any) -> str:
    """Where a recording is: an absolute path, or a URL.

    Raises
    ------
    RegistrationError
    """
    try:
        place = os.fspath(path)
    except TypeError as exc:
        raise RegistrationError(f"record() needs a path, as in record('run.zarr'), got {path!r}") from exc
    return place if "://" in place else os.path.abspath(os.path.expanduser(place))


class Recording:
    """A recording that is being written.

    Raises
    ------
    SaveFormatError
        When something else is at the path.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._writers: dict[str, Writer] = {}
        self._newest: dict[str, int] = {}
        zarr = package("zarr", "a recording")
        is_new = "://" in path or not os.path.exists(path) or not os.listdir(path)
        try:
            self._group = zarr.open_group(path, mode="a")
        except Exception as error:  # of whatever stores it
            raise SaveFormatError(f"{path} cannot be a recording: {type(error).__name__}: {error}") from error
        known = RecordedArrays.from_attributes(dict(self._group.attrs), path)
        if known is None and not is_new:
            raise SaveFormatError(f"{path} holds Zarr data that is no recording; give another path")
        self._known = known or RecordedArrays()
        if known is None:
            self._group.attrs.update(self._known.to_attributes())

    def append(self, name: str, window: Sequence[DeisaArray]) -> None:
        """Keep the timesteps of a window that are not there yet.

        Raises
        ------
        SaveError
        """
        writer = self._writers.get(name)
        if writer is None:
            self._writers[name] = writer = Writer(self._place(name), format="zarr")
        blocks = Blocks.of(window[-1].to_dask_array())
        if self._known.arrays.get(name) != blocks:
            self._known.arrays[name] = blocks
            self._group.attrs.update(self._known.to_attributes())
        for array in window:
            if array.t > self._newest.get(name, -math.inf):
                named: dict[str, Any] = {name: array.xarray}
                writer.append(**named)
                self._newest[name] = array.t

    def _place(self, name: str) -> str:
        return (
            f"{self.path}/{group_of(name)}" if "://" in self.path else os.path.join(self.path, group_of(name))
        )

    def close(self) -> None:
        """Let another process write there."""
        for writer in self._writers.values():
            writer.close()


class Record:
    """A callback that keeps its windows in a recording; `arrays` are those of the windows, in their order."""

    def __init__(self, recording: Recording, arrays: Sequence[str]) -> None:
        for name in RESERVED & set(arrays):
            raise RegistrationError(
                f"record(): array {name!r} has the name of a coordinate of recordings, so that it cannot be kept; name "
                "those to keep, as in record(path, 'temperature')"
            )
        self.recording = recording
        self.arrays = tuple(arrays)
        self.__name__ = f"record to {recording.path}"

    def __call__(self, /, *windows: Sequence[DeisaArray]) -> None:
        """Keep what is new in the windows."""
        for name, window in zip(self.arrays, windows, strict=True):
            self.recording.append(name, window)


@dataclass(frozen=True)
class RecordRequest:
    """What was asked of `Deisa.record`.

    Attributes
    ----------
    recording : Recording
    windows : tuple of WindowSpec
        Empty where all arrays are to be kept that callbacks ask for.
    trigger : callable or None
    following : int
    exception_handler : callable or None
    when : {"AND", "OR"}
    """

    recording: Recording
    windows: tuple[WindowSpec, ...]
    trigger: Callable[..., Any] | None
    following: int
    exception_handler: ExceptionHandler | None
    when: When

    @classmethod
    def of(
        cls,
        place: str,
        windows: tuple[WindowSpec, ...],
        trigger: Callable[..., Any] | None,
        following: int,
        exception_handler: ExceptionHandler | None,
        when: When,
    ) -> RecordRequest:
        """Check what was asked for, and open the recording.

        Raises
        ------
        RegistrationError, WindowError, SaveFormatError, MissingPackageError
        """
        if trigger is not None and not windows:
            raise RegistrationError(
                "record(): a trigger looks at windows; name the arrays, as in "
                "record('run.zarr', 'temperature', trigger=lambda temperature: temperature[-1].max() > 10)"
            )
        Registration.of(_no_record, windows, exception_handler, when, trigger, following)
        recording = Recording(place)
        return cls(recording, windows, trigger, following, exception_handler, when)

    def registrations(self, others: Iterable[Registration]) -> list[Registration]:
        """The callbacks that keep it: one for each array, or, with a trigger, one for all."""
        if self.trigger is not None:
            return [self._registration(self.windows)]
        if self.windows:
            return [self._registration((replace(window, window_size=1),)) for window in self.windows]
        names = dict.fromkeys(window.name for other in others for window in other.windows)
        return [self._registration((WindowSpec(name),)) for name in names]

    def _registration(self, windows: tuple[WindowSpec, ...]) -> Registration:
        record = Record(self.recording, [window.name for window in windows])
        return Registration.of(
            record, windows, self.exception_handler, self.when, self.trigger, self.following
        )


def _no_record(*_windows: Any) -> None:
    """What would be registered, to check what goes with it before anything is opened."""
