"""Chunks that carry their own checksum, and logs that outlive the process that writes them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from deisa.ray import DeisaArray

HEAD = 3  # a chunk's first elements: its rank, its timestep, the sum of the rest


def chunk(rank: int, timestep: int, elements: int) -> np.ndarray:
    """Whole numbers, so that their sum is exact; no two chunks are the same."""
    body = np.random.default_rng([rank, timestep]).integers(0, 2**31, elements - HEAD).astype(float)
    return np.concatenate([[rank, timestep, body.sum()], body])


def is_intact(block: np.ndarray, timestep: int) -> bool:
    """Whether a chunk is one that was sent for a timestep, unchanged."""
    return bool(block[1] == timestep and block[HEAD:].sum() == block[2])


def count_broken(block: np.ndarray, timestep: int) -> np.ndarray:
    """Dask's view of `is_intact`: a block of one number."""
    return np.array([0 if is_intact(block, timestep) else 1])


def description(rank: int, size: int, elements: int) -> dict[str, Any]:
    """What a rank says of its chunk: one of a row, whose elements have numbers."""
    even = {"start": 0, "step": 1}
    numbers = np.arange(rank * elements, (rank + 1) * elements) if elements <= 10_000 else even
    return {
        "dims": ["element"],
        "coords": {"element": numbers},
        "attrs": {"units": "K"},
        "chunk_shape": (elements,),
        "nb_chunks_per_dim": (size,),
        "chunk_position": (rank,),
        "dtype": np.float64,
    }


def time_of(timestep: int) -> float | None:
    """The physical time of a timestep; some have none."""
    return None if timestep % 3 == 0 else timestep / 10


def wrong_labels(array: DeisaArray) -> str:
    """What is wrong with an array's labels and physical time; empty if nothing is."""
    (numbers,), attrs = array.labels.coords, array.labels.attrs
    right = (
        array.labels.dims == ("element",) and dict(attrs) == {"units": "K"} and array.time == time_of(array.t)
    )
    return "" if right and np.array_equal(numbers.values, np.arange(array.size)) else repr(array)


class Log:
    """Lines in a file; one that has been written is there even if the process is killed at once."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def write(self, line: str) -> None:
        """Add a line."""
        os.write(self._descriptor, f"{line}\n".encode())
