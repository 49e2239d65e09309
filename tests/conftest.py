"""Fixtures that the kinds of tests share; CONTRIBUTING.md says which kind to write."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.mpi import FLAVOURS, Mpi
from tests.support.netns import NamespacedCluster, namespaced_cluster, reason_unavailable
from tests.support.ray_node import AUTHENTICATION, RayNode

# Ray reads these once, when it is imported: too early for a fixture.
os.environ |= AUTHENTICATION

# A shell has what it starts in the background ignore interrupts, and all its children too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def skip_or_fail(reason: str) -> NoReturn:
    """Skip; but fail where everything has to run."""
    if os.environ.get("DEISA_RAY_REQUIRE_NETNS") == "1" or os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def session_name(request: pytest.FixtureRequest) -> str:
    """A deisa session of the test's own."""
    readable = re.sub("[^A-Za-z0-9]+", "-", request.node.name).strip("-")[:40]
    return f"{readable}-{os.urandom(3).hex()}"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address of a one-node Ray cluster, which RAY_ADDRESS gives to this process and to those it starts."""
    with ExitStack() as undo:
        temp_dir = undo.enter_context(tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp"))
        node = RayNode.start(Path(temp_dir))
        undo.callback(node.stop)
        node.wait_started()
        patches = undo.enter_context(pytest.MonkeyPatch.context())
        patches.setenv("RAY_ADDRESS", node.address)
        from deisa.ray._engine import ray_executor
        from tests.support.standing_workers import SharedStandingWorkers

        shared = SharedStandingWorkers(ray_executor.StandingWorker)
        patches.setattr(ray_executor, "StandingWorker", shared)
        yield node.address
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()


@pytest.fixture
def own_standing_workers(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each session of a test start standing workers of its own, as it does for users."""
    from deisa.ray._engine import ray_executor

    monkeypatch.setattr(ray_executor, "StandingWorker", ray_executor.StandingWorker.actor_class)  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def netns_cluster() -> Iterator[NamespacedCluster]:
    """A Ray cluster of three nodes, each in a network namespace of its own."""
    reason = reason_unavailable()
    if reason is not None:
        skip_or_fail(reason)
    with namespaced_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session", params=FLAVOURS)
def mpi(request: pytest.FixtureRequest) -> Mpi:
    """An MPI implementation; a test that asks for it runs once for each."""
    found = Mpi.find(request.param)
    if found is None:
        skip_or_fail(f"{request.param} is not installed; `make test` installs it")
    return found
