"""The callback behind `Deisa.save`."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deisa.ray._files.fields import why_not_called
from deisa.ray.errors import RegistrationError, WindowError
from deisa.ray.files import Writer
from deisa.ray.types import WindowSpec


class Save:
    """Appends its windows, as far as they are not saved.

    Parameters
    ----------
    writer : Writer
    request : tuple
        What was asked for: another one of the same path must be the same.
    every : int
        Only timesteps that are multiples of it.
    """

    def __init__(self, writer: Writer, request: tuple[Any, ...], every: int) -> None:
        self.writer = writer
        self.request = request
        self._every = every
        self.__name__ = f"save to {os.path.basename(writer.path)}"

    def __call__(self, /, **windows: Sequence[Any]) -> None:
        """Save what is new."""
        timestep = max(window[-1].timestep for window in windows.values())
        if timestep % self._every:
            return
        if any(len(window) > 1 for window in windows.values()):
            whole: dict[str, Any] = dict(windows)
            self.writer.append(**whole)
        else:
            newest: dict[str, Any] = {name: window[-1] for name, window in windows.items()}
            self.writer.append(**newest, timestep=timestep)


def save_of(
    windows: Sequence[tuple[str, int]],
    path: Any,
    every: Any,
    options: Mapping[str, Any],
    others: Iterable[Any],
    request: tuple[Any, ...],
) -> Save:
    """Make the callback that saves windows.

    Parameters
    ----------
    windows : sequence of (str, int)
        Their arrays and sizes.
    path, every
    options : mapping
        As `Writer` takes them.
    others : iterable of callable
        The callbacks that there are: one that does the same is returned.
    request : tuple
        The rest of what was asked for.

    Raises
    ------
    RegistrationError, WindowError, SaveError
    """
    number = _every(every)
    for name, size in windows:
        if why := why_not_called(name):
            raise RegistrationError(f"save(): {why}; save that array in a callback, under another name")
        if size != windows[0][1]:
            raise WindowError(
                f"save(): windows of one path have the same size, got {windows[0][1]} of {windows[0][0]!r} and {size} "
                f"of {name!r}"
            )
    writer = Writer(path, **options)
    save = Save(writer, (tuple(windows), number, dict(options), *request), number)
    for other in others:
        if isinstance(other, Save) and other.writer.path == writer.path:
            if other.request != save.request:
                raise RegistrationError(
                    f"another save() to {writer.path} is registered: save all arrays of a path by one call, as in "
                    f"deisa.save({[name for name, _ in windows]!r}, ...)"
                )
            return other
    return save


def at_multiples(specs: Sequence[WindowSpec], every: Any) -> tuple[WindowSpec, ...]:
    """Have windows of one timestep take only those that are to be saved, so that ranks copy no others.

    Raises
    ------
    WindowError
    """
    number = _every(every)
    return tuple(
        replace(spec, every=math.lcm(spec.every, number)) if spec.window_size == 1 else spec for spec in specs
    )


def _every(every: Any) -> int:
    try:
        number = operator.index(every)
    except TypeError as exc:
        raise WindowError(f"save(): every must be an integer, got {every!r}") from exc
    if number < 1:
        raise WindowError(f"save(): every is {number}, it must be at least 1")
    return number
