"""Standing workers that the sessions of the test process share: a start takes longer than most tests."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import ray


class SharedStandingWorkers:
    """Takes the place of the actor class `StandingWorker`, and starts a worker only where there is none yet.

    Sessions are not told apart by their workers: these hold nothing of a session that is over, and are as they
    are in a session's own.

    Attributes
    ----------
    actor_class
        The real one.
    """

    def __init__(self, actor_class: Any) -> None:
        self.actor_class = actor_class
        self._workers: dict[tuple[object, ...], Any] = {}

    def options(self, **options: Any) -> SimpleNamespace:
        """Return what has the method `remote`, as the actor class does."""
        return SimpleNamespace(remote=partial(self._find_or_start, options))

    def _find_or_start(self, options: dict[str, Any], *arguments: Any) -> Any:
        job = ray.get_runtime_context().get_job_id()
        node = options["scheduling_strategy"].node_id
        key = (job, node, options["max_concurrency"], *arguments)
        if key not in self._workers:
            self._workers[key] = self.actor_class.options(**options).remote(*arguments)
        return self._workers[key]
