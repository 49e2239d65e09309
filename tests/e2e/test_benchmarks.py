"""Benchmarks, small: cases as `make bench` runs them, each on what `make test` installs."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.clusters import ROOT
from benchmarks.results import read
from tests.support.processes import kill_tree

pytestmark = [pytest.mark.mpi, pytest.mark.ray]

# One for each way in which cases measure, but `slowdown` and `traffic`, which are slow.
SHARING = ["answer", "harder-callback"]
APART = [
    pytest.param(case, marks=pytest.mark.slow) for case in ("memory", "scale", "files")
]  # want a cluster to themselves


@pytest.mark.parametrize("case", SHARING + APART)
def test_a_case_runs(case: str, ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case in SHARING:
        monkeypatch.setenv("BENCHMARKS_RAY_ADDRESS", ray_cluster)
    command = [sys.executable, "-m", "benchmarks", "--quick", "--no-peers", f"--out={tmp_path}", case]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as suite:
        try:
            printed, errors = suite.communicate(timeout=200)
        finally:
            kill_tree(suite)
    assert suite.returncode == 0, errors
    (outcome,) = read(tmp_path, quick=True).values()
    assert all(math.isfinite(value) for figure in outcome.figures for value in figure.values)
    assert outcome.figures or outcome.notes
    assert len(list(tmp_path.glob("*.svg"))) == len(outcome.curves)
    assert printed.strip() == (tmp_path / "results.md").read_text().strip()
