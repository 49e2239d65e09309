"""What callbacks have handled, as the next analytics reads it; also where one was killed between two stores."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import pytest

from deisa.ray._state.journal import WORDS_EACH, Handled, Journal, merge_journals


class Stores(Sequence[int]):
    """Words that remember what they were after each store."""

    def __init__(self, words: Sequence[int]) -> None:
        self.words = list(words)
        self.states: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        return self.words[index]

    def __setitem__(self, index: int, word: int) -> None:
        self.words[index] = word
        self.states.append(list(self.words))


def test_each_callback_has_its_words() -> None:
    journal = Journal(memoryview(array("q", [0] * (3 * WORDS_EACH))))
    for callback in range(3):
        journal.note(callback, Handled())
    journal.note(1, Handled(7, following=2))
    journal.note(2, Handled(-3))
    assert journal.read() == (Handled(), Handled(7, 2), Handled(-3))


@pytest.mark.parametrize("left", range(4), ids="from {}".format)
@pytest.mark.parametrize("following", range(4), ids="to {}".format)
def test_what_follows_is_never_lost_with_its_timestep(left: int, following: int) -> None:
    """The one that reads half a note runs the callback once too often, or asks the trigger again."""
    words = Stores([4, left])
    Journal(words).note(0, Handled(5, following))  # type: ignore[arg-type]
    half, whole = words.states
    assert whole == [5, following]
    assert half[0] == 4 or half[1] >= following
    assert half[0] == 5 or half[1] >= left


def test_journals_of_several_nodes_are_joined() -> None:
    journals = [(Handled(3, 1), Handled()), (), (Handled(1, 5), Handled(7, 2), Handled(2))]
    assert merge_journals(journals) == (Handled(3, 1), Handled(7, 2), Handled(2))
    assert merge_journals([]) == ()
