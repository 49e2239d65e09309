"""Running what a page shows: as programs, or in this process with ranks as threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.patience import PATIENCE_S

RANKS = 4
RUN_TIMEOUT_S = 2 * PATIENCE_S  # programs start, connect to Ray, compute and end


@contextmanager
def started(*argv: str | Path) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, *argv], text=True, **pipes) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def output_of(process: subprocess.Popen[str]) -> str:
    stdout, stderr = process.communicate(timeout=RUN_TIMEOUT_S)
    assert process.returncode == 0, stderr
    return stdout


@dataclass(frozen=True)
class Communicator:
    rank: int

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return RANKS


@contextmanager
def ranks_in_threads(program: Callable[[Communicator], None]) -> Iterator[None]:
    with ThreadPoolExecutor(RANKS) as pool:
        running = [pool.submit(program, Communicator(rank)) for rank in range(RANKS)]
        yield
        for rank in running:
            rank.result(RUN_TIMEOUT_S)
