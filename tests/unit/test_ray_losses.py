"""What is said of what Ray has lost, or has no room for."""

from __future__ import annotations

import pytest
from ray.exceptions import (
    ActorDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from deisa.ray._engine.ray_losses import explain_loss, loss_error
from deisa.ray.errors import MEMORY_MONITOR, ComputationLostError, StoreFullError

OOM = "1 worker was killed due to the node running low on memory. 23.0GB used / 23.5GB\nObject store memory usage: ["


def test_the_memory_monitor_names_its_settings() -> None:
    text = explain_loss(OutOfMemoryError(OOM))
    assert text.startswith(MEMORY_MONITOR) and text.endswith("23.0GB used / 23.5GB")
    assert "RAY_memory_usage_threshold" in text and "RAY_memory_monitor_refresh_ms" in text


@pytest.mark.parametrize("error", [WorkerCrashedError(), ActorDiedError()], ids=lambda e: type(e).__name__)
def test_a_death_without_a_reason_may_be_its_work(error: RayError) -> None:
    text = explain_loss(error)
    assert text.startswith(type(error).__name__) and MEMORY_MONITOR in text
    assert "\n" not in text


def test_other_losses_are_told_as_ray_does() -> None:
    error = ObjectLostError("ab" * 28, None, "")
    assert explain_loss(error).startswith("ObjectLostError: ") and MEMORY_MONITOR not in explain_loss(error)
    assert isinstance(loss_error(error, 3), ComputationLostError)
    assert "after 3 retries" in str(loss_error(error, 3))


@pytest.mark.parametrize(
    ("error", "words"),
    [(ObjectStoreFullError("x"), "object store is full"), (OutOfDiskError("x"), "disk is full")],
    ids=["store", "disk"],
)
@pytest.mark.parametrize("wrapped", [False, True], ids=["direct", "in-a-task"])
def test_what_is_full_has_words_of_its_own(error: RayError, words: str, wrapped: bool) -> None:
    told = loss_error(RayTaskError("run_on_node", "a traceback", error) if wrapped else error, 3)
    assert isinstance(told, StoreFullError) and isinstance(told, MemoryError)
    assert words in str(told) and "--object-store-memory" in str(told)
