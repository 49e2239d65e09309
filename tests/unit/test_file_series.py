"""Series of timesteps in files, read back by plain xarray, zarr, h5py and the tools of NetCDF and HDF5."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import h5py
import icechunk
import numpy as np
import pytest
import xarray as xr
import zarr

from deisa.ray._files.coordinates import encoded
from deisa.ray._files.fields import Field, plain
from deisa.ray.errors import (
    SaveConflictError,
    SaveError,
    SaveFormatError,
    SaveMismatchError,
    SaveOrderError,
)
from deisa.ray.files import Writer, to_hdf5
from tests.conftest import skip_or_fail
from tests.support.patience import PATIENCE_S

ROOT = Path(__file__).parents[2]
SERIES = ("out.zarr", "out.h5", "out.nc")
SHAPE, CHUNKS = (40, 30), (20, 15)


@pytest.fixture(autouse=True)
def no_threads() -> Iterator[None]:
    with dask.config.set(scheduler="sync"):
        yield


def at(timestep: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=float).reshape(shape) + 10_000.0 * timestep


def lazy(timestep: int, chunks: Any = CHUNKS) -> da.Array:
    return da.from_array(at(timestep), chunks=chunks)


def labelled(timestep: int, chunks: Any = CHUNKS) -> xr.DataArray:
    return xr.DataArray(
        lazy(timestep, chunks),
        dims=("y", "x"),
        coords={
            "y": ("y", np.arange(SHAPE[0]) * 0.5, {"units": "m"}),
            "x": np.arange(SHAPE[1]),
            "height": (("y", "x"), at(0) / 7, {"units": "m"}),
            "timestep": timestep,
            "time": xr.Variable((), timestep * 0.25, {"units": "s", "standard_name": "time"}),
        },
        name="temperature",
        attrs={"units": "K", "long_name": "air temperature", "levels": [1, 2, 3]},
    )


def opened(path: Path) -> xr.Dataset:
    """The whole data set, in memory, by what xarray does of itself."""
    if path.suffix == ".zarr":
        with xr.open_zarr(path) as found:
            return found.load()
    with xr.open_dataset(path, engine="netcdf4") as found:
        return found.load()


def check(path: Path, timesteps: list[int], name: str = "temperature") -> xr.Dataset:
    """What is there is these timesteps, each with its values."""
    found = opened(path)
    assert found.timestep.dims == ("time",)
    assert found.timestep.dtype == np.int64
    assert found.timestep.values.tolist() == timesteps
    assert found[name].dims[0] == "time"
    for index, timestep in enumerate(timesteps):
        np.testing.assert_array_equal(found[name].values[index], at(timestep))
    return found


# Growing.


@pytest.mark.parametrize("name", SERIES)
def test_a_series_has_labels_coordinates_and_times(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    writer = Writer(path)
    for timestep in (0, 10, 20):
        array = labelled(timestep)
        writer.append(array, profile=array.mean("x"), total=array.data.sum())
    assert writer.timesteps == (0, 10, 20)
    found = check(path, [0, 10, 20])
    assert found.temperature.dims == ("time", "y", "x")
    assert plain(found.temperature.attrs) == plain(labelled(0).attrs)
    assert set(found.coords) == {"time", "timestep", "y", "x", "height"}
    assert found.time.values.tolist() == [0, 2.5, 5]
    assert found.time.attrs == {"units": "s", "standard_name": "time"}
    assert found.height.attrs == {"units": "m"}
    np.testing.assert_array_equal(found.height, at(0) / 7)
    np.testing.assert_array_equal(found.y, np.arange(SHAPE[0]) * 0.5)
    np.testing.assert_allclose(found.profile.sel(time=2.5), at(10).mean(axis=1))
    np.testing.assert_allclose(found.total, [at(t).sum() for t in (0, 10, 20)])


@pytest.mark.parametrize(
    ("values", "numbers", "units"),
    [
        (np.array(["1970-01-03", "9999-01-01"], "M8[D]"), [2, 2932532], "days since 1970-01-01"),
        (np.array(["1971", "1970"], "M8[Y]"), [365, 0], "days since 1970-01-01"),
        (np.array([1, 90], "m8[s]"), [1, 90], "seconds"),
        (np.array([1, 90], "m8[ps]"), [0, 0], "nanoseconds"),
    ],
)
def test_dates_are_numbers_in_their_own_unit(values: np.ndarray, numbers: list[int], units: str) -> None:
    found = encoded(Field("t", ("t",), values))
    assert found.data.tolist() == numbers
    assert found.attrs["units"] == units


@pytest.mark.parametrize("name", SERIES)
def test_dates_and_texts_are_coordinates_too(tmp_path: Path, name: str) -> None:
    rows = 3
    coords: dict[str, Any] = {
        "day": np.array(["2001-01-01", "2199-12-31", "NaT"], "M8[ns]"),
        "moment": np.array(["2001-01-01T00:00:00.000000001"] * rows, "M8[ns]"),
        "wait": np.array([1, 90, 3], "m8[s]").astype("m8[ns]"),
        "site": np.array(["A", "Zürich", ""]),
    }
    for run in range(2):
        with Writer(tmp_path / name) as writer:
            for timestep in range(2 * run, 2 * run + 2):
                array = xr.DataArray(np.arange(rows) + timestep, dims="y")
                writer.append(
                    n=array.assign_coords({k: ("y", v) for k, v in coords.items()}), timestep=timestep
                )
    found = opened(tmp_path / name)
    for key, values in coords.items():
        np.testing.assert_array_equal(found[key].values.astype(values.dtype), values)
        assert found[key].dims == ("y",)
    assert found.timestep.values.tolist() == [0, 1, 2, 3]
    with (
        Writer(tmp_path / name) as writer,
        pytest.raises(SaveMismatchError, match="'site' of 3 values from A to "),
    ):
        writer.append(
            n=array.assign_coords({**{k: ("y", v) for k, v in coords.items()}, "site": ("y", ["A"] * 3)}),
            timestep=9,
        )


def test_zarr_as_zarr_has_it(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out.zarr")
    for timestep in range(3):
        writer.append(temperature=lazy(timestep), count=np.int32(timestep), timestep=timestep)
    group = zarr.open_group(tmp_path / "out.zarr", mode="r")
    assert group.metadata.consolidated_metadata is not None
    assert sorted(group.array_keys()) == ["count", "temperature", "timestep"]
    for opened_array in (group["temperature"], zarr.open_array(tmp_path / "out.zarr" / "temperature")):
        assert opened_array.shape == (3, *SHAPE)
        assert opened_array.chunks == (1, *CHUNKS)
        np.testing.assert_array_equal(opened_array[1], at(1))
    assert group["timestep"][:].tolist() == group["count"][:].tolist() == [0, 1, 2]
    assert group["count"].chunks[0] > 1  # not a file for each number
    apart = xr.open_zarr(tmp_path / "out.zarr", consolidated=False)
    np.testing.assert_array_equal(apart.temperature[2], at(2))
    own = dict(zarr.open_group(tmp_path / "out.zarr", use_consolidated=False).arrays())
    assert {name: str(array.metadata) for name, array in own.items()} == {
        name: str(array.metadata) for name, array in group.arrays()
    }


def tool(*argv: str | Path) -> str:
    if shutil.which(str(argv[0])) is None:
        skip_or_fail(f"`{argv[0]}` is not installed (packages netcdf-bin and hdf5-tools)")
    done = subprocess.run(list(map(str, argv)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["out.h5", "out.nc"])
def test_hdf5_as_its_tools_have_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    writer = Writer(path)
    for timestep in (0, 5):
        writer.append(labelled(timestep))
    printed = tool("ncdump", "-v", "timestep,time", path)
    assert "time = UNLIMITED ; // (2 currently)" in printed
    assert "double temperature(time, y, x) ;" in printed
    assert 'temperature:units = "K" ;' in printed
    assert 'temperature:coordinates = "timestep height" ;' in printed
    assert "timestep = 0, 5 ;" in printed
    assert "time = 0, 1.25 ;" in printed
    header = tool("h5dump", "-H", "-d", "/temperature", path)
    assert "( 2, 40, 30 ) / ( H5S_UNLIMITED, 40, 30 )" in header
    assert "50002" in tool("h5dump", "-d", "/temperature", "-s", "1,0,0", "-c", "1,1,3", path)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(file["temperature"][1], at(5))
        assert file["temperature"].chunks == (1, *CHUNKS)


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("chunks", [((17, 17, 6), (30,)), ((1, 39), (7, 23))])
def test_blocks_that_fit_no_chunks(tmp_path: Path, name: str, chunks: Any) -> None:
    writer = Writer(tmp_path / name)
    for timestep in range(2):
        writer.append(temperature=lazy(timestep, chunks), timestep=timestep)
    writer.append(temperature=lazy(2, (40, 30)), timestep=2)  # other ranks than before
    check(tmp_path / name, [0, 1, 2])


@pytest.mark.parametrize("chunks", [CHUNKS, ((17, 17, 6), (30,)), ((1, 39), (7, 23)), ((40,), (4, 8, 8, 10))])
def test_each_chunk_of_a_store_has_one_writer(chunks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store of Zarr's own in place of a path; every assignment is seen."""
    writers: Counter[tuple[int, ...]] = Counter()
    assign = zarr.Array.__setitem__

    def assigned(array: Any, index: Any, value: Any) -> None:
        if array.basename == "temperature":
            sides = [
                range(at.start // n, -(-at.stop // n)) for at, n in zip(index, array.chunks, strict=True)
            ]
            writers.update(itertools.product(*sides))
        assign(array, index, value)

    monkeypatch.setattr(zarr.Array, "__setitem__", assigned)
    store = zarr.storage.MemoryStore()
    writer = Writer(store)
    for timestep in range(2):
        writer.append(temperature=lazy(timestep, chunks), timestep=timestep)
    found = zarr.open_group(store, mode="r")
    np.testing.assert_array_equal(found["temperature"], [at(0), at(1)])
    assert len(writers) == found["temperature"].nchunks >= 4
    assert set(writers.values()) == {1}


def test_a_store_with_transactions(tmp_path: Path) -> None:
    repository = icechunk.Repository.create(icechunk.local_filesystem_storage(str(tmp_path)))

    def append(timestep: int) -> Any:
        session = repository.writable_session("main")
        Writer(session.store).append(temperature=lazy(timestep, ((17, 17, 6), 30)), timestep=timestep)
        return session

    def stored() -> list[int]:
        found = zarr.open_group(repository.readonly_session("main").store, mode="r")
        for index, timestep in enumerate(found["timestep"]):
            np.testing.assert_array_equal(found["temperature"][index], at(timestep))
        return found["timestep"][:].tolist()

    for timestep in (0, 1, 2):
        append(timestep).commit(f"timestep {timestep}")
    append(3)  # killed before it commits
    assert stored() == [0, 1, 2]
    append(1).commit("from a checkpoint")
    append(4).commit("timestep 4")
    assert stored() == [0, 1, 4]


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("dtype", ["f4", "i2", "u8", "i8"])
def test_dtypes(tmp_path: Path, name: str, dtype: str) -> None:
    values = np.array([[0, 1], [2, 100]], dtype)
    writer = Writer(tmp_path / name)
    for timestep in range(2):
        writer.append(n=da.from_array(values * timestep, chunks=1), timestep=timestep)
    found = opened(tmp_path / name).n
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, [values * 0, values])


@pytest.mark.parametrize("name", ["out.zarr", "out.h5"])
@pytest.mark.parametrize("values", [np.array([[1 + 2j, np.nan]]), np.array([[True, False]])])
def test_dtypes_that_netcdf_does_not_have(tmp_path: Path, name: str, values: np.ndarray) -> None:
    Writer(tmp_path / name).append(n=values, timestep=3)
    np.testing.assert_array_equal(
        zarr.open_group(tmp_path / name)["n"][0]
        if name == "out.zarr"
        else h5py.File(tmp_path / name)["n"][0],
        values,
    )
    with pytest.raises(
        SaveMismatchError, match=rf"n: NetCDF has no dtype {values.dtype}; .* save to Zarr or HDF5"
    ):
        Writer(tmp_path / "out.nc").append(n=values, timestep=3)
    assert not list(tmp_path.glob("*.nc"))


@pytest.mark.parametrize("name", SERIES)
def test_encoding(tmp_path: Path, name: str) -> None:
    encoding: dict[str, Any] = {"chunks": (1, 8, 5)}
    if name == "out.zarr":
        encoding |= {"compressors": None, "shards": (1, 40, 30)}
    else:
        encoding |= {"compression": "gzip", "shuffle": True}
    writer = Writer(tmp_path / name, encoding={"temperature": encoding})
    for timestep in range(2):
        writer.append(temperature=lazy(timestep, 10), timestep=timestep)
    check(tmp_path / name, [0, 1])
    if name == "out.zarr":
        array = zarr.open_array(tmp_path / name / "temperature")
        assert (array.chunks, array.shards, array.compressors) == ((1, 8, 5), (1, 40, 30), ())
    else:
        with h5py.File(tmp_path / name) as file:
            assert (file["temperature"].chunks, file["temperature"].compression) == ((1, 8, 5), "gzip")


# Going on.


@pytest.mark.parametrize("name", SERIES)
def test_a_run_goes_on_where_another_one_ended(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / name
    with Writer(path) as writer:
        for timestep in range(5):
            writer.append(temperature=-lazy(timestep), timestep=timestep)
    with Writer(path) as writer:
        assert writer.timesteps == (0, 1, 2, 3, 4)
        writer.append(temperature=-lazy(6), timestep=6)
    assert not caplog.records
    with Writer(path) as writer:  # from a checkpoint: it sends 2 and 3 again, and no 4
        for timestep in (2, 3, 5):
            writer.append(temperature=-lazy(timestep), timestep=timestep)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} has timesteps 2 to 6 of an earlier run: those of this run replace them"
    ]
    found = opened(path)
    assert found.timestep.values.tolist() == [0, 1, 2, 3, 5]
    np.testing.assert_array_equal(found.temperature, [-at(timestep) for timestep in (0, 1, 2, 3, 5)])
    if name == "out.zarr":
        assert sorted(file.name for file in (path / "temperature" / "c").iterdir()) == list("01234")


@pytest.mark.parametrize("name", SERIES)
def test_a_timestep_again_and_one_that_is_too_late(tmp_path: Path, name: str) -> None:
    writer = Writer(tmp_path / name)
    for timestep in (3, 4, 4):
        writer.append(temperature=lazy(timestep), timestep=timestep)
    with pytest.raises(SaveOrderError, match="timestep 3 comes after timestep 4"):
        writer.append(temperature=lazy(3), timestep=3)
    writer.append(temperature=lazy(5), timestep=5)
    check(tmp_path / name, [3, 4, 5])


MISMATCHES: list[tuple[Callable[[xr.DataArray], Any], str]] = [
    (lambda x: x[:20], r"'temperature' with shape \(40, 30\), and at timestep 1 it has shape \(20, 30\)"),
    (lambda x: x.astype("f4"), r"with dtype float64, and at timestep 1 it has dtype float32"),
    (lambda x: x.drop_vars(["x", "y", "height"]).rename(x="z"), r"\('y', 'x'\), .* dimensions \('y', 'z'\)"),
    (lambda x: x.assign_attrs(units="degC"), r"'units': 'K'.*'units': 'degC'"),
    (lambda x: x.assign_coords(x=np.arange(30) + 1), r"'x' of 30 values from 0 to 29, .* from 1 to 30"),
    (lambda x: x.drop_vars("height"), r"holds coordinates 'height', 'x', 'y', and .* has 'x', 'y'"),
    (lambda x: x.rename("pressure"), r"holds 'temperature', .* has 'pressure'"),
]


@pytest.mark.parametrize("name", SERIES)
def test_times_that_some_timesteps_have(tmp_path: Path, name: str) -> None:
    for timesteps in ((0, 1), (2, 3, 4), (5, 6)):
        with Writer(tmp_path / name) as writer:
            for t in timesteps:
                writer.append(temperature=lazy(t), timestep=t, time=t / 2 if t in (3, 5) else None)
    found = check(tmp_path / name, [0, 1, 2, 3, 4, 5, 6])
    np.testing.assert_array_equal(found.time, [np.nan, np.nan, np.nan, 1.5, np.nan, 2.5, np.nan])


@pytest.mark.parametrize("name", SERIES)
def test_what_does_not_fit_is_refused_and_harms_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for change, message in MISMATCHES:
        with Writer(path) as writer:
            writer.append(labelled(0))
            with pytest.raises(SaveMismatchError, match=f"(?s){path}.*{message}"):
                writer.append(change(labelled(1)))
            check(path, [0])
            writer.append(labelled(1))
        check(path, [0, 1])


@pytest.mark.parametrize(
    ("append", "message"),
    [
        (lambda w: w.append(), r"there is nothing to save"),
        (lambda w: w.append(lazy(0)), r"needs a name: append\(mean=\.\.\.\) instead of append\(Array\)"),
        (
            lambda w: w.append(x=lazy(0)),
            r"x: of which timestep\? append\(..., timestep=temperature\[-1\].t\)",
        ),
        (lambda w: w.append(x=lazy(0), timestep=1.5), r"a timestep must be an integer, got 1.5"),
        (lambda w: w.append(x=np.array(["a"]), timestep=1), r"x: dtype <U1 cannot be saved"),
        (
            lambda w: w.append(x=np.zeros(2, "i4,f4"), timestep=1),
            r"save fields of a structured array by themselves",
        ),
        (
            lambda w: w.append(x=lazy(0)[lazy(0) > 3], timestep=1),
            r"its shape .* is not known; call compute_chunk_sizes",
        ),
        (
            lambda w: w.append(labelled(1), temperature=lazy(0)),
            r"two things called 'temperature' are to be saved",
        ),
        (
            lambda w: w.append(labelled(1).expand_dims("time")),
            r"has a dimension 'time' already; append one timestep",
        ),
        (
            lambda w: w.append(labelled(1), b=labelled(1).isel(x=slice(3))),
            r"different coordinates 'x': save them apart",
        ),
        (
            lambda w: w.append(
                a=xr.DataArray([1.0, 2], dims="x"), b=xr.DataArray([1.0], dims="x"), timestep=1
            ),
            r"dimension 'x' has 2 elements in 'a' and 1 in 'b'",
        ),
        (
            lambda w: w.append(**{"a/b": lazy(1)}, timestep=1),
            r"'a/b' cannot be the name of an array in a file",
        ),
        (
            lambda w: w.append(labelled(1).rename("time")),
            r"'time' is the name of a coordinate in what is saved",
        ),
        (lambda w: w.append(y=labelled(1)), r"'y' is the name of an array and of a coordinate or dimension"),
        (
            lambda w: w.append(a=labelled(1), b=labelled(2)),
            r"timestep 1 has a, and timestep 2 has b: what is appended together must be of the same timesteps",
        ),
    ],
)
def test_what_cannot_be_saved(tmp_path: Path, append: Callable[[Writer], None], message: str) -> None:
    writer = Writer(tmp_path / "out.zarr")
    with pytest.raises(SaveMismatchError, match=message):
        append(writer)
    assert writer.timesteps == ()


def test_a_window_is_saved_whole_and_once(tmp_path: Path) -> None:
    class Array:
        def __init__(self, timestep: int) -> None:
            self.timestep = timestep

        def to_dask_array(self) -> da.Array:
            return lazy(self.timestep)

    writer = Writer(tmp_path / "out.zarr")
    for newest in (3, 4, 9):
        writer.append(temperature=[Array(t) for t in range(newest - 2, newest + 1)])
    check(tmp_path / "out.zarr", [1, 2, 3, 4, 7, 8, 9])


# What else may be at a path.


def test_paths_that_hold_something_else(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "text").write_text("mine")
    zarr.create_array(tmp_path / "array.zarr", shape=(3,), dtype=float)
    zarr.open_group(tmp_path / "group.zarr", mode="w").create_array("x", shape=(3,), dtype=float)
    xr.Dataset({"x": ("i", [1.0])}).to_netcdf(tmp_path / "other.nc")
    before = sorted(tmp_path.rglob("*"))
    for name, format, message in (
        ("folder", "zarr", "is no Zarr group of format 3, and not empty"),
        ("text", "zarr", "is a file, and a Zarr store is a folder"),
        ("array.zarr", None, "holds Zarr data that is no series of timesteps"),
        ("group.zarr", None, "holds Zarr data that is no series of timesteps"),
        ("folder", "hdf5", "is a folder, and hdf5 is a file"),
        ("text", "netcdf", "is no HDF5 file that can be read"),
        ("other.nc", None, "is an HDF5 file without 'timestep' along 'time'"),
    ):
        with pytest.raises(SaveFormatError, match=f"{tmp_path / name} {message}"):
            Writer(tmp_path / name, format=format)  # type: ignore[arg-type]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", SERIES)
def test_two_writers_of_one_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    first, second = Writer(path), Writer(path)
    first.append(temperature=lazy(0), timestep=0)
    with pytest.raises(SaveConflictError, match=rf"{path} is being written by process \d+ on "):
        second.append(temperature=lazy(1), timestep=1)
    first.append(temperature=lazy(1), timestep=1)
    first.close()
    second.append(temperature=lazy(2), timestep=2)
    check(path, [0, 1, 2])
    del first, second
    assert not list(tmp_path.glob(".*"))


def test_a_store_that_another_program_changes_meanwhile(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "out.zarr")
    writer.append(temperature=lazy(0), timestep=0)
    zarr.open_group(tmp_path / "out.zarr").attrs["author"] = "somebody"
    with pytest.raises(SaveConflictError, match="was changed by another program while this one saves"):
        writer.append(temperature=lazy(1), timestep=1)


@pytest.mark.parametrize("name", SERIES)
def test_paths_that_nobody_can_write(name: str) -> None:
    with pytest.raises(SaveError, match=rf"/proc/nowhere/{name}: anything could not be saved: No such file"):
        Writer(f"/proc/nowhere/{name}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True, text=True
    )
    if done.returncode != 0:
        skip_or_fail(f"a small file system needs root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def noise(timestep: int) -> np.ndarray:
    """320 kB that cannot be made smaller."""
    return np.random.default_rng(timestep).random((200, 200))


@pytest.mark.parametrize(
    ("name", "virtual"),
    [*((name, False) for name in SERIES), ("{timestep}.nc", False), ("{timestep}.h5", True)],
)
def test_a_full_disk(small_disk: Path, name: str, virtual: bool) -> None:
    """It is said, what was saved stays, and when there is room it goes on."""
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2**20))
    writer = Writer(small_disk / name, virtual=virtual)

    def append(timestep: int) -> None:
        writer.append(noise=da.from_array(noise(timestep), chunks=100), timestep=timestep)

    def check_noise(timesteps: list[int]) -> None:
        if "{" in name:
            found = [opened(small_disk / name.format(timestep=timestep)) for timestep in timesteps]
        else:
            found = [opened(small_disk / name)]
        whole = np.concatenate([one.noise.values for one in found])
        np.testing.assert_array_equal(whole, list(map(noise, timesteps)))

    saved: list[int] = []
    message = r"timestep \d+ could not be saved: No space left on device \(.* MiB free at .*\); make room"
    with pytest.raises(SaveError, match=message):
        for timestep in range(10):
            append(timestep)
            saved.append(timestep)
    assert saved
    check_noise(saved)
    ballast.unlink()
    again = [len(saved), len(saved) + 1]
    for timestep in again:
        append(timestep)
    check_noise(saved + again)
    assert writer.timesteps == (*saved, *again)
    writer.close()
    assert not [file for file in small_disk.rglob(".*") if "lock" not in file.name]


# Killed at any moment.


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_writer_that_is_killed(tmp_path: Path, name: str, stride: int) -> None:
    """Before its calls that change files: what is there is whole, and the next one goes on."""
    program = [sys.executable, "-m", "tests.support.killed_writer", str(tmp_path / name), str(stride)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


# A file for each timestep.


@pytest.mark.parametrize("virtual", [False, True])
@pytest.mark.parametrize("name", ["run-{timestep:03d}.nc", "run-{timestep:03d}.h5"])
def test_a_file_for_each_timestep(
    tmp_path: Path, name: str, virtual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    writer = Writer(f"out/{name}", virtual=virtual)
    monkeypatch.chdir("/")
    for timestep in (0, 5, 10):
        writer.append(labelled(timestep, ((17, 17, 6), 15)), total=labelled(timestep).sum())
    assert writer.timesteps == (0, 5, 10)
    (tmp_path / "out").rename(tmp_path / "moved")
    folder = tmp_path / "moved"
    for timestep in (0, 5, 10):
        path = folder / name.format(timestep=timestep)
        found = check(path, [timestep])
        assert found.temperature.attrs["units"] == "K"
        assert found.time.values.tolist() == [timestep * 0.25]
        with h5py.File(path) as file:
            assert file["temperature"].is_virtual is virtual
        assert "double temperature(time, y, x) ;" in tool("ncdump", "-h", path)
        assert "( 1, 40, 30 )" in tool("h5dump", "-H", "-d", "/temperature", path)
    files = [str(folder / name.format(timestep=timestep)) for timestep in (0, 5, 10)]
    with xr.open_mfdataset(files, combine="nested", concat_dim="time") as whole:
        assert whole.sel(time=slice(1, 3)).timestep.values.tolist() == [5, 10]


def test_a_zarr_store_for_each_timestep(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "{timestep}.zarr")
    for timestep in (1, 2, 2):
        writer.append(temperature=lazy(timestep), timestep=timestep)
    check(tmp_path / "1.zarr", [1])
    check(tmp_path / "2.zarr", [2])
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("virtual", [False, True])
def test_files_of_an_earlier_run_are_replaced(tmp_path: Path, virtual: bool) -> None:
    for sign, chunks in ((-1, 10), (1, 20)):
        writer = Writer(tmp_path / "{timestep}.h5", virtual=virtual)
        writer.append(temperature=sign * lazy(1, chunks), timestep=1)
    check(tmp_path / "1.h5", [1])
    assert len(list(tmp_path.rglob("*-?-?.h5"))) == (4 if virtual else 0)
    assert not list(tmp_path.glob(".*"))


# Virtual data sets, as 0.1.8 writes them.


def test_virtual_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    irregular = lazy(3, ((17, 17, 6), (1, 29)))
    to_hdf5("a/run.h5", {"temperature": irregular, "group/n": np.arange(5)}, compression="gzip")
    to_hdf5("a/run.h5", {"pressure": lazy(4)})
    to_hdf5("a/run.h5", {"/temperature": irregular + 1})
    Path("a").rename("b")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    with h5py.File(tmp_path / "b" / "run.h5") as file:
        np.testing.assert_array_equal(file["temperature"], at(3) + 1)
        np.testing.assert_array_equal(file["pressure"], at(4))
        assert file["group/n"][:].tolist() == [0, 1, 2, 3, 4]
        assert file["pressure"].is_virtual
        folders = {source.file_name.split("/")[1] for source in file["temperature"].virtual_sources()}
    parts = tmp_path / "b" / "run.h5.parts"
    assert folders <= {folder.name for folder in parts.iterdir()}
    assert len(list(parts.iterdir())) == 3  # those of the first temperature have gone with it... and n stays
    part = next((parts / folders.pop()).iterdir())
    part.unlink()
    with h5py.File(tmp_path / "b" / "run.h5") as file:
        assert np.isnan(file["temperature"][...]).any()  # not a number that looks like one
    assert "( 40, 30 )" in tool("h5dump", "-H", "-d", "/pressure", tmp_path / "b" / "run.h5")
