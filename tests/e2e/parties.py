"""Both sides of a session as processes that tests can kill, and the logs in which they say what they saw."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.mpi import Mpi
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.processes import kill_tree

ROOT = Path(__file__).parents[2]


@dataclass
class Party:
    """A process with a log."""

    process: subprocess.Popen[str]
    log: Path

    def lines(self) -> list[str]:
        """What it has written."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    def numbers(self, word: str) -> list[int]:
        """The timesteps of the lines that begin with a word."""
        return [int(line.split()[1].rstrip(":")) for line in self.lines() if line.split()[0] == word]

    @property
    def has_ended(self) -> bool:
        """Whether it has written its last line."""
        return any(line.startswith("ended") for line in self.lines())

    def ended(self, timeout_s: float = PATIENCE_S) -> str:
        """Wait for its last line; returns what that says."""
        wait_until(lambda: self.has_ended, f"{self.log.name} ends", timeout_s)
        return next(line for line in self.lines() if line.startswith("ended")).removeprefix("ended ")

    def reached(self, line: str) -> None:
        """Wait for a line."""
        wait_until(
            lambda: line in self.lines() or self.has_ended, f"{self.log.name} says {line!r}", PATIENCE_S
        )
        assert line in self.lines(), f"{self.log.name} never said {line!r}, but {self.lines()[-1:]}"

    def kill(self, number: int = signal.SIGKILL) -> float:
        """Send a signal, and return when (monotonic seconds)."""
        os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self.process.wait()
        return time.monotonic()


@dataclass
class Parties:
    """The processes of one session.

    Parameters
    ----------
    folder : Path
        For the logs.
    session : str
    """

    folder: Path
    session: str
    started: list[Party] = field(default_factory=list)

    def rank(self, rank: int, size: int, steps: int, *more: object, **settings: object) -> Party:
        """Start a rank; `settings` as `Settings` has them."""
        arguments = [f"--rank={rank}", f"--size={size}", f"--steps={steps}", *more]
        return self.start("steady_rank", f"rank-{rank}", arguments, settings)

    def ranks(self, size: int, steps: int, *more: object, **settings: object) -> list[Party]:
        """Start all ranks."""
        return [self.rank(rank, size, steps, *more, **settings) for rank in range(size)]

    def analytics(self, *more: object, **settings: object) -> Party:
        """Start an analytics."""
        return self.start("steady_analytics", "analytics", more, settings)

    def start(
        self,
        program: str,
        name: str,
        arguments: Sequence[object],
        settings: Mapping[str, object],
    ) -> Party:
        """Start a program of tests/e2e/programs."""
        log = self.folder / f"{len(self.started)}-{name}.log"
        errors = log.with_suffix(".err").open("w")
        variables = {f"DEISA_RAY_{key.upper()}": str(value) for key, value in settings.items()}
        process = subprocess.Popen(
            [sys.executable, "-m", f"tests.e2e.programs.{program}", f"--log={log}", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"DEISA_RAY_SESSION": self.session} | variables,
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            text=True,
        )
        errors.close()
        party = Party(process, log)
        self.started.append(party)
        return party

    def mpi(self, mpi: Mpi, size: int, steps: int) -> Party:
        """Start all ranks under `mpiexec`; the log is empty, each rank has its own beside it."""
        log = self.folder / f"{len(self.started)}-mpi.log"
        program = ["-m", "tests.e2e.programs.steady_rank", "--mpi", f"--steps={steps}", f"--log={log}"]
        process = mpi.popen(size, *program, env={"DEISA_RAY_SESSION": self.session})
        self.started.append(Party(process, log))
        return self.started[-1]

    def stop(self) -> None:
        """Kill what is left."""
        for party in self.started:
            with party.process:  # closes its pipes
                kill_tree(party.process)
