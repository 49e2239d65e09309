"""How long tests wait: for a condition, never for a time.

A test that passes goes on as soon as its condition holds, so patience costs nothing; what is slow on a machine
that does other things beside is not broken.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PATIENCE_S = 60.0


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Return once `condition` holds; `TimeoutError` saying `what` did not come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"still not so after {timeout_s:g} s: {what}")
        time.sleep(0.01)
