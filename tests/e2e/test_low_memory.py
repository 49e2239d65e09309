"""What everybody is told where Ray's memory monitor ends processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deisa.ray.errors import MEMORY_MONITOR
from tests.support.patience import PATIENCE_S
from tests.support.processes import kill_tree
from tests.support.ray_node import RayNode

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PROGRAM = Path(__file__).parent / "programs/low_memory.py"

FILL = """
import dask.array as da
import numpy as np
from deisa.ray import deisa_ray_get

def large(block):
    return np.zeros(2**24)

da.zeros(1, chunks=1).map_blocks(large, chunks=(2**24,), meta=np.array(())).compute(scheduler=deisa_ray_get)
"""


def test_the_memory_monitor_is_named(
    short_dir: Path, session_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a threshold that any machine exceeds, it ends whatever runs."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    node = RayNode.start(short_dir)
    try:
        node.wait_started()
        with subprocess.Popen(
            [sys.executable, str(PROGRAM), session_name],
            env=os.environ | {"RAY_ADDRESS": node.address, "DEISA_RAY_CONNECT_TIMEOUT_S": "10"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as program:
            try:
                stdout, stderr = program.communicate(timeout=PATIENCE_S)
            finally:
                kill_tree(program)
    finally:
        node.stop()
    lines = [line for line in stdout.splitlines() if line.startswith(("computation ", "analytics ", "rank "))]
    told = {line.split()[0]: line for line in lines}  # Ray's own words are between them
    assert told["computation"].startswith("computation ComputationLostError "), stdout + stderr
    assert told["analytics"].startswith("analytics AgentLostError "), stdout + stderr
    for line in told.values():
        assert MEMORY_MONITOR in line or line.startswith("rank NoAnalyticsError "), line


def test_a_full_disk_has_words_of_its_own(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is larger than the object store, and a disk of which one percent may be in use."""
    monkeypatch.setenv("RAY_local_fs_capacity_threshold", "0.01")
    node = RayNode.start(short_dir, object_store_bytes=80_000_000)
    try:
        node.wait_started()
        done = subprocess.run(
            [sys.executable, "-c", FILL],
            env=os.environ | {"RAY_ADDRESS": node.address},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    finally:
        node.stop()
    assert done.returncode == 1
    assert "deisa.ray.errors.StoreFullError: the disk is full to which Ray writes" in done.stderr
