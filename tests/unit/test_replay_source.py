"""What can be replayed, and what is made of it, without any session."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr

from deisa.ray._replay.blocks import Block, Blocks
from deisa.ray._replay.recorded import KEY, RecordedArrays, group_of
from deisa.ray._replay.source import Source, open_source
from deisa.ray.config import ReplaySettings
from deisa.ray.errors import ConfigurationError, ReplayError

pytestmark = pytest.mark.filterwarnings(
    "ignore:The data type"
)  # of texts, which Zarr has no specification for

VALUES = np.random.default_rng(7).normal(size=(6, 5, 4)).astype("f4")
DAYS = np.datetime64("2001-01-01", "ns") + np.arange(6) * np.timedelta64(6, "h")


def dataset(**coords: Any) -> xr.Dataset:
    """A variable with times, another one without, and one that no array can be."""
    return xr.Dataset(
        {
            "temperature": (("time", "y", "x"), VALUES, {"units": "K"}),
            "pressure": (("y", "time"), VALUES[:, :, 0].T.astype("f8")),
            "mask": (("y", "x"), np.ones((5, 4), bool)),
            "name": (("time",), np.array(list("abcdef"))),
        },
        coords={"time": ("time", DAYS), "x": ("x", np.arange(4) / 2.0)} | coords,
    )


def write(found: xr.Dataset, path: Path, **options: Any) -> None:
    found.to_zarr(path, consolidated=False, **options)


def opened(path: Path | str, **settings: Any) -> Source:
    return open_source(ReplaySettings(path=str(path), **settings))


def whole(source: Source, name: str, timestep: int) -> np.ndarray:
    array = source.arrays[name]
    values = np.empty(array.shape, array.variable.dtype)
    for block in array.blocks.blocks:
        values[block.slices] = array.read(timestep, block)
    return values


@pytest.fixture(params=["zarr 3", "zarr 2", "h5netcdf", "netcdf4"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind = request.param
    encoding = {"temperature": {"chunks" if "zarr" in kind else "chunksizes": (4, 2, 4)}}
    if "zarr" in kind:
        write(dataset(), tmp_path / "d.zarr", zarr_format=int(kind[-1]), encoding=encoding)
        return tmp_path / "d.zarr"
    dataset().to_netcdf(tmp_path / "d.nc", engine=kind, encoding=encoding)
    return tmp_path / "d.nc"


def test_any_data_set_with_a_time_dimension(stored: Path) -> None:
    source = opened(stored)
    assert not source.is_recording and not source.cuts
    assert sorted(source.arrays) == ["pressure", "temperature"]
    assert source.timesteps == list(range(6))
    for timestep in (5, 0, 3, 4):
        assert np.array_equal(whole(source, "temperature", timestep), VALUES[timestep])
        assert np.array_equal(whole(source, "pressure", timestep), VALUES[timestep, :, 0])
    temperature = source.arrays["temperature"]
    assert temperature.blocks.cuts == ((2, 2, 1), (4,))
    assert temperature.per_chunk == 4
    assert temperature.variable.dtype == "f4"
    times = [temperature.time_at(t) for t in range(6)]
    assert np.allclose(np.diff(times), times[1] - times[0]) and times[1] > times[0]


def test_the_timesteps_that_a_data_set_names(tmp_path: Path) -> None:
    write(dataset(timestep=("time", [0, 10, 20, 35, 40, 50])), tmp_path / "d.zarr")
    source = opened(tmp_path / "d.zarr", start=10, stop=40)
    assert source.timesteps == [10, 20, 35]
    assert np.array_equal(whole(source, "temperature", 35), VALUES[3])


@pytest.mark.parametrize("each", [1, 4], ids=["one timestep each", "some"])
def test_many_files(tmp_path: Path, each: int) -> None:
    found = dataset(timestep=("time", np.arange(8, 14)))[["temperature"]]
    for start in range(0, 6, each):
        part = found.isel(time=start if each == 1 else slice(start, start + each))
        part.to_netcdf(
            tmp_path / f"out-{8 + start}.nc", encoding={"time": {"units": "hours since 2001-01-01"}}
        )
    source = opened(tmp_path / "out-*.nc")
    assert list(source.arrays) == ["temperature"]
    assert source.timesteps == list(range(8, 14))
    for timestep in (8, 13, 10):
        assert np.array_equal(whole(source, "temperature", timestep), VALUES[timestep - 8])
    assert source.arrays["temperature"].time_at(9) == 6.0
    with pytest.raises(ReplayError, match=r"no-\*\.nc is to be replayed, but there is no such file"):
        opened(tmp_path / "no-*.nc")


def test_arrays_are_chosen_and_renamed(tmp_path: Path) -> None:
    write(dataset(), tmp_path / "d.zarr")
    source = opened(tmp_path / "d.zarr", arrays=(("T", "temperature"),))
    assert list(source.arrays) == ["T"]
    assert np.array_equal(whole(source, "T", 2), VALUES[2])


@pytest.mark.parametrize(
    ("rename", "attrs"),
    [("t", {"axis": "T"}), ("when", {"units": "seconds since 2001-01-01"}), ("timestep", {}), ("step", {})],
)
def test_what_is_a_time_dimension(tmp_path: Path, rename: str, attrs: dict[str, str]) -> None:
    found = dataset(time=("time", np.arange(6.0), attrs)).rename(time=rename)
    write(found, tmp_path / "d.zarr")
    assert opened(tmp_path / "d.zarr").timesteps == list(range(6))


def test_an_unlimited_dimension_is_time(tmp_path: Path) -> None:
    found = dataset().drop_vars("time").rename(time="n")
    found.to_netcdf(tmp_path / "d.nc", unlimited_dims=["n"])
    source = opened(tmp_path / "d.nc")
    assert source.timesteps == list(range(6))
    assert source.arrays["temperature"].time_at(0) is None


@pytest.mark.parametrize(
    ("change", "settings", "error"),
    [
        (
            lambda d: d,
            {"arrays": (("T", "temp"),)},
            "has no array 'temp' .* it has 'pressure', 'temperature'",
        ),
        (lambda d: d, {"start": 9}, "no timestep to replay, it has timesteps 0 to 5, and 9: are asked for"),
        (lambda d: d.isel(time=0), {}, r"no time dimension, .* its dimensions are y \(5\), x \(4\)"),
        (
            lambda d: d[["mask", "name"]].expand_dims("k"),
            {},
            "has no variable of numbers along dimension 'time'",
        ),
        (
            lambda d: d.assign_coords(timestep=("time", [0, 1, 2, 2, 3, 4])),
            {},
            "do not increase, 2 comes before 2",
        ),
    ],
)
def test_what_cannot_be_replayed(tmp_path: Path, change: Any, settings: Any, error: str) -> None:
    write(change(dataset()), tmp_path / "d.zarr")
    with pytest.raises(ReplayError, match=error):
        opened(tmp_path / "d.zarr", **settings)


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match=r"missing\.zarr is to be replayed, but there is no such"):
        opened(tmp_path / "missing.zarr")
    with pytest.raises(ReplayError, match="cannot be read as Zarr"):
        opened(tmp_path)
    (tmp_path / "text.nc").write_text("no data")
    with pytest.raises(ReplayError, match=r"text\.nc cannot be read"):
        opened(tmp_path / "text.nc")


# Recordings.


def test_blocks_as_json() -> None:
    blocks = Blocks((Block((0, 0), (2, 3)), Block((2, 0), (2, 3))), ((1, 1, 2), (3,)))
    assert Blocks.from_json(blocks.to_json()) == blocks
    arrays = RecordedArrays({"T": blocks})
    assert RecordedArrays.from_attributes(arrays.to_attributes(), "p") == arrays
    assert Blocks.of(da.zeros((4, 3), chunks=((1, 3), 3))).blocks[1] == Block((1, 0), (3, 3))


@pytest.mark.parametrize(
    ("document", "error"),
    [
        ({"version": 2, "arrays": {}}, "of version 2, this release reads version 1"),
        ({"version": 1, "arrays": {"T": {}}}, "attributes make no sense"),
        ([], "attributes make no sense"),
    ],
)
def test_recordings_of_others(document: Any, error: str) -> None:
    with pytest.raises(ReplayError, match=error):
        RecordedArrays.from_attributes({KEY: document}, "p")
    assert RecordedArrays.from_attributes({}, "p") is None


def test_every_array_has_a_group() -> None:
    names = ["T", "a/b", "..", ".", "__x", "a b", "ü", "%2E", "a.b", "zarr.json"]
    groups = [group_of(name) for name in names]
    assert len(set(groups)) == len(names)
    assert not any("/" in group or group in (".", "..") or group.startswith("__") for group in groups)


# Settings.


def test_the_environment() -> None:
    assert ReplaySettings.from_environment({}) is None
    assert ReplaySettings.from_environment({"DEISA_RAY_REPLAY": ""}) is None
    variables = {
        "DEISA_RAY_REPLAY": "/data/run.zarr",
        "DEISA_RAY_REPLAY_ARRAYS": "T = temperature, p",
        "DEISA_RAY_REPLAY_TIMESTEPS": "-5:",
        "DEISA_RAY_REPLAY_RANKS": "3",
    }
    assert ReplaySettings.from_environment(variables) == ReplaySettings(
        path="/data/run.zarr", arrays=(("T", "temperature"), ("p", "p")), start=-5, ranks=3
    )
    only = ReplaySettings.from_environment({"DEISA_RAY_REPLAY": "run.zarr"})
    assert only == ReplaySettings(path=str(Path("run.zarr").absolute()))
    remote = ReplaySettings.from_environment({"DEISA_RAY_REPLAY": "s3://bucket/run.zarr"})
    assert remote is not None and remote.path == "s3://bucket/run.zarr"


@pytest.mark.parametrize(
    ("option", "text", "error"),
    [
        ("ARRAYS", "T=", "give names, or name=variable"),
        ("ARRAYS", "=T", "give names, or name=variable"),
        ("ARRAYS", "T,T=p", "names an array twice"),
        ("TIMESTEPS", "5", "give the first timestep and the one before which it ends"),
        ("TIMESTEPS", "5:5", "has no timestep in it"),
        ("RANKS", "0", "at least 1"),
        ("RANKS", "many", "at least 1"),
    ],
)
def test_bad_variables(option: str, text: str, error: str) -> None:
    variables = {"DEISA_RAY_REPLAY": "run.zarr", f"DEISA_RAY_REPLAY_{option}": text}
    with pytest.raises(ConfigurationError, match=f"DEISA_RAY_REPLAY_{option}='{text}'.*{error}"):
        ReplaySettings.from_environment(variables)
