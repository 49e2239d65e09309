"""Whether the process at the other end of a connection is alive, whoever else holds a copy of its socket."""

from __future__ import annotations

import os
import select
from contextlib import suppress


def open_process(pid: int) -> int | None:
    """Return a descriptor that becomes readable when a process ends.

    None where there is nothing to watch: this very process, one of another pid namespace (which the kernel calls 0),
    a kernel that has no such descriptors.

    Raises
    ------
    ProcessLookupError
        When the process has ended before.
    """
    if pid in (0, os.getpid()):
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        return None


def has_ended(process: int | None) -> bool:
    """Whether the process of a descriptor from `open_process` has ended."""
    if process is None:
        return False
    poll = select.poll()
    poll.register(process, select.POLLIN)
    return bool(poll.poll(0))


def process_has_ended(pid: int) -> bool:
    """Whether the process of that number has ended, as far as one can know."""
    try:
        process = open_process(pid)
    except ProcessLookupError:
        return True
    try:
        return has_ended(process)
    finally:
        if process is not None:
            os.close(process)


def holders_of(address: str) -> list[int]:
    """Return the processes of this user that hold a socket bound to an address, as far as /proc shows them."""
    path = "@" + address[1:] if address.startswith("\0") else address
    nodes = {fields[6] for fields in _unix_sockets() if len(fields) > 7 and fields[7] == path}
    held = {f"socket:[{node}]" for node in nodes}
    return sorted(pid for pid in _processes() if held & set(_open_files(pid)))


def _unix_sockets() -> list[list[str]]:
    with suppress(OSError), open("/proc/net/unix", encoding="utf-8", errors="replace") as listing:
        return [line.rstrip("\n").split(maxsplit=7) for line in listing][1:]
    return []


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _open_files(pid: int) -> list[str]:
    found = []
    with suppress(OSError):
        for number in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found.append(os.readlink(f"/proc/{pid}/fd/{number}"))
    return found
