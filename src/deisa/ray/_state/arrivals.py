"""What has arrived on one node, and which slots hold it.

What is called an array here is a *stream*: what windows ask for of an array, which mostly is all of it. A *region* is
one chunk of a stream on this node. All regions of a stream have K *slots* each and go through them in step: the n-th
timestep that is submitted of any of them has *sequence number* n, and lies in the slot that the agent has granted that
number. At first number n has slot n; when every consumer's lease on an (array, timestep) has ended, its slot goes to
the next number. A rank that has submitted as many timesteps as numbers are granted is blocked.

::

    sequence number  0  1  2  3  4      K = 3; timesteps in slots 0, 1 and 2 have arrived, the one in
    slot             0  1  2  1         slot 1 has been released: number 3 may come, number 4 waits
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from deisa.ray._state.events import (
    LASTING,
    BridgeClosed,
    BridgeLost,
    Event,
    OwnersPassed,
    StepComplete,
    StepTorn,
    TimesDiffer,
)
from deisa.ray._state.stats import BridgeStats
from deisa.ray._state.streams import Parts
from deisa.ray._state.takeover import HeldArray
from deisa.ray.errors import ProtocolError

NOT_STARTED = -math.inf
FINISHED = math.inf
MIXED = -1  # chunks of one timestep in different slots


class Entry(NamedTuple):
    """What a rank submits: the chunk of a region, at a timestep.

    Attributes
    ----------
    region, timestep : int
    rows : int
        0.
    time : float or None
        The physical time, where the rank says it.
    """

    region: int
    timestep: int
    rows: int = 0
    time: float | None = None


@dataclass(frozen=True, slots=True)
class Grant:
    """Sequence number `number` has been given `slot`."""

    number: int
    slot: int


@dataclass(slots=True)
class _Bridge:
    regions: dict[str, tuple[int, ...]] = field(default_factory=dict)  # by array
    at: float = NOT_STARTED  # timestep being sent; FINISHED once closed
    last_sent: int | None = None


@dataclass(slots=True)
class _Arriving:
    slot: int
    time: float | None
    first: int  # the bridge that has said the time
    regions: set[int] = field(default_factory=set)  # those that are there


@dataclass(slots=True)
class _Leased:
    slot: int
    time: float | None
    holders: set[str]


@dataclass(slots=True)
class _Array:
    regions: tuple[int, ...]
    owners: tuple[int, ...]  # bridges that own a region of it
    slots: int
    sent: dict[int, int]  # region -> timesteps handed over
    last: dict[int, float]  # region -> timestep handed over last
    slot_of: list[int]  # slot of sequence number n at n % slots; older ones are over
    granted: int  # so many sequence numbers have been given a slot
    passed: float = NOT_STARTED
    told: float = NOT_STARTED  # of `passed`, what has been announced
    torn: bool = (
        False  # a timestep is not delivered, and its slot is lost: skipped by a region, or with several times
    )
    newest: float = NOT_STARTED  # the last timestep that was complete here
    arriving: dict[int, _Arriving] = field(default_factory=dict)  # by timestep
    leased: dict[int, _Leased] = field(default_factory=dict)  # by timestep


class NodeArrivals:
    """The bridges, chunks and slots of one node.

    Before `subscribe`, bridges only join. After it, chunks arrive, complete timesteps are
    announced through `take_events`, and `release` gives slots back.
    """

    def __init__(self) -> None:
        self._bridges: dict[int, _Bridge] = {}
        self._arrays: dict[str, _Array] = {}
        self._owner: dict[int, tuple[int, str]] = {}  # region -> bridge, array
        self._consumers: frozenset[str] = frozenset()
        self._events: list[Event] = []
        self._lasting: list[Event] = []  # those that another analytics would have to hear again

    def join(self, bridge_id: int) -> None:
        """Add a bridge."""
        self._bridges[bridge_id] = _Bridge()

    def leave(self, bridge_id: int) -> None:
        """Forget a bridge that went away before the session started."""
        del self._bridges[bridge_id]
        self._lasting.clear()  # that it was lost is no news to an analytics that comes later

    def subscribe(self, slots: Mapping[str, int], parts: Parts, consumers: Iterable[str]) -> None:
        """Start the session: how many slots each chunk of an array has, the chunks, and who leases the slots.

        Chunks of bridges that are not here any more count as well: the arrays cannot become complete.
        """
        self._consumers = frozenset(consumers)
        for array, of_array in parts.items():
            by_bridge: dict[int, list[int]] = {}
            for part in of_array:
                by_bridge.setdefault(part.bridge_id, []).append(part.region)
                self._owner[part.region] = (part.bridge_id, array)
            for bridge_id, regions in by_bridge.items():
                self._bridges.setdefault(bridge_id, _Bridge()).regions[array] = tuple(regions)
            numbers = [part.region for part in of_array]
            if numbers:
                self._arrays[array] = _Array(
                    tuple(numbers),
                    tuple(sorted(by_bridge)),
                    slots[array],
                    dict.fromkeys(numbers, 0),
                    dict.fromkeys(numbers, NOT_STARTED),
                    list(range(slots[array])),
                    slots[array],
                )

    def put(self, bridge_id: int, region: int, timestep: int, time: float | None = None) -> None:
        """A chunk lies in the slot of its region's next sequence number, for a timestep with a physical time or none.

        Raises
        ------
        ProtocolError
            When the bridge breaks a rule: another bridge's region, a sequence number that has no slot yet,
            an older timestep, the same chunk twice, a time that is not finite.
        """
        owner, name = self._owner.get(region, (None, ""))
        array = self._arrays.get(name)
        if owner != bridge_id or array is None:
            raise ProtocolError(f"bridge {bridge_id} has no region {region} to send")
        number = array.sent[region]
        if number >= array.granted:
            raise ProtocolError(f"bridge {bridge_id}: region {region} has no free slot")
        if array.last[region] == timestep:
            raise ProtocolError(f"bridge {bridge_id} sent region {region} twice for timestep {timestep}")
        at = self._bridges[bridge_id].at
        if timestep < at:
            raise ProtocolError(f"bridge {bridge_id} went back from timestep {at} to {timestep}")
        if time is not None and not math.isfinite(time):
            raise ProtocolError(f"bridge {bridge_id} sent region {region} with time {time}")
        self.advance(bridge_id, timestep)
        array.last[region] = timestep
        array.sent[region] = number + 1
        self._bridges[bridge_id].last_sent = timestep
        slot = array.slot_of[number % array.slots]
        arriving = array.arriving.get(timestep)
        if arriving is None:
            arriving = array.arriving[timestep] = _Arriving(slot, time, bridge_id)
        elif arriving.slot != slot:
            arriving.slot = MIXED
        if arriving.time != time:
            self._events.append(
                TimesDiffer(name, timestep, (arriving.first, bridge_id), (arriving.time, time))
            )
            arriving.slot, array.torn = MIXED, True
        arriving.regions.add(region)
        if len(arriving.regions) == len(array.regions):
            del array.arriving[timestep]
            # Slots differ only after some region has skipped a timestep that others sent: that one has been
            # reported as torn, and nothing after it is delivered. So it is where times differ.
            array.newest = timestep
            if arriving.slot != MIXED:
                array.leased[timestep] = _Leased(slot, time, set(self._consumers))
                self._events.append(StepComplete(name, timestep, slot, time))

    def advance(self, bridge_id: int, timestep: float) -> None:
        """A bridge says that it will send nothing older than `timestep` any more.

        An older timestep than the last says nothing new: it was written while chunks that were submitted after it
        have been seen.
        """
        bridge = self._bridges[bridge_id]
        if timestep <= bridge.at:
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
            there = array.arriving.pop(timestep).regions
            absent = {self._owner[region][0] for region in array.regions if region not in there}
            array.torn = True
            self._events.append(StepTorn(name, timestep, tuple(sorted(absent))))

    def must_wait(self, bridge_id: int, region: int) -> bool:
        """Whether the next sequence number of a bridge's region has no slot yet.

        Raises
        ------
        ProtocolError
            When the bridge has no such region.
        """
        owner, name = self._owner.get(region, (None, ""))
        array = self._arrays.get(name)
        if owner != bridge_id or array is None:
            raise ProtocolError(f"bridge {bridge_id} has no region {region} to wait for")
        return array.sent[region] >= array.granted

    def owes(self, bridge_id: int) -> bool:
        """Whether others have submitted a timestep of an array that lacks a chunk of this bridge."""
        for name, regions in self._bridges[bridge_id].regions.items():
            array = self._arrays.get(name)
            if array is not None and any(
                not there.regions.issuperset(regions) for there in array.arriving.values()
            ):
                return True
        return False

    def array_of(self, region: int) -> str:
        """The array that a region is a chunk of."""
        return self._owner[region][1]

    def close(self, bridge_id: int, stats: BridgeStats) -> None:
        """A bridge has closed: nothing more comes from it."""
        self.advance(bridge_id, FINISHED)
        self._events.append(BridgeClosed(bridge_id, stats))

    def lose(self, bridge_id: int, reason: str) -> None:
        """A bridge has gone without closing. What it had not sent will never be complete."""
        self._events.append(BridgeLost(bridge_id, self._bridges[bridge_id].last_sent, reason))

    def release(self, consumer: str, array: str, timestep: int) -> Grant | None:
        """End a consumer's lease; returns what is granted, once nobody holds the slot any more.

        Raises
        ------
        ProtocolError
            When nothing of that kind is leased.
        """
        known = self._arrays.get(array)
        leased = known.leased.get(timestep) if known is not None else None
        if known is None or leased is None or consumer not in leased.holders:
            raise ProtocolError(
                f"{consumer!r:.60} has no lease on array {array!r:.60} at timestep {timestep}"
            )
        leased.holders.discard(consumer)
        if leased.holders:
            return None
        del known.leased[timestep]
        grant = Grant(known.granted, leased.slot)
        # This overwrites the number before by as many as there are slots. Every region is past it: one of the numbers
        # since then has been released, having been complete.
        known.slot_of[grant.number % known.slots] = leased.slot
        known.granted += 1
        return grant

    def check(self) -> None:
        """Raise `AssertionError` if what is known contradicts itself.

        Of the K slots of an array, each belongs to one leased timestep, or to one sequence number that some region has
        still to submit, or to timesteps that arrive; unless a timestep was torn, whose slot is lost.
        """
        for name, array in self._arrays.items():
            if not all(0 <= array.granted - sent <= array.slots for sent in array.sent.values()):
                raise AssertionError(
                    f"{name!r}: {array.granted} granted, {array.slots} slots, submitted {array.sent}"
                )
            waiting = range(
                max(array.sent.values()) if array.torn else min(array.sent.values()), array.granted
            )
            used = [array.slot_of[number % array.slots] for number in waiting]
            used += [leased.slot for leased in array.leased.values()]
            covered = {*used, *(arriving.slot for arriving in array.arriving.values())}
            if len(set(used)) < len(used) or not (array.torn or covered == set(range(array.slots))):
                raise AssertionError(f"{name!r}: the slots in use are {sorted(used)} of {array.slots}")
            if not all(leased.holders for leased in array.leased.values()):
                raise AssertionError(f"{name!r}: a lease is held by nobody")
            for timestep, arriving in array.arriving.items():
                if not arriving.regions < set(array.regions) or timestep < array.passed:
                    raise AssertionError(
                        f"{name!r} at {timestep}: {arriving.regions} of {array.regions} arrive"
                    )
            if any(self._bridges[self._owner[region][0]].at < last for region, last in array.last.items()):
                raise AssertionError(f"{name!r}: a bridge is behind what it has submitted")

    def regions_of(self, bridge_id: int) -> Mapping[str, Sequence[int]]:
        """The bridge's regions by array."""
        return self._bridges[bridge_id].regions

    def held(self) -> dict[str, HeldArray]:
        """For each array asked for, what is still leased and how far it is; for an analytics that takes over."""
        return {
            name: HeldArray(
                {t: leased.slot for t, leased in array.leased.items()},
                array.newest,
                array.passed,
                {t: leased.time for t, leased in array.leased.items() if leased.time is not None},
            )
            for name, array in self._arrays.items()
            if array.owners
        }

    def at(self, bridge_id: int) -> float:
        """The timestep that a bridge is at."""
        return self._bridges[bridge_id].at

    def positions(self) -> dict[int, float]:
        """The timestep that each bridge is at, or minus infinity; without those that have closed."""
        return {bridge_id: bridge.at for bridge_id, bridge in self._bridges.items() if bridge.at != FINISHED}

    @property
    def lasting_events(self) -> list[Event]:
        """What was announced of bridges that have gone, and of torn timesteps."""
        return [*self._lasting, *(event for event in self._events if isinstance(event, LASTING))]

    def take_events(self) -> list[Event]:
        """Hand over the events that have gathered, oldest first, and how far owners are where nothing else says so.

        A complete timestep says that all its owners have come to it, so that nothing older will come.
        """
        events, self._events = self._events, []
        for name, array in self._arrays.items():
            if _has_passed_more(array):
                array.told = array.passed
                events.append(OwnersPassed(name, None if array.passed == FINISHED else int(array.passed)))
        self._lasting += [event for event in events if isinstance(event, LASTING)]
        return events


def _has_passed_more(array: _Array) -> bool:
    """Whether owners have passed more timesteps than announced, and than the last complete one says."""
    return array.passed > max(array.told, array.newest + 1)
