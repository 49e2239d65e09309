"""How many descriptors an agent may open, and how many it will."""

from __future__ import annotations

import os
import resource
from contextlib import suppress

from deisa.ray.errors import DescriptorLimitError

SPARE = 64  # for pages, readers, and what else a process opens


def raise_descriptor_limit() -> None:
    """Let this process open as many descriptors as it may: each bridge takes a few."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_descriptors(needed: int, bridges: int) -> None:
    """Raise `DescriptorLimitError` when so many more descriptors would be too many."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = len(os.listdir("/proc/self/fd"))
    if limit != resource.RLIM_INFINITY and taken + needed + SPARE > limit:
        raise DescriptorLimitError(
            f"the memory of {bridges} bridges on one node takes {needed} descriptors beside {taken} that are open, and "
            f"the agent may have {limit}; raise the limit (ulimit -n) where Ray is started"
        )
