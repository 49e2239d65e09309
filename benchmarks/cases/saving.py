"""Saving timesteps to files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.clusters import output_of, ray_cluster, started
from benchmarks.grids import RANKS, Grid, run
from benchmarks.peers import PeerUnavailableError
from benchmarks.suite import THIS, Outcome, Setting, case

if TYPE_CHECKING:
    import dask.array as da

TIMEOUT_S = 600.0
PLAIN = "dask.array.to_zarr"
PER_RANK = "h5py, a file of each rank"
GATHERED = "h5py, gathered by rank 0"
PARALLEL = "h5py with MPI"
WITH_MPI = {  # Debian's h5py has both kinds, and its OpenMPI does not like root
    "H5PY_ALWAYS_USE_MPI": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
DEBIAN_PYTHON, DEBIAN_MPIEXEC = Path("/usr/bin/python3"), Path("/usr/bin/mpiexec")


@case("How fast are timesteps saved, to Zarr and to HDF5?")
def files(setting: Setting) -> Outcome:
    """16 chunks of 8 MiB a timestep, random numbers; into the page cache, nobody waits for the disk."""
    outcome = Outcome()
    grid = Grid((RANKS, setting.pick(8, 2)), setting.pick((1024, 1024), (64, 64)))
    steps = setting.pick(8, 3)
    size = grid.count * 8 * grid.shape[0] * grid.shape[1]
    speeds: dict[tuple[str, str], float] = {}

    def record(what: str, system: str, took: float) -> None:
        speeds[what, system] = outcome.figure(f"saving, {what}", system, size / took / 2**20, "MiB/s")
        for path in setting.scratch.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    with ray_cluster():
        for what, path, options in (
            ("Zarr", "out.zarr", {}),
            ("HDF5, one file that grows", "out.h5", {}),
            ("HDF5, a file each timestep", "out-{timestep}.h5", {}),
            ("HDF5, a file each timestep, parts by nodes", "out-{timestep}.h5", {"virtual": True}),
        ):
            record(what, THIS, _ours(grid, steps, setting.scratch / path, options))
        record("Zarr", PLAIN, _plain(grid, steps, setting.scratch))
    for system, way in ((PER_RANK, "own"), (GATHERED, "gather"), (PARALLEL, "parallel")):
        try:
            record("HDF5, a file each timestep", system, _by_ranks(grid, steps, setting.scratch, way))
        except PeerUnavailableError as reason:
            outcome.not_measured(system, reason)
    outcome.compare(
        "saving to Zarr: this / to_zarr", speeds["Zarr", THIS] / speeds["Zarr", PLAIN], ">=", None
    )
    return outcome


def _ours(grid: Grid, steps: int, path: Path, options: dict[str, Any]) -> float:
    """Median time of a callback that saves (seconds)."""
    from deisa.ray.files import Writer

    writer = Writer(path, **options)
    timesteps = iter(range(steps))

    def save(window: Sequence[da.Array]) -> None:
        writer.append(field=window[-1], timestep=next(timesteps))

    took = run(grid, steps, save).later
    writer.close()
    return took


def _plain(grid: Grid, steps: int, folder: Path) -> float:
    """Median time of Dask's own function, with its threads, on an array in memory (seconds)."""
    import dask.array as da

    lazy = da.from_array(grid.values(), chunks=grid.shape)
    return _median([_timed(lambda n=n: lazy.to_zarr(str(folder / f"plain-{n}.zarr"))) for n in range(steps)])


def _by_ranks(grid: Grid, steps: int, folder: Path, way: str) -> float:
    python, mpiexec = Path(sys.executable), Path(sys.executable).parent / "mpiexec"
    if way == "parallel":
        python, mpiexec = DEBIAN_PYTHON, DEBIAN_MPIEXEC
        probe = "import mpi4py, h5py; assert h5py.get_config().mpi, 'h5py was built without MPI'"
        found = python.exists() and mpiexec.exists()
        with_mpi = {**os.environ, **WITH_MPI}
        done = (
            subprocess.run([python, "-c", probe], env=with_mpi, capture_output=True, text=True)
            if found
            else None
        )
        if done is None or done.returncode:
            why = done.stderr.strip().splitlines()[-1] if done is not None else f"{mpiexec} was not found"
            raise PeerUnavailableError(f"{why} (Debian: python3-h5py-mpi, python3-mpi4py)")
    rows, columns = grid.chunks[0] // RANKS * grid.shape[0], grid.chunks[1] * grid.shape[1]
    program = [
        *(mpiexec, "-n", str(RANKS), python, Path(__file__).parents[1] / "programs" / "file_ranks.py"),
        *(f"--way={way}", f"--folder={folder}", f"--steps={steps}", "--shape", str(rows), str(columns)),
    ]
    with started(program, WITH_MPI) as ranks:
        return _median(json.loads(output_of(ranks, TIMEOUT_S).splitlines()[-1])["took"])


def _timed(do: Callable[[], Any]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def _median(took: Sequence[float]) -> float:
    return float(np.median(took[len(took) // 2 :]))
