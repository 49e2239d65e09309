"""The callback behind `Deisa.save`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from deisa.ray._files.fields import TIME, TIMESTEP
from deisa.ray.errors import RegistrationError, WindowError


class Save:
    """Appends the newest timestep of each of its windows.

    Parameters
    ----------
    writer : Writer
    request : tuple
        What was asked for: another one of the same path must be the same.
    every : int
        Only timesteps that are multiples of it.
    """

    def __init__(self, writer: Any, request: tuple[Any, ...], every: int) -> None:
        self.writer = writer
        self.request = request
        self._every = every
        self.__name__ = f"save to {writer.path}"

    def __call__(self, /, **windows: Sequence[Any]) -> None:
        """Save what is newest."""
        newest = {name: window[-1] for name, window in windows.items()}
        timestep = max(array.timestep for array in newest.values())
        if timestep % self._every == 0:
            self.writer.append(timestep=timestep, **newest)


def check_request(names: Sequence[str], sizes: Sequence[int], every: Any) -> int:
    """Check what is to be saved, and how often; returns the latter.

    Raises
    ------
    RegistrationError, WindowError
    """
    for name in names:
        if name in (TIME, TIMESTEP):
            raise RegistrationError(
                f"save(): {name!r} is the name of a coordinate in what is saved; save that array in a callback, under "
                "another name"
            )
    if set(sizes) - {1}:
        raise WindowError("save() takes windows of one timestep: it saves each timestep when it comes")
    try:
        number = operator.index(every)
    except TypeError as exc:
        raise WindowError(f"save(): every must be an integer, got {every!r}") from exc
    if number < 1:
        raise WindowError(f"save(): every is {number}, it must be at least 1")
    return number
