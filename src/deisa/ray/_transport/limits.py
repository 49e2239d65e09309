"""The memory limits of control groups, as batch systems and containers set them.

Shared memory is charged to the group of the process that touches a page first: chunk memory to that of the rank. So
each rank tells its agent the limits that it is under, and the agent adds up what the ranks under one limit will take.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from deisa.ray._state.naming import name_bridges
from deisa.ray.errors import MemoryBoundError


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A control group's limit, and what it may still take.

    Attributes
    ----------
    group : int
        Tells groups apart, also between containers, which see other paths.
    path : str
        As the process sees it that is under the limit.
    limit, available : int
        Bytes.
    """

    group: int
    path: str
    limit: int
    available: int


def check_limits(
    needed: Sequence[tuple[int, int, Sequence[MemoryLimit]]], fraction: float, what: str = ""
) -> None:
    """Check that what ranks are about to touch fits under the limits of their control groups.

    Parameters
    ----------
    needed : sequence of (int, int, sequence of MemoryLimit)
        For each bridge its id, the bytes that it will touch, and the limits that it is under.
    fraction : float
        The largest part of what is available that they may take.
    what : str
        What it is for, to begin the message with.

    Raises
    ------
    MemoryBoundError
    """
    under: dict[int, list[tuple[int, int, MemoryLimit]]] = defaultdict(list)
    for bridge_id, nbytes, limits in needed:
        for limit in limits:
            if nbytes:
                under[limit.group].append((bridge_id, nbytes, limit))
    for bridges in under.values():
        total = sum(nbytes for _, nbytes, _ in bridges)
        limit = min(
            (limit for _, _, limit in bridges), key=lambda limit: limit.available
        )  # the last one to look
        if total > limit.available * fraction:
            raise MemoryBoundError(
                f"{what}{name_bridges(bridge_id for bridge_id, _, _ in bridges)} of this node would take "
                f"{human_bytes(total)} of chunk memory, but may use {human_bytes(limit.available * fraction)} "
                f"({fraction:.0%} of the {human_bytes(limit.available)} that are free under the memory limit of "
                f"{human_bytes(limit.limit)} of their control group {limit.path}); give the simulation more memory "
                "(srun --mem), or use smaller windows, a smaller max_simulation_ahead, fewer ranks per node, or raise "
                "memory_fraction"
            )


def human_bytes(count: float) -> str:
    """Write a number of bytes for people, as in ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
