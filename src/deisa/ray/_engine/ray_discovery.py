"""What can be known of a Ray cluster before Ray is asked to join it: Ray itself tries for minutes, in silence."""

from __future__ import annotations

import os
import pwd
import re
import socket
from dataclasses import dataclass
from pathlib import Path

ANSWER_S = 5.0
DEFAULT_PORT = 6379
_RAYLET = "raylet"
_GCS_FLAG = "--gcs-address="

# A server of gRPC answers a client's preface, here with empty settings, by its own settings.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
_FRAME_HEADER_BYTES = 9
_SETTINGS_FRAME = 4


@dataclass(frozen=True, slots=True)
class RayNodeHere:
    """A node of a Ray cluster that runs on this host.

    Attributes
    ----------
    address : str
        Of the cluster's head, as ``host:port``.
    uid : int
        Of the user whose process the node is.
    """

    address: str
    uid: int

    @property
    def is_own(self) -> bool:
        """Whether it is this user's."""
        return self.uid == os.geteuid()


class NoAnswerError(Exception):
    """Nothing that could be the head of a Ray cluster answers.

    Parameters
    ----------
    reason : str
    final : bool
        Whether it makes no sense to try again.
    """

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


def nodes_here(proc: Path = Path("/proc")) -> list[RayNodeHere]:
    """The nodes of Ray clusters on this host, whoever's they are; read from the command lines of processes."""
    found = []
    for folder in proc.glob("[0-9]*"):
        try:
            words = re.split(r"[\0 ]", (folder / "cmdline").read_text(errors="replace"))
            uid = folder.stat().st_uid
        except OSError:  # it has ended, or is hidden
            continue
        if os.path.basename(words[0]) == _RAYLET:
            addresses = [word.removeprefix(_GCS_FLAG) for word in words if word.startswith(_GCS_FLAG)]
            found += [RayNodeHere(address, uid) for address in addresses]
    return found


def user_name(uid: int) -> str:
    """A user, by name if it has one here."""
    try:
        return f"user {pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def temp_folder() -> tuple[Path, str]:
    """Where Ray keeps its sessions, and the variable that says so; the variable is empty where none does."""
    for variable in ("RAY_TMPDIR", "TMPDIR"):
        if variable in os.environ:
            return Path(os.environ[variable], "ray"), variable
    return Path("/tmp/ray"), ""


def noted_address() -> tuple[str | None, str]:
    """The address that ``ray start`` noted for this user, and what there is to say if it cannot be used."""
    note = temp_folder()[0] / "ray_current_cluster"
    try:
        uid = note.stat().st_uid
        if uid != os.geteuid():
            return None, f"{note} belongs to {user_name(uid)}"
        return note.read_text(errors="replace").strip() or None, ""
    except (FileNotFoundError, NotADirectoryError):
        return None, ""
    except OSError as exc:
        return None, f"{note} cannot be read ({exc.strerror})"


def split_address(address: str) -> tuple[str, int] | None:
    """Host and port of ``host:port``, or None where it is something else."""
    host, _, port = address.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        return None
    if ":" in host and not host.startswith("["):
        return None  # an IPv6 address without a port
    return host.strip("[]"), int(port)


def check_answers(host: str, port: int, timeout_s: float = ANSWER_S) -> None:
    """Check that something which could be the head of a Ray cluster answers.

    Raises
    ------
    NoAnswerError
    """
    try:
        with socket.create_connection((host, port), timeout_s) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("", "0"):
                return  # it would want a certificate before it says anything
            connection.sendall(_PREFACE)
            header = b""
            while len(header) < _FRAME_HEADER_BYTES and (more := connection.recv(_FRAME_HEADER_BYTES)):
                header += more
    except socket.gaierror as exc:
        raise NoAnswerError(f"there is no host {host!r} ({exc.strerror})", final=True) from exc
    except TimeoutError as exc:
        raise NoAnswerError(f"nothing came within {timeout_s:g} s") from exc
    except OSError as exc:
        raise NoAnswerError(str(exc)) from exc
    if len(header) < _FRAME_HEADER_BYTES or header[3] != _SETTINGS_FRAME:
        raise NoAnswerError(
            "what listens there is no Ray head (its port is that of `ray start --head --port`, "
            f"{DEFAULT_PORT} by default; the dashboard and Ray Client have others)",
            final=True,
        )
