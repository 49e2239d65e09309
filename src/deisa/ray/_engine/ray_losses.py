"""What Ray says when something has gone or is full, in words that name what to set."""

from __future__ import annotations

from ray.exceptions import (
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from deisa.ray.errors import MEMORY_MONITOR, ComputationLostError, DeisaError, StoreFullError

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
