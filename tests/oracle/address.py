"""Where a rank looks for its agent, and what it says when there is none."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from deisa.ray._transport.address import agent_address, shown
from deisa.ray.config import Settings
from deisa.ray.errors import ConfigurationError

SHOWN = 5  # addresses in a message
_PREFIX = "deisa-ray/"


def check_socket_path(path: str) -> None:
    """Check that a socket can be at a path, now or later.

    Raises
    ------
    ConfigurationError
        When something else is there, or there is no such folder, or this user may not use it.
    """
    folder = os.path.dirname(path)
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            kind = "a folder" if os.path.isdir(path) else "a file that is no socket"
            raise ConfigurationError(
                f"socket_path {path!r} is {kind}, which stays as it is; give the path of a file that is not there yet, "
                "the same on both sides (DEISA_RAY_SOCKET_PATH)"
            )
    except FileNotFoundError:
        if not os.path.isdir(folder):
            raise ConfigurationError(
                f"socket_path {path!r}: there is no folder {folder!r} on this host; create it, or give another path, "
                "the same on both sides (DEISA_RAY_SOCKET_PATH)"
            ) from None
    except OSError as exc:  # PermissionError, NotADirectoryError
        raise ConfigurationError(
            f"socket_path {path!r} cannot be reached: {exc.strerror}; give another path, the same on both sides "
            "(DEISA_RAY_SOCKET_PATH)"
        ) from exc


def other_agents(settings: Settings) -> str:
    """Say which addresses of other sessions, or other user ids, there are on this host; empty if there are none."""
    own = shown(agent_address(settings))
    names = [name for name in bound_names() if name != own]
    mine = [name.split("/", 2)[2] for name in names if name.startswith(f"@{_PREFIX}{os.getuid()}/")]
    others = [name for name in names if not name.startswith(f"@{_PREFIX}{os.getuid()}/")]
    said = ""
    if mine:
        listed = ", ".join(map(repr, mine[:SHOWN]))
        said += f"; you have an agent of session {listed} here: is DEISA_RAY_SESSION the same on both sides?"
    if others:
        said += (
            f"; there are agents of other user ids ({', '.join(others[:SHOWN])}): if one is yours, seen from a "
            f"container with user ids of its own (here you are {os.getuid()}), set DEISA_RAY_SOCKET_PATH to a path "
            "that both sides see"
        )
    return said


def bound_names() -> list[str]:
    """The addresses of agents in this network namespace."""
    sockets = [
        line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text(errors="replace").splitlines()
    ]
    return sorted(
        {fields[7] for fields in sockets if len(fields) > 7 and fields[7].startswith(f"@{_PREFIX}")}
    )
