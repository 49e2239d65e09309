"""What a rank does with its slots before it fills them."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np

from deisa.ray._transport.memory import PAGE_BYTES


def touch(slot: np.ndarray) -> None:
    """Fault every page of a slot in, so that no later copy pays for it and pages lie near the caller."""
    if slot.flags.c_contiguous:
        slot.reshape(-1).view(np.uint8)[::PAGE_BYTES] = 0
    else:  # rows in a box that other ranks share
        slot.view(f"V{slot.itemsize}")[...] = np.void(bytes(slot.itemsize))


def prefer_huge_pages(memory: mmap.mmap) -> None:
    """Have the kernel use huge pages where its ``shmem_enabled`` setting leaves that to the program."""
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
