"""Ranks under mpiexec, the analytics in a process of its own, on one Ray cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mpi import Mpi
from tests.support.patience import PATIENCE_S
from tests.support.processes import kill_tree

pytestmark = [pytest.mark.mpi, pytest.mark.ray]

PROGRAMS = Path(__file__).parent / "programs"


def run_both(
    mpi: Mpi, session: str, timesteps: int, *, dtype: tuple[str, ...] = (), **settings: object
) -> tuple[str, str, str]:
    """Run the simulation and its analytics to their good ends; returns what they printed, and all complaints."""
    settings = {"session": session, "warn_every_s": PATIENCE_S} | settings
    env = {f"DEISA_RAY_{name.upper()}": str(value) for name, value in settings.items()}
    with subprocess.Popen(
        [sys.executable, str(PROGRAMS / "mpi_analytics.py")],
        env=os.environ | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as analytics:
        try:
            script = PROGRAMS / "mpi_simulation.py"
            simulation = mpi.run(4, script, "2", "2", str(timesteps), *dtype, env=env, timeout_s=PATIENCE_S)
            stdout, stderr = analytics.communicate(timeout=PATIENCE_S)
        finally:
            kill_tree(analytics)
    assert simulation.returncode == 0, simulation.stderr
    assert analytics.returncode == 0, stderr
    return simulation.stdout, stdout, simulation.stderr + stderr


def told(timesteps: int, chunks: int) -> list[str]:
    """What the analytics prints."""
    return [
        *(
            f"t={t} of {[t - 1, t][t == 0 :]} mean={100 * t + 1.5} "
            f"corners={[[100 * t, 100 * t + 1], [100 * t + 2, 100 * t + 3]]}"
            for t in range(timesteps)
        ),
        f"{{'temperature': {timesteps}}} 0 failed, {{{chunks}}} chunks",
    ]


def test_runs_one_after_another(ray_cluster: str, mpi: Mpi, session_name: str) -> None:
    for timesteps in (3, 2):
        simulation, analytics, complaints = run_both(mpi, session_name, timesteps)
        assert sorted(simulation.splitlines()) == [
            f"rank {rank} of 4 sent {timesteps} chunks, imported []" for rank in range(4)
        ]
        assert analytics.splitlines() == told(timesteps, chunks=4)
        # Nothing beside what deisa-ray says of its memory: no word of Ray's, none from a rank.
        noise = [line for line in complaints.splitlines() if not line.startswith("deisa-ray: ")]
        assert not noise, "\n".join(noise)


def test_merged_chunks_have_the_same_values(ray_cluster: str, mpi: Mpi, session_name: str) -> None:
    """Four ranks write their parts of one box, which Dask sees cut in two, for two CPUs."""
    _, analytics, complaints = run_both(mpi, session_name, 3, dtype=("float64",), merge_chunks_beyond=0)
    assert analytics.splitlines() == told(3, chunks=2)
    assert "4 chunks merged into 1," in complaints


# One mpiexec for both, which makes the analytics a rank.

MPMD_S = 100.0


def run_mpmd(
    mpi: Mpi, session: str, temp_dir: str, *, split: str, **settings: object
) -> tuple[int, str, str]:
    """Run two ranks and their analytics under one mpiexec, with a Ray of its own; returns status and output."""
    env = {f"DEISA_RAY_{name.upper()}": str(value) for name, value in settings.items()}
    with mpi.popen_both(
        2,
        PROGRAMS / "mpmd_simulation.py",
        PROGRAMS / "mpmd_analytics.py",
        env={
            "DEISA_RAY_ADDRESS": "local",
            "RAY_TMPDIR": temp_dir,
            "SPLIT": split,
            "DEISA_RAY_SESSION": session,
        }
        | env,
    ) as job:
        try:
            stdout, stderr = job.communicate(timeout=MPMD_S)
        finally:
            kill_tree(job)
    return job.returncode, stdout, stderr


@pytest.mark.slow
def test_one_mpiexec_for_both(mpi: Mpi, session_name: str, short_dir: Path) -> None:
    status, stdout, stderr = run_mpmd(mpi, session_name, str(short_dir), split="yes")
    assert "rank 2 of 3 saw [804.0, 884.0, 964.0, 1044.0]" in stdout, stderr
    assert status == 0, stderr


@pytest.mark.slow
def test_a_communicator_that_contains_the_analytics(mpi: Mpi, session_name: str, short_dir: Path) -> None:
    """Both sides say so."""
    status, _, stderr = run_mpmd(
        mpi, session_name, str(short_dir), split="no", start_timeout_s=10, warn_every_s=1
    )
    assert status != 0
    waiting = "waiting for bridge 2 of 3 (the analytics itself is rank 2 of the 3 processes that one mpiexec started"
    errors = [line for line in stderr.splitlines() if line.startswith("deisa.ray.errors.WaitTimeoutError")]
    assert errors and all(waiting in line for line in errors), stderr
    assert stderr.count(waiting) > len(errors), "said while they wait, too"
