"""What a process of an MPI job must not pass on to Ray.

A launcher tells each process of a job by its environment which rank it is. A Ray that one of them starts, and every
worker of that Ray, would inherit this; a worker that imports mpi4py would then take itself for that rank, and abort.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass

# Of Slurm the variables of a step only: those of the job tell nobody that it is a rank.
_OF_A_RANK = re.compile(
    "(PMI|PMI2|PMIX|OMPI|PRTE|ORTE|OPAL|HYDRA|HYDI|PALS|ALPS|FLUX_TASK|FLUX_PMI|JSM|MV2_COMM_WORLD|MPIRUN)_.*"
    "|MPI_LOCAL(RANKID|NRANKS)"
    "|SLURM_(STEP.*|SRUN_.*|PMI.*|PROCID|LOCALID|NODEID|TASK_PID|GTIDS|LAUNCH_NODE_IPADDR|MPI_TYPE)"
)

# Where launchers say which rank a process is, and of how many. Slurm sets SLURM_PROCID in the batch script too, but
# the number of a step's tasks in steps only.
_RANK_AND_SIZE = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
    ("PALS_RANKID", "PALS_NRANKS"),
    ("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Which process of an MPI job this one is.

    Attributes
    ----------
    rank, size : int
        In ``MPI.COMM_WORLD``.
    """

    rank: int
    size: int


def place_in_job(environment: Mapping[str, str] | None = None) -> Place | None:
    """Which process of an MPI job of several this one is, as its launcher says; None where it is not of any."""
    environment = os.environ if environment is None else environment
    for rank, size in _RANK_AND_SIZE:
        try:
            place = Place(int(environment[rank]), int(environment[size]))
        except (KeyError, ValueError):
            continue
        return place if place.size > 1 else None
    return None


def forget_rank(environment: MutableMapping[str, str] | None = None) -> dict[str, str]:
    """Remove what says that this process is a rank of an MPI job; returns what that was."""
    environment = os.environ if environment is None else environment
    names = [name for name in environment if _OF_A_RANK.fullmatch(name)]
    return {name: environment.pop(name) for name in names}


@contextmanager
def no_rank() -> Iterator[None]:
    """Have processes that are started in this context not know of the MPI job that this one belongs to."""
    forgotten = forget_rank()
    try:
        yield
    finally:
        os.environ |= forgotten
