"""What each callback has handled, on a page of memory that outlives the analytics.

A callback has two words there: the last timestep that it has handled, and at how many further ones it runs whatever
its trigger says. An analytics may be killed between two stores, so the order of the stores matters: a timestep that
is noted as handled must never take with it what is still to follow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

NOTHING_HANDLED = -(2**63)
WORDS_EACH = 2  # for each callback


@dataclass(frozen=True, slots=True, order=True)
class Handled:
    """The last timestep that a callback has handled, and at how many further ones it runs in any case."""

    timestep: int = NOTHING_HANDLED
    following: int = 0


class Journal:
    """The words of all callbacks.

    Parameters
    ----------
    words : memoryview
        Of 64-bit integers, `WORDS_EACH` for each callback.
    """

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def note(self, callback: int, handled: Handled) -> None:
        """Note what a callback has handled.

        Killed in between, this leaves one timestep too many to follow, or the timestep to be handled again, with its
        trigger.
        """
        at = WORDS_EACH * callback
        if handled.following > self._words[at + 1]:
            self._words[at + 1] = handled.following
            self._words[at] = handled.timestep
        else:
            self._words[at] = handled.timestep
            self._words[at + 1] = handled.following

    def read(self) -> tuple[Handled, ...]:
        """Return what all callbacks have noted."""
        pairs = zip(self._words[::WORDS_EACH], self._words[1::WORDS_EACH], strict=True)
        return tuple(Handled(timestep, following) for timestep, following in pairs)


def merge_journals(journals: Iterable[Sequence[Handled]]) -> tuple[Handled, ...]:
    """Join the journals of all nodes; one analytics after the other has written to that of its own node."""
    merged: list[Handled] = []
    for journal in journals:
        merged += [Handled()] * (len(journal) - len(merged))
        for callback, handled in enumerate(journal):
            merged[callback] = max(merged[callback], handled)
    return tuple(merged)
