"""The example in which the analytics steers: all ranks stop at the same step, and two runs are the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mpi import Mpi
from tests.support.patience import PATIENCE_S
from tests.support.processes import kill_tree

pytestmark = [pytest.mark.mpi, pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]


def run(mpi: Mpi) -> tuple[list[str], list[str]]:
    """Run both programs; returns what the ranks and the analytics have printed."""
    command = ["-m", "examples.steering.analytics", "--feed=0.03", "--at=600", "--steady=1e-4"]
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as analytics:
        try:
            simulation = ["-m", "mpi4py", "-m", "examples.steering.simulation", "--size=64", "--every=50"]
            ranks = mpi.run(2, *simulation)
            assert ranks.returncode == 0, ranks.stderr
            printed, errors = analytics.communicate(timeout=PATIENCE_S)
            assert analytics.returncode == 0, errors
        finally:
            kill_tree(analytics)
    return sorted(ranks.stdout.splitlines()), printed.splitlines()


@pytest.mark.usefixtures("ray_cluster")
def test_the_analytics_steers(mpi: Mpi, session_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEISA_RAY_SESSION", session_name)
    monkeypatch.chdir(ROOT)
    stopped, seen = run(mpi)
    ends = [re.fullmatch(r"rank (\d) stopped after step (\d+), fed at 0.0300", line) for line in stopped]
    assert [end[1] for end in ends if end is not None] == ["0", "1"], stopped
    (step,) = {end[2] for end in ends if end is not None}
    assert seen[-1].startswith(f"t={step}:")
    assert run(mpi) == (stopped, seen)
