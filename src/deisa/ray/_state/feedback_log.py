"""Which of the values that were set a node keeps, and where they lie.

Values lie one behind the other in memory of a fixed size, and at its end the next one goes to its start again: whatever
lies there is dropped, oldest first. Each key also has a queue of a fixed size, in the order of timesteps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

NEVER_DROPPED = -(2**63)
MOST_REPLACED = 1024


@dataclass(slots=True)
class Kept:
    """Where a value lies: `first` and `words` count 64-bit words of the memory."""

    timestep: int
    first: int
    words: int
    nbytes: int
    key: str
    replaced: bool = False


@dataclass(slots=True)
class Queue:
    """The values of a key.

    Attributes
    ----------
    values : list of Kept
        In the order of timesteps.
    dropped : int
        The newest timestep of which a value was dropped.
    changed_from : int
        From which one on `values` are others than at the last call of `FeedbackLog.take_changes`.
    """

    values: list[Kept] = field(default_factory=list)
    dropped: int = NEVER_DROPPED
    changed_from: int = 0

    def find(self, timestep: int) -> tuple[int, Kept | None]:
        """Where the value of a timestep is, or would be; and the value."""
        at = bisect_left(self.values, timestep, key=lambda kept: kept.timestep)
        there = at < len(self.values) and self.values[at].timestep == timestep
        return at, self.values[at] if there else None

    def _change(self, at: int) -> None:
        self.changed_from = min(self.changed_from, at)

    def put(self, kept: Kept) -> None:
        """Add a value, or put it in the place of that of its timestep."""
        at, known = self.find(kept.timestep)
        self._change(at)
        if known is not None:
            known.replaced = True
            self.values[at] = kept
        else:
            self.values.insert(at, kept)

    def drop(self, at: int) -> None:
        """Keep a value no longer."""
        kept = self.values.pop(at)
        kept.replaced = True
        self.dropped = max(self.dropped, kept.timestep)
        self._change(at)


class FeedbackLog:
    """The values that a node keeps.

    Parameters
    ----------
    queue_size : int
        Values of each key.
    words : int
        The memory's size.
    """

    def __init__(self, queue_size: int, words: int) -> None:
        self.queues: dict[str, Queue] = {}
        self.words = words
        self._queue_size = queue_size
        self._next = 0  # where the next value goes
        self._order: deque[Kept] = deque()  # as they were set
        self._changed: set[str] = set()

    def find(self, key: str, timestep: int) -> Kept | None:
        """The value of a question, if it is kept."""
        queue = self.queues.get(key)
        return queue.find(timestep)[1] if queue is not None else None

    def put(self, key: str, timestep: int, nbytes: int) -> Kept:
        """Make room for a value that fits into the memory, and say where."""
        words = max(1, -(-nbytes // 8))
        if words > self.words:
            raise ValueError(f"a value of {words} words does not fit into {self.words}")
        kept = Kept(timestep, self._make_room(words), words, nbytes, key)
        self._forget_replaced()
        self._order.append(kept)
        queue = self.queues.setdefault(key, Queue())
        queue.put(kept)
        if len(queue.values) > self._queue_size:
            queue.drop(0)
        self._changed.add(key)
        return kept

    def _make_room(self, words: int) -> int:
        first = self._next
        if first + words > self.words:
            self._drop_oldest(first, self.words)  # what lies there is older than what lies at the start
            first = 0
        self._drop_oldest(first, first + words)
        self._next = first + words
        return first

    def _drop_oldest(self, first: int, end: int) -> None:
        """Drop the oldest values for as long as they lie in a part of the memory."""
        while self._order and first <= self._order[0].first < end:
            oldest = self._order.popleft()
            if not oldest.replaced:
                queue = self.queues[oldest.key]
                queue.drop(queue.find(oldest.timestep)[0])
                self._changed.add(oldest.key)

    def _forget_replaced(self) -> None:
        """Keep no more records of values that are not kept than there are values, and a few."""
        kept = sum(len(queue.values) for queue in self.queues.values())
        if len(self._order) > 2 * kept + MOST_REPLACED:
            self._order = deque(record for record in self._order if not record.replaced)

    def take_changes(self) -> Iterator[tuple[str, Queue, int]]:
        """The queues that have changed since the last call, each with the place of the first value that did."""
        changed, self._changed = self._changed, set()
        for key in changed:
            queue = self.queues[key]
            since, queue.changed_from = queue.changed_from, len(queue.values)
            yield key, queue, since
