"""How well a median is known: an interval that needs no assumption about how the values are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """Confidence interval of the median, between two of the values in order of size; None with too few values.

    Each value lies below the true median as often as above it, like a fair coin. So the k-th least and the k-th
    greatest of n values enclose it, unless fewer than k of n coins fall on one side; k is the greatest number with
    which that is rare enough. The interval is that of the sign test: W. J. Conover, *Practical Nonparametric
    Statistics*, 3rd edition, section 3.2.
    """
    ordered = sorted(values)
    n, k = len(ordered), 0
    while k < n // 2 and 2 * sum(comb(n, i) for i in range(k + 1)) <= (1 - level) * 2**n:
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None
