"""Scripts of deisa-ray 0.1.8, and calls that deisa-core and deisa-dask know, on both engines."""

from __future__ import annotations

import os
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import dask.array as da
import h5py
import numpy as np
import pytest
import xarray as xr

from deisa.core import IDeisa
from deisa.ray import Bridge, DeisaArray, Window
from deisa.ray.errors import AnalyticsLostError, RegistrationError
from deisa.ray.types import to_hdf5
from tests.e2e.simulation import Comm, Ranks, Site, grid_boxes, ranks, values


def test_what_ends_a_run_there_ends_it_here(site: Site) -> None:
    deisa = site.deisa()

    @deisa.register("x")
    def wrong(x: list[DeisaArray]) -> None:
        assert x[-1].t < 1, "these numbers cannot be"

    simulation = Ranks([partial(site.send_rows, 0, 1, range(1000))])
    with pytest.raises(AssertionError, match="these numbers cannot be") as caught:
        deisa.execute_callbacks()
    assert caught.value.__notes__ == ["in callback 'wrong' at timestep 1"]
    (told,) = simulation.errors()
    assert isinstance(told, AnalyticsLostError) and "these numbers cannot be" in str(told)


def test_a_handler_of_ones_own_gets_everything(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    deisa = site.deisa()
    handled: list[Exception] = []

    @deisa.register("x", exception_handler=handled.append)
    def wrong(x: list[DeisaArray]) -> None:
        raise (AssertionError, TimeoutError, ValueError)[x[-1].t]

    @deisa.register("x", exception_handler=IDeisa._IDeisa__default_exception_handler)  # type: ignore[attr-defined]
    def fails(x: list[DeisaArray]) -> None:
        raise ZeroDivisionError("printed")

    with ranks(partial(site.send_rows, 0, 1, range(3))):
        report = deisa.execute_callbacks()
    assert [type(error) for error in handled] == [AssertionError, TimeoutError, ValueError]
    assert capsys.readouterr().err.count("printed") == 3
    assert report.callbacks_failed == 6


def test_a_callback_that_is_unregistered_runs_no_more(site: Site) -> None:
    deisa = site.deisa()
    seen: list[Any] = []

    @deisa.register("x")
    def never(x: list[DeisaArray]) -> None:
        seen.append("never")

    @deisa.register(Window("x", 2))
    def twice(x: list[DeisaArray]) -> None:
        seen.append(x[-1].t)
        if x[-1].t == 1:
            deisa.unregister_callback(twice)

    deisa.register_callback(lambda x: seen.append("still there"), "x")
    deisa.unregister_callback(never)
    with pytest.raises(
        RegistrationError, match="'never' is not registered; registered are 'twice', '<lambda>'"
    ):
        deisa.unregister_callback(never)
    with ranks(*(partial(site.send_rows, rank, 2, range(5)) for rank in range(2))):
        report = deisa.execute_callbacks()
    assert seen == [0, "still there", 1, *["still there"] * 4]
    assert [(callback.name, callback.calls) for callback in report.callbacks] == [
        ("twice", 2),
        ("<lambda>", 5),
    ]


# Each case of the documentation of 0.1.8, in one run.

SHAPE, TIMESTEPS = (4, 6), range(6)
BOXES = grid_boxes((0, 2, 4), (0, 3, 6))


def send_two(site: Site, rank: int, position: tuple[int, ...], box: tuple[slice, ...]) -> None:
    described = {"global_shape": SHAPE, "chunk_shape": (2, 3), "chunk_position": position}
    arrays = {"temperature": described, "pressure": described}
    bridge = Bridge(comm=Comm(rank, len(BOXES)), arrays_metadata=arrays, settings=site.settings)
    assert bridge.node_id == os.uname().nodename
    for t in TIMESTEPS:
        bridge.send(array_name="temperature", chunk=values(SHAPE, t)[box], timestep=t)
        factor = bridge.get("cooling_factor", timestep=t)
        assert factor is None or (factor, t) == (0.5, 2)
        if t % 3 == 0:
            bridge.send("pressure", -values(SHAPE, t)[box], timestep=t)


def test_the_cases_of_its_documentation(site: Site, tmp_path: Path) -> None:
    started: list[bool] = []
    on_ray = {"ray_start": lambda: started.append(True)} if site.engine == "ray" else {}
    d = site.deisa_with(max_simulation_ahead=1, **on_ray)
    seen: dict[str, list[Any]] = defaultdict(list)

    @d.register(Window("temperature"))
    def mean_of_the_only_one(temperature: list[DeisaArray]) -> None:
        mean_value = temperature[0].mean().compute()
        seen["mean"].append((temperature[0].t, mean_value))
        if temperature[0].t == 2:
            d.set("cooling_factor", value=0.5, timestep=temperature[0].t)

    @d.register(Window("temperature"), Window("pressure"))
    def two_arrays(temperature: list[DeisaArray], pressure: list[DeisaArray]) -> None:
        seen["sum"].append((temperature[0] + pressure[0]).sum().compute())

    @d.register("temperature", Window("pressure"), when="OR")
    def either(temperature: list[DeisaArray], pressure: list[DeisaArray]) -> None:
        seen["either"].append((temperature[0].t, pressure[0].timestep))

    def five_points(temperature: list[DeisaArray]) -> None:
        if len(temperature) >= 3:
            rate = (temperature[-1] - temperature[-3]) / (temperature[-1].t - temperature[-3].t)
            seen["rate"].append(rate.mean().compute())
        if len(temperature) == 5:
            seen["average"].append((sum(temperature) / 5)[0, 0].compute())

    d.register_callback(five_points, [Window("temperature", size=5)], when="AND")

    @d.register(Window("pressure"))
    def persisted(pressure: list[DeisaArray]) -> None:
        total = pressure[0].sum().persist()
        assert isinstance(total, da.Array)
        seen["persisted"].append(total.compute())

    @d.register(Window("temperature"), Window("pressure"))
    def saved(**windows: list[DeisaArray]) -> None:
        latest = windows["temperature"][0]
        if latest.t == 3:
            latest.to_hdf5(str(tmp_path / "one.h5"), "temperature")
            to_hdf5(str(tmp_path / "both.h5"), {name: window[0] for name, window in windows.items()})
            latest.to_zarr(str(tmp_path / "one.zarr"))
            field = xr.DataArray(latest, dims=["x", "y"], name="temperature")
            field.compute().to_netcdf(tmp_path / "one.nc")

    @d.register("temperature")
    def drawn(temperature: list[DeisaArray]) -> None:
        seen["drawn"].append(np.asarray(temperature[-1])[1, 2])

    bodies = [partial(send_two, site, rank, *box) for rank, box in enumerate(BOXES.items())]
    with ranks(*bodies):
        report = d.execute_callbacks()
    assert report.callbacks_failed == 0
    assert len(started) == len(on_ray)
    assert seen == {
        "mean": [(t, values(SHAPE, t).mean()) for t in TIMESTEPS],
        "sum": [0.0, 0.0],
        "either": [(t, t - t % 3) for t in TIMESTEPS],
        "rate": [1000.0] * 4,
        "average": [2000.0, 3000.0],
        "persisted": [-values(SHAPE, t).sum() for t in (0, 3)],
        "drawn": [values(SHAPE, t)[1, 2] for t in TIMESTEPS],
    }
    with h5py.File(tmp_path / "both.h5") as file:
        np.testing.assert_array_equal(file["pressure"][...], -file["temperature"][...])
    with h5py.File(tmp_path / "one.h5") as file, xr.open_dataset(tmp_path / "one.nc") as dataset:
        for stored in (
            file["temperature"][...],
            dataset.temperature.values,
            da.from_zarr(tmp_path / "one.zarr"),
        ):
            np.testing.assert_array_equal(stored, values(SHAPE, 3))
