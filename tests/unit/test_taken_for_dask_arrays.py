"""Whatever takes Dask arrays takes a `DeisaArray` for what its `dask` is: never for a constant, and no less lazily."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import dask.dataframe as dd
import h5py
import numpy as np
import pytest
import xarray as xr
import zarr
from dask.delayed import Delayed

from deisa.ray.types import DeisaArray, can_be_formatted

NUMBERS = np.arange(1.0, 17.0).reshape(4, 4)
Function = Callable[..., Any]


class CountingScheduler:
    """Dask's own for one thread; counts what it is asked for."""

    def __init__(self) -> None:
        self.computations = 0

    def __call__(self, dsk: Any, keys: Any, **options: Any) -> Any:
        self.computations += 1
        return dask.get(dsk, keys, **options)


def array(shift: float = 0.0) -> da.Array:
    return da.from_array(NUMBERS + shift, chunks=(2, 2))


def outcome(do: Function, wrap: Function) -> tuple[Any, int]:
    """What comes of something done with two arrays, and how often it computed anything before it was asked for."""
    scheduler = CountingScheduler()
    with dask.config.set(scheduler=scheduler), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = do(wrap(array()), wrap(array(0.5)))
            computations = scheduler.computations
            return computed(result), computations
        except Exception as error:
            return type(error), scheduler.computations


def computed(result: Any) -> Any:
    if isinstance(result, da.Array):
        return "array", result.chunks, result.dtype, result.compute()
    if isinstance(result, Delayed):
        return "delayed", result.compute()
    if isinstance(result, list | tuple):
        return type(result), [computed(one) for one in result]
    return result


def assert_alike(one: Any, other: Any) -> None:
    assert type(one) is type(other), (one, other)
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for inner, outer in zip(one, other, strict=True):
            assert_alike(inner, outer)
    elif isinstance(one, np.ndarray):
        close = one.dtype.kind in "fc"  # not every function adds up in the same order each time
        (np.testing.assert_allclose if close else np.testing.assert_array_equal)(one, other)
    elif hasattr(one, "identical"):  # xarray's
        assert one.identical(other)
    elif hasattr(one, "equals"):  # pandas's
        assert one.equals(other)
    else:
        assert one == other or (one != one and other != other), (one, other)


def plain(x: da.Array) -> da.Array:
    return x


def deisa(x: da.Array) -> DeisaArray:
    return DeisaArray(x, 7)


def check(do: Function, raises: bool = False) -> None:
    expected, computations = outcome(do, plain)
    assert isinstance(expected, type) == raises, expected
    got, computations_too = outcome(do, deisa)
    assert_alike(got, expected)
    assert computations_too == computations


def at(*path: str) -> Function:
    found: Any = da
    for name in path:
        found = getattr(found, name)
    return found


def public(module: Any) -> list[str]:
    names = getattr(module, "__all__", None) or dir(module)
    return [n for n in names if not n.startswith("_") and callable(getattr(module, n))]


# Every public function, in the usual ways of calling one.

CALLS: dict[str, Function] = {
    "f(a)": lambda f, a, b: f(a),
    "f(a, b)": lambda f, a, b: f(a, b),
    "f([a, b])": lambda f, a, b: f([a, b]),
    "f(a, 1)": lambda f, a, b: f(a, 1),
    "f(a > 3, b)": lambda f, a, b: f(a > 3, b),
    "f(np.negative, a)": lambda f, a, b: f(np.negative, a),
}
APART = {
    "assert_eq",  # of Dask's own tests, looks into the graph
    "as_gufunc",  # makes functions
    "empty_like",  # of any values
    "compression_matrix",  # random
    "typename",
    "register_chunk_type",  # changes Dask
    "seed",
}


@pytest.mark.parametrize("how", CALLS)
@pytest.mark.parametrize("room", ["", "linalg", "ma"])
def test_every_function_called_in_the_usual_ways(room: str, how: str) -> None:
    module = at(room) if room else da
    compared = 0
    for name in public(module):
        function = getattr(module, name)
        if name in APART or isinstance(function, type):
            continue
        expected, computations = outcome(lambda a, b: CALLS[how](function, a, b), plain)  # noqa: B023
        got, computations_too = outcome(lambda a, b: CALLS[how](function, a, b), deisa)  # noqa: B023
        if isinstance(expected, tuple | type):  # others carry the array's type in their names or reprs
            assert_alike(got, expected)
            assert computations_too == computations, name
            compared += 1
    assert compared > 10


# Those that want more than arrays.


def shifted(block: np.ndarray) -> np.ndarray:
    return block + 1


def both(block: np.ndarray, other: np.ndarray) -> np.ndarray:
    return block - 2 * other


CASES: dict[str, Function] = {
    "map_blocks": lambda a, b: da.map_blocks(
        lambda block: block.max(keepdims=True), a, dtype=float, chunks=(1, 1)
    ),
    "map_blocks with two": lambda a, b: da.map_blocks(both, a, b, dtype=float),
    "map_blocks, method": lambda a, b: a.map_blocks(both, b, dtype=float),
    "map_blocks, method of an ordinary one": lambda a, b: (a + 0).map_blocks(both, b, dtype=float),
    "map_blocks, keyword": lambda a, b: da.map_blocks(
        lambda block, other: block + other.sum(), a, other=b, dtype=float
    ),
    "map_blocks, nested": lambda a, b: da.map_blocks(
        lambda block, others: block + others[0].sum(), a, [b], dtype=float
    ),
    "map_overlap": lambda a, b: da.map_overlap(
        lambda block: block + np.roll(block, 1, 0), a, depth=1, boundary="reflect"
    ),
    "map_overlap with two": lambda a, b: da.map_overlap(both, a, b, depth=1, boundary=0, dtype=float),
    "overlap": lambda a, b: da.overlap.overlap(a, depth=1, boundary="periodic"),
    "trim_overlap": lambda a, b: da.overlap.trim_overlap(a, depth={0: 0, 1: 0}),
    "blockwise": lambda a, b: da.blockwise(both, "ij", a, "ij", b, "ij", dtype=float),
    "blockwise, literal": lambda a, b: da.blockwise(
        lambda x, y: x + y.sum(), "ij", a, "ij", b, None, dtype=float
    ),
    "apply_gufunc": lambda a, b: da.apply_gufunc(
        np.dot, "(i),(i)->()", a.rechunk((2, 4)), b, vectorize=True, allow_rechunk=True, output_dtypes=float
    ),
    "reduction": lambda a, b: da.reduction(a, np.sum, np.sum, dtype=float),
    "cumreduction": lambda a, b: da.reductions.cumreduction(np.cumsum, np.add, 0, a, 0, dtype=float),
    "elemwise": lambda a, b: da.core.elemwise(np.hypot, a, b),
    "stack": lambda a, b: da.stack([a, b], axis=1),
    "concatenate": lambda a, b: da.concatenate([a, b], axis=1),
    "block": lambda a, b: da.block([[a, b], [b, a]]),
    "where": lambda a, b: da.where(a > 5, a, b),
    "choose": lambda a, b: da.choose((a % 2).astype(int), [a, b]),
    "select": lambda a, b: da.select([a > 5, b > 2], [a, b]),
    "piecewise": lambda a, b: da.piecewise(a, [a < 5, a >= 5], [-1, 1]),
    "clip": lambda a, b: da.clip(a, 2, b),
    "isin": lambda a, b: da.isin(a, b),
    "compress": lambda a, b: da.compress([True, False, True, False], a, axis=0),
    "extract": lambda a, b: da.extract(a > 3, b),
    "take": lambda a, b: da.take(a, [0, 3], axis=1),
    "take, order unchanged": lambda a, b: da.take(a, [0, 1, 2, 3], axis=0),
    "take_along, indices": lambda a, b: a[:, (b[0] % 4).astype(int)],
    "boolean index": lambda a, b: b[a > 5],
    "vindex": lambda a, b: a.vindex[[0, 1], [2, 3]],
    "blocks": lambda a, b: a.blocks[1, 0],
    "partitions": lambda a, b: a.partitions[0],
    "apply_along_axis": lambda a, b: da.apply_along_axis(np.ptp, 0, a),
    "apply_over_axes": lambda a, b: da.apply_over_axes(np.sum, a, [0]),
    "pad": lambda a, b: da.pad(a, 1, mode="edge"),
    "roll": lambda a, b: da.roll(a, 1, axis=0),
    "repeat": lambda a, b: da.repeat(a, 2, axis=0),
    "tile": lambda a, b: da.tile(a, (2, 1)),
    "insert": lambda a, b: da.insert(a, 1, b[0], axis=0),
    "delete": lambda a, b: da.delete(a, 1, axis=0),
    "append": lambda a, b: da.append(a, b, axis=0),
    "diag": lambda a, b: da.diag(a[0]),
    "diag of two dimensions": lambda a, b: da.diag(a),
    "diagonal": lambda a, b: da.diagonal(a, 1),
    "tril": lambda a, b: da.tril(a),
    "coarsen": lambda a, b: da.coarsen(np.mean, a, {0: 2, 1: 2}),
    "histogram": lambda a, b: da.histogram(a, bins=4, range=(0, 20)),
    "histogram, weights": lambda a, b: da.histogram(a, bins=4, range=(0, 20), weights=b)[0],
    "histogram2d": lambda a, b: da.histogram2d(a[0], b[0], bins=2, range=((0, 5), (0, 5)))[0],
    "histogramdd": lambda a, b: da.histogramdd((a[0], b[0]), bins=2, range=((0, 5), (0, 5)))[0],
    "bincount": lambda a, b: da.bincount(a[0].astype(int), weights=b[0], minlength=5),
    "digitize": lambda a, b: da.digitize(a, np.array([2, 8])),
    "searchsorted": lambda a, b: da.searchsorted(a[0], b[0]),
    "percentile": lambda a, b: da.percentile(a[0], [25, 50]),
    "quantile": lambda a, b: da.quantile(a, 0.5, axis=0),
    "median": lambda a, b: da.median(a, axis=0),
    "topk": lambda a, b: da.topk(a, 2),
    "argtopk": lambda a, b: da.argtopk(a, 2),
    "unique": lambda a, b: da.unique(a, return_counts=True),
    "union1d": lambda a, b: da.union1d(a[0], b[0]),
    "average": lambda a, b: da.average(a, weights=b),
    "cov": lambda a, b: da.cov(a, b),
    "corrcoef": lambda a, b: da.corrcoef(a),
    "gradient": lambda a, b: da.gradient(a, axis=0),
    "diff": lambda a, b: da.diff(a, axis=0, prepend=b[:1]),
    "ediff1d": lambda a, b: da.ediff1d(a),
    "einsum": lambda a, b: da.einsum("ij,jk->ik", a, b),
    "tensordot": lambda a, b: da.tensordot(a, b, axes=1),
    "matmul": lambda a, b: da.matmul(a, b),
    "@": lambda a, b: a @ b,
    "dot": lambda a, b: da.dot(a, b),
    "vdot": lambda a, b: da.vdot(a, b),
    "outer": lambda a, b: da.outer(a[0], b),
    "rechunk": lambda a, b: da.rechunk(a, (4, 1)),
    "rechunk to the same": lambda a, b: a.rechunk((2, 2)) + 1,
    "reshape": lambda a, b: da.reshape(a, (4, 2, 2)),
    "reshape to the same": lambda a, b: a.reshape((4, 4)) + 1,
    "reshape_blockwise": lambda a, b: da.reshape_blockwise(a, (16,)),
    "shuffle": lambda a, b: da.shuffle(a, [[3, 1], [0, 2]], axis=0),
    "shuffle to the same": lambda a, b: a.shuffle([[0, 1], [2, 3]], axis=0),
    "broadcast_to": lambda a, b: da.broadcast_to(a, (2, 4, 4)),
    "broadcast_arrays": lambda a, b: da.broadcast_arrays(a, b[0]),
    "unify_chunks": lambda a, b: da.core.unify_chunks(a, "ij", b.rechunk((4, 1)), "ij")[1],
    "moveaxis": lambda a, b: da.moveaxis(a, 0, 1),
    "swapaxes": lambda a, b: da.swapaxes(a, 0, 1),
    "full_like": lambda a, b: da.full_like(a, 3.0),
    "meshgrid": lambda a, b: da.meshgrid(a[0], b[0]),
    "asarray": lambda a, b: da.asarray(a),
    "asarray, another type": lambda a, b: da.asarray(a, dtype="f4"),
    "asarray of a list": lambda a, b: da.asarray([a, b]),
    "asanyarray": lambda a, b: da.asanyarray(a),
    "array": lambda a, b: da.array(a),
    "asarray, like": lambda a, b: da.asarray([1, 2], like=a),
    "fft": lambda a, b: da.fft.fft(a.rechunk((2, 4)), axis=1),
    "rfft2": lambda a, b: da.fft.rfft2(a.rechunk((4, 4))),
    "fftshift": lambda a, b: da.fft.fftshift(a),
    "norm": lambda a, b: da.linalg.norm(a),
    "qr": lambda a, b: da.linalg.qr(a.rechunk((2, 4)))[1],
    "tsqr": lambda a, b: da.linalg.tsqr(a.rechunk((2, 4)))[1],
    "svd": lambda a, b: da.linalg.svd(a.rechunk((2, 4)))[1],
    "solve": lambda a, b: da.linalg.solve(a + 9 * da.eye(4, chunks=2), b),
    "cholesky": lambda a, b: da.linalg.cholesky(a @ a.T + da.eye(4, chunks=2)),
    "inv": lambda a, b: da.linalg.inv(a + 9 * da.eye(4, chunks=2)),
    "masked_where": lambda a, b: da.ma.filled(da.ma.masked_where(a > 5, b), -1),
    "masked_array": lambda a, b: da.ma.getmaskarray(da.ma.masked_array(a, mask=b > 3)),
    "random, loc": lambda a, b: da.random.default_rng(1).poisson(a, chunks=(2, 2)).shape,
    "from_delayed": lambda a, b: da.from_delayed(dask.delayed(shifted)(a), (4, 4), float),
    "to_delayed": lambda a, b: a.to_delayed()[0, 1],
    "store": lambda a, b: stored(lambda target: da.store([a], [target])),
    "store, method": lambda a, b: stored(lambda target: a.store(target)),
    "store, later": lambda a, b: stored(lambda target: da.store(a, target, compute=False).compute()),
    "ufunc.outer": lambda a, b: da.add.outer(a[0], b[0]),
    "ufunc, out": lambda a, b: da.add(a, 1, out=b),
    "setitem, mask": lambda a, b: assigned(a, a > 5, 0.0),
    "setitem, value": lambda a, b: assigned(a, slice(0, 2), b[:2]),
    "setitem, whole value of one chunk": lambda a, b: assigned(a, slice(None), b.rechunk(-1)),
    "setitem, index": lambda a, b: assigned(a, (b[0] % 4).astype(int), -1.0),
    "setitem into another": lambda a, b: assigned(a + 0, slice(None), b),
    "delayed": lambda a, b: dask.delayed(both)(a, b),
    "delayed, nested": lambda a, b: dask.delayed(len)([a, {"b": b}]),
    "compute": lambda a, b: dask.compute(a, [b]),
    "persist": lambda a, b: [one + 0 for one in dask.persist(a, b)],
    "optimize": lambda a, b: [one + 0 for one in dask.optimize(a, b)],
    "np.mean": lambda a, b: np.mean(a, axis=0),
    "np.concatenate": lambda a, b: np.concatenate([a, b]),
    "np.stack": lambda a, b: np.stack([a, b]),
    "np.where": lambda a, b: np.where(a > 3, a, b),
    "np.hypot": lambda a, b: np.hypot(a, b),
    "np.einsum": lambda a, b: np.einsum("ij,ij->i", a, b),
    "np.clip": lambda a, b: np.clip(a, 2, 7),
    "np.sort": lambda a, b: np.sort(a),
    "np.histogram": lambda a, b: np.histogram(a, bins=3, range=(0, 9)),
    "np.add.outer": lambda a, b: np.add.outer(a[0], b[0]),
    "np.linalg.norm": lambda a, b: np.linalg.norm(a),
    "np.fft.fft": lambda a, b: np.fft.fft(a.rechunk((2, 4))),
    "np.asarray": lambda a, b: np.asarray(a),
    "np.array": lambda a, b: np.array(a, dtype="f4"),
    "list": lambda a, b: list(a),
    "sum": lambda a, b: sum([a, b]),
    "max": lambda a, b: max(a.max(), b.max()),
    "float": lambda a, b: float(a[0, 0]),
    "bool": lambda a, b: bool(a[0, 0] > 0),
    "compute_chunk_sizes": lambda a, b: a.compute_chunk_sizes().chunks,
    "ordinary first": lambda a, b: (a + 0) * b,
    "ordinary last": lambda a, b: a * (b + 0),
    "numpy first": lambda a, b: NUMBERS - a,
    "divmod": lambda a, b: divmod(a, b),
    "power": lambda a, b: 2**a,
}


def stored(store: Function) -> np.ndarray:
    target = np.zeros((4, 4))
    store(target)
    return target


def assigned(array: Any, index: Any, value: Any) -> Any:
    array[index] = value
    return array + 0


@pytest.mark.parametrize("case", CASES)
def test_functions_that_want_more_than_arrays(case: str) -> None:
    check(CASES[case])


def test_what_dask_refuses() -> None:
    check(lambda a, b: da.from_array(a), raises=True)
    check(lambda a, b: da.concatenate([a, b[0]]), raises=True)
    check(lambda a, b: len(a[0, 0]), raises=True)
    check(lambda a, b: bool(a), raises=True)
    check(lambda a, b: float(a), raises=True)


@pytest.mark.parametrize("method", sorted(n for n in dir(da.Array) if not n.startswith("_")))
def test_every_method(method: str) -> None:
    """Without arguments; those that want some raise the same."""
    if method in {"dask", "to_svg", "visualize", "to_delayed"}:
        return  # `dask` is the point; others have no values to compare

    def do(a: Any, b: Any) -> Any:
        found = getattr(a, method)
        return found() if callable(found) else found

    expected, _ = outcome(do, plain)
    got, _ = outcome(do, deisa)
    if isinstance(expected, tuple | type | int | np.dtype):
        assert_alike(got, expected)


# Files.


def test_files(tmp_path: Path) -> None:
    def to_zarr(a: Any, b: Any) -> Any:
        da.to_zarr(a, str(tmp_path / f"{type(a).__name__}.zarr"))
        return zarr.open_array(str(tmp_path / f"{type(a).__name__}.zarr"))[...]

    def to_hdf5(a: Any, b: Any) -> Any:
        path = tmp_path / f"{type(a).__name__}.h5"
        da.to_hdf5(path, {"/a": a, "/b": b})
        with h5py.File(path) as file:
            return file["a"][...], file["b"][...]

    def to_npy_stack(a: Any, b: Any) -> Any:
        path = str(tmp_path / type(a).__name__)
        da.to_npy_stack(path, a)
        return da.from_npy_stack(path)

    for do in (to_zarr, to_hdf5, to_npy_stack):
        check(do)


# Other libraries.


def test_data_frames() -> None:
    check(lambda a, b: dd.from_dask_array(a, columns=list("wxyz")).compute())
    check(lambda a, b: dd.from_dask_array(a[0]).sum().compute())
    check(lambda a, b: a.to_dask_dataframe(columns=list("wxyz")).sum().compute())


XARRAY: dict[str, Function] = {
    "DataArray": lambda a, b: xr.DataArray(a, dims=("y", "x")),
    "Variable": lambda a, b: xr.Variable(("y", "x"), a),
    "Dataset": lambda a, b: xr.Dataset({"a": (("y", "x"), a), "b": (("y", "x"), b)}),
    "arithmetic": lambda a, b: xr.DataArray(a, dims=("y", "x")) - xr.DataArray(b, dims=("y", "x")),
    "with the array itself": lambda a, b: xr.DataArray(a, dims=("y", "x")) - b,
    "the array itself first": lambda a, b: b * xr.DataArray(a, dims=("y", "x")),
    "mean": lambda a, b: xr.DataArray(a, dims=("y", "x")).mean("y"),
    "rolling": lambda a, b: xr.DataArray(a, dims=("y", "x")).rolling(y=2).mean(),
    "coarsen": lambda a, b: xr.DataArray(a, dims=("y", "x")).coarsen(y=2).mean(),
    "isel": lambda a, b: xr.DataArray(a, dims=("y", "x")).isel(y=1),
    "where": lambda a, b: xr.where(xr.DataArray(a, dims=("y", "x")) > 3, a, b),
    "concat": lambda a, b: xr.concat(
        [xr.DataArray(a, dims=("y", "x")), xr.DataArray(b, dims=("y", "x"))], "t"
    ),
    "weighted": lambda a, b: (
        xr.DataArray(a, dims=("y", "x")).weighted(xr.DataArray(b, dims=("y", "x"))).mean()
    ),
    "map_blocks": lambda a, b: xr.map_blocks(lambda block: block + 1, xr.DataArray(a, dims=("y", "x"))),
    "apply_ufunc": lambda a, b: xr.apply_ufunc(
        both,
        xr.DataArray(a, dims=("y", "x")),
        xr.DataArray(b, dims=("y", "x")),
        dask="parallelized",
        output_dtypes=[float],
    ),
    "apply_ufunc, allowed": lambda a, b: xr.apply_ufunc(
        np.negative, xr.DataArray(a, dims=("y", "x")), dask="allowed"
    ),
}


@pytest.mark.parametrize("case", XARRAY)
def test_xarray_stays_lazy(case: str) -> None:
    do = XARRAY[case]
    check(lambda a, b: bool(do(a, b).chunks))
    check(lambda a, b: do(a, b).compute())


def test_xarray_mixes_it_with_ordinary_arrays() -> None:
    with dask.config.set(array_plugins=[can_be_formatted]):  # as in a run
        for mixed in (
            lambda a, b: xr.Dataset({"a": (("y", "x"), a), "b": (("y", "x"), b + 0), "mean": a.mean()}),
            lambda a, b: xr.DataArray(a, dims=("y", "x")) - xr.DataArray(b + 0, dims=("y", "x")),
            lambda a, b: xr.concat([xr.DataArray(a), xr.DataArray(b + 0)], "t"),
            lambda a, b: xr.apply_ufunc(both, xr.DataArray(a), xr.DataArray(b + 0), dask="parallelized"),
        ):
            check(lambda a, b: mixed(a, b).compute())  # noqa: B023
        check(lambda a, b: np.where(a > a.mean(), a, b.mean()))


def test_xarray_writes_files(tmp_path: Path) -> None:
    def dataset(a: Any) -> Any:
        return xr.Dataset({"a": (("y", "x"), a), "b": (("y", "x"), a + 1)})

    def to_zarr(a: Any, b: Any) -> Any:
        path = str(tmp_path / f"{type(a).__name__}.zarr")
        dataset(a).to_zarr(path, consolidated=False)
        written = zarr.open_group(path, mode="r")
        return [np.asarray(written[name]) for name in ("a", "b")]

    def to_netcdf(a: Any, b: Any) -> Any:
        path = str(tmp_path / f"{type(a).__name__}.nc")
        dataset(a).to_netcdf(path, engine="scipy")
        with xr.open_dataset(path, engine="scipy") as written:
            return written.load()

    for do in (to_zarr, to_netcdf):
        check(do)
