"""What an operating system says about a path, in terms of what was to be saved there."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deisa.ray.errors import SaveError, cause_chain

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def saving(where: str, what: str) -> Iterator[None]:
    """Have errors of the operating system name the path, and what can be done."""
    try:
        yield
    except SaveError:
        raise
    except Exception as error:
        number = _number_of(error)
        if number is None:
            raise
        raise SaveError(f"{where}: {what} could not be saved: {_reason(where, number, error)}") from error


def _number_of(error: Exception) -> int | None:
    """The number of an error of the operating system, also where a library tells of it in its own words."""
    for link in cause_chain(error):
        if isinstance(link, OSError):
            if link.errno is not None:
                return link.errno
            for number in (*_FULL, *_FORBIDDEN):
                if os.strerror(number) in str(link):
                    return number
    return 0 if isinstance(error, OSError) else None


def _reason(where: str, number: int, error: Exception) -> str:
    if number in _FULL:
        return (
            f"{os.strerror(number)} ({_free(where)}); make room. What was saved before is whole, and the next "
            "timestep is tried again"
        )
    if number in _FORBIDDEN:
        return f"{os.strerror(number)}; have user {_user()} allowed to write there, or give another path"
    if number in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return f"{os.strerror(number)}: a file is where a folder should be, or the other way round; give another path"
    if number in (errno.ENOENT, errno.ESTALE):
        return f"{os.strerror(number)}: a folder has gone, or is not on every node; give a path that all nodes share"
    return f"{error}"


def _free(where: str) -> str:
    folder = Path(where)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB free at {folder}"
    except OSError as exc:
        return str(exc)


def _user() -> str:
    return str(os.geteuid())
