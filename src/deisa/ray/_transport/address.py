"""Where an agent listens, and who may talk to it."""

from __future__ import annotations

import os
import socket
import struct
import time

from deisa.ray.config import Settings
from deisa.ray.errors import PeerIdentityError

_PREFIX = "deisa-ray/"
_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def agent_address(settings: Settings) -> str:
    """Address of the session's agent on this host: an abstract socket, or the configured path.

    Abstract names exist once for each network namespace and vanish with the process that bound them.
    """
    return settings.socket_path or f"\0{_PREFIX}{os.getuid()}/{settings.session}"


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
