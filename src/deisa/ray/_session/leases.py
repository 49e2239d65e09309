"""The leases that the analytics holds on slots, and the thread that gives them back."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence

from deisa.ray._graph.leaves import Lease

logger = logging.getLogger("deisa.ray")

Step = tuple[str, int]  # array, timestep


class Leases:
    """Grants leases, and releases each step when the last reference to its lease has gone.

    Leases end wherever the last reference to an array goes, also in the middle of a garbage collection:
    there they only leave a note in a queue, which a thread of its own reads.

    Parameters
    ----------
    release : callable
        Tells the agents which steps nobody needs any more; called from that thread.
    """

    def __init__(self, release: Callable[[Sequence[Step]], None]) -> None:
        self._release = release
        self._ended: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self._live: set[Step] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def grant(self, array: str, timestep: int) -> Lease:
        """Make the lease of a step that has just become complete."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._give_back, name="deisa-leases", daemon=True)
            self._thread.start()
        with self._changed:
            self._live.add((array, timestep))
        return Lease(array, timestep, lambda name, t: self._ended.put((name, t)))

    def live(self) -> set[Step]:
        """The steps that somebody still holds."""
        with self._changed:
            return set(self._live)

    def wait_gone(self, timeout_s: float | None = None) -> bool:
        """Wait until nobody holds any step, or `stop`; returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._live or self._stopped, timeout_s)

    def stop(self) -> None:
        """End the thread; no step is released any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._ended.put(None)

    def _give_back(self) -> None:
        stop = False
        while not stop:
            ended = [self._ended.get()]
            while not self._ended.empty():
                ended.append(self._ended.get())
            stop = None in ended
            steps = [step for step in ended if step is not None]
            try:
                if not self._stopped:
                    self._release(steps)
            except Exception as error:  # the agents have gone; their memory with them
                logger.debug("leases not released: %s", error)
            with self._changed:
                self._live.difference_update(steps)
                self._changed.notify_all()
