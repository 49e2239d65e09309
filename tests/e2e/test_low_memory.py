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
