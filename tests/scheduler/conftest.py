"""Both engines, for tests that hold for either."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pytest

from deisa.ray._engine.local import LocalExecutor
from deisa.ray._graph.scheduler import BundleScheduler
from deisa.ray.config import Settings
from tests.support.patience import wait_until


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def engine(request: pytest.FixtureRequest) -> str:
    """``"local"`` or ``"ray"``; with the latter, Ray is there."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param


@pytest.fixture(autouse=True)
def every_session_ends() -> Iterator[None]:
    """When a test is over, so are its sessions: all arrays are gone, and with them agents and threads.

    Threads that have helped with a bundle stay for the next one.
    """
    yield

    def left() -> list[str]:
        return [name for t in threading.enumerate() if re.match("deisa-(?!bundle)", name := t.name)]

    try:
        wait_until(lambda: not left(), "the threads of all sessions have ended")
    except TimeoutError:
        pytest.fail(f"threads {left()} are still there")


@pytest.fixture
def scheduler(engine: str) -> BundleScheduler:
    """The Dask scheduler of an engine."""
    if engine == "local":
        return BundleScheduler(LocalExecutor(Settings()))
    from deisa.ray import deisa_ray_get

    return deisa_ray_get
