"""The bridges of a node that wait for a slot: what subscribers hear of them, and what they hear themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deisa.ray._state.events import SendersBlocked

BLOCKED_S = 0.25  # that ranks wait before subscribers hear of it: nothing, where these are merely slower
PROGRESS_S = 1.0  # that a rank waits before it hears for whom


@dataclass(slots=True)
class _Blocked:
    array: str
    timestep: int
    since: float
    told: str = ""  # whom it has been told to wait for


class BlockedBridges:
    """Who waits, for a slot of which array, with which timestep, and since when.

    Subscribers hear of an array when the bridges that wait for it have been the same for `BLOCKED_S`, and once.
    """

    def __init__(self) -> None:
        self._blocked: dict[int, _Blocked] = {}
        self._reported: dict[str, dict[int, int]] = {}

    def __contains__(self, bridge_id: int) -> bool:
        return bridge_id in self._blocked

    def note(self, bridge_id: int, waits: tuple[str, int] | None, now: float) -> None:
        """A bridge waits for a slot of an array with a timestep, or does not wait."""
        if waits is None:
            self.forget(bridge_id)
            return
        known = self._blocked.get(bridge_id)
        if known is None or (known.array, known.timestep) != waits:
            self._blocked[bridge_id] = _Blocked(*waits, now)

    def forget(self, bridge_id: int) -> None:
        """A bridge does not wait."""
        self._blocked.pop(bridge_id, None)

    def all(self) -> Sequence[SendersBlocked]:
        """Who waits now."""
        found: dict[str, dict[int, int]] = {}
        for bridge_id, blocked in sorted(self._blocked.items()):
            found.setdefault(blocked.array, {})[bridge_id] = blocked.timestep
        return [SendersBlocked(array, timesteps) for array, timesteps in found.items()]

    def news(self, now: float) -> Sequence[SendersBlocked]:
        """What subscribers have to hear now."""
        late = {blocked.array for blocked in self._blocked.values() if now - blocked.since < BLOCKED_S}
        news = [e for e in self.all() if e.array not in late and self._reported.get(e.array) != e.timesteps]
        self._reported |= {event.array: event.timesteps for event in news}
        return news

    def to_tell(self, progress: str, now: float) -> Sequence[int]:
        """The bridges that have to hear now whom they wait for."""
        found = []
        for bridge_id, blocked in self._blocked.items():
            if now - blocked.since >= PROGRESS_S and blocked.told != progress:
                blocked.told = progress
                found.append(bridge_id)
        return found
