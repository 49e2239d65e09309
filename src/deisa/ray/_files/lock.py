"""Who writes to a path: one process at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from deisa.ray.errors import SaveConflictError


class PathLock:
    """Held by the one that writes to a path, until it lets go of it or its process ends.

    The lock is on a hidden file beside the path. Where a file system knows no locks, there is none.

    Parameters
    ----------
    path : Path

    Raises
    ------
    SaveConflictError
        When another one holds it.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.with_name(f".{path.name}.lock")
        self._descriptor: int | None = None
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_there(descriptor):  # its holder has removed it meanwhile
                raise BlockingIOError
        except BlockingIOError as exc:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise SaveConflictError(
                f"{path} is being written by {holder}: let each analytics save to a path of its own, or end that one"
            ) from exc
        except OSError:  # of file systems without locks
            os.close(descriptor)
            return
        self._descriptor = descriptor
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def _is_there(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.stat(self._file), os.fstat(descriptor))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let go of it."""
        if self._descriptor is not None:
            self._file.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.release()
