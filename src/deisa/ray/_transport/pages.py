"""Pages of 64-bit words that an agent and the ranks of its node share, so that few messages are needed.

Waking a process by a message costs more than copying a small chunk. So what happens for every chunk is
written where the other side looks when it has reason to:

- The **board**, written by the agent alone: which slot each turn has. A rank that finds its turn there
  needs no message.
- An **outbox** for each bridge, written by its rank alone: the chunks handed over, as a ring of (region,
  timestep) behind the number of all so far. It has room for every chunk that can be under way, since a chunk
  without a slot cannot be handed over.
- The **tally**, written by all ranks: how many timesteps of an array each bridge has handed over whole. The
  rank that finds itself the last for a timestep wakes the agent, which then looks into every outbox.

Only outboxes count. What the tally says is a hint, which a faulty rank may spoil for the others, and an
agent looks into the outboxes every `LOOK_S` anyway: then a timestep is seen a little later.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Mapping

from deisa.ray._transport.memory import WITHOUT_DESCRIPTOR, map_segment, whole_pages
from deisa.ray.errors import ProtocolError

LOOK_S = 0.02
DESCRIPTORS_PER_PAGE = 1 if WITHOUT_DESCRIPTOR else 2  # of a `Page`
_WORD_BYTES = 8  # words are signed and aligned: written and read as a whole
_LARGEST_WORD = 2**63 - 1
_ENTRY_WORDS = 2
_F_SEAL_FUTURE_WRITE = 0x10  # fcntl has it from Python 3.13 on


class Fence:
    """Keeps what a thread has written before a call apart from what it reads and writes after it, for other processors.

    Python has no memory barrier of its own, but a lock that is released and taken again is one.
    """

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        self._lock.release()
        self._lock.acquire()


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


class Board:
    """The agent's end of the board.

    Parameters
    ----------
    name : str
    slots : mapping of str to int
        For each array, its number of slots; so many first turns have a slot from the start.
    """

    def __init__(self, name: str, slots: Mapping[str, int]) -> None:
        self._slots = dict(slots)
        self.rows: dict[str, int] = {}
        words = 0
        for array, count in self._slots.items():
            self.rows[array] = words
            words += 1 + count
        self.page = Page(name, words, only_here=True)
        self._fence = Fence()
        for array, count in self._slots.items():
            row = self.rows[array]
            self.page.words[row] = count
            for turn in range(count):
                self.page.words[row + 1 + turn] = turn

    def give(self, array: str, turn: int, slot: int) -> None:
        """Give a slot to the next turn; the number of turns comes last, for ranks look at it first."""
        row = self.rows[array]
        self.page.words[row + 1 + turn % self._slots[array]] = slot
        self._fence()
        self.page.words[row] = turn + 1


class OutboxReader:
    """The agent's end of an outbox.

    Parameters
    ----------
    name : str
    capacity : int
        Chunks that can be under way: the bridge's slots.
    """

    def __init__(self, name: str, capacity: int) -> None:
        self._capacity = capacity
        self._taken = 0
        self.page = Page(name, outbox_words(capacity))
        self._fence = Fence()

    def take(self) -> list[tuple[int, int]]:
        """Return the (region, timestep) pairs that have been added, oldest first.

        Raises
        ------
        ProtocolError
            When the rank has added more than it had slots for, or taken some back.
        """
        words = self.page.words
        added = words[0]
        if added == self._taken:
            return []
        if not 0 < added - self._taken <= self._capacity:
            raise ProtocolError("a rank has handed over more chunks than it has slots")
        self._fence()
        entries = []
        for number in range(self._taken, added):
            at = 1 + _ENTRY_WORDS * (number % self._capacity)
            entries.append((words[at], words[at + 1]))
        self._taken = added
        return entries


class OutboxWriter:
    """The rank's end of its outbox; `capacity` as the agent has it."""

    __slots__ = ("_fence", "capacity", "words")

    def __init__(self, words: memoryview, capacity: int, fence: Fence) -> None:
        self.words = words
        self.capacity = capacity
        self._fence = fence

    @property
    def added(self) -> int:
        """Chunks handed over so far."""
        number: int = self.words[0]
        return number

    def add(self, region: int, timestep: int) -> None:
        """Hand a chunk over; the number of entries comes last, for the agent looks at it first."""
        words = self.words
        added = words[0]
        at = 1 + _ENTRY_WORDS * (added % self.capacity)
        words[at] = region
        words[at + 1] = timestep
        self._fence()
        words[0] = added + 1


def outbox_words(capacity: int) -> int:
    """Words that an outbox needs."""
    return 1 + _ENTRY_WORDS * max(1, capacity)


class TallyRow:
    """A rank's view of the tally's row for one array.

    Parameters
    ----------
    words : memoryview
    first, count : int
        Where the row lies.
    own : int
        The word of this bridge.
    chunks : int
        Chunks that this bridge hands over for each timestep.
    account : memoryview
    within : int
        The word of `account` that counts those handed over for a timestep that is not whole yet.
    """

    __slots__ = ("_account", "_fence", "_own", "_row", "chunks", "within", "words")

    def __init__(
        self,
        words: memoryview,
        first: int,
        count: int,
        own: int,
        chunks: int,
        account: memoryview,
        within: int,
        fence: Fence,
    ) -> None:
        self.words = words
        self._row = words[first : first + count]
        self._own = own - first
        self.chunks = chunks
        self._account = account
        self.within = within
        self._fence = fence

    def is_last(self) -> bool:
        """Count a chunk; whether it makes this bridge the last one to have handed a timestep over."""
        self._account[self.within] += 1
        if self._account[self.within] < self.chunks:
            return False
        self._account[self.within] = 0
        row = self._row
        before = row[self._own]  # others can write there
        whole = before + 1 if before < _LARGEST_WORD else -_LARGEST_WORD
        row[self._own] = whole
        if len(row) == 1:
            return True
        self._fence()  # of two that come at the same time, one at least sees the other
        return min(row) >= whole

    def count_again(self, handed_over: int) -> None:
        """Count all chunks of the array anew, after an exception may have kept `is_last` from counting one."""
        self._row[self._own], self._account[self.within] = divmod(handed_over, self.chunks)
