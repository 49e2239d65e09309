"""A child made by ``fork`` inherits what belongs to its parent, and must not touch it.

It has copies of the parent's descriptors: as long as it lives, a socket of the parent is not closed. And it has the
parent's memory that is shared, so that what it writes there is seen by others. Python's own forks run a hook in the
child (`close_in_children`). A fork in C code does not: there `OwnProcess` notices, and a word of the client in C that
the kernel wipes in every child.
"""

from __future__ import annotations

import os
import weakref
from contextlib import suppress
from typing import Protocol

from deisa.ray.errors import ForkedProcessError


class Inherited(Protocol):
    """Something that holds descriptors."""

    def close_in_child(self) -> None:
        """Close the child's copies, without a word to anyone and without taking a lock."""


_inherited: weakref.WeakSet[Inherited] = weakref.WeakSet()


def close_in_children(owner: Inherited) -> None:
    """Have a child of this process close its copies of what `owner` holds."""
    _inherited.add(owner)


def _close_in_child() -> None:
    for owner in list(_inherited):
        with suppress(OSError):
            owner.close_in_child()
    _inherited.clear()


os.register_at_fork(after_in_child=_close_in_child)


class OwnProcess:
    """Remembers the process in which it was made."""

    __slots__ = ("_pid",)

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_this(self) -> bool:
        """Whether this is the same process, and no child of it."""
        return os.getpid() == self._pid

    def check(self, who: str) -> None:
        """Raise `ForkedProcessError` in a child of the process."""
        if not self.is_this:
            raise ForkedProcessError(
                f"{who} belongs to process {self._pid}; this is process {os.getpid()}, a forked child of it, which "
                "must not use the parent's connection and memory. Hand the values to the parent, or start the child "
                "with multiprocessing.get_context('spawn') or 'forkserver', where it can have one of its own"
            )
