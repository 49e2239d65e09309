"""The board: one page on which an agent says which slot each turn has, for the ranks of its node to read.

The agent alone can write: once it has mapped the board, a seal makes every other mapping read-only. A
rank that finds its turn there needs no message.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Mapping

from deisa.ray._transport.memory import whole_pages

_WORD_BYTES = 8  # words are 64-bit signed and aligned: written and read as a whole
_F_SEAL_FUTURE_WRITE = 0x10  # fcntl has it from Python 3.13 on


class Board:
    """The agent's end.

    Parameters
    ----------
    name : str
        For the kernel's lists of what is mapped.
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
        self.nbytes = whole_pages(max(1, words) * _WORD_BYTES)
        self.descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, self.nbytes)
        self._memory = mmap.mmap(self.descriptor, self.nbytes)
        fcntl.fcntl(
            self.descriptor,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL,
        )
        self._words = memoryview(self._memory).cast("q")
        for array, count in self._slots.items():
            row = self.rows[array]
            self._words[row] = count
            for turn in range(count):
                self._words[row + 1 + turn] = turn

    def give(self, array: str, turn: int, slot: int) -> None:
        """Give a slot to the next turn; the number of turns comes last, for ranks look at it first."""
        row = self.rows[array]
        self._words[row + 1 + turn % self._slots[array]] = slot
        self._words[row] = turn + 1

    def close(self) -> None:
        """Give the memory back, as far as no rank has it mapped."""
        self._words.release()
        self._memory.close()
        os.close(self.descriptor)


def read_board(descriptor: int, nbytes: int) -> memoryview:
    """Map a board for reading, as 64-bit words; closes the descriptor."""
    try:
        return memoryview(mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ)).cast("q")
    finally:
        os.close(descriptor)
