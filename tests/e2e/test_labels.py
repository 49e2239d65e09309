"""Labels and physical times: from what bridges say to xarray's arrays, on both engines."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from deisa.ray import DeisaArray, WindowSpec, to_dataset
from deisa.ray.errors import DeisaError, DescriptionMismatchError, PhysicalTimeError
from tests.e2e.simulation import Ranks, Site, ranks

SHAPE = (12, 16)
X = np.linspace(0.0, 3.0, SHAPE[1])
DAYS = np.datetime64("2021-03-01", "ns") + np.arange(SHAPE[0]) * np.timedelta64(12, "h")
ATTRS = {"units": "K", "long_name": "air temperature", "standard_name": "air_temperature"}
STEPS = 4


def value_of(timestep: int, name: str = "T") -> np.ndarray:
    """No two elements are the same, at no two timesteps."""
    rng = np.random.default_rng([timestep, len(name)])
    return rng.normal(size=SHAPE) + np.linspace(10, 20, SHAPE[1])


def expected(timestep: int, name: str = "T") -> xr.DataArray:
    """What a callback should see."""
    return xr.DataArray(
        value_of(timestep, name),
        dims=("day", "x"),
        coords={
            "day": ("day", DAYS, {"axis": "T"}),
            "x": ("x", X, {"units": "m"}),
            "season": ("day", [f"season {n // 6}" for n in range(SHAPE[0])]),
            "level": ("x", 2.0 + 0.5 * np.arange(SHAPE[1])),
            "timestep": timestep,
            "time": timestep / 4,
        },
        name=name,
        attrs=ATTRS,
    )


def described(rank: int, part: slice) -> dict[str, Any]:
    """A rank owns a quarter of the columns; each says something else of the labels."""
    described: dict[str, Any] = {
        "global_shape": SHAPE,
        "chunk_shape": (SHAPE[0], 4),
        "offset": (0, 4 * rank),
        "dtype": "f8",
        "dims": ("day", "x"),
        "coords": {"x": ("x", X[part], {"units": "m"})},
        "attrs": ATTRS,
    }
    if rank == 0:
        seasons = [f"season {n // 6}" for n in range(SHAPE[0])]
        described["coords"] |= {"day": ("day", DAYS, {"axis": "T"}), "season": ("day", seasons)}
    if rank == 1:
        described["coords"] = {"x": X, "level": ("x", {"start": 2.0, "step": 0.5})}
    if rank == 2:
        del described["attrs"]
    return described


def simulate(site: Site, rank: int, steps: int = STEPS) -> None:
    part = slice(4 * rank, 4 * rank + 4)
    names = ("T", "pressure")
    with site.bridge(rank, 4, {name: described(rank, part) for name in names}) as bridge:
        for timestep in range(steps):
            for name in names:
                bridge.send(name, value_of(timestep, name)[:, part], timestep, time=timestep / 4)


def run(site: Site, callback: Callable[..., Any], *windows: WindowSpec, **settings: Any) -> None:
    deisa = site.deisa(on_error="raise", **settings)
    deisa.register_callback(callback, *windows)
    with ranks(*(partial(simulate, site, rank) for rank in range(4))):
        deisa.execute_callbacks()


@pytest.mark.parametrize("beyond", [32, 0], ids=["a chunk for each rank", "merged"])
def test_a_callback_sees_the_labels(site: Site, beyond: int) -> None:
    seen = []

    def look(T: list[DeisaArray], pressure: list[DeisaArray]) -> None:
        for array, name in ((T[-1], "T"), (pressure[-1], "pressure")):
            right = expected(array.t, name)
            assert array.time == array.t / 4 and array.labels.dims == ("day", "x")
            assert array.xarray.chunks == array.dask.chunks
            for again in (
                array,
                array.copy(),
                copy.copy(array),
                array.persist(),
                pickle.loads(pickle.dumps(array)),
            ):
                xr.testing.assert_identical(again.xarray.compute(), right)
        steps = [array.t for array in T]
        whole = xr.DataArray(
            np.stack([value_of(t) for t in steps]), dims=("time", "day", "x"), name="T", attrs=ATTRS
        )
        labels = expected(0).drop_vars(("timestep", "time")).coords
        times = {"timestep": ("time", steps), "time": ("time", [t / 4 for t in steps])}
        stacked = whole.assign_coords(labels).assign_coords(times)
        xr.testing.assert_identical(T.xarray.compute(), stacked)  # type: ignore[attr-defined]
        both = to_dataset(T[-1], pressure[-1])
        xr.testing.assert_identical(
            both.compute(), xr.Dataset({name: expected(T[-1].t, name) for name in ("T", "pressure")})
        )
        seen.append(T[-1].t)

    run(site, look, WindowSpec("T", 3), WindowSpec("pressure"), merge_chunks_beyond=beyond)
    assert seen == list(range(STEPS))


def amplitude(block: xr.DataArray) -> xr.DataArray:
    return block - block.mean("day")


def doubled(values: np.ndarray) -> np.ndarray:
    return 2 * values


Field = xr.DataArray
OPERATIONS: dict[str, Callable[[Field, Field], Any]] = {
    # of an array at a timestep `f`, and of a window `w`
    "isel": lambda f, w: f.isel(x=slice(2, 9, 3), day=-1),
    "sel by value": lambda f, w: f.sel(x=slice(0.4, 2.1)).mean("day"),
    "sel nearest": lambda f, w: f.sel(x=[0.33, 1.7], method="nearest"),
    "sel a date": lambda f, w: f.sel(day="2021-03-03"),
    "vectorized indexing": lambda f, w: f.isel(
        x=xr.DataArray([1, 5, 9], dims="p"), day=xr.DataArray([0, 3, 7], dims="p")
    ),
    "arithmetic": lambda f, w: (f - f.mean("x")) / f.std("x"),
    "alignment by labels": lambda f, w: f.isel(x=slice(0, 10)) + f.isel(x=slice(5, 16)),
    "align, outer": lambda f, w: xr.align(f.isel(x=slice(0, 10)), f.isel(x=slice(5, 16)), join="outer")[1],
    "where": lambda f, w: f.where(f > f.mean(), drop=False),
    "where, drop": lambda f, w: f.where(f.x > 1.0, drop=True),
    "fillna and dropna": lambda f, w: f.where(f.x > 1).fillna(0.5).dropna("x"),
    "interp": lambda f, w: f.interp(x=[0.1, 0.77, 2.9]),
    "interp in time": lambda f, w: w.interp(time=[0.6]),
    "interp_like": lambda f, w: f.interp_like(f.isel(x=slice(None, None, 2))),
    "groupby a coordinate": lambda f, w: f.groupby("season").mean(),
    "groupby, transform": lambda f, w: f.groupby("season") - f.groupby("season").mean(),
    "groupby_bins": lambda f, w: f.groupby_bins("x", [0, 1, 3]).max(),
    "groupby a part of a date": lambda f, w: f.groupby("day.day").sum(),
    "rolling": lambda f, w: f.rolling(x=3, center=True).mean(),
    "rolling in time": lambda f, w: w.rolling(time=2).sum(),
    "rolling, constructed": lambda f, w: f.rolling(day=4).construct("lag").max("lag"),
    "coarsen": lambda f, w: f.drop_vars("season").coarsen(x=4, day=3).mean(),
    "differentiate": lambda f, w: f.differentiate("x"),
    "differentiate in time": lambda f, w: w.chunk(time=-1).differentiate("time"),
    "differentiate along dates": lambda f, w: f.differentiate("day", datetime_unit="h"),
    "integrate": lambda f, w: f.integrate("x"),
    "cumulative_integrate": lambda f, w: f.cumulative_integrate("x"),
    "weighted": lambda f, w: f.weighted(f.x + 1).mean("x"),
    "polyfit": lambda f, w: f.polyfit("x", 2).polyfit_coefficients,
    "polyfit in time": lambda f, w: w.polyfit("time", 1).polyfit_coefficients,
    "resample": lambda f, w: f.resample(day="1D").mean(),
    "quantile": lambda f, w: f.chunk(x=-1).quantile([0.1, 0.5], dim="x"),
    "median": lambda f, w: f.chunk(x=-1).median("x"),
    "argmax and idxmax": lambda f, w: f.idxmax("x"),
    "cumsum": lambda f, w: f.cumsum("x"),
    "diff and shift": lambda f, w: f.diff("x") + f.shift(x=1),
    "roll": lambda f, w: f.roll(x=5, roll_coords=True),
    "pad": lambda f, w: f.pad(x=2, mode="edge"),
    "sortby": lambda f, w: f.sortby("x", ascending=False),
    "stack and unstack": lambda f, w: f.stack(z=("day", "x")).unstack("z"),
    "transpose and expand_dims": lambda f, w: f.T.expand_dims("member"),
    "apply_ufunc, parallelized": lambda f, w: xr.apply_ufunc(
        doubled, f, dask="parallelized", output_dtypes=[float]
    ),
    "map_blocks": lambda f, w: f.map_blocks(amplitude, template=f).drop_attrs(),
    "dot and cov": lambda f, w: xr.dot(f, f, dim="x") + xr.cov(f, f, dim="x"),
    "corr in time": lambda f, w: xr.corr(w, w**2, dim="time"),
    "concat": lambda f, w: xr.concat([f, f + 1], "member"),
    "concat windows": lambda f, w: xr.concat([w.isel(time=slice(0, 1)), w.isel(time=slice(1, None))], "time"),
    "merge": lambda f, w: xr.merge([f.rename("a"), (f * 2).rename("b")]).to_array("variable"),
    "to_dataframe": lambda f, w: f.to_dataframe().sort_index(),
    "to_series": lambda f, w: f.to_series(),
    "histogram": lambda f, w: f.groupby_bins("x", 3).count(),
    "reduce to a scalar": lambda f, w: float(f.max()),
    "clip, round, isin": lambda f, w: f.clip(11, 15).round(1).isin([12.0, 12.1]),
    "time mean": lambda f, w: w.mean("time"),
    "newest of a window": lambda f, w: w.isel(time=-1),
    "swap to timesteps": lambda f, w: w.swap_dims(time="timestep").sel(timestep=STEPS - 1),
    "Dataset": lambda f, w: xr.Dataset({"a": f, "b": f**2}).map(np.sqrt).mean("day"),
}


def loaded(result: Any) -> Any:
    return result.compute() if hasattr(result, "compute") else result


def assert_same(found: Any, right: Any) -> None:
    if isinstance(right, pd.DataFrame):
        pd.testing.assert_frame_equal(found, right)
    elif isinstance(right, pd.Series):
        pd.testing.assert_series_equal(found, right)
    elif isinstance(right, float):
        assert found == pytest.approx(right)
    else:
        xr.testing.assert_allclose(found, right)
        assert found.attrs == right.attrs


def test_operations_of_xarray(site: Site) -> None:
    """Each gives what it gives of arrays in memory, and is lazy until then."""
    done: list[str] = []
    wrong: dict[str, str] = {}

    def look(T: Any) -> None:
        if T[-1].t < STEPS - 1:
            return
        field, window = T[-1].xarray, T.xarray
        in_memory = field.compute(), window.compute()
        for name, operate in OPERATIONS.items():
            try:
                assert_same(loaded(operate(field, window)), loaded(operate(*in_memory)))
            except Exception as error:
                wrong[name] = f"{type(error).__name__}: {error}"
            done.append(name)

    run(site, look, WindowSpec("T", 3))
    assert done == list(OPERATIONS)
    assert wrong == {}


def test_labels_survive_in_files(site: Site, tmp_path: Path) -> None:
    """Read back with plain xarray, and by the tool that comes with NetCDF."""

    def write(T: Any, pressure: Any) -> None:
        if T[-1].t < STEPS - 1:
            return
        T[-1].xarray.to_netcdf(tmp_path / "one.nc")
        to_dataset(T, pressure).to_netcdf(tmp_path / "window.nc", engine="h5netcdf")
        without_texts = to_dataset(T[-1], pressure[-1]).drop_vars(
            "season"
        )  # which Zarr 3 has no specification for
        without_texts.to_zarr(tmp_path / "one.zarr", consolidated=False)

    run(site, write, WindowSpec("T", 3), WindowSpec("pressure", 3))
    right = expected(STEPS - 1)
    with xr.open_dataarray(tmp_path / "one.nc") as one:
        xr.testing.assert_identical(one.compute(), right)
    with xr.open_dataset(tmp_path / "window.nc", engine="h5netcdf") as several:
        xr.testing.assert_identical(several["T"].isel(time=-1).compute(), right)
        assert several.sizes["time"] == 3 and several.pressure.attrs == ATTRS
    with xr.open_zarr(tmp_path / "one.zarr", consolidated=False) as one:
        xr.testing.assert_identical(one["T"].compute(), right.drop_vars("season"))
    ncdump = shutil.which("ncdump")
    if ncdump is None:
        pytest.skip("ncdump is not installed (Debian: netcdf-bin); xarray has read all of it")
    header = subprocess.run(
        [ncdump, "-h", tmp_path / "one.nc"], capture_output=True, text=True, check=True
    ).stdout
    for line in (
        'T:units = "K"',
        'T:standard_name = "air_temperature"',
        'x:units = "m"',
        'T:coordinates = "level season time timestep"',
    ):
        assert line in header


def test_bridges_that_disagree_end_the_session(site: Site) -> None:
    def rank(number: int) -> None:
        said = described(number, slice(4 * number, 4 * number + 4))
        said["attrs"] = {"units": "K" if number < 3 else "C"}
        site.bridge(number, 4, {"T": said})

    deisa = site.deisa()
    deisa.register_callback(lambda T: None, "T")
    running = Ranks([partial(rank, number) for number in range(4)])
    with pytest.raises(
        DescriptionMismatchError,
        match="attribute 'units' differs between bridges: bridge 0: 'K'; bridge 3: 'C'",
    ) as raised:
        deisa.execute_callbacks()
    assert {str(error) for error in running.errors()} == {str(raised.value)}


@pytest.mark.parametrize("other", [0.75, None])
def test_times_that_differ_end_the_run(site: Site, other: float | None) -> None:
    """What was complete before is delivered."""
    seen: list[float | None] = []

    def rank(number: int) -> None:
        part = slice(4 * number, 4 * number + 4)
        with site.bridge(number, 4, {"T": described(number, part)}) as bridge:
            for timestep in range(3):
                time = other if (number, timestep) == (2, 2) else timestep / 4
                bridge.send("T", value_of(timestep)[:, part], timestep, time=time)
            bridge.advance(10)

    deisa = site.deisa()
    deisa.register_callback(lambda T: seen.append(T[-1].time), "T")
    running = Ranks([partial(rank, number) for number in range(4)])
    says = "array 'T' at timestep 2: the physical time differs between bridges: bridge .*; bridge "
    with pytest.raises(PhysicalTimeError, match=says) as raised:
        deisa.execute_callbacks()
    assert "bridge 2: " + ("none" if other is None else "time=0.75") in str(raised.value)
    assert "time=0.5" in str(raised.value)
    assert seen == [0.0, 0.25]
    assert all(error is None or isinstance(error, DeisaError) for error in running.errors())
