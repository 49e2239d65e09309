"""Settings of the tests that need neither Ray nor a cluster, and the two ways in which a rank hands over."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from deisa.ray._transport import client
from tests.conftest import skip_or_fail

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


@pytest.fixture(params=["compiled", "interpreted"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with the compiled short cut of `Bridge.send`, and without it."""
    if request.param == "interpreted":
        monkeypatch.setattr(client, "Lane", None)
    elif client.Lane is None:
        skip_or_fail("deisa.ray was installed without a C compiler")
    return request.param
