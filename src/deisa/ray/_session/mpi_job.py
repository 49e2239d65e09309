"""What the launcher of an MPI job tells each process, and what follows where one of them is the analytics.

A launcher tells each process of a job by its environment which rank it is. A Ray that one of them starts, and every
worker of that Ray, would inherit this; a worker that imports mpi4py would then take itself for that rank, and abort.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Container, Iterator, Mapping, MutableMapping
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


def explain_missing(joined: Container[int], world_size: int | None, place: Place | None) -> str:
    """Say why bridges are missing if that is because the analytics is itself a process of their MPI job.

    Parameters
    ----------
    joined : container of int
        Ids of the bridges that are there.
    world_size : int or None
        How many bridges there should be; None if no bridge has come yet.
    place : Place or None
        Of the analytics.

    Returns
    -------
    str
        Something to add to a line that names the missing bridges; empty if there is nothing to say.
    """
    if place is None:
        return ""
    if world_size is None and "mpi4py.MPI" not in sys.modules:
        return (
            f" (the analytics is rank {place.rank} of the {place.size} processes that one mpiexec started: MPI_Init "
            "of the others may wait until the analytics calls it too, as `import mpi4py.MPI` does)"
        )
    if world_size == place.size and place.rank not in joined:
        return (
            f" (the analytics itself is rank {place.rank} of the {place.size} processes that one mpiexec started: "
            "give Bridge a communicator without it, made by MPI.COMM_WORLD.Split() in both programs)"
        )
    return ""


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
