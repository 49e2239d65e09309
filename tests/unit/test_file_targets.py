"""Where something is saved, and in which format."""

from __future__ import annotations

from pathlib import Path

import pytest

from deisa.ray._files.formats import target_of
from deisa.ray._files.packages import package
from deisa.ray.errors import MissingPackageError, SaveFormatError
from deisa.ray.files import Writer


def test_what_paths_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "a {folder} of mine"
    odd.mkdir()
    monkeypatch.chdir(odd)
    for place, format, each in (
        ("out.zarr", "zarr", False),
        (Path("out.h5"), "hdf5", False),
        ("out.nc", "netcdf", False),
        ("out-{timestep:04d}.nc4", "netcdf", True),
        ("{timestep}/out.hdf5", "hdf5", True),
    ):
        target = target_of(place, None)
        assert (target.format, target.each) == (format, each)
        assert target.path is not None
        assert target.path.is_absolute()
    assert target_of("out-{timestep:04d}.nc", None).at(7) == odd / "out-0007.nc"
    assert target_of("out", "zarr").format == "zarr"
    assert target_of("s3://bucket/out.zarr", None).path is None


@pytest.mark.parametrize(
    ("place", "format", "message"),
    [
        ("out", None, r"'out' says no format: end it with .zarr, .h5, .hdf5, .nc, .nc4, or give format="),
        ("out.zarr", "zip", r"format must be 'zarr', 'hdf5' or 'netcdf', got 'zip'"),
        ("out-{t}.nc", None, r"only '{timestep}' can be filled in, not 't'"),
        ("out-{timestep.nc", None, r"'{timestep}' or '{timestep:06d}' stands for the timestep"),
        ("out-{timestep:s}.nc", None, r"stands for the timestep"),
        ("s3://bucket/out.nc", None, r"at a URL there can be one growing Zarr store"),
        (7, None, r"a place to save to is a path, or a Zarr store, got 7"),
    ],
)
def test_places_that_make_no_sense(place: object, format: str | None, message: str) -> None:
    with pytest.raises(SaveFormatError, match=message):
        target_of(place, format)


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from deisa.ray._files import packages

    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(packages, "import_module", missing)
    with pytest.raises(MissingPackageError, match=r"needs zarr, .* pip install 'deisa-ray\[zarr\]'"):
        Writer(tmp_path / "out.zarr")
    with pytest.raises(ImportError, match=r"pip install 'deisa-ray\[hdf5\]'"):
        package("h5py", "an HDF5 file")


def test_files_of_each_timestep_by_nodes_are_no_series(tmp_path: Path) -> None:
    with pytest.raises(
        SaveFormatError, match=r"virtual=True is for HDF5 and NetCDF with a file for each timestep"
    ):
        Writer(tmp_path / "out.h5", virtual=True)
