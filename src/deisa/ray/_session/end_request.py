"""Whether somebody wants the session to end while it waits or runs."""

from __future__ import annotations

import threading

from deisa.ray.errors import ClosedError


class EndRequest:
    """Set from any thread, or by a signal handler; looked at between waits and between callbacks."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._closed = False

    @property
    def stopped(self) -> bool:
        """Whether the run is to end in order, without an error."""
        return self._stopped.is_set()

    def stop(self) -> bool:
        """Ask for an end in order; returns whether this was the first time."""
        first = not self._stopped.is_set()
        self._stopped.set()
        return first

    def close(self) -> None:
        """Say that the session has ended: waits on it raise."""
        self._closed = True

    def check_open(self) -> None:
        """Raise `ClosedError` after `close`."""
        if self._closed:
            raise ClosedError("the analytics was closed while it waited for the simulation")
