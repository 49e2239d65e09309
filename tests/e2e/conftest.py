"""Both engines, behind one fixture."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from deisa.ray import Settings
from tests.e2e.simulation import QUICK_TO_GIVE_UP, Site


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def engine(request: pytest.FixtureRequest) -> str:
    """The name of an engine; with a cluster behind it, if it needs one."""
    if request.param == "ray":
        request.getfixturevalue("ray_cluster")
    return request.param


@pytest.fixture
def site(engine: str, session_name: str) -> Iterator[Site]:
    """A session of the test's own; a test that asks for it runs once on each engine."""
    site = Site(engine, Settings(session=session_name, **QUICK_TO_GIVE_UP))
    yield site
    site.close()


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A folder with a path short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp") as folder:
        yield Path(folder)
