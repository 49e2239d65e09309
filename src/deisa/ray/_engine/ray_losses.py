"""What Ray says when something has gone or is full, in words that name what to set."""

from __future__ import annotations

from ray.exceptions import ObjectStoreFullError, OutOfDiskError, OutOfMemoryError, RayError, RayTaskError

from deisa.ray.errors import ComputationLostError, DeisaError, StoreFullError

MEMORY_MONITOR = (
    "Ray's memory monitor kills processes of a node whose memory is nearly full, by whomever: chunk memory and the "
    "simulation's own count, too. RAY_memory_usage_threshold (0.95) says from which part on, and "
    "RAY_memory_monitor_refresh_ms=0 switches it off; `ray start` reads both"
)
_SHOWN_CHARACTERS = 600


def by_memory_monitor(error: BaseException) -> bool:
    """Whether it was Ray's memory monitor that ended a process."""
    text = str(error).lower()
    return isinstance(error, OutOfMemoryError) or "memory monitor" in text or "out of memory" in text


def explain_loss(error: BaseException) -> str:
    """What Ray says of a process that has gone, and what it means if its memory monitor was at work."""
    said = f"{type(error).__name__}: {str(error).strip():.{_SHOWN_CHARACTERS}}"
    return f"{MEMORY_MONITOR}. {said}" if by_memory_monitor(error) else said


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
