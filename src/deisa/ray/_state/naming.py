"""How messages name bridges."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

SHOWN_CULPRITS = 5
SHOWN_BRIDGES = 2 * SHOWN_CULPRITS


def missing_bridges(registered: Iterable[int], world_size: int) -> str:
    """Say which bridges are not there yet, as in ``bridges 2 and 3 of 4``."""
    there = {i for i in registered if 0 <= i < world_size}
    missing = itertools.islice((i for i in range(world_size) if i not in there), SHOWN_BRIDGES + 1)
    return f"{_name_some(list(missing), world_size - len(there))} of {world_size}"


def two_programs(session: str) -> str:
    """Say what to do where two programs seem to be one session's simulation."""
    return (
        f"two programs seem to share session {session!r}: give one of them, and its analytics, another name "
        "(Bridge(session=...) and Deisa(session=...), or DEISA_RAY_SESSION), or end the other one"
    )


def name_bridges(ids: Iterable[int]) -> str:
    """Write bridge ids for a message: ``bridge 2``, ``bridges 2 and 3``, ``bridges 2, 3, 4 ...``."""
    listed = sorted(set(ids))
    return _name_some(listed, len(listed))


def _name_some(listed: Sequence[int], count: int) -> str:
    """Name the first of so many bridges."""
    shown = [str(i) for i in listed[:SHOWN_BRIDGES]]
    if count > len(shown):
        return f"bridges {', '.join(shown)} ... ({count} in all)"
    if len(shown) == 1:
        return f"bridge {shown[0]}"
    return f"bridges {', '.join(shown[:-1])} and {shown[-1]}"
