"""The processes that Ray runs for a session, found from outside: by the names Ray gives them, and by what they hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from tests.support.processes import live_processes


def named(name: str) -> list[int]:
    """Processes whose command line begins so; Ray calls its workers after what they do."""
    return [pid for pid in running(name) if command(pid).startswith(name)]


def running(program: str) -> list[int]:
    """Processes with something in their command line."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if program in command(int(path.name))]


def command(pid: int) -> str:
    """The command line of a process; empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def workers(session: str) -> list[int]:
    """Processes that run bundles where a session's agent is, on its Ray node: of any session, of no other Ray."""
    found = [*named("ray::run_on_node"), *named("ray::StandingWorker")]
    belongs_to = {process.pid: process.session for process in live_processes()}
    node = belongs_to.get(agent_of(session) or 0)
    return [pid for pid in found if node is not None and belongs_to.get(pid) == node]


def agent_of(session: str) -> int | None:
    """The agent of a session on this host: it holds the session's memory, and neither is a rank nor a worker."""
    for pid in named("ray::NodeAgent"):
        if any(f"memfd:deisa-{session} " in f"{link} " for _, link in _links(pid)):
            return pid
    return None


def chunk_memory(pid: int, session: str) -> int:
    """Bytes of the chunk memory that an agent holds; its pages for messages are not counted."""
    total = 0
    for descriptor, link in _links(pid):
        if f"memfd:deisa-{session} " in f"{link} ":
            with suppress(OSError):
                total += os.stat(descriptor).st_size
    return total


def _links(pid: int) -> Iterator[tuple[Path, str]]:
    for entry in Path(f"/proc/{pid}/fd").glob("*"):
        with suppress(OSError):
            yield entry, os.readlink(entry)
