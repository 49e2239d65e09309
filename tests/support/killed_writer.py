"""Kills a writer of a series before its calls that change files. Arguments: the series' path, and how many calls
later each kill is than the one before.

Children of this process append timesteps 1 to 3 to a series that has timesteps 0 and 1 of an earlier run. Each is
killed (SIGKILL, by itself). Afterwards readers find a series whose timesteps are whole, and another writer goes on.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np

from deisa.ray._files.journal import journal_of
from deisa.ray.files import Writer

SHAPE = (64, 64)
CHANGES = {  # events of Python's audit hooks
    *("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree"),
}


def values(timestep: int) -> np.ndarray:
    return np.arange(float(np.prod(SHAPE))).reshape(SHAPE) + 1000 * timestep


def append(writer: Writer, timesteps: Sequence[int], sign: int = 1) -> None:
    for timestep in timesteps:
        writer.append(
            x=sign * da.from_array(values(timestep), chunks=32), time=timestep / 2, timestep=timestep
        )


def die_at(number: int) -> None:
    """Have this process kill itself before its call of that number."""
    calls = itertools.count()

    def count() -> None:
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, args: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT):
            count()

    write = os.pwrite

    def pwrite(*args: Any) -> int:
        count()
        return write(*args)

    os.pwrite = pwrite
    sys.addaudithook(heard)


def read(path: Path) -> list[tuple[int, int]]:
    """The timesteps that a reader sees, and of which run each is; all their values are right."""
    if path.suffix == ".zarr":
        import zarr

        if not (path / "zarr.json").exists():
            return []
        found: Any = zarr.open_group(path, mode="r")
        alone: dict[str, Any] = {name: zarr.open_array(path / name, mode="r") for name in ("x", "timestep")}
        assert alone["x"].shape[0] >= min(alone["timestep"].shape[0], found["timestep"].shape[0])
        for index in range(alone["x"].shape[0]):
            assert not np.isnan(alone["x"][index]).any(), "somebody sees values that are not there"
    else:
        import h5py

        if not path.exists():
            return []
        found = h5py.File(path, "r")
    timesteps = found["timestep"][:].tolist()
    assert found["x"].shape[0] == len(timesteps)
    assert found["time"][:].tolist() == [timestep / 2 for timestep in timesteps]
    seen = []
    for index, timestep in enumerate(timesteps):
        one = found["x"][index]
        run = next((sign for sign in (-1, 1) if np.array_equal(one, sign * values(timestep))), None)
        assert run is not None, f"wrong values at timestep {timestep}"
        seen.append((timestep, run))
    if hasattr(found, "close"):
        found.close()
    return seen


def main() -> None:
    path = Path(sys.argv[1])
    before, between = path.with_name("before"), Counter[str]()
    with Writer(path) as writer:
        append(writer, (0, 1), sign=-1)
    (shutil.copytree if path.is_dir() else shutil.copyfile)(path, before)
    for number in itertools.count(0, int(sys.argv[2])):
        for file in path.parent.iterdir():
            if file != before:
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        (shutil.copytree if before.is_dir() else shutil.copyfile)(before, path)
        child = os.fork()
        if not child:
            die_at(number)
            append(Writer(path), (1, 2, 3))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, (
            f"the writer failed at {number}"
        )
        if (
            path.suffix != ".zarr"
            and journal_of(path).exists()
            and b"offsets" in journal_of(path).read_bytes()
        ):
            between["journal"] += 1  # the one moment at which a reader has to wait for the next writer
        else:
            seen = read(path)
            assert seen in (
                [(0, -1), (1, -1)], [(0, -1)], *([(0, -1), *((t, 1) for t in range(1, n + 1))] for n in (1, 2, 3)),
            ), seen  # fmt: skip
            between[str(seen)] += 1
        with Writer(path) as writer:
            next_one = max((1, *(t + 1 for t, run in read(path) if run == 1)))
            append(writer, range(next_one, 5))
        assert read(path) == [(0, -1), *((t, 1) for t in range(1, 5))]
        if not os.WIFSIGNALED(status):
            break
    print(number, "calls", dict(between))
    assert len(between) >= 3


if __name__ == "__main__":
    with dask.config.set(scheduler="sync"):
        main()
