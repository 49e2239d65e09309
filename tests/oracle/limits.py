"""The memory limits that this process is under."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from deisa.ray._transport.limits import MemoryLimit

ROOT = Path("/sys/fs/cgroup")
_UNLIMITED = 2**60  # what version 1 says without a limit is larger
_FILES = (
    ("memory.max", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)  # versions 2 and 1


def own_limits(memberships: str | None = None, root: Path = ROOT) -> tuple[MemoryLimit, ...]:
    """Return the limits that this process is under: that of its own control group, and those of all above.

    Parameters
    ----------
    memberships : str, optional
        What ``/proc/self/cgroup`` says.
    root : Path
        Where control groups are mounted.
    """
    if memberships is None:
        try:
            memberships = Path("/proc/self/cgroup").read_text()
        except OSError:
            return ()
    limits = [_limit_of(group) for group in _memory_groups(memberships, root)]
    return tuple({limit.group: limit for limit in limits if limit is not None}.values())


def _memory_groups(memberships: str, root: Path) -> Iterable[Path]:
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            mounted = root / ("memory" if controllers else "")
            own = mounted / path.lstrip("/")
            yield from (group for group in (own, *own.parents) if group.is_relative_to(mounted))


def _limit_of(group: Path) -> MemoryLimit | None:
    for limit_name, used_name in _FILES:
        try:
            limit = (group / limit_name).read_text().strip()
            used = int((group / used_name).read_text())
            cached = _inactive_files((group / "memory.stat").read_text())
            number = group.stat().st_ino
        except (OSError, ValueError):
            continue
        if limit.isdigit() and int(limit) < _UNLIMITED:
            return MemoryLimit(number, str(group), int(limit), max(0, int(limit) - max(0, used - cached)))
    return None


def _inactive_files(stat: str) -> int:
    """Bytes of cached files that the kernel gives up when memory is needed."""
    fields = dict(line.split() for line in stat.splitlines())
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
