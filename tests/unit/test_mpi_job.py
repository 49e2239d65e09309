"""What says that a process is a rank of an MPI job, how to forget it, and what it explains."""

from __future__ import annotations

import os
import sys

import pytest

from deisa.ray._session.mpi_job import Place, explain_missing, forget_rank, no_rank, place_in_job

OF_A_RANK = {
    "mpich": ["PMI_RANK", "PMI_SIZE", "PMI_FD", "HYDI_CONTROL_FD", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"],
    "openmpi": ["OMPI_COMM_WORLD_RANK", "OMPI_MCA_ess", "PMIX_RANK", "PMIX_SERVER_URI41", "PRTE_LAUNCHED"],
    "slurm": [
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_NODEID",
        "SLURM_STEP_ID",
        "SLURM_STEPID",
        "SLURM_TASK_PID",
    ],
    "slurm2": ["SLURM_GTIDS", "SLURM_SRUN_COMM_HOST", "SLURM_LAUNCH_NODE_IPADDR", "SLURM_MPI_TYPE"],
    "cray": ["PALS_RANKID", "PALS_APID", "PMI_CONTROL_PORT", "ALPS_APP_PE"],
    "others": ["FLUX_TASK_RANK", "JSM_NAMESPACE_RANK", "MV2_COMM_WORLD_RANK"],
}
OF_THE_JOB = [
    *("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK", "SLURM_NODELIST", "FLUX_URI"),
    *("MPICH_OFI_NIC_POLICY", "OMP_NUM_THREADS", "PATH", "PMIXED", "UCX_TLS"),
]


@pytest.mark.parametrize("launcher", OF_A_RANK)
def test_what_a_launcher_tells_its_ranks_is_forgotten(launcher: str) -> None:
    told = dict.fromkeys(OF_A_RANK[launcher], "1")
    kept = dict.fromkeys(OF_THE_JOB, "2")
    environment = told | kept
    assert forget_rank(environment) == told
    assert environment == kept


def test_it_is_there_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PMI_RANK", "1")
    with pytest.raises(ZeroDivisionError), no_rank():
        assert "PMI_RANK" not in os.environ
        raise ZeroDivisionError
    assert os.environ["PMI_RANK"] == "1"


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({"PMI_RANK": "2", "PMI_SIZE": "3"}, Place(2, 3)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4", "PMIX_RANK": "0"}, Place(0, 4)),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "8"}, Place(1, 2)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, None),  # a batch script is no rank
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, None),
        ({"PMI_RANK": "first", "PMI_SIZE": "3"}, None),
        ({}, None),
    ],
    ids=["mpich", "openmpi", "slurm", "batch", "alone", "nonsense", "none"],
)
def test_which_process_of_a_job_one_is(environment: dict[str, str], place: Place | None) -> None:
    assert place_in_job(environment) == place


# Whom the analytics waits for.


@pytest.mark.parametrize(
    ("joined", "world_size", "expected"),
    [
        ([0, 1], 3, True),
        ([0], 3, True),
        ([0, 2], 3, False),  # the bridge that is missing is another process
        ([0, 1], 4, False),  # not the communicator that contains the analytics
    ],
)
def test_a_bridge_that_is_the_analytics_itself(joined: list[int], world_size: int, expected: bool) -> None:
    text = explain_missing(joined, world_size, place=Place(2 if expected or world_size == 4 else 0, 3))
    assert bool(text) == expected
    if expected:
        assert "the analytics itself is rank 2 of the 3 processes" in text
        assert "MPI.COMM_WORLD.Split()" in text


def test_ranks_that_wait_in_mpi_init(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    text = explain_missing([], None, place=Place(2, 3))
    assert "MPI_Init" in text and "import mpi4py.MPI" in text
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", sys)
    assert explain_missing([], None, place=Place(2, 3)) == ""


def test_nothing_is_explained_outside_of_mpi_jobs() -> None:
    assert explain_missing([0], 3, place=None) == explain_missing([], None, place=None) == ""
