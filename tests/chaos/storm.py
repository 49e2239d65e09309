"""One session in a storm: parties are killed, stopped and replaced at random, and what they saw is checked at the end.

What is checked: callbacks ran in order and exactly once for a timestep; every value was what had been sent; everything
that was complete was delivered; the session's memory stayed within its bound; everybody ended, and in time.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.parties import Parties, Party
from tests.support.ray_processes import agent_of, chunk_memory, workers

ELEMENTS = 1000
SLOT_BYTES = 8192  # of such a chunk, in whole pages
END_S = 90.0


class BrokenPromiseError(AssertionError):
    """Something happened that docs/reliability.md says does not."""


@dataclass
class Figures:
    """What happened in a number of sessions."""

    sessions: int = 0
    timesteps: int = 0
    events: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)

    def add(self, other: Figures) -> None:
        """Count another session's."""
        self.sessions += other.sessions
        self.timesteps += other.timesteps
        self.events += other.events
        self.outcomes += other.outcomes


class Storm:
    """A session, and what befalls it.

    Parameters
    ----------
    folder : Path
        For the logs.
    session : str
    seed : int
        Decides everything but the timing.
    """

    def __init__(self, folder: Path, session: str, seed: int) -> None:
        self._dice = random.Random(seed)
        self._parties = Parties(folder, session)
        self._size = self._dice.randint(1, 3)
        self._steps = self._dice.randint(100, 300)
        self._window = self._dice.randint(1, 3)
        self._ahead = self._dice.randint(1, 4)
        self._analytics: list[Party] = []
        self._ranks: list[Party] = []
        self._fatal = ""  # what ended the session before its time
        self._waited = False  # the last analytics found nothing, and waited for another simulation
        self.figures = Figures(sessions=1)

    def run(self) -> Figures:
        """Run the session to its end.

        Raises
        ------
        BrokenPromiseError
        """
        pause = self._dice.choice([0.0, 0.01, 0.03])
        try:
            self._start_analytics()
            self._ranks = self._parties.ranks(
                self._size, self._steps, f"--pause={pause}", f"--elements={ELEMENTS}", connect_timeout_s=60
            )
            self._disturb()
            self._wait_for_the_end()
            self._check()
        finally:
            self._parties.stop()
        return self.figures

    # What befalls it.

    def _start_analytics(self) -> None:
        slow = self._dice.choice([0.0, 0.0, 0.02, 0.1])
        options = [f"--window={self._window}", f"--ahead={self._ahead}", f"--slow={slow}"]
        if self._dice.random() < 0.3:
            options.append("--fail-every=3")
        self._analytics.append(self._parties.analytics(*options, driver_timeout_s=60, leftover="deliver"))

    def _disturb(self) -> None:
        what: dict[Callable[[], None], float] = {
            self._kill_analytics: 4,
            self._interrupt_analytics: 2,
            self._stop_analytics: 2,
            self._stop_rank: 2,
            self._kill_worker: 4,
            self._kill_rank: 0.7,
            self._kill_agent: 0.4,
        }
        for _ in range(self._dice.randint(1, 5)):
            time.sleep(self._dice.uniform(0.2, 3.0))
            if self._fatal or any(self._has_ended(party) for party in (*self._ranks, self._analytics[-1])):
                return
            (act,) = self._dice.choices(list(what), list(what.values()))
            act()
            self._check_bound()

    def _count(self, event: str) -> None:
        self.figures.events[event] += 1

    def _kill_analytics(self) -> None:
        self._count("analytics killed")
        self._analytics[-1].kill()
        self._start_analytics()

    def _interrupt_analytics(self) -> None:
        if "ready" not in self._analytics[-1].lines():
            return  # it would be interrupted while it imports
        self._count("analytics interrupted")
        self._analytics[-1].kill(signal.SIGINT)
        self._analytics[-1].process.wait(END_S)
        if not self._has_ended(self._analytics[-1], "well"):
            self._start_analytics()

    def _stop_analytics(self) -> None:
        self._pause("analytics stopped", self._analytics[-1], 7.0)

    def _stop_rank(self) -> None:
        self._pause("rank stopped", self._dice.choice(self._ranks), 2.0)

    def _pause(self, event: str, party: Party, longest_s: float) -> None:
        self._count(event)
        party.kill(signal.SIGSTOP)
        time.sleep(self._dice.uniform(0.1, longest_s))
        party.kill(signal.SIGCONT)

    def _kill_worker(self) -> None:
        for pid in workers(self._parties.session)[:1]:
            self._count("worker killed")
            _kill(pid)

    def _kill_rank(self) -> None:
        rank = self._dice.choice(self._ranks)
        if "started" in rank.lines() and not self._has_ended(rank):
            self._count("rank killed")
            self._fatal = "rank"
            rank.kill()

    def _kill_agent(self) -> None:
        agent = agent_of(self._parties.session)
        if agent is not None and all("started" in rank.lines() for rank in self._ranks):
            self._count("agent killed")
            self._fatal = "agent"
            _kill(agent)

    # What is promised.

    @staticmethod
    def _has_ended(party: Party, how: str = "") -> bool:
        return any(line.startswith(f"ended {how}") for line in party.lines())

    def _promise(self, kept: object, what: str) -> None:
        if not kept:
            logs = "\n".join(f"{p.log.name}: {p.lines()[-3:]}" for p in self._parties.started)
            raise BrokenPromiseError(f"{what} (seed: {self._parties.session})\n{logs}")

    def _check_bound(self) -> None:
        bound = (self._window + self._ahead) * self._size * SLOT_BYTES
        agent = agent_of(self._parties.session)
        taken = chunk_memory(agent, self._parties.session) if agent is not None else 0
        self._promise(taken <= bound, f"{taken} bytes of chunk memory, the bound is {bound}")

    def _wait_for_the_end(self) -> None:
        deadline = time.monotonic() + END_S
        alive = [*self._ranks, self._analytics[-1]]
        while (left := [p for p in alive if p.process.poll() is None]) and time.monotonic() < deadline:
            time.sleep(0.05)
            if left == [self._analytics[-1]] and not self._waited and self._waits_for_a_simulation():
                self._waited = True
                self._analytics[-1].kill(signal.SIGINT)
        self._promise(not left, f"{[p.log.name for p in left]} hang")

    def _waits_for_a_simulation(self) -> bool:
        """Whether the last analytics has come when neither the agent nor a rank was left to tell of the session."""
        if self._fatal != "agent" or self._analytics[-1].numbers("began"):
            return False
        return (
            "waiting for the first bridge of session"
            in self._analytics[-1].log.with_suffix(".err").read_text()
        )

    def _check(self) -> None:
        broken = [line for one in self._analytics for line in one.lines() if line.startswith("broken")]
        self._promise(not broken, f"values or windows are not what they should be: {broken[:3]}")
        handled = [t for one in self._analytics for t in one.numbers("done")]
        self._promise(
            handled == list(range(len(handled))), f"not in order, or not exactly once: {_odd(handled)}"
        )
        sent = [max(rank.numbers("sent"), default=-1) + 1 for rank in self._ranks]
        self.figures.timesteps += len(handled)
        outcome = self._analytics[-1].ended().split(":")[0]
        self.figures.outcomes[outcome] += 1
        if self._fatal == "agent":
            expected = ("KeyboardInterrupt",) if self._waited else ("AgentLostError", "well")
            self._promise(outcome in expected, f"the agent was killed, and it ended {outcome}")
            return
        self._promise(len(handled) >= min(sent), f"{len(handled)} timesteps of {min(sent)} were delivered")
        if self._fatal == "rank":
            self._promise(
                outcome in ("BridgeLostError", "well"), f"a rank was killed, and it ended {outcome}"
            )
        else:
            self._promise(outcome == "well", f"nothing fatal happened, and it ended {outcome}")
            self._promise(
                len(handled) == self._steps, f"{len(handled)} timesteps of {self._steps} were delivered"
            )
            self._promise(all(rank.ended() == "well" for rank in self._ranks), "a rank did not end well")


def _odd(handled: list[int]) -> str:
    before = [-1, *handled]
    odd = [(a, b) for a, b in zip(before, handled, strict=False) if b != a + 1]
    return f"timesteps {odd[:5]} follow each other"


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
