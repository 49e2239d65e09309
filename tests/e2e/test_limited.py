"""What a node has too little of: it does not matter, or is said before the first timestep."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import skip_or_fail
from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
LIMITED = Path(__file__).parent / "programs/limited.py"


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
        "DescriptorLimitError: the memory of 60 bridges on one node takes 120 descriptors"
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
