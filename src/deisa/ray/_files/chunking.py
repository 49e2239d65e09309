"""Which chunks an array gets in a file, so that no two tasks write to the same one.

A file has chunks of one size, the simulation's blocks need not. If every border between blocks is also a border between
chunks of the file, each block is written by its own task, where it is. Otherwise blocks are joined and cut first
(``rechunk``), so that each chunk of the file is the block of one task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

Shape = tuple[int, ...]
Blocks = Sequence[Sequence[int]]  # sizes along each dimension, as `dask.array.Array.chunks` has them

LARGEST_BYTES = 64 * 2**20  # of a chunk; a reader takes all of it to see one element
SMALLEST_BYTES = 2**18  # below that, files and requests cost more than their bytes


def chunk_shape(blocks: Blocks, itemsize: int) -> Shape:
    """Choose the shape of an array's chunks.

    Parameters
    ----------
    blocks : sequence of sequence of int
        Sizes of the array's blocks along each dimension.
    itemsize : int

    Returns
    -------
    tuple of int
        At least 1 along each dimension. `fits` says whether the blocks can be written as they are.
    """
    common = tuple(_common_length(sizes) for sizes in blocks)
    largest = tuple(max(sizes, default=1) or 1 for sizes in blocks)
    per_block = math.prod(largest) // max(1, math.prod(common))
    if math.prod(common) * itemsize >= SMALLEST_BYTES or per_block <= 4:
        return _limited(common, blocks, itemsize)
    return _limited(largest, [(sum(sizes),) for sizes in blocks], itemsize)


def fits(blocks: Blocks, chunks: Shape) -> bool:
    """Whether every border between blocks is one between chunks, too."""
    return all(
        border % chunk == 0 for sizes, chunk in zip(blocks, chunks, strict=True) for border in _borders(sizes)
    )


def _borders(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(sizes))[:-1]


def _common_length(sizes: Sequence[int]) -> int:
    """The greatest length of which all borders are multiples."""
    return math.gcd(*_borders(sizes)) or max(1, sum(sizes))


def _limited(chunk: Shape, blocks: Blocks, itemsize: int) -> Shape:
    """Cut a chunk that is too large into equal parts, along its longest dimensions."""
    limited = list(chunk)
    while math.prod(limited) * itemsize > LARGEST_BYTES:
        for axis in sorted(range(len(limited)), key=lambda axis: -limited[axis]):
            part = _part(limited[axis], has_borders=len(blocks[axis]) > 1)
            if part < limited[axis]:
                limited[axis] = part
                break
        else:
            break
    return tuple(limited)


def _part(length: int, *, has_borders: bool) -> int:
    """Shorten a length; to one that divides it where blocks have borders at its multiples."""
    if not has_borders:
        return -(-length // 2)
    return next((length // n for n in range(2, 17) if length % n == 0), length)
