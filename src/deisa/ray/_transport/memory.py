"""Chunk memory: sealed memfds, and the slots laid out in them."""

from __future__ import annotations

import errno
import fcntl
import math
import mmap
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deisa.ray._state.descriptions import Shape
from deisa.ray._transport.limits import human_bytes
from deisa.ray._transport.messages import RegionSpec
from deisa.ray.errors import MemoryBoundError, ProtocolError

PAGE_BYTES = mmap.PAGESIZE
# Before Python 3.13, each mapping keeps a descriptor of its own.
WITHOUT_DESCRIPTOR: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}


def create_segment(name: str, nbytes: int) -> int:
    """Create anonymous shared memory that can never change size; returns its descriptor."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(descriptor, nbytes)
        fcntl.fcntl(
            descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def lay_out(
    chunks: Sequence[tuple[int, Shape, np.dtype, int]], segment: int = 0
) -> tuple[list[RegionSpec], int]:
    """Place the slots of several chunks, given as (region, shape, dtype, slots), in one segment.

    Every slot starts on a page of its own. Returns the regions and the segment's size in bytes.
    """
    regions = []
    base = 0
    for region, shape, dtype, slots in chunks:
        slot_bytes = slot_size(shape, dtype)
        strides = contiguous_strides(shape, dtype.itemsize)
        regions.append(
            RegionSpec(region, segment, base, slot_bytes, slots, shape, strides, dtype, dtype.itemsize)
        )
        base += slot_bytes * slots
    return regions, base


def within(box: RegionSpec, region: int, offset: Shape, shape: Shape) -> RegionSpec:
    """Place a chunk inside a box, `offset` elements from its corner."""
    base = box.base + sum(o * step for o, step in zip(offset, box.strides, strict=True))
    return replace(box, region=region, base=base, shape=shape)


def slot_size(shape: Shape, dtype: np.dtype) -> int:
    """Bytes of one slot: the chunk, rounded up to whole pages."""
    return whole_pages(math.prod(shape) * dtype.itemsize)


def whole_pages(nbytes: int) -> int:
    """Round a number of bytes up to whole pages."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def contiguous_strides(shape: Shape, itemsize: int) -> Shape:
    """Strides in bytes of a C-contiguous array."""
    strides = []
    step = itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def map_segment(descriptor: int, nbytes: int, *, writable: bool) -> mmap.mmap:
    """Map a whole segment; the descriptor can be closed afterwards.

    Raises
    ------
    ProtocolError
        When the segment is smaller than announced: touching it would kill the process.
    MemoryBoundError
        When the process may not have so much address space.
    """
    actual = os.fstat(descriptor).st_size
    if actual < nbytes:
        raise ProtocolError(f"a memory segment has {actual} bytes, {nbytes} were announced")
    protection = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    try:
        return mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED, prot=protection, **WITHOUT_DESCRIPTOR)
    except OSError as exc:
        if exc.errno != errno.ENOMEM:
            raise
        raise MemoryBoundError(
            f"this process may not map {human_bytes(nbytes)} of chunk memory; raise the limit on its address space "
            "(ulimit -v), or use smaller windows or a smaller max_simulation_ahead"
        ) from exc


def map_segments(descriptors: Sequence[int], sizes: Sequence[int], *, writable: bool) -> list[mmap.mmap]:
    """Map the segments that came along with a message, and close their descriptors.

    Raises
    ------
    ProtocolError
        When fewer came than were announced: the kernel drops those for which a process has no room.
    """
    try:
        if len(descriptors) != len(sizes):
            raise ProtocolError(
                f"{len(sizes)} memory segments were announced, {len(descriptors)} came along; "
                "is the limit on open files (ulimit -n) too small?"
            )
        return [map_segment(d, size, writable=writable) for d, size in zip(descriptors, sizes, strict=True)]
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def slot_view(memory: object, spec: RegionSpec, slot: int) -> np.ndarray:
    """Return one slot of a region as an array over mapped memory."""
    return np.ndarray(
        spec.shape,
        spec.dtype,
        buffer=memory,  # type: ignore[arg-type]
        offset=spec.base + slot * spec.slot_bytes,
        strides=spec.strides,
    )


def available_bytes() -> int:
    """Memory that this node can still give, as the kernel estimates."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * PAGE_BYTES


def check_fits(needed: int, fraction: float, what: str) -> None:
    """Raise `MemoryBoundError` when `needed` bytes exceed the allowed part of this node's memory."""
    available = available_bytes()
    if needed > available * fraction:
        raise MemoryBoundError(
            f"{what} needs {human_bytes(needed)} of chunk memory, but only {human_bytes(available * fraction)} may "
            f"be used on this node ({fraction:.0%} of {human_bytes(available)} available); use smaller windows, "
            "a smaller max_simulation_ahead, fewer ranks per node, or raise memory_fraction"
        )
