"""What a bridge counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BridgeStats:
    """What one bridge did until it closed.

    Attributes
    ----------
    chunks : int
        Chunks handed over.
    bytes_handed_over : int
    held_up_s : float
        Time spent in ``send`` waiting for a free slot.
    bytes_left_out : int
        Bytes that were sent and not handed over, because no callback asks for them.
    """

    chunks: int = 0
    bytes_handed_over: int = 0
    held_up_s: float = 0.0
    bytes_left_out: int = 0
