"""Saving from a run, on both engines: without a callback, in one, and as 0.1.8 did it."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xarray as xr
import zarr

from deisa.ray import DeisaArray, WindowSpec
from deisa.ray.errors import (
    AnalyticsLostError,
    RegistrationError,
    SaveError,
    SaveFormatError,
    SaveMismatchError,
    WindowError,
)
from deisa.ray.files import Writer
from deisa.ray.types import to_hdf5
from tests.e2e.simulation import Site, ranks, rows, values

SHAPE = (70, 60)
BORDERS = (0, 30, 70)  # uneven rows, of two ranks


def send(site: Site, rank: int, timesteps: range, number: bool = False) -> None:
    mine = slice(*BORDERS[rank : rank + 2])
    arrays: dict[str, Any] = {
        "x": {
            "global_shape": SHAPE,
            "chunk_shape": (mine.stop - mine.start, SHAPE[1]),
            "offset": (mine.start, 0),
            "dtype": float,
            "dims": ("row", "column"),
            "coords": {
                "row": {"start": 0.0, "step": 0.5},
                "site": ("row", [f"row {i}" for i in range(SHAPE[0])]),
            },
            "attrs": {"units": "K", "valid_range": [0, 1e9]},
        }
    }
    if number:
        arrays["n"] = rows(rank, 2)
    with site.bridge(rank, 2, arrays) as bridge:
        for timestep in timesteps:
            bridge.send("x", values(SHAPE, timestep)[mine], timestep, time=timestep / 4)
            if number:
                bridge.send("n", np.full(4, float(rank)), timestep)


def run(site: Site, deisa: Any, timesteps: range, number: bool = False) -> None:
    with ranks(*(partial(send, site, rank, timesteps, number) for rank in range(2))):
        report = deisa.execute_callbacks()
    assert report.callbacks_failed == 0


def check(found: Any, timesteps: list[int], by: float = 1) -> None:
    assert np.asarray(found["timestep"]).tolist() == timesteps
    for index, timestep in enumerate(timesteps):
        np.testing.assert_array_equal(np.asarray(found["x"][index]), by * values(SHAPE, timestep))


def check_labels(found: xr.Dataset) -> None:
    assert found.x.dims == ("time", "row", "column")
    assert found.x.units == "K"
    assert list(found.x.valid_range) == [0, 1e9]
    np.testing.assert_array_equal(found.row, np.arange(SHAPE[0]) / 2)
    assert found.site.values[7] == "row 7"


def test_saving_without_a_callback(site: Site, tmp_path: Path) -> None:
    """All formats in one run; then another run goes on with what is there."""
    paths = {name: tmp_path / f"out.{name}" for name in ("zarr", "h5", "nc")}

    def save_all(timesteps: range) -> None:
        deisa = site.deisa()
        writer = deisa.save("x", paths["zarr"])
        assert deisa.save("x", paths["zarr"]) is writer
        deisa.save("x", paths["h5"], every=2)
        deisa.save(["x", "n"], str(paths["nc"]), every=3)
        deisa.save(
            WindowSpec("x", 2),
            tmp_path / "event.zarr",
            trigger=lambda x: x[-1].t in (1, 4),  # type: ignore[index]
        )
        deisa.save("x", tmp_path / "one-{timestep:02d}.nc", every=2)
        deisa.save("x", tmp_path / "parts-{timestep:02d}.h5", every=2, virtual=True)
        run(site, deisa, timesteps, number=True)
        deisa.close()

    save_all(range(3))
    save_all(range(2, 5))
    check(zarr.open_group(paths["zarr"], mode="r"), [0, 1, 2, 3, 4])
    check(zarr.open_group(tmp_path / "event.zarr", mode="r"), [0, 1, 3, 4])
    with h5py.File(paths["h5"]) as file:
        check(file, [0, 2, 4])
    with xr.open_dataset(paths["nc"]) as found:
        check(found, [0, 3])
        check_labels(found)
        assert found.time.values.tolist() == [0, 0.75]
        assert found.n.values.tolist() == [[0.0] * 4 + [1.0] * 4] * 2
    for timestep in (0, 2, 4):
        for kind in ("one", "parts"):
            (path,) = tmp_path.glob(f"{kind}-{timestep:02d}.??")  # .nc and .h5
            with xr.open_dataset(path, engine="h5netcdf") as found:
                check(found, [timestep])
                check_labels(found)
    check_labels(xr.open_zarr(paths["zarr"]))
    assert not list(tmp_path.glob(".*"))


def test_saving_in_a_callback(site: Site, tmp_path: Path) -> None:
    writer = Writer(tmp_path / "derived.zarr")
    deisa = site.deisa(on_error="raise")

    @deisa.register("x")
    def derived(x: list[DeisaArray]) -> None:
        latest = x[-1]
        writer.append(x=latest - 1, profile=latest.mean(axis=0), most=latest.max(), timestep=latest.t)
        dataset = xr.Dataset({"x": (("row", "column"), latest.dask)})
        for engine in ("netcdf4", "h5netcdf"):
            dataset.to_netcdf(tmp_path / f"{engine}-{latest.t}.nc", engine=engine)
        latest.to_hdf5(tmp_path / f"own-{latest.t}.h5", "x")
        to_hdf5(tmp_path / f"both-{latest.t}.h5", {"x": latest, "twice": 2 * latest})

    run(site, deisa, range(2))
    found = xr.open_zarr(tmp_path / "derived.zarr")
    for timestep in range(2):
        whole = values(SHAPE, timestep)
        np.testing.assert_array_equal(found.x[timestep], whole - 1)
        np.testing.assert_allclose(found.profile[timestep], whole.mean(axis=0))
        assert found.most[timestep] == whole.max()
        for name in ("netcdf4", "h5netcdf"):
            with xr.open_dataset(tmp_path / f"{name}-{timestep}.nc") as one:
                np.testing.assert_array_equal(one.x, whole)
        with h5py.File(tmp_path / f"own-{timestep}.h5") as file:
            np.testing.assert_array_equal(file["x"], whole)
            assert len(file["x"].virtual_sources()) == 2
        with h5py.File(tmp_path / f"both-{timestep}.h5") as file:
            np.testing.assert_array_equal(file["twice"], 2 * whole)


def test_a_save_that_fails_ends_as_callbacks_do(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "out.zarr"
    with Writer(path) as writer:
        writer.append(x=np.zeros(3), timestep=-1, time=0)
    failed: list[Exception] = []
    deisa = site.deisa()
    deisa.save("x", path, exception_handler=failed.append)
    run_failing(site, deisa, 2)
    assert [type(error) for error in failed] == [SaveMismatchError] * 2
    assert f"in callback 'save to {path.name}' at timestep 1" in failed[1].__notes__
    deisa = site.deisa(on_error="raise")
    deisa.save("x", path)
    with (
        pytest.raises(
            SaveMismatchError, match=r"with shape \(3,\), and at timestep 0 it has shape \(70, 60\)"
        ),
        ranks(lambda: None),
    ):
        run_failing(site, deisa, 1)
    assert zarr.open_group(path, mode="r")["x"].shape == (1, 3)


def run_failing(site: Site, deisa: Any, timesteps: int) -> None:
    with ranks(*(partial(send_to_whom_may_end, site, rank, timesteps) for rank in range(2))):
        deisa.execute_callbacks()


def send_to_whom_may_end(site: Site, rank: int, timesteps: int) -> None:
    with suppress(AnalyticsLostError):
        send(site, rank, range(timesteps))


def test_saves_that_make_no_sense(site: Site, tmp_path: Path) -> None:
    deisa = site.deisa()
    deisa.save("x", tmp_path / "out.zarr")
    with pytest.raises(
        RegistrationError, match=r"another save\(\) to .*out.zarr is registered: save all arrays"
    ):
        deisa.save("y", tmp_path / "out.zarr")
    with pytest.raises(RegistrationError, match="'time' is the name of a coordinate"):
        deisa.save("time", tmp_path / "time.zarr")
    with pytest.raises(WindowError, match="every is 0"):
        deisa.save("x", tmp_path / "every.zarr", every=0)
    with pytest.raises(WindowError, match=r"every must be an integer, got 0.5"):
        deisa.save("x", tmp_path / "every.zarr", every=0.5)  # type: ignore[arg-type]
    with pytest.raises(WindowError, match=r"the same size, got 3 of 'x' and 1 of 'y'"):
        deisa.save([WindowSpec("x", 3), "y"], tmp_path / "window.zarr")
    with pytest.raises(SaveFormatError, match="says no format"):
        deisa.save("x", tmp_path / "out.txt")
    with pytest.raises(SaveError, match="could not be saved"):
        deisa.save("x", "/proc/nowhere/out.zarr")
    deisa.close()
