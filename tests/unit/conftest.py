"""Settings of the tests that need neither Ray nor a cluster, and the two clients that a rank can have."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.unit.agent import CLIENTS, Client, use_client

settings.register_profile(
    "unit",
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("unit")


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What refers to itself in a circle stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    """Run a test with the client in C, and with the one in Python that says what it has to do."""
    with use_client(request.param) as client:
        yield client
