"""The rank's ends of the feedback pages: asking for what the analytics has set; ``docs/protocol.md`` says how."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from deisa.ray._handoff._native import exchange, fence, load, store, wait
from deisa.ray._state.feedback import MAX_ASKED_KEYS, MAX_KEYS
from deisa.ray._transport.feedback import (
    ASKED_HASH,
    ASKED_TIMESTEP,
    ASKED_WORDS,
    CHANGES,
    CLOSED_KEY,
    CLOSED_TIMESTEP,
    FEEDBACK_MAGIC,
    FEEDBACK_WAKE,
    FINISHED_WITH,
    FIRST_ROW,
    KEY_BYTES,
    KEY_COUNT,
    KEY_DROPPED,
    KEY_ENTRIES,
    KEY_HASH,
    KEY_LENGTH,
    QUESTIONS_MAGIC,
    QUEUE_SIZE,
    VALUE_FIRST,
    VALUE_LENGTH,
    VALUE_TIMESTEP,
    VALUE_WORDS,
    WAITED,
    key_hash,
    row_words,
)
from deisa.ray.errors import FeedbackSizeError

FEEDBACK, QUESTIONS = (
    int.from_bytes(magic, sys.byteorder, signed=True) for magic in (FEEDBACK_MAGIC, QUESTIONS_MAGIC)
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the page says: the values there are, each with its timestep, or that some were dropped."""

    values: tuple[tuple[int, bytes], ...] = ()
    dropped: bool = False


class FeedbackReader:
    """What this bridge sees of what the analytics has set, and what it notes of its questions."""

    def __init__(self, page: memoryview, questions: memoryview, row: int) -> None:
        self._page = page
        self._bytes = page.cast("B")
        self._questions = questions
        self._row = row

    def ask(self, key: str, timestep: int | None, *, waits: bool) -> Answer | None:
        """Return the answer, or None where there is none yet; once there is one, it is final."""
        if waits:
            assert timestep is not None
            finished = load(self._page, FINISHED_WITH) >= timestep
            seen = self._look(key, timestep)
            if seen is None or (seen == Answer() and not finished):
                return None
        if timestep is not None:
            self._note(key, timestep)
        return self._look(key, timestep)

    def begin_wait(self, key: str, timestep: int) -> None:
        """Have the agent be told of finished timesteps, unless the value is there."""
        seen = self._look(key, timestep)
        if seen is None or not seen.values:
            exchange(self._questions, WAITED, 1)

    def wakes(self) -> int:
        """Return what `wait` wants to know; to be read before `ask`."""
        return load(self._page, FEEDBACK_WAKE)

    def wait(self, wakes: int, seconds: float) -> None:
        """Wait until the agent wakes those that wait, not longer than that, if it has not since `wakes`."""
        wait(self._page, FEEDBACK_WAKE, wakes, seconds)

    def _look(self, key: str, timestep: int | None) -> Answer | None:
        while True:
            before = load(self._page, CHANGES)
            if before % 2:
                return None
            answer = self._read(key, timestep)
            fence()
            if load(self._page, CHANGES) == before:
                return answer

    def _read(self, key: str, timestep: int | None) -> Answer | None:
        page = self._page
        if page[CLOSED_KEY] == key_hash(key) and page[CLOSED_TIMESTEP] == timestep:
            return None
        row = self._find(key)
        if row is None:
            return Answer()
        first = row + KEY_ENTRIES
        entries = range(first, first + VALUE_WORDS * page[row + KEY_COUNT], VALUE_WORDS)
        wanted = [e for e in entries if timestep is None or page[e + VALUE_TIMESTEP] == timestep]
        dropped = not wanted and timestep is not None and timestep <= page[row + KEY_DROPPED]
        return Answer(tuple(map(self._value, wanted)), dropped)

    def _find(self, key: str) -> int | None:
        page, wanted, encoded = self._page, key_hash(key), key.encode()
        for probe in range(MAX_KEYS):
            row = FIRST_ROW + row_words(page[QUEUE_SIZE]) * ((wanted + probe) % MAX_KEYS)
            if page[row + KEY_HASH] == 0:
                break
            start = 8 * (row + KEY_BYTES)
            known = bytes(self._bytes[start : start + page[row + KEY_LENGTH]])
            if page[row + KEY_HASH] == wanted and known == encoded:
                return row
        return None

    def _value(self, entry: int) -> tuple[int, bytes]:
        first = 8 * self._page[entry + VALUE_FIRST]
        value = bytes(self._bytes[first : first + self._page[entry + VALUE_LENGTH]])
        return self._page[entry + VALUE_TIMESTEP], value

    def _note(self, key: str, timestep: int) -> None:
        words, wanted = self._questions, key_hash(key)
        for probe in range(MAX_ASKED_KEYS):
            entry = self._row + ASKED_WORDS * ((wanted + probe) % MAX_ASKED_KEYS)
            known = words[entry + ASKED_HASH]
            if known in (0, wanted):
                if known == 0 or words[entry + ASKED_TIMESTEP] < timestep:
                    store(words, entry + ASKED_TIMESTEP, timestep)
                store(words, entry + ASKED_HASH, wanted)
                fence()
                return
        raise FeedbackSizeError(f"more than {MAX_ASKED_KEYS} different keys are asked for")
