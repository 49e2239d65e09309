"""Whether the analytics of a session is there, as one of its agents sees it.

An agent knows for certain only while the analytics has a connection to it, which the kernel closes when the process
ends. Otherwise it goes by the analytics' polls, and by how long there has been none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

DRIVER_QUIET_S = 5.0
HOLD_S = 2.0  # that a killed process may take to end
QUIET_HOLD_S = DRIVER_QUIET_S + 4.0  # likewise, where its silence decides

State = Literal["here", "gone", "quiet"]


class Presence:
    """What an agent knows of its analytics; times are those of one monotonic clock, in seconds.

    Parameters
    ----------
    driver_id : str
        The analytics that is served.
    holder : str
        Its process, in words, for whoever is refused because of it.
    now : float
    ends_alone : bool
        False where agent and analytics are one process, so that one can't miss the other.

    Attributes
    ----------
    reason : str
        Why there is no analytics any more; empty while there is one.
    connected : bool
        Whether it has a connection to this agent.
    """

    def __init__(self, driver_id: str, holder: str, now: float, *, ends_alone: bool) -> None:
        self.driver_id = driver_id
        self.holder = holder
        self.reason = ""
        self.connected = False
        self._only_silent = False  # it may still be there
        self._heard = now
        self._polls = 0
        self._ends_alone = ends_alone

    def quiet_s(self, now: float) -> float:
        """How long the analytics has not been heard of."""
        present = self.connected or self._polls
        if (present and not self.reason) or not self._ends_alone:
            return 0.0
        return now - self._heard

    def state(self, now: float) -> tuple[State, float]:
        """Whether the analytics is there, and how long it has been quiet (seconds)."""
        if self.reason and not self._only_silent:
            return "gone", self.quiet_s(now)
        if self.connected or not self._ends_alone:
            return "here", 0.0
        return "quiet", self.quiet_s(now)

    def leave(self, reason: str, now: float) -> bool:
        """The analytics has ended; returns whether that is news."""
        if self.reason:
            return False
        self.reason, self._only_silent, self._heard = reason, False, now
        return True

    def fall_silent(self, reason: str, now: float) -> bool:
        """See whether it has been quiet for too long; returns whether that is news."""
        if self.reason or self.quiet_s(now) <= DRIVER_QUIET_S:
            return False
        self.reason, self._only_silent = reason, True
        return True

    def connect(self) -> bool:
        """The analytics has a connection; returns whether it had been taken for gone: it was busy, or cut off."""
        self.connected = True
        return self._come_back()

    def begin_poll(self) -> bool:
        """The analytics asks for events; returns what `connect` does."""
        self._polls += 1
        return self._come_back()

    def _come_back(self) -> bool:
        back = bool(self.reason) and self._only_silent
        if back:
            self.reason = ""
        return back

    def end_poll(self, driver_id: str, now: float) -> None:
        """It gets its answer."""
        self._polls -= 1
        if driver_id == self.driver_id and not self.reason:
            self._heard = now

    def follow(self, driver_id: str, holder: str, now: float) -> bool:
        """Another analytics takes over; returns whether ranks have been told that there was none."""
        told = bool(self.reason)
        self.driver_id, self.holder, self.reason, self._heard = driver_id, holder, "", now
        return told


def judge_presence(
    answers: Sequence[tuple[State, float]], waited_s: float
) -> Literal["here", "gone", "unsure"]:
    """Decide from what all agents of a session say of their analytics whether it is there.

    Parameters
    ----------
    answers : sequence of (state, seconds)
        As `Presence.state` has them; none where the session has no agent.
    waited_s : float
        Since the first question: a process that is killed takes a moment to end, and so do its ranks.
    """
    states = {state for state, _ in answers}
    if "here" in states:
        return "here" if waited_s > HOLD_S else "unsure"
    if "gone" in states:
        since_s = min(quiet_s for state, quiet_s in answers if state == "gone")
        return "gone" if max(since_s, waited_s) > HOLD_S else "unsure"
    if all(quiet_s > DRIVER_QUIET_S for _, quiet_s in answers):
        return "gone"
    return "here" if waited_s > QUIET_HOLD_S else "unsure"


def is_certain(state: str, quiet_s: float, waited_s: float, driver_timeout_s: float) -> bool:
    """Whether an address is in use by an analytics that lives, as far as its agent's answers since then tell."""
    if state == "here":
        return waited_s > HOLD_S
    if state == "quiet" and quiet_s < DRIVER_QUIET_S:
        return waited_s > QUIET_HOLD_S
    return waited_s > driver_timeout_s + DRIVER_QUIET_S  # it should have ended


def in_use(session: str, where: str, holder: str | None) -> str:
    """Tell a second analytics who has the session, and what to do."""
    return (
        f"session {session!r} is in use {where} by another analytics, {holder or 'which does not answer'}; end it, or "
        "choose another name: Deisa(session=...) and Bridge(session=...), or DEISA_RAY_SESSION on both sides"
    )
