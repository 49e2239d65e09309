"""The agent's ends of the feedback pages: what is set for the simulation, and what bridges have asked.

- The **feedback page**, written by the agent alone: for each key a queue of timesteps, and the values. A rank that asks
  reads it. If it changes meanwhile, the rank reads again; if its question is closed, the rank waits on a futex.
- The **questions page**, written by ranks, each in its own row: the newest timestep for which it has asked, by key.

``docs/protocol.md`` says what every word means, and `_state.feedback` why it is so.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from deisa.ray._handoff._native import fence, load, store, wake
from deisa.ray._state.feedback import (
    MAX_ASKED_KEYS,
    MAX_KEYS,
    Asked,
    FeedbackPlan,
    FeedbackState,
    Proposal,
    Questions,
    Setting,
    Verdict,
)
from deisa.ray._state.feedback_log import FeedbackLog, Queue
from deisa.ray._state.questions import FINISHED, MAX_KEY_BYTES, UNFINISHED
from deisa.ray._transport.limits import human_bytes
from deisa.ray._transport.pages import HEADER_WORDS, Page

FEEDBACK_MAGIC, QUESTIONS_MAGIC = b"deisaFBK", b"deisaQST"
CHANGES, FEEDBACK_WAKE, FINISHED_WITH, ROWS = range(4, 8)  # of the feedback page's header
CLOSED_KEY, CLOSED_TIMESTEP, QUEUE_SIZE, VALUES, FIRST_ROW = range(8, 13)  # of the feedback page, behind it
KEY_HASH, KEY_DROPPED, KEY_COUNT, KEY_LENGTH, KEY_BYTES = range(5)  # of a key's row
KEY_ENTRIES = KEY_BYTES + (MAX_KEY_BYTES + 1) // 8
VALUE_TIMESTEP, VALUE_FIRST, VALUE_LENGTH, VALUE_WORDS = range(4)  # of an entry there
WAITED = 4  # of the questions page's header
ASKED_HASH, ASKED_TIMESTEP, ASKED_WORDS = range(3)  # of an entry of a rank's row
ASKED_ROW = ASKED_WORDS * MAX_ASKED_KEYS

_WORD_BYTES = 8
_FNV_BASIS, _FNV_PRIME, _WORD = 0xCBF29CE484222325, 0x100000001B3, 2**64


def key_hash(key: str) -> int:
    """Return the hash of a key, FNV-1a of its UTF-8 with 64 bits, as a word; 0 stands for none, and becomes 1."""
    value = _FNV_BASIS
    for byte in key.encode():
        value = (value ^ byte) * _FNV_PRIME % _WORD
    value = value or 1
    return value - _WORD if value >= _WORD // 2 else value


def row_words(queue_size: int) -> int:
    """Words of a key's row."""
    return KEY_ENTRIES + VALUE_WORDS * queue_size


class FeedbackPages:
    """Both pages of a node, and its part in deciding what is set.

    Parameters
    ----------
    prefix : str
        Of the pages' names.
    plan : FeedbackPlan
    bridges : sequence of int
        Those of the node.

    Attributes
    ----------
    page, questions : Page
    rows : dict of int to int
        Where the row of each bridge starts on the questions page.
    """

    def __init__(self, prefix: str, plan: FeedbackPlan, bridges: Sequence[int]) -> None:
        self._questions = Questions()
        self._log = FeedbackLog(plan.queue_size, plan.nbytes // _WORD_BYTES)
        self._row_words = row_words(plan.queue_size)
        self._key_rows: dict[str, int] = {}
        self._values = FIRST_ROW + MAX_KEYS * self._row_words
        words = self._values + self._log.words
        self.page = Page(f"{prefix}-feedback", words, only_here=True)
        self.page.begin(FEEDBACK_MAGIC, words)
        self.page.words[FINISHED_WITH] = UNFINISHED
        self.page.words[ROWS] = MAX_KEYS
        self.page.words[QUEUE_SIZE] = plan.queue_size
        self.page.words[VALUES] = self._values
        self.rows = {bridge: HEADER_WORDS + ASKED_ROW * n for n, bridge in enumerate(bridges)}
        words = HEADER_WORDS + ASKED_ROW * len(self.rows)
        self.questions = Page(f"{prefix}-questions", words)
        self.questions.begin(QUESTIONS_MAGIC, words)
        for setting in plan.settings:
            self._keep(setting)

    # What the analytics asks.

    def propose(self, proposal: Proposal) -> Verdict:
        """Close a question, and say whether its value can be set; with a final proposal, set it."""
        setting = proposal.setting
        before = self._questions.close(proposal)
        with self._changing():
            if before is not None:
                self._write(before)
            self.page.words[CLOSED_KEY] = key_hash(setting.key)
            self.page.words[CLOSED_TIMESTEP] = setting.timestep
        verdict = self._judge(setting)  # after that: a bridge that is not seen by now waits
        if proposal.final:
            self.settle(proposal.number, is_accepted=verdict.accepts)
        return verdict

    def _judge(self, setting: Setting) -> Verdict:
        if self._is_kept(setting):
            return Verdict(known=True)
        return Verdict(self.answered(setting.key, setting.timestep), refusal=self._refusal(setting))

    def _refusal(self, setting: Setting) -> str:
        nbytes = self._log.words * _WORD_BYTES
        if len(setting.value) > nbytes:
            return (
                f"takes {human_bytes(len(setting.value))}, and a node keeps {human_bytes(nbytes)} of values: set a "
                "smaller one, or a larger DEISA_RAY_FEEDBACK_MEMORY_MIB"
            )
        if setting.key not in self._key_rows and len(self._key_rows) >= MAX_KEYS:
            return f"would be the value of another key than the {MAX_KEYS} that there are, which is the limit"
        return ""

    def answered(self, key: str, timestep: int) -> Asked | None:
        """Who has had an answer to a question about a key, for a timestep or a newer one."""
        wanted, words = key_hash(key), self.questions.words
        newest: Asked | None = None
        for bridge_id, row in self.rows.items():
            for probe in range(MAX_ASKED_KEYS):
                at = row + ASKED_WORDS * ((wanted + probe) % MAX_ASKED_KEYS)
                found = load(words, at + ASKED_HASH)
                if found == 0:
                    break
                if found == wanted:
                    asked = load(words, at + ASKED_TIMESTEP)
                    if asked >= timestep and (newest is None or asked > newest.timestep):
                        newest = Asked(bridge_id, asked)
                    break
        return newest

    def settle(self, number: int, *, is_accepted: bool) -> None:
        """Open a question again, and keep its value if it has been accepted."""
        if self._questions.closed is None or self._questions.closed.number != number:
            return  # a later proposal has said so
        setting = self._questions.settle(number, is_accepted=is_accepted)
        with self._changing():
            if setting is not None:
                self._write(setting)
            self.page.words[CLOSED_KEY] = 0

    def finish(self, timestep: int) -> None:
        """The analytics has finished with a timestep, and all before."""
        words = self.page.words
        if timestep > words[FINISHED_WITH]:
            store(words, FINISHED_WITH, min(timestep, FINISHED))
            self.wake()

    @property
    def state(self) -> FeedbackState:
        """For an analytics that takes over."""
        return self._questions.state

    @property
    def is_waited_for(self) -> bool:
        """Whether a rank has waited for an answer so far."""
        return load(self.questions.words, WAITED) != 0

    def wake(self) -> None:
        """Have the ranks that wait for an answer look again, and at their connections."""
        wake(self.page.words, FEEDBACK_WAKE)

    # What is written.

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change the page: a rank that reads meanwhile reads again."""
        words = self.page.words
        changes = words[CHANGES]
        store(words, CHANGES, changes + 1)
        fence()
        try:
            yield
        finally:
            store(words, CHANGES, changes + 2)
            fence()  # before a look at what ranks have noted
            self.wake()

    def _keep(self, setting: Setting) -> None:
        with self._changing():
            self._write(setting)

    def _write(self, setting: Setting) -> None:
        if self._is_kept(setting):
            return
        words = self.page.words
        kept = self._log.put(setting.key, setting.timestep, len(setting.value))
        for key, queue, since in self._log.take_changes():
            self._write_queue(key, queue, since)
        at = self._values + kept.first
        padded = setting.value.ljust(_WORD_BYTES * kept.words, b"\0")
        words[at : at + kept.words] = memoryview(padded).cast("q")

    def _is_kept(self, setting: Setting) -> bool:
        """Whether the very value is there already."""
        kept = self._log.find(setting.key, setting.timestep)
        if kept is None or kept.nbytes != len(setting.value):
            return False
        at = self._values + kept.first
        return bytes(self.page.words[at : at + kept.words])[: kept.nbytes] == setting.value

    def _write_queue(self, key: str, queue: Queue, since: int) -> None:
        words, row = self.page.words, self._row_of(key)
        words[row + KEY_DROPPED] = queue.dropped
        words[row + KEY_COUNT] = len(queue.values)
        changed = array("q")
        for kept in queue.values[since:]:
            changed.extend((kept.timestep, self._values + kept.first, kept.nbytes))
        at = row + KEY_ENTRIES + VALUE_WORDS * since
        words[at : at + len(changed)] = changed

    def _row_of(self, key: str) -> int:
        """Where the row of a key starts; a new key gets one."""
        row = self._key_rows.get(key)
        if row is not None:
            return row
        words, wanted, encoded = self.page.words, key_hash(key), key.encode()
        for probe in range(MAX_KEYS):
            row = FIRST_ROW + self._row_words * ((wanted + probe) % MAX_KEYS)
            if words[row + KEY_HASH] == 0:
                break
        else:
            raise ValueError(f"there are more than {MAX_KEYS} keys")
        padded = encoded.ljust(MAX_KEY_BYTES + 1, b"\0")
        words[row + KEY_BYTES : row + KEY_ENTRIES] = memoryview(padded).cast("q")
        words[row + KEY_LENGTH] = len(encoded)
        words[row + KEY_HASH] = wanted
        self._key_rows[key] = row
        return row

    def close(self) -> None:
        """Give the memory back, as far as no rank has it mapped."""
        wake(self.page.words, FEEDBACK_WAKE)
        self.page.close()
        self.questions.close()
