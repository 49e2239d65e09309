"""A module of a script's own, with values that the script sets."""

from __future__ import annotations

import numpy as np

ALPHA = 1.0
TABLE = {"beta": [1.0]}
SEEN: list[int] = []


def shift(block: np.ndarray) -> np.ndarray:
    """Use what the module holds, and leave something there."""
    SEEN.append(1)
    return 0 * block + ALPHA + TABLE["beta"][0] + 1000 * (len(SEEN) - 1)
