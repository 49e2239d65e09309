"""What has arrived on one node, and which slots hold it.

A *region* is one chunk on this node; it has K *slots*, each holding the chunk at one timestep.
A slot is free, or holds a chunk that has arrived and is not released yet: the rank takes a free one
when it copies, the agent frees it when every consumer's lease on that (array, timestep) has ended.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from deisa.ray._state.events import (
    BridgeClosed,
    BridgeLost,
    BridgeStats,
    Event,
    OwnersPassed,
    SendHeldUp,
    StepComplete,
    StepTorn,
)
from deisa.ray.errors import ProtocolError

NOT_STARTED = -math.inf
FINISHED = math.inf
EMPTY = -1


@dataclass(slots=True)
class _Bridge:
    regions: dict[str, tuple[int, ...]]
    at: float = NOT_STARTED  # timestep being sent; FINISHED once closed
    last_sent: int | None = None


@dataclass(slots=True)
class _Array:
    regions: list[int]  # increasing
    place: dict[int, int]  # region -> position in `regions`
    owners: tuple[int, ...]  # bridges that own a region of it
    slots: int
    last: list[float]  # timestep sent last, by position
    passed: float = NOT_STARTED
    arriving: dict[int, list[int]] = field(default_factory=dict)  # timestep -> slot by position
    missing: dict[int, int] = field(default_factory=dict)  # timestep -> chunks still to come
    leased: dict[int, tuple[list[int], set[str]]] = field(default_factory=dict)


class NodeArrivals:
    """Account of the bridges, chunks and slots of one node.

    Before `subscribe`, bridges only join. After it, chunks arrive, complete timesteps are
    announced through `take_events`, and `release` gives slots back.
    """

    def __init__(self) -> None:
        self._bridges: dict[int, _Bridge] = {}
        self._arrays: dict[str, _Array] = {}
        self._owner: dict[int, tuple[int, str]] = {}  # region -> bridge, array
        self._busy: dict[int, set[int]] = {}  # region -> slots not free
        self._consumers: frozenset[str] = frozenset()
        self._next_region = 0
        self._events: list[Event] = []

    def join(self, bridge_id: int, chunk_counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Add a bridge that owns so many chunks of each array; returns its regions by array."""
        regions: dict[str, tuple[int, ...]] = {}
        for array, count in chunk_counts.items():
            regions[array] = tuple(range(self._next_region, self._next_region + count))
            self._next_region += count
            for region in regions[array]:
                self._owner[region] = (bridge_id, array)
        self._bridges[bridge_id] = _Bridge(regions)
        return regions

    def leave(self, bridge_id: int) -> None:
        """Forget a bridge that went away before the session started."""
        for regions in self._bridges.pop(bridge_id).regions.values():
            for region in regions:
                del self._owner[region]

    def subscribe(self, slots: Mapping[str, int], consumers: Iterable[str]) -> None:
        """Start the session: the arrays asked for, how many slots each chunk has, who leases them."""
        self._consumers = frozenset(consumers)
        for array, count in slots.items():
            regions = sorted(r for r, (_, name) in self._owner.items() if name == array)
            if regions:
                owners = tuple(sorted({self._owner[r][0] for r in regions}))
                place = {region: position for position, region in enumerate(regions)}
                self._arrays[array] = _Array(regions, place, owners, count, [NOT_STARTED] * len(regions))
                self._busy.update((region, set()) for region in regions)

    def put(self, bridge_id: int, region: int, timestep: int, slot: int) -> None:
        """A chunk lies in `slot` of `region`.

        Raises
        ------
        ProtocolError
            When the bridge breaks the account: another bridge's region, a slot that does not
            exist or is not free, an older timestep, the same chunk twice.
        """
        owner, name = self._owner.get(region, (None, ""))
        array = self._arrays.get(name)
        if owner != bridge_id or array is None:
            raise ProtocolError(f"bridge {bridge_id} has no region {region} to send")
        if not 0 <= slot < array.slots or slot in self._busy[region]:
            raise ProtocolError(f"bridge {bridge_id}: slot {slot} of region {region} is not free")
        place = array.place[region]
        if array.last[place] == timestep:
            raise ProtocolError(f"bridge {bridge_id} sent region {region} twice for timestep {timestep}")
        self.advance(bridge_id, timestep)
        array.last[place] = timestep
        if timestep not in array.arriving:
            array.arriving[timestep] = [EMPTY] * len(array.regions)
            array.missing[timestep] = len(array.regions)
        arriving = array.arriving[timestep]
        arriving[place] = slot
        self._busy[region].add(slot)
        self._bridges[bridge_id].last_sent = timestep
        array.missing[timestep] -= 1
        if array.missing[timestep] == 0:
            del array.missing[timestep], array.arriving[timestep]
            array.leased[timestep] = (arriving, set(self._consumers))
            self._events.append(StepComplete(name, timestep, tuple(arriving)))

    def advance(self, bridge_id: int, timestep: float) -> None:
        """A bridge says that it will send nothing older than `timestep` any more."""
        bridge = self._bridges[bridge_id]
        if timestep < bridge.at:
            raise ProtocolError(f"bridge {bridge_id} went back from timestep {bridge.at} to {timestep}")
        if timestep == bridge.at:
            return
        bridge.at = timestep
        for name in bridge.regions:
            array = self._arrays.get(name)
            if array is not None and array.owners:
                self._pass(name, array)

    def _pass(self, name: str, array: _Array) -> None:
        passed = min(self._bridges[owner].at for owner in array.owners)
        if passed <= array.passed:
            return
        array.passed = passed
        for timestep in sorted(t for t in array.arriving if t < passed):
            slots = array.arriving[timestep]
            absent = {
                self._owner[r][0] for r, slot in zip(array.regions, slots, strict=True) if slot == EMPTY
            }
            self._events.append(StepTorn(name, timestep, tuple(sorted(absent))))
            del array.missing[timestep], array.arriving[timestep]
        self._events.append(OwnersPassed(name, None if passed == FINISHED else int(passed)))

    def hold_up(self, bridge_id: int, region: int, timestep: int) -> None:
        """A rank has no free slot for a chunk of `timestep`."""
        owner, name = self._owner.get(region, (None, ""))
        if owner != bridge_id or name not in self._arrays:
            raise ProtocolError(f"bridge {bridge_id} has no region {region} to wait for")
        self.advance(bridge_id, timestep)
        self._events.append(SendHeldUp(bridge_id, name, timestep))

    def slots_of_region(self, region: int) -> int:
        """How many slots a region has."""
        return self._arrays[self._owner[region][1]].slots

    def close(self, bridge_id: int, stats: BridgeStats) -> None:
        """A bridge has closed: nothing more comes from it."""
        self.advance(bridge_id, FINISHED)
        self._events.append(BridgeClosed(bridge_id, stats))

    def lose(self, bridge_id: int, reason: str) -> None:
        """A bridge has gone without closing. What it had not sent will never be complete."""
        self._events.append(BridgeLost(bridge_id, self._bridges[bridge_id].last_sent, reason))

    def release(self, consumer: str, array: str, timestep: int) -> dict[int, list[tuple[int, int]]]:
        """End a consumer's lease; returns the slots that became free, as (region, slot) by bridge."""
        slots, holders = self._arrays[array].leased[timestep]
        holders.discard(consumer)
        freed: dict[int, list[tuple[int, int]]] = defaultdict(list)
        if not holders:
            del self._arrays[array].leased[timestep]
            for region, slot in zip(self._arrays[array].regions, slots, strict=True):
                self._busy[region].discard(slot)
                freed[self._owner[region][0]].append((region, slot))
        return freed

    def is_finished(self, bridge_id: int) -> bool:
        """Whether the bridge has closed."""
        return self._bridges[bridge_id].at == FINISHED

    def regions_of(self, bridge_id: int) -> Mapping[str, Sequence[int]]:
        """The bridge's regions by array."""
        return self._bridges[bridge_id].regions

    def take_events(self) -> list[Event]:
        """Hand over the events that have gathered, oldest first."""
        events, self._events = self._events, []
        return events
