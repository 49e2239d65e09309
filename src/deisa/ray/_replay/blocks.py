"""How an array lies in memory, and how Dask sees it: what makes the results of a replay the same to the last bit.

A sum of floats depends on the order in which they are added. That order follows from the cells that Dask sees, and
within a cell from its strides: NumPy adds up a part of a larger box in another order than a box of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any

import dask.array as da

from deisa.ray._graph.assemble import tiling_of

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A part of an array that lies in one piece of memory."""

    offset: Shape
    shape: Shape

    @property
    def slices(self) -> tuple[slice, ...]:
        """Where it lies in the array."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of an array, and the sizes of the cells that Dask sees, as in ``dask.array.Array.chunks``."""

    blocks: tuple[Block, ...]
    cuts: tuple[Shape, ...]

    @classmethod
    def of(cls, array: da.Array) -> Blocks:
        """Look at an array as a callback gets it."""
        tiling = tiling_of(array)
        if tiling is None:
            return cls.of_grid(array.chunks)
        return cls(tuple(Block(box.offset, box.shape) for box in tiling.boxes), tiling.cuts)

    @classmethod
    def of_grid(cls, sizes: Sequence[Sequence[int]]) -> Blocks:
        """The blocks of a grid, each of which is one cell."""
        cuts = tuple(map(tuple, sizes))
        starts = [list(accumulate(lengths, initial=0)) for lengths in cuts]
        blocks = tuple(
            Block(
                tuple(along[i] for along, i in zip(starts, position, strict=True)),
                tuple(lengths[i] for lengths, i in zip(cuts, position, strict=True)),
            )
            for position in product(*(range(len(lengths)) for lengths in cuts))
        )
        return cls(blocks, cuts)

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> Blocks:
        """Read what `to_json` has written."""
        blocks = tuple(Block(tuple(offset), tuple(shape)) for offset, shape in written["blocks"])
        return cls(blocks, tuple(map(tuple, written["cuts"])))

    def to_json(self) -> dict[str, Any]:
        """Write as lists of numbers."""
        return {
            "blocks": [[list(block.offset), list(block.shape)] for block in self.blocks],
            "cuts": [list(lengths) for lengths in self.cuts],
        }
