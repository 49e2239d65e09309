"""What a node has too little of: it does not matter, or is said before the first timestep."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deisa.ray import Deisa
from deisa.ray.errors import MemoryBoundError
from tests.conftest import skip_or_fail
from tests.support.patience import PATIENCE_S, wait_until

ROOT = Path(__file__).parents[2]
LIMITED = Path(__file__).parent / "programs/limited.py"
RANK = Path(__file__).parent / "programs/rank.py"


def session(*sizes: int, under: Sequence[str] = ()) -> dict[str, Any]:
    """Run a session in a process of its own, under another command."""
    done = subprocess.run(
        [*under, sys.executable, str(LIMITED), *map(str, sizes)],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        env={**os.environ, "DEISA_RAY_START_TIMEOUT_S": str(PATIENCE_S)},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def shell(command: str) -> list[str]:
    return ["sh", "-c", f'{command} && exec "$@"', "sh"]


def test_two_thousand_chunks_on_one_agent() -> None:
    assert session(1, 2000, 10) == {"seen": [20_000.0, 40_000.0], "errors": {}}


def test_many_bridges_on_one_agent() -> None:
    assert session(200, 10, 10) == {"seen": [20_000.0, 40_000.0], "errors": {}}


def test_too_few_open_files() -> None:
    """The bridges' sockets just fit, the memory of all of them does not."""
    ended = session(60, 1, 10, under=shell("ulimit -n 220"))
    assert ended["seen"] == []
    assert len(set(ended["errors"].values())) == 1, ended
    assert sorted(ended["errors"]) == sorted(["analytics", *(f"bridge {number}" for number in range(60))])
    assert ended["errors"]["analytics"].startswith(
        "DescriptorLimitError: the memory of 60 bridges on one node takes 121 descriptors"
    )
    assert "(ulimit -n)" in ended["errors"]["analytics"]


def test_hardly_any_shared_memory_and_a_full_disk() -> None:
    """Chunk memory lies in neither."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        skip_or_fail("mounting a small file system needs root and `unshare` (package util-linux)")
    needed = [Path(path).resolve() for path in (ROOT, sys.prefix, sys.base_prefix)]
    full = with_full_tmp([path for path in needed if Path("/tmp") in path.parents])
    under = ["unshare", "--mount", *shell(f"mount -t tmpfs -o size=64k small /dev/shm && {full}")]
    assert session(2, 1, 2**20, under=under) == {"seen": [2.0**21, 2.0**22], "errors": {}}


def with_full_tmp(kept: Sequence[Path]) -> str:
    """A command that hides /tmp behind a full file system, all but some folders below it."""
    opened, mounted = [], []
    for descriptor, folder in enumerate(map(shlex.quote, map(str, kept)), start=5):
        opened.append(f"exec {descriptor}< {folder}")
        behind = f"/proc/self/fd/{descriptor}"  # the folder itself, which its name leads to no more
        mounted.append(f"mkdir -p {folder} && mount --no-canonicalize --bind {behind} {folder}")
    mount = "mount -t tmpfs -o size=4k full /tmp"
    return " && ".join([*opened, mount, *mounted, "head -c 4096 /dev/zero > /tmp/full"])


# The memory limit of a rank's control group.


@contextmanager
def memory_limit(nbytes: int) -> Iterator[list[str]]:
    """A control group of the test's own; yields a command that runs another one in it."""
    root = Path("/sys/fs/cgroup")
    version_1 = (root / "memory").is_dir()
    group = root / ("memory" if version_1 else "") / f"deisa-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(nbytes))
    except OSError as error:
        if group.exists():
            group.rmdir()
        skip_or_fail(f"limiting the memory of a process takes root and control groups: {error}")
    try:
        yield shell(f"echo $$ > {group}/cgroup.procs")
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), "the processes of the group have ended")
        group.rmdir()


def limited_rank(under: Sequence[str], session: str, elements: int, rank: int = 0, size: int = 1) -> Any:
    """Start tests/e2e/programs/rank.py under a limit."""
    return subprocess.Popen(
        [*under, sys.executable, str(RANK), *map(str, (rank, size, 2, elements)), "close"],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DEISA_RAY_SESSION": session},
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_rank_would_be_killed_for_is_refused_on_both_sides(session_name: str, ranks: int) -> None:
    """Two slots of each chunk take 192 MiB in all, and the ranks may have 224 MiB with all that they have already."""
    elements = 12 * 2**20 // ranks
    with memory_limit(224 * 2**20) as under:
        started = [limited_rank(under, session_name, elements, rank, ranks) for rank in range(ranks)]
        with Deisa(engine="local", session=session_name) as deisa:
            deisa.register_callback(lambda x: None, "x")
            with pytest.raises(MemoryBoundError) as caught:
                deisa.execute_callbacks()
        said = str(caught.value)
        who = "bridge 0" if ranks == 1 else "bridges 0 and 1"
        assert f"{who} of this node would take 192.0 MiB of chunk memory" in said
        assert "under the memory limit of 224.0 MiB of their control group /sys/fs/cgroup/" in said
        for rank in started:
            assert f"MemoryBoundError: {said}" in rank.communicate(timeout=PATIENCE_S)[1]
            assert rank.returncode == 1


def test_a_rank_whose_slots_fit_under_its_limit(session_name: str) -> None:
    with memory_limit(256 * 2**20) as under:
        rank = limited_rank(under, session_name, 2**20)
        with Deisa(engine="local", session=session_name) as deisa:
            deisa.register_callback(lambda x: None, "x")
            assert deisa.execute_callbacks().callbacks[0].calls == 2
        assert rank.communicate(timeout=PATIENCE_S)[1] == ""
