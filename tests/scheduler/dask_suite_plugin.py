"""A pytest plugin that puts our scheduler where Dask's own tests look for Dask's schedulers.

``DASK_SUITE_ENGINE`` says which: ``local``, ``ray``, or ``dask`` to change nothing.
"""

from __future__ import annotations

import os
from typing import Any

import dask
import dask.base
import pytest

from deisa.ray._engine.local import LocalExecutor
from deisa.ray._graph.leaves import Leaf
from deisa.ray._graph.scheduler import BundleScheduler
from deisa.ray.config import Settings


class CountingScheduler(BundleScheduler):
    graphs = 0

    def _run(self, *arguments: Any, **options: Any) -> Any:
        CountingScheduler.graphs += 1
        return super()._run(*arguments, **options)


def pytest_configure(config: pytest.Config) -> None:
    engine = os.environ["DASK_SUITE_ENGINE"]
    if engine == "dask":
        return
    if engine == "ray":
        from deisa.ray._engine.ray_executor import RayExecutor

        scheduler = CountingScheduler(RayExecutor(Settings()))
    else:
        scheduler = CountingScheduler(LocalExecutor(Settings()))
    # Dask's assert_eq() looks into the graph of what was persisted, for values or futures.
    Leaf.result = Leaf.__call__  # type: ignore[attr-defined]
    dask.base.named_schedulers.update(dict.fromkeys(dask.base.named_schedulers, scheduler))
    dask.config.set(scheduler="sync")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"graphs run by our scheduler: {CountingScheduler.graphs}")
