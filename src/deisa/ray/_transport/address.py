"""Where an agent listens, and who may talk to it."""

from __future__ import annotations

import os
import socket
import stat
import struct
import time

from deisa.ray._transport.peers import bound_names
from deisa.ray.config import Settings
from deisa.ray.errors import ConfigurationError, PeerIdentityError

SHOWN = 5  # addresses in a message
_PREFIX = "deisa-ray/"
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def agent_address(settings: Settings) -> str:
    """Address of the session's agent on this host: an abstract socket, or the configured path.

    Abstract names exist once for each network namespace and vanish with the process that bound them.
    """
    return settings.socket_path or f"\0{_PREFIX}{os.getuid()}/{settings.session}"


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
    names = [name for name in bound_names(f"@{_PREFIX}") if name != own]
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


def shown(address: str) -> str:
    """Write an address for a message, an abstract one with the usual ``@``."""
    return address.replace("\0", "@", 1)


def this_process() -> str:
    """Name this process, for those who are refused because of it."""
    return f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"


def check_same_user(connection: socket.socket) -> int:
    """Check with the kernel that the other end belongs to this user; returns its process id.

    Raises
    ------
    PeerIdentityError
        When it does not.
    """
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(raw)
    if uid != os.getuid():
        raise PeerIdentityError(
            f"the process at the other end of the agent's socket (pid {pid}) belongs to user id {uid}, "
            f"this one to {os.getuid()}; simulation and analytics must run as the same user"
        )
    return pid
