"""The rank's ends of the pages that it shares with its agent; ``docs/protocol.md`` says what every word means.

- `SlotTableRow` reads which slot each sequence number of an array has, and waits for one.
- `RingWriter` submits chunks.
- `CountersEntry` finds out whether this rank has reason to notify the agent.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Sequence

from deisa.ray._handoff._native import exchange, load, store, wait
from deisa.ray._transport.memory import map_segment
from deisa.ray._transport.pages import (
    ARRIVAL_COUNTERS_MAGIC,
    BLOCKED,
    COUNTER_PASSED,
    COUNTER_WHOLE,
    COUNTER_WORDS,
    ENTRY_REGION,
    ENTRY_ROWS,
    ENTRY_TIME,
    ENTRY_TIMESTEP,
    ENTRY_WORDS,
    FIRST,
    FIRST_SLOT,
    GRANTED,
    HEADER_WORDS,
    IN_USE,
    LAYOUT_VERSION,
    MAGIC,
    NO_TIME,
    NOTIFIED,
    PASSED,
    SLOT_TABLE_MAGIC,
    SUBMISSION_RING_MAGIC,
    SUBMITTED,
    VERSION,
    WAKE,
)
from deisa.ray.errors import ProtocolError
from tests.oracle.feedback import FEEDBACK

SLOT_TABLE, COUNTERS, RING = (
    int.from_bytes(magic, sys.byteorder, signed=True)
    for magic in (SLOT_TABLE_MAGIC, ARRIVAL_COUNTERS_MAGIC, SUBMISSION_RING_MAGIC)
)
WORD_BYTES = 8
READ_ONLY = {SLOT_TABLE, FEEDBACK}


def map_page(descriptor: int, nbytes: int, magic: int) -> memoryview:
    """Map a page that has come along with a message, as words; closes the descriptor.

    Raises
    ------
    ProtocolError
        When it is smaller than announced, another page, or laid out in another way.
    """
    try:
        if nbytes < HEADER_WORDS * WORD_BYTES:
            raise ProtocolError(f"a page of {nbytes} bytes was announced, which is less than its header")
        memory = map_segment(descriptor, nbytes, writable=magic not in READ_ONLY)
    finally:
        os.close(descriptor)
    words = memoryview(memory).cast("q")
    if words[MAGIC] != magic or words[VERSION] != LAYOUT_VERSION:
        raise ProtocolError(
            f"a page starts with {words[MAGIC]:#x} and layout version {words[VERSION]}; "
            f"expected {magic:#x} and {LAYOUT_VERSION}"
        )
    if not HEADER_WORDS <= words[IN_USE] <= len(words):
        raise ProtocolError(f"a page of {len(words)} words says that it uses {words[IN_USE]} of them")
    return words


class SlotTableRow:
    """The row of an array: its sequence numbers that have a slot."""

    __slots__ = ("_row", "_words", "slots")

    def __init__(self, words: memoryview, row: int, slots: int) -> None:
        self._words = words
        self._row = row
        self.slots = slots

    def has_slot(self, number: int) -> bool:
        """Whether a sequence number has a slot."""
        return number < load(self._words, self._row + GRANTED)

    def slot_of(self, number: int) -> int:
        """Return the slot of a sequence number that has one."""
        slot: int = self._words[self._row + FIRST_SLOT + number % self.slots]
        return slot

    def wakes(self) -> int:
        """Return what `wait` wants to know; to be read before `has_slot`."""
        return load(self._words, self._row + WAKE)

    def wait(self, wakes: int, seconds: float) -> None:
        """Wait until the agent wakes the waiting ranks, not longer than that, if it has not since `wakes`."""
        wait(self._words, self._row + WAKE, wakes, seconds)


class RingWriter:
    """The submission ring of this bridge."""

    __slots__ = ("_capacity", "_first", "_words")

    def __init__(self, words: memoryview, capacity: int) -> None:
        self._words = words
        self._first = words[FIRST]
        self._capacity = capacity

    @property
    def submitted(self) -> int:
        """Chunks submitted so far."""
        return load(self._words, SUBMITTED)

    def submit(self, regions: Sequence[int], timestep: int, time: float | None = None) -> None:
        """Submit chunks; the number of entries comes last, for the agent looks at it first."""
        words = self._words
        number = load(words, SUBMITTED)
        bits = NO_TIME if time is None else struct.unpack("=q", struct.pack("=d", time))[0]
        for further, region in enumerate(regions):
            entry = self._first + ENTRY_WORDS * ((number + further) % self._capacity)
            words[entry + ENTRY_REGION] = region
            words[entry + ENTRY_TIMESTEP] = timestep
            words[entry + ENTRY_ROWS] = 0
            words[entry + ENTRY_TIME] = bits
        store(words, SUBMITTED, number + len(regions))

    def move_on(self, timestep: int) -> None:
        """Say that nothing older than a timestep will be submitted."""
        store(self._words, PASSED, timestep)

    def block(self, region: int) -> None:
        """Say that the next chunk of a region has no slot."""
        store(self._words, BLOCKED, region + 1)

    def unblock(self) -> None:
        """Say that no chunk waits for a slot."""
        store(self._words, BLOCKED, 0)


class CountersEntry:
    """The arrival counters of this bridge for an array, and those of the other bridges of the node.

    Its stores are exchanges: they, and the loads that follow, have one total order for all threads.
    """

    __slots__ = ("_entry", "_others", "_words")

    def __init__(self, words: memoryview, row: int, bridges: int, entry: int) -> None:
        self._words = words
        self._entry = entry
        entries: Sequence[int] = range(row, row + COUNTER_WORDS * bridges, COUNTER_WORDS)
        self._others = [other for other in entries if other != entry]

    def count_whole(self, whole: int) -> bool:
        """Say how many timesteps were submitted whole; whether no other bridge of the node has fewer."""
        return self._is_last(COUNTER_WHOLE, whole)

    def move_on(self, timestep: int) -> bool:
        """Say which timestep this bridge is at; whether no other bridge of the node is at an older one."""
        return self._is_last(COUNTER_PASSED, timestep)

    def _is_last(self, word: int, value: int) -> bool:
        exchange(self._words, self._entry + word, value)
        return all(load(self._words, other + word) >= value for other in self._others)


def must_notify(counters: memoryview) -> bool:
    """Whether no other notification is under way that covers what this rank has done."""
    return exchange(counters, NOTIFIED, 1) == 0
