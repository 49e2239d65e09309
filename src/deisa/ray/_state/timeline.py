"""Which callback runs for which timestep, and with which windows.

The nodes' events go in; `next_firing` says what to run now. Two facts about an array decide
everything: its complete timesteps, which come in increasing order because every bridge sends in
order, and how far it is *resolved*: at a timestep at or before which nothing more can
become complete. A callback that has something to look at in timestep t is a *candidate* at t
until it fires or can no longer fire.

Ready callbacks run earliest timestep first, then in the order of registration. A callback is
never held up for another one that is not ready: bridges that send one array only now and then
must not stop the others.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from deisa.ray._state.events import OwnersPassed, StepComplete, StepTorn
from deisa.ray._state.naming import name_bridges
from deisa.ray._state.times import times_differ
from deisa.ray.errors import IncompleteTimestepError

When = Literal["AND", "OR"]
NEVER = -math.inf
NEXT_TIMESTEP = "the next timestep"


@dataclass(frozen=True, slots=True)
class Subscription:
    """What one callback asked for: ``(stream, window size)`` pairs, and AND or OR."""

    windows: tuple[tuple[str, int], ...]
    when: When


@dataclass(frozen=True, slots=True)
class Firing:
    """Run callback number `callback` for `timestep`; `windows` are timesteps, oldest first."""

    callback: int
    timestep: int
    windows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class CompleteStep:
    """A whole array at a timestep, the slot of each node that holds it, and the physical time where there is one."""

    array: str
    timestep: int
    slots: Mapping[str, int]
    time: float | None = None


@dataclass(slots=True)
class _Array:
    owners: Mapping[str, tuple[int, ...]]  # node -> bridges on it that own chunks of this array
    passed: dict[str, float]  # node -> nothing older comes from it
    arrived: dict[int, dict[str, int]] = field(default_factory=dict)  # not complete yet
    times: dict[int, tuple[str, float | None]] = field(
        default_factory=dict
    )  # of those; the node that was first
    complete: list[int] = field(default_factory=list)  # those that a window may still need
    first: float = math.inf
    resolved: float = NEVER  # the last timestep at which nothing more can become complete
    seen: int = 0
    delivered: int = 0
    undelivered: set[int] = field(default_factory=set)  # of `complete`, those at which nothing has fired


class Timeline:
    """Turns what the nodes report into callbacks to run.

    Parameters
    ----------
    owners : mapping of str to mapping of str to tuple of int
        For each array and node, the bridges that own chunks of it there.
    subscriptions : sequence of Subscription
        In the order of registration; only arrays in `owners` may be named.
    every : mapping of str to int
        For an array (a stream) that leaves timesteps out: it has those that are multiples of this.
    handled : sequence of float
        For each subscription, the last timestep for which its callback needs no running any more; where the
        sequence ends, none.
    """

    def __init__(
        self,
        owners: Mapping[str, Mapping[str, tuple[int, ...]]],
        subscriptions: Sequence[Subscription],
        handled: Sequence[float] = (),
        every: Mapping[str, int] | None = None,
    ) -> None:
        self._subscriptions = tuple(subscriptions)
        self._every = dict(every or {})
        self._handled = [*handled, *[NEVER] * len(self._subscriptions)]
        self._arrays = {
            name: _Array(by_node, dict.fromkeys(by_node, NEVER)) for name, by_node in owners.items()
        }
        self._users: dict[str, list[int]] = defaultdict(list)
        for number, subscription in enumerate(self._subscriptions):
            for name in {array for array, _ in subscription.windows}:
                self._users[name].append(number)
        self._candidates: list[set[int]] = [set() for _ in self._subscriptions]
        self._ready: list[tuple[int, int]] = []

    def step_complete(self, node: str, event: StepComplete) -> CompleteStep | None:
        """A node has all its chunks, and nothing older will come; returns the step when every node has, else None.

        Raises
        ------
        IncompleteTimestepError
            When another node has skipped the timestep, or this one an older timestep.
        PhysicalTimeError
            When another node has another physical time for it.
        """
        array = self._arrays[event.array]
        if event.timestep > array.passed[node]:
            self._pass(event.array, node, event.timestep)
        by_node = array.arrived.setdefault(event.timestep, {})
        by_node[node] = event.slot
        skipped = [n for n in array.owners if n not in by_node and array.passed[n] > event.timestep]
        if skipped:
            raise self._torn(event.array, event.timestep, (b for n in skipped for b in array.owners[n]))
        first, time = array.times.setdefault(event.timestep, (node, event.time))
        if time != event.time:
            one, other = (array.owners[first], time), (array.owners[node], event.time)
            raise times_differ(event.array, event.timestep, one, other)
        if len(by_node) < len(array.owners):
            return None
        del array.arrived[event.timestep], array.times[event.timestep]
        array.complete.append(event.timestep)
        array.first = min(array.first, event.timestep)
        array.resolved = max(array.resolved, event.timestep)
        array.seen += 1
        array.undelivered.add(event.timestep)
        for number in self._users[event.array]:
            if event.timestep > self._handled[number]:
                self._candidates[number].add(event.timestep)
        self._decide(event.array)
        return CompleteStep(event.array, event.timestep, by_node, time)

    def owners_passed(self, node: str, event: OwnersPassed) -> None:
        """Nothing older than the event's timestep comes of an array from a node.

        Raises
        ------
        IncompleteTimestepError
            When another node has chunks of a timestep that this node has skipped.
        """
        self._pass(event.array, node, math.inf if event.timestep is None else event.timestep)

    def _pass(self, name: str, node: str, passed: float) -> None:
        array = self._arrays[name]
        before = array.passed[node]
        array.passed[node] = passed
        for timestep in sorted(array.arrived):
            if timestep < passed and node not in array.arrived[timestep]:
                raise self._torn(name, timestep, array.owners[node])
        if before <= array.resolved + 1:  # this node may have been the last one
            resolved = min(array.passed.values()) - 1
            if resolved > array.resolved:
                array.resolved = resolved
                self._decide(name)

    def step_torn(self, event: StepTorn) -> IncompleteTimestepError:
        """Build the error for bridges that skipped a timestep which their neighbours sent."""
        return self._torn(event.array, event.timestep, event.missing)

    @staticmethod
    def _torn(array: str, timestep: int, missing: Iterable[int]) -> IncompleteTimestepError:
        return IncompleteTimestepError(
            f"array {array!r} at timestep {timestep}: {name_bridges(missing)} moved on without sending it, "
            "other bridges sent it; every bridge that owns a chunk of an array must send it at the same timesteps"
        )

    def _decide(self, array: str) -> None:
        for number in self._users[array]:
            subscription = self._subscriptions[number]
            for timestep in sorted(self._candidates[number]):
                verdict = self._verdict(subscription, timestep)
                if verdict is None:
                    continue
                self._candidates[number].discard(timestep)
                if verdict:
                    heapq.heappush(self._ready, (timestep, number))

    def _verdict(self, subscription: Subscription, timestep: int) -> bool | None:
        """Whether a callback fires at a timestep: yes, no, or (None) not known yet."""
        arrays = [self._arrays[name] for name, _ in subscription.windows]
        complete = [_contains(array.complete, timestep) for array in arrays]
        if all(complete):
            return True
        names = [name for name, _ in subscription.windows]
        if subscription.when == "AND" and any(timestep % self._every.get(name, 1) for name in names):
            return False  # one of them never has this timestep
        resolved = [self._settled(name) >= timestep for name in names]
        if subscription.when == "AND":
            skipped = any(done and not whole for whole, done in zip(complete, resolved, strict=True))
            return False if skipped else None
        return all(array.first <= timestep for array in arrays) if all(resolved) else None

    def _settled(self, name: str) -> float:
        """The last timestep up to which nothing more can become complete: the next one that it takes comes after."""
        resolved, every = self._arrays[name].resolved, self._every.get(name, 1)
        if every == 1 or math.isinf(resolved):
            return resolved
        return (resolved // every + 1) * every - 1

    def next_firing(self) -> Firing | None:
        """Take the callback to run now, or None when nothing is ready."""
        if not self._ready:
            return None
        timestep, number = heapq.heappop(self._ready)
        windows = []
        for name, size in self._subscriptions[number].windows:
            array = self._arrays[name]
            end = bisect.bisect_right(array.complete, timestep)
            windows.append(tuple(array.complete[max(0, end - size) : end]))
            if timestep in array.undelivered:
                array.undelivered.remove(timestep)
                array.delivered += 1
        return Firing(number, timestep, tuple(windows))

    def forget(self) -> list[tuple[str, int]]:
        """Drop the complete timesteps that no window can need any more, and return them."""
        dropped = []
        for name, array in self._arrays.items():
            keep = len(array.complete)
            for number in self._users[name]:
                keep = min(keep, self._oldest_needed(name, array, number))
            dropped += [(name, timestep) for timestep in array.complete[:keep]]
            array.undelivered.difference_update(array.complete[:keep])
            del array.complete[:keep]
        return dropped

    def _oldest_needed(self, name: str, array: _Array, number: int) -> int:
        """Position in `array.complete` of the first timestep that a callback may still be given."""
        subscription = self._subscriptions[number]
        size = max(size for array_name, size in subscription.windows if array_name == name)
        if subscription.when == "AND":  # it fires next with a timestep of this array that is still to come
            needed = len(array.complete) - (size - 1)
        else:  # it fires next with one of any of its arrays, which may be behind this one
            settled = min(self._settled(other) for other, _ in subscription.windows)
            needed = bisect.bisect_right(array.complete, settled) - size
        waiting = [*self._candidates[number], *(t for t, n in self._ready if n == number)]
        for timestep in waiting:
            needed = min(needed, bisect.bisect_right(array.complete, timestep) - size)
        return max(0, needed)

    @property
    def finished(self) -> float:
        """The newest timestep such that no callback can fire for it, or for an older one, any more."""
        return min(map(self._finished, range(len(self._subscriptions))), default=math.inf)

    def _finished(self, number: int) -> float:
        subscription = self._subscriptions[number]
        resolved = [self._settled(name) for name, _ in subscription.windows]
        waiting = [*self._candidates[number], *(t for t, n in self._ready if n == number)]
        # With AND, one array that is resolved and not complete decides; one that is complete makes a candidate.
        decided = max(resolved) if subscription.when == "AND" else min(resolved)
        return min(decided, min(waiting, default=math.inf) - 1)

    @property
    def resolved_entirely(self) -> bool:
        """Whether nothing more can become complete and nothing is left to run."""
        return not self._ready and all(array.resolved == math.inf for array in self._arrays.values())

    def arrays_of(self, callback: int) -> tuple[str, ...]:
        """The arrays of a callback's windows, in their order."""
        return tuple(name for name, _ in self._subscriptions[callback].windows)

    def timesteps_seen(self) -> dict[str, int]:
        """How many complete timesteps each array has had."""
        return {name: array.seen for name, array in self._arrays.items()}

    def timesteps_delivered(self) -> dict[str, int]:
        """At how many of its complete timesteps a callback on each array has fired."""
        return {name: array.delivered for name, array in self._arrays.items()}

    @property
    def owners(self) -> set[int]:
        """The bridges that own chunks which callbacks ask for."""
        return {b for array in self._arrays.values() for bridges in array.owners.values() for b in bridges}

    def waiting_for(self, positions: Mapping[int, float] | None = None) -> str:
        """Say whom the next callback waits for.

        Parameters
        ----------
        positions : mapping of int to float, optional
            The timestep that each bridge is at which has not closed. With it, bridges are told from others of their
            node.
        """
        undecided = min(((min(c), number) for number, c in enumerate(self._candidates) if c), default=None)
        if undecided is not None:
            timestep, number = undecided
            names = [name for name, _ in self._subscriptions[number].windows]
            open_ones = [name for name in names if self._settled(name) < timestep]
            behind = {b for name in open_ones for b in self._behind(name, timestep, positions)}
            if behind and not any(timestep in self._arrays[name].arrived for name in open_ones):
                others = " and ".join(repr(name) for name in open_ones)
                has, says = ("has", "says") if len(behind) == 1 else ("have", "say")
                return (
                    f"{name_bridges(behind)}, which {has} not passed timestep {timestep}{_place(behind, positions)}: a "
                    f"callback that has timestep {timestep} also looks at {others}. A bridge that sends nothing for "
                    f"a timestep {says} so with advance()"
                )
        parts = []
        for name, array in self._arrays.items():
            for timestep, by_node in sorted(array.arrived.items()):
                absent = set(self._behind(name, timestep, positions, without=by_node))
                parts.append(
                    f"{name!r} at timestep {timestep} from {name_bridges(absent)}{_place(absent, positions)}"
                )
        return "; ".join(parts) or self._last_ones(positions or {})

    def _behind(
        self,
        name: str,
        timestep: int,
        positions: Mapping[int, float] | None,
        without: Collection[str] = (),
    ) -> list[int]:
        """The bridges, on other nodes than some, for which an array waits at a timestep."""
        array = self._arrays[name]
        nodes = [node for node in array.owners if node not in without and array.passed[node] <= timestep]
        owners = [bridge_id for node in nodes for bridge_id in array.owners[node]]
        if not positions:
            return owners
        there = [b for b in owners if positions.get(b, math.inf) <= timestep]
        return [b for b in there if positions[b] < timestep] or there or owners

    def _last_ones(self, positions: Mapping[int, float]) -> str:
        """Name the bridges that are behind the others of their array."""
        for name, array in self._arrays.items():
            at = {b: positions[b] for bs in array.owners.values() for b in bs if b in positions}
            last, first = min(at.values(), default=0), max(at.values(), default=0)
            if last < first:
                behind = {b for b, timestep in at.items() if timestep == last}
                place = _place(behind, positions)
                return f"{name!r} from {name_bridges(behind)}{place}, others being at timestep {int(first)}"
        return NEXT_TIMESTEP


def _place(bridges: Collection[int], positions: Mapping[int, float] | None) -> str:
    """Say where bridges are that are all at the same timestep."""
    at = {positions[b] for b in bridges if b in positions} if positions else set()
    if len(at) != 1:
        return ""
    (timestep,) = at
    if timestep == NEVER:
        return " (nothing sent yet)"
    return f" (at timestep {int(timestep)})"


def _contains(ordered: Sequence[int], value: int) -> bool:
    position = bisect.bisect_left(ordered, value)
    return position < len(ordered) and ordered[position] == value
