"""Says which callback has been running for long, since when, and where it is."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("deisa.ray")

SHOWN_FRAMES = 4  # the innermost ones


class Watchdog:
    """Watches the calls of one thread, from a thread of its own; warns after a time, and each time that has doubled.

    Parameters
    ----------
    warn_s : float
        After how long (seconds).
    """

    def __init__(self, warn_s: float) -> None:
        self._warn_s = warn_s
        self._thread = threading.get_ident()
        self._changed = threading.Condition()
        self._running: tuple[str, int, float] | None = None  # callback, timestep, since when
        self._ended = False

    @contextmanager
    def on_guard(self) -> Iterator[None]:
        """Watch for as long as the context."""
        watcher = threading.Thread(target=self._watch, name="deisa-watchdog", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify()

    @contextmanager
    def watching(self, callback: str, timestep: int) -> Iterator[None]:
        """Watch one call."""
        with self._changed:
            self._running = (callback, timestep, time.monotonic())
        try:
            yield
        finally:
            with self._changed:
                self._running = None

    def _watch(self) -> None:
        warned: tuple[str, int, float] | None = None
        due_s = self._warn_s
        with self._changed:
            while not self._ended:
                running = self._running
                if running is None or running != warned:
                    warned, due_s = running, self._warn_s
                if running is not None and time.monotonic() - running[2] >= due_s:
                    self._warn(*running)
                    due_s *= 2
                # Calls come and go without a word to this thread, which would cost each of them a switch.
                self._changed.wait(self._warn_s / 4)

    def _warn(self, callback: str, timestep: int, since: float) -> None:
        seconds = time.monotonic() - since
        frame = sys._current_frames().get(self._thread)
        where = (
            "".join(traceback.format_stack(frame)[-SHOWN_FRAMES:]).rstrip()
            if frame is not None
            else "  (unknown)"
        )
        logger.warning(
            "callback %r has been running for %.0f s at timestep %d, since %s; the simulation waits for it once its "
            "slots are full. It is here:\n%s",
            callback,
            seconds,
            timestep,
            time.strftime("%H:%M:%S", time.localtime(time.time() - seconds)),
            where,
        )
