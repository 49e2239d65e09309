"""Steering: what the analytics sets, and why every bridge gets the same answer to the same question.

A *question* is a key and a timestep. Its *answer* is the value that is set for them, or the default of whoever asks. A
bridge that asks gets it from memory of its node, without a message. Once one bridge has its answer, nobody may get
another one. So a value goes to all nodes in two steps::

    analytics          every node                                      bridges
    ---------          ----------                                      -------
    propose  ------->  closes the question: whoever asks now waits
             <-------  says whether a bridge has had an answer by then
    settle   ------->  keeps the value if no bridge had, else drops    those that wait get
                       it, and opens the question                      the answer

With one node, `Proposal.final` makes both one step. A bridge notes what it asks before it looks for the answer, and a
node closes the question before it looks for notes. So one of the two sees the other.

What a bridge notes of a key is the newest timestep it has asked for. So a value can also be too late for an older
timestep, about which nobody has asked: simulations move on and do not ask about it any more.

The analytics waits for the second step, too: a callback that it has noted as handled has set what it set. One
that dies between the steps leaves the question closed. The next analytics settles it: the value counts if some node
has kept it, since then all had agreed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

MAX_KEYS = 256  # for which values are set
MAX_ASKED_KEYS = 512  # about which a bridge asks


@dataclass(frozen=True, slots=True)
class Setting:
    """A value that is set: `value` is as `values` has encoded it."""

    key: str
    timestep: int
    value: bytes


@dataclass(frozen=True, slots=True)
class FeedbackPlan:
    """What a node keeps, and what it starts with.

    Attributes
    ----------
    queue_size : int
        Values of each key.
    nbytes : int
        Bytes of all values.
    settings : tuple of Setting
        Set before the start, in that order.
    """

    queue_size: int = 1
    nbytes: int = 4096
    settings: tuple[Setting, ...] = ()


@dataclass(frozen=True, slots=True)
class Proposal:
    """A value that all nodes are asked about.

    Attributes
    ----------
    number : int
        Counts the proposals of a session, from 1.
    setting : Setting
    final : bool
        Whether the node decides by itself: there is no other one.
    last_accepted : int
        The number of the last proposal that was accepted: a node may not have heard how the one before was
        settled, where the analytics was interrupted.
    """

    number: int
    setting: Setting
    final: bool
    last_accepted: int


@dataclass(frozen=True, slots=True)
class Asked:
    """The newest question about a key of which a bridge has an answer."""

    bridge_id: int
    timestep: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a node says of a proposal.

    Attributes
    ----------
    asked : Asked or None
        Who has had an answer; None where the value can be set.
    known : bool
        Whether that value is set already.
    refusal : str
        Why the node cannot keep the value, or nothing.
    """

    asked: Asked | None = None
    known: bool = False
    refusal: str = ""

    @property
    def accepts(self) -> bool:
        """Whether the value can be set, or is."""
        return not self.refusal and (self.known or self.asked is None)


def accepted(verdicts: Iterable[Verdict]) -> bool:
    """Whether a value can be set on all nodes."""
    return all(verdict.accepts for verdict in verdicts)


@dataclass(frozen=True, slots=True)
class FeedbackState:
    """What a node tells an analytics that takes over.

    Attributes
    ----------
    pending : int or None
        The number of the proposal that waits to be settled.
    last_accepted, last : int
        The number of the last proposal that was accepted, and of the last one that came.
    """

    pending: int | None = None
    last_accepted: int = 0
    last: int = 0


def settlement(states: Collection[FeedbackState]) -> tuple[int, bool] | None:
    """Decide on the proposal that an analytics left behind, if it did: its number, and whether it counts."""
    pending = {state.pending for state in states if state.pending is not None}
    if not pending:
        return None
    number = max(pending)
    return number, any(state.last_accepted == number for state in states)


class Questions:
    """Which question a node has closed, and what it keeps when it is settled.

    Attributes
    ----------
    closed : Proposal or None
        The question about which nobody gets an answer now.
    """

    def __init__(self) -> None:
        self.closed: Proposal | None = None
        self._last = 0
        self._last_accepted = 0

    @property
    def state(self) -> FeedbackState:
        """For an analytics that takes over."""
        return FeedbackState(
            self.closed.number if self.closed is not None else None, self._last_accepted, self._last
        )

    def close(self, proposal: Proposal) -> Setting | None:
        """Close the question of a proposal; returns what is to be kept of the one before, as `settle` does."""
        kept = None
        if self.closed is not None:
            number = self.closed.number
            kept = self.settle(number, is_accepted=number == proposal.last_accepted)
        self.closed = proposal
        self._last = proposal.number
        return kept

    def settle(self, number: int, *, is_accepted: bool) -> Setting | None:
        """Open the question of a proposal, if it is still closed; returns the value where it is to be kept."""
        closed = self.closed
        if closed is None or closed.number != number:
            return None
        self.closed = None
        if not is_accepted:
            return None
        self._last_accepted = number
        return closed.setting
