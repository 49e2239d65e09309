"""Point Dask at the scheduler of a run, for as long as the run lasts."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import dask

from deisa.ray._graph._dask import compute_in_threads, computing_with
from deisa.ray._graph.scheduler import BundleScheduler
from deisa.ray.types import can_be_formatted

SPLIT_EVERY = 16  # blocks that a reduction combines at once; Dask's own default is 4


class _RunningSchedulers:
    """The schedulers of the runs in this process, behind the one that Dask's configuration names.

    That configuration is the whole process's, and runs in several threads may end in any order: the first
    run sets it, the last one restores it, and each thread computes with the scheduler of its own run.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[BundleScheduler] = []
        self._own = threading.local()
        self._configured: Any = None

    @contextmanager
    def use(self, scheduler: BundleScheduler) -> Iterator[None]:
        """Have Dask compute with `scheduler` in this thread, and in threads without a run of their own."""
        with self._lock:
            if not self._running:
                self._configured = computing_with(self, SPLIT_EVERY, can_be_formatted)
            self._running.append(scheduler)
        outer, self._own.scheduler = getattr(self._own, "scheduler", None), scheduler
        try:
            yield
        finally:
            self._own.scheduler = outer
            with self._lock:
                self._running.remove(scheduler)
                if not self._running:
                    self._configured.__exit__(None, None, None)

    def __call__(self, dsk: Any, keys: Any, **options: Any) -> Any:
        """Compute the values of `keys`."""
        return (self._current or compute_in_threads)(dsk, keys, **options)

    def persist(self, collections: Sequence[Any], **options: Any) -> list[Any]:
        """Start computing collections."""
        current = self._current
        if current is None:
            return list(dask.persist(*collections, **(options | {"scheduler": "threads"})))
        return current.persist(collections, **options)

    @property
    def _current(self) -> BundleScheduler | None:
        """The scheduler for this thread; None when the last run has ended since Dask has looked here."""
        own = getattr(self._own, "scheduler", None)
        with self._lock:
            return own or (self._running[-1] if self._running else None)


dask_computes_with = _RunningSchedulers().use
