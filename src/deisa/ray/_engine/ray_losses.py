"""What Ray says when something has gone or is full, in words that name what to set."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from deisa.ray.errors import MEMORY_MONITOR, ComputationLostError, DeisaError, StoreFullError

ASK_WHY_S = 3.0
_SHOWN_CHARACTERS = 600
_DETAILS = "\nObject store memory usage"  # what follows is for those who debug Ray


def explain_loss(error: BaseException) -> str:
    """What Ray says of something that has gone, with what its memory monitor is where that may have been at work."""
    text = " ".join(str(error).partition(_DETAILS)[0].split())
    said = f"{type(error).__name__}: {text:.{_SHOWN_CHARACTERS}}"
    if isinstance(error, OutOfMemoryError) or "running low on memory" in text:
        return f"{MEMORY_MONITOR}. It says: {text:.{_SHOWN_CHARACTERS}}"
    if isinstance(error, (RayActorError, WorkerCrashedError)):
        return f"{said} (if the node's memory is nearly full: {MEMORY_MONITOR})"
    return said


def why_lost(actor: Any, error: BaseException) -> str:
    """Say why an agent has gone; what a first call says is often that a connection has ended, a second one why."""
    if isinstance(error, RayActorError):
        try:
            ray.get(actor.driver_presence.remote(), timeout=ASK_WHY_S)
        except RayError as later:
            if not isinstance(later, GetTimeoutError):
                error = later
    if isinstance(error, RayTaskError) and isinstance(error.cause, DeisaError):
        return str(error.cause)
    return f"its process died ({explain_loss(error)})" if isinstance(error, RayError) else str(error)


def why_hung_up(actor: Any, driver_id: str, reason: str) -> str:
    """Say why an agent's line has ended, which ended for that reason as far as the line itself tells."""
    try:
        ray.get(actor.call.remote(driver_id, "positions"), timeout=ASK_WHY_S)
    except GetTimeoutError:
        return f"the connection to it has ended ({reason}), and it does not answer"
    except (RayError, DeisaError) as error:
        return why_lost(actor, error)
    return f"the connection to it has ended ({reason}), though its process lives"


def loss_error(error: RayError, retries: int) -> DeisaError:
    """Build the error for a bundle whose result Ray cannot give, after so many retries."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ObjectStoreFullError):
        return StoreFullError(
            "Ray's object store is full of results, and Ray could not make room: compute smaller results, let go of "
            "persisted arrays, or start Ray with a larger --object-store-memory"
        )
    if isinstance(cause, OutOfDiskError):
        return StoreFullError(
            "the disk is full to which Ray writes what its object store has no room for: free some of it (see "
            "RAY_TMPDIR), let go of persisted arrays, or start Ray with a larger --object-store-memory"
        )
    return ComputationLostError(
        f"what computed a result has gone, after {retries} retries where they could help: {explain_loss(error)}"
    )
