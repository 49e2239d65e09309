"""The agent's ends of the pages: shared memory of 64-bit words, in place of messages about every chunk.

Waking a process by a message costs more than copying a small chunk. So what happens for every chunk is
written where the other side looks when it has reason to:

- The **slot table**, written by the agent alone: which slot each sequence number of an array has. A rank that finds its
  number there needs no message; one that does not waits on a futex of the table.
- A **submission ring** for each bridge, written by its rank alone: the chunks submitted, the timestep that the bridge
  is at, and whether it waits for a slot.
- The **arrival counters**, written by all ranks: how far each bridge is with each array. The rank that finds itself the
  last one notifies the agent, which then looks into every ring.

Only rings count. What the counters say is a hint, which a faulty rank may spoil for the others, and an
agent looks into the rings every `RING_SCAN_S` anyway: then a timestep is seen a little later.

``docs/protocol.md`` says what every word means, and ``_handoff/pages.h`` argues the order of loads and stores.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from deisa.ray._handoff._native import exchange, load, store, wake
from deisa.ray._state.arrivals import Entry
from deisa.ray._transport.memory import WITHOUT_DESCRIPTOR, map_segment, whole_pages
from deisa.ray.errors import ProtocolError

RING_SCAN_S = 0.02
DESCRIPTORS_PER_PAGE = 1 if WITHOUT_DESCRIPTOR else 2  # of a `Page`
LAYOUT_VERSION = 2
SLOT_TABLE_MAGIC, ARRIVAL_COUNTERS_MAGIC, SUBMISSION_RING_MAGIC = b"deisaSLT", b"deisaCNT", b"deisaRNG"
NO_TIMESTEP = -(2**63)  # in the place of one, before the first
NO_TIME = 0x7FF8000000000000  # the bits of a NaN, in the place of a physical time

MAGIC, VERSION, FIRST, IN_USE = range(4)  # words of every header
HEADER_WORDS = 8
GRANTED, WAKE, FIRST_SLOT = range(3)  # of a row of the slot table
NOTIFIED = 4  # of the arrival counters' header
COUNTER_WHOLE, COUNTER_PASSED, COUNTER_WORDS = range(3)  # of an entry of the arrival counters
CAPACITY, SUBMITTED, PASSED, BLOCKED = range(4, 8)  # of a ring's header
ENTRY_REGION, ENTRY_TIMESTEP, ENTRY_ROWS, ENTRY_TIME, ENTRY_WORDS = range(5)  # of an entry of a ring

_WORD_BYTES = 8
_WORD, _DOUBLE = struct.Struct("=q"), struct.Struct("=d")
_F_SEAL_FUTURE_WRITE = 0x10  # fcntl has it from Python 3.13 on


class Page:
    """Words that the agent has created and mapped.

    Parameters
    ----------
    name : str
        For the kernel's lists of what is mapped.
    words : int
    only_here : bool
        Seal it, so that no mapping made after this one can be written to.
    """

    def __init__(self, name: str, words: int, *, only_here: bool = False) -> None:
        self.nbytes = whole_pages(max(1, words) * _WORD_BYTES)
        self.descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, self.nbytes)
        self._memory = mmap.mmap(self.descriptor, self.nbytes, **WITHOUT_DESCRIPTOR)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals | (_F_SEAL_FUTURE_WRITE if only_here else 0))
        self.words = memoryview(self._memory).cast("q")

    def begin(self, magic: bytes, words: int) -> None:
        """Write the header of a page that uses so many words."""
        self.words[MAGIC] = int.from_bytes(magic, sys.byteorder, signed=True)
        self.words[VERSION] = LAYOUT_VERSION
        self.words[FIRST] = HEADER_WORDS
        self.words[IN_USE] = words

    def close(self) -> None:
        """Give the memory back, as far as no rank has it mapped."""
        self.words.release()
        self._memory.close()
        os.close(self.descriptor)


def map_words(descriptor: int, nbytes: int, *, writable: bool) -> memoryview:
    """Map a page that has come along with a message, as words; closes the descriptor.

    Raises
    ------
    ProtocolError
        When it is smaller than announced.
    """
    try:
        return memoryview(map_segment(descriptor, nbytes, writable=writable)).cast("q")
    finally:
        os.close(descriptor)


class SlotTable:
    """Which slot each sequence number of an array has.

    Parameters
    ----------
    name : str
    slots : mapping of str to int
        For each array, its number of slots; so many first sequence numbers have a slot from the start.

    Attributes
    ----------
    rows : dict of str to int
        Where the row of each array starts.
    """

    def __init__(self, name: str, slots: Mapping[str, int]) -> None:
        self._slots = dict(slots)
        self.rows: dict[str, int] = {}
        words = HEADER_WORDS
        for array, count in self._slots.items():
            self.rows[array] = words
            words += FIRST_SLOT + count
        self.page = Page(name, words, only_here=True)
        self.page.begin(SLOT_TABLE_MAGIC, words)
        for array, count in self._slots.items():
            row = self.rows[array]
            for number in range(count):
                self.page.words[row + FIRST_SLOT + number] = number
            store(self.page.words, row + GRANTED, count)

    def grant(self, array: str, number: int, slot: int) -> None:
        """Give a slot to the next sequence number, and wake the ranks that wait for one."""
        row = self.rows[array]
        self.page.words[row + FIRST_SLOT + number % self._slots[array]] = slot
        store(self.page.words, row + GRANTED, number + 1)
        wake(self.page.words, row + WAKE)

    def wake(self, array: str) -> None:
        """Have the ranks that wait for a slot look at their connections."""
        wake(self.page.words, self.rows[array] + WAKE)

    def wake_all(self) -> None:
        """Have all ranks that wait look at their connections."""
        for array in self.rows:
            self.wake(array)


class ArrivalCounters:
    """How far each bridge is with each array, for ranks to see whether they are the last one.

    Parameters
    ----------
    name : str
    bridges : mapping of str to int
        For each array, how many bridges of the node own chunks of it.

    Attributes
    ----------
    rows : dict of str to int
        Where the row of each array starts.
    """

    def __init__(self, name: str, bridges: Mapping[str, int]) -> None:
        self.rows: dict[str, int] = {}
        words = HEADER_WORDS
        for array, count in bridges.items():
            self.rows[array] = words
            words += COUNTER_WORDS * count
        self.page = Page(name, words)
        self.page.begin(ARRIVAL_COUNTERS_MAGIC, words)
        for entry in range(HEADER_WORDS, words, COUNTER_WORDS):
            self.page.words[entry + COUNTER_PASSED] = NO_TIMESTEP

    def entry(self, array: str, position: int) -> int:
        """Where the entry of a bridge starts, by its position among those of the array."""
        return self.rows[array] + COUNTER_WORDS * position

    def begin_look(self) -> None:
        """Have whoever submits from now on notify again."""
        exchange(self.page.words, NOTIFIED, 0)


@dataclass(frozen=True, slots=True)
class Submitted:
    """What a rank has written since the last look.

    Attributes
    ----------
    entries : tuple of Entry
        Oldest first.
    passed : int or None
        The timestep that the bridge is at, or has been after the entries at least; None before the first.
    blocked : int or None
        The region for which it waits for a slot.
    """

    entries: tuple[Entry, ...]
    passed: int | None
    blocked: int | None


def _time_of(word: int) -> float:
    time: float = _DOUBLE.unpack(_WORD.pack(word))[0]
    return time


class RingReader:
    """The agent's end of a submission ring.

    Parameters
    ----------
    name : str
    capacity : int
        Chunks that can be under way: the bridge's slots.
    """

    def __init__(self, name: str, capacity: int) -> None:
        self._capacity = capacity
        self._taken = 0
        words = HEADER_WORDS + ENTRY_WORDS * capacity
        self.page = Page(name, words)
        self.page.begin(SUBMISSION_RING_MAGIC, words)
        self.page.words[CAPACITY] = capacity
        self.page.words[PASSED] = NO_TIMESTEP

    @property
    def is_blocked(self) -> bool:
        """Whether the rank says that it waits for a slot."""
        return load(self.page.words, BLOCKED) != 0

    def look(self) -> Submitted:
        """Return what the rank has written since the last time.

        Raises
        ------
        ProtocolError
            When the rank has submitted more than it had slots for, or taken some back.
        """
        words = self.page.words
        blocked, passed = load(words, BLOCKED), load(words, PASSED)
        submitted = load(words, SUBMITTED)  # after them: all that came before they were stored is seen
        if not 0 <= submitted - self._taken <= self._capacity:
            raise ProtocolError("a rank has handed over more chunks than it has slots")
        entries = []
        for number in range(self._taken, submitted):
            at = HEADER_WORDS + ENTRY_WORDS * (number % self._capacity)
            region, timestep, rows, time = words[at : at + ENTRY_WORDS]
            entries.append(Entry(region, timestep, rows, None if time == NO_TIME else _time_of(time)))
        self._taken = submitted
        return Submitted(
            tuple(entries),
            None if passed == NO_TIMESTEP else passed,
            None if blocked == 0 else blocked - 1,
        )
