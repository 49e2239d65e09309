"""Whether a simulation that waits for slots can ever go on, and if not, because of which arrays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

Step = tuple[str, int]  # array, timestep


def steps_in_the_way(
    slots: Mapping[str, int],
    held: Iterable[Step],
    windows: Collection[Step],
    waiting: Mapping[int, str],
    senders: Iterable[int],
) -> list[Step]:
    """List the steps without whose end nothing can come; none where something still can.

    Parameters
    ----------
    slots : mapping of str to int
        Of each array.
    held : iterable of (str, int)
        Complete steps whose slots are not free yet.
    windows : collection of (str, int)
        Those that callbacks may still need.
    waiting : mapping of int to str
        Bridges that wait for a slot, and of which array.
    senders : iterable of int
        Bridges that have not closed and own chunks which callbacks ask for. Unless all of them wait, one may send
        what lets a callback run, and that may let arrays go.
    """
    held = set(held)
    taken = Counter(array for array, _ in held)
    full = {array for array in slots if taken[array] >= slots[array]}
    senders = set(senders)
    if not senders or any(waiting.get(bridge_id) not in full for bridge_id in senders):
        return []
    blocking = {waiting[bridge_id] for bridge_id in senders}
    return sorted(step for step in held.difference(windows) if step[0] in blocking)
