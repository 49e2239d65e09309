"""What says that a process is a rank of an MPI job, and how to forget it."""

from __future__ import annotations

import os

import pytest

from deisa.ray._engine.ray_environment import Place, forget_rank, no_rank, place_in_job

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
