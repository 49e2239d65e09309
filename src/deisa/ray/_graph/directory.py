"""The directory in which tasks run: that of the analytics, where their node has it.

So a relative path means the same file in a task and in the callback, on a file system that the nodes share.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def enter(directory: str) -> None:
    """Make it this process's directory, if this node has it."""
    with suppress(OSError):
        os.chdir(directory)


@contextmanager
def in_directory(directory: str) -> Iterator[None]:
    """Make it this process's directory for a while; other tasks of the process's owner find theirs again."""
    before = os.getcwd()
    enter(directory)
    try:
        yield
    finally:
        enter(before)
