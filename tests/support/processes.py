"""Tell the processes that a test started, however indirectly, from all others, and kill exactly those."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.support.patience import PATIENCE_S


class Process(NamedTuple):
    """What Linux says about a process: who started it, and the operating-system session that it belongs to."""

    pid: int
    parent: int
    session: int


def kill_session(leader: subprocess.Popen[str]) -> None:
    """Kill what is left of the operating-system session that a process began, orphans included."""
    _kill_all(lambda: [process.pid for process in live_processes() if process.session == leader.pid])
    leader.wait()


def kill_tree(root: subprocess.Popen[str]) -> None:
    """Kill a process and its descendants, whatever sessions and groups they have made for themselves."""
    tree = {root.pid}
    processes = list(live_processes())
    while children := {process.pid for process in processes if process.parent in tree} - tree:
        tree |= children
    _kill_all(lambda: [process.pid for process in live_processes() if process.pid in tree])
    root.wait()


def _kill_all(find_pids: Callable[[], list[int]]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while pids := find_pids():
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {pids} are still there {PATIENCE_S:g} s after SIGKILL")
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def live_processes() -> Iterator[Process]:
    """Every process that is not a zombie."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # "PID (NAME) STATE PPID PGRP SESSION ...", and NAME may contain anything
            state, parent, _group, session = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state not in "ZX":
            yield Process(int(stat.parent.name), int(parent), int(session))
