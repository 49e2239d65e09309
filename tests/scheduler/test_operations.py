"""Operations of Dask on our scheduler, on both engines, give what Dask's own scheduler gives."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import zarr
from dask._task_spec import Task, TaskRef

from deisa.ray._graph.leaves import kept_of
from deisa.ray._graph.scheduler import BundleScheduler

RNG = np.random.default_rng(7)
A = RNG.normal(size=(24, 16))
B = RNG.normal(size=(24, 16))
SQUARE = A[:16, :16] + 8 * np.eye(16)


def where(block_info: Any = None) -> np.ndarray:
    location = block_info[None]["array-location"]
    return np.full([stop - start for start, stop in location], float(location[0][0]))


def shifted(block: np.ndarray, block_info: Any = None) -> np.ndarray:
    return block + block_info[0]["array-location"][0][0]


def row_means(block: np.ndarray) -> np.ndarray:
    return block.mean(axis=-1)


OPERATIONS: dict[str, Callable[[da.Array, da.Array], Any]] = {
    "elementwise": lambda a, b: np.sqrt(abs(a)) + b**2 - 3 * a / (1 + abs(b)),
    "comparison": lambda a, b: da.where(a > b, a, b),
    "sum": lambda a, b: a.sum(axis=0),
    "mean": lambda a, b: a.mean(),
    "std along an axis": lambda a, b: a.std(axis=1),
    "argmax": lambda a, b: a.argmax(axis=0),
    "cumsum": lambda a, b: a.cumsum(axis=0),
    "topk": lambda a, b: da.topk(a, 3, axis=0),
    "median": lambda a, b: da.median(a, axis=0),
    "percentile": lambda a, b: da.percentile(a[:, 0], [25, 50]),
    "histogram": lambda a, b: da.histogram(a, bins=5, range=(-3, 3))[0],
    "unique": lambda a, b: da.unique(a.round()),
    "slicing": lambda a, b: a[3:19:2, ::-1],
    "fancy indexing": lambda a, b: a[[5, 1, 20, 5]],
    "boolean indexing": lambda a, b: a[a > 0],
    "indexing by a dask array": lambda a, b: a[da.from_array(np.array([3, 1, 2]), chunks=2)],
    "vindex": lambda a, b: a.vindex[[1, 20, 7], [3, 3, 15]],
    "rechunk": lambda a, b: a.rechunk((24, 2)) + b.rechunk((24, 2)),
    "transpose": lambda a, b: a.T @ b,
    "reshape": lambda a, b: a.reshape(4, 6, 16),
    "map_overlap": lambda a, b: a.map_overlap(lambda x: x + np.roll(x, 1, 0), depth=1, boundary="periodic"),
    "tensordot": lambda a, b: da.tensordot(a, b, axes=([0], [0])),
    "einsum": lambda a, b: da.einsum("ij,ij->i", a, b),
    "fft": lambda a, b: da.fft.fft(a.rechunk({0: -1}), axis=0),
    "qr": lambda a, b: da.linalg.qr(a.rechunk((6, 16)))[1].__abs__(),
    "svd": lambda a, b: da.linalg.svd(a.rechunk((6, 16)))[1],
    "lstsq": lambda a, b: da.linalg.lstsq(a.rechunk((6, 16)), b[:, 0].rechunk(6))[0],
    "solve": lambda a, b: da.linalg.solve(da.from_array(SQUARE, chunks=4), b[0].rechunk(4)),
    "map_blocks with block_info": lambda a, b: a.map_blocks(shifted, dtype=float),
    "map_blocks without arrays": lambda a, b: da.map_blocks(
        where, chunks=((4, 4), (3,)), dtype=float, meta=A[:0, :0]
    ),
    "stack and concatenate": lambda a, b: da.concatenate([da.stack([a, b])[0], b]),
    "masked": lambda a, b: da.ma.masked_greater(a, 0).sum(axis=0),
    "apply_gufunc": lambda a, b: da.apply_gufunc(
        row_means, "(i)->()", a.rechunk({1: -1}), output_dtypes=float
    ),
    "apply_along_axis": lambda a, b: da.apply_along_axis(np.ptp, 0, a),
    "random": lambda a, b: da.random.default_rng(3).normal(size=(20, 20), chunks=7).mean(axis=0),
    "structured": lambda a, b: a.astype([("u", "f4")])["u"],
}


def arrays() -> tuple[da.Array, da.Array]:
    return da.from_array(A, chunks=(6, 5)), da.from_array(B, chunks=(6, 5))


@pytest.mark.parametrize("operation", list(OPERATIONS.values()), ids=list(OPERATIONS))
def test_operation(scheduler: BundleScheduler, operation: Callable[[da.Array, da.Array], da.Array]) -> None:
    lazy = operation(*arrays())
    expected = lazy.compute(scheduler="synchronous")
    computed = lazy.compute(scheduler=scheduler)
    assert type(computed) is type(expected)
    np.testing.assert_allclose(computed, expected, rtol=1e-12, atol=1e-12)
    assert np.asarray(computed).dtype == np.asarray(expected).dtype


def test_operation_on_kept_values(scheduler: BundleScheduler) -> None:
    a, b = dask.persist(*arrays(), scheduler=scheduler)
    for name in ("elementwise", "mean", "rechunk", "map_overlap", "fancy indexing", "tensordot"):
        lazy = OPERATIONS[name](a, b)
        expected = OPERATIONS[name](*arrays()).compute(scheduler="synchronous")
        np.testing.assert_allclose(lazy.compute(scheduler=scheduler), expected, rtol=1e-12, atol=1e-12)


def test_persist_keeps_values_and_names(scheduler: BundleScheduler) -> None:
    a, _ = arrays()
    doubled = (2 * a).persist(scheduler=scheduler)
    assert type(doubled) is da.Array
    assert doubled.chunks == a.chunks
    assert all(kept_of(task) is not None for task in dict(doubled.__dask_graph__()).values())
    np.testing.assert_array_equal(doubled.compute(scheduler=scheduler), 2 * A)


def test_kept_values_are_there_for_any_scheduler(scheduler: BundleScheduler) -> None:
    a, _ = arrays()
    doubled = (2 * a).persist(scheduler=scheduler)
    np.testing.assert_array_equal((doubled + 1).compute(scheduler="threads"), 2 * A + 1)


def test_persist_of_persist(scheduler: BundleScheduler) -> None:
    a, b = arrays()
    first = (a + b).persist(scheduler=scheduler)
    second = (first * 2).persist(scheduler=scheduler)
    third = second.persist(scheduler=scheduler)
    del first, second
    np.testing.assert_allclose(third.sum().compute(scheduler=scheduler), (2 * (A + B)).sum())


def test_what_was_persisted_is_not_run_again(scheduler: BundleScheduler, tmp_path: Path) -> None:
    def noted(block: np.ndarray) -> np.ndarray:
        with (tmp_path / "calls").open("a") as calls:
            calls.write(".")
        return block

    x = arrays()[0].map_blocks(noted, dtype=float, meta=A[:0, :0]).persist(scheduler=scheduler)
    for _ in range(3):
        x.sum().compute(scheduler=scheduler)
    assert len((tmp_path / "calls").read_text()) == x.npartitions


def test_persist_of_several_kinds(scheduler: BundleScheduler) -> None:
    a, b = arrays()
    total, again, late = dask.persist(a.sum(), {"b": [b]}, dask.delayed(sum)([1, 2]), scheduler=scheduler)
    assert total.compute(scheduler=scheduler) == pytest.approx(A.sum())
    np.testing.assert_array_equal(again["b"][0].compute(scheduler=scheduler), B)
    assert late.compute(scheduler=scheduler) == 3


def test_several_collections_in_one_compute(scheduler: BundleScheduler) -> None:
    a, b = arrays()
    total, (part, both), late, plain = dask.compute(
        a.sum(), [b[3], a + b], dask.delayed(max)(4, 5), "plain", scheduler=scheduler
    )
    assert total == pytest.approx(A.sum())
    np.testing.assert_array_equal(part, B[3])
    np.testing.assert_array_equal(both, A + B)
    assert (late, plain) == (5, "plain")


def test_store_to_zarr(scheduler: BundleScheduler, tmp_path: Path) -> None:
    a, b = arrays()
    with dask.config.set(scheduler=scheduler):
        (a + b).to_zarr(str(tmp_path / "sum.zarr"))
        target = zarr.open_array(
            str(tmp_path / "target.zarr"), mode="w", shape=A.shape, chunks=(6, 5), dtype="f8"
        )
        da.store(a * 2, target, lock=False)
        np.testing.assert_array_equal(da.from_zarr(str(tmp_path / "sum.zarr")).compute(), A + B)
    np.testing.assert_array_equal(target[:], A * 2)


def test_store_returns_what_was_stored(scheduler: BundleScheduler, tmp_path: Path) -> None:
    a, _ = arrays()
    target = np.lib.format.open_memmap(tmp_path / "a.npy", "w+", A.dtype, A.shape)
    path = tmp_path / "a.npy"

    class Npy:
        shape, dtype = A.shape, A.dtype

        def __setitem__(self, index: Any, value: np.ndarray) -> None:
            memory = np.load(path, mmap_mode="r+")
            memory[index] = value
            memory.flush()

        def __getitem__(self, index: Any) -> np.ndarray:
            return np.load(path)[index]

    with dask.config.set(scheduler=scheduler):
        stored = da.store(a + 1, Npy(), lock=False, return_stored=True, compute=True)
        np.testing.assert_array_equal(stored.compute(), A + 1)
    np.testing.assert_array_equal(target, A + 1)


def test_to_delayed(scheduler: BundleScheduler) -> None:
    a, _ = arrays()
    blocks = a.to_delayed()
    sums = [dask.delayed(np.sum)(block) for block in blocks.ravel()]
    total = dask.delayed(sum)(sums)
    assert total.compute(scheduler=scheduler) == pytest.approx(A.sum())
    again = da.from_delayed(dask.delayed(np.negative)(blocks[1, 1]), shape=(6, 5), dtype=float)
    np.testing.assert_array_equal(again.compute(scheduler=scheduler), -A[6:12, 5:10])


def test_delayed(scheduler: BundleScheduler) -> None:
    @dask.delayed(pure=True)
    def add(x: int, y: int = 0) -> int:
        return x + y

    @dask.delayed(nout=2)
    def both(x: int) -> tuple[int, int]:
        return x, -x

    plus, minus = both(add(1, y=add(2)))
    assert dask.compute(plus, minus, {"sum": plus + minus}, scheduler=scheduler) == (3, -3, {"sum": 0})
    assert add(dask.delayed([1, 2]), [3]).compute(scheduler=scheduler) == [1, 2, 3]


def inc(x: int) -> int:
    return x + 1


def test_plain_graphs_and_nested_keys(scheduler: BundleScheduler) -> None:
    graph = {"a": 1, "b": (inc, "a"), ("c", 0): (sum, ["a", "b", (inc, "b")]), "d": "b", "e": ["a", ("c", 0)]}
    assert scheduler(graph, "b") == 2
    assert (
        scheduler(graph, ["a", ["b", [("c", 0)]], "d"])
        == (1, (2, (6,)), 2)
        == dask.get(graph, ["a", ["b", [("c", 0)]], "d"])
    )
    assert scheduler(graph, "e") == [1, 6]
    assert scheduler(graph, []) == ()
    tasks = {"x": Task("x", inc, 1), "y": Task("y", inc, TaskRef("x"))}
    assert scheduler(tasks, [["y"], "x"]) == ((3,), 2)
    assert scheduler(graph, ["a", "a"], num_workers=3, pool=None) == (1, 1)


def test_missing_keys(scheduler: BundleScheduler) -> None:
    with pytest.raises(KeyError):
        scheduler({"a": 1}, ["b"])


def test_empty_arrays(scheduler: BundleScheduler) -> None:
    assert da.zeros((0, 3)).compute(scheduler=scheduler).shape == (0, 3)
    assert arrays()[0][:0].sum().compute(scheduler=scheduler) == 0


def only_arrays(value: Any) -> Iterator[np.ndarray]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from only_arrays(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from only_arrays(item)


@pytest.mark.parametrize(
    "lazy",
    [
        lambda a: a,
        lambda a: a.rechunk(-1),
        lambda a: a.rechunk(-1).T,
        lambda a: a.rechunk(-1)[2:4],
        lambda a: a[0],
        lambda a: da.ma.masked_greater(a.rechunk(-1), 0),
        lambda a: da.ma.masked_greater(a, 0),
        lambda a: dask.delayed(lambda x: {"x": [x, (x[1],)]})(a),
        lambda a: [a.rechunk(-1), {"b": a + 1}],
        lambda a: a.rechunk(-1).astype([("u", "f8")]),
    ],
    ids=[
        "whole",
        "one chunk",
        "transposed",
        "slice",
        "row",
        "masked chunk",
        "masked",
        "nested",
        "list",
        "structured",
    ],
)
def test_results_are_writable(scheduler: BundleScheduler, lazy: Callable[[da.Array], Any]) -> None:
    (computed,) = dask.compute(lazy(arrays()[0]), scheduler=scheduler)
    (persisted,) = dask.persist(lazy(arrays()[0]), scheduler=scheduler)
    (again,) = dask.compute(persisted, scheduler=scheduler)
    found = [*only_arrays(computed), *only_arrays(again)]
    assert found
    for array in found:
        array[...] = array[(0,) * array.ndim]
        if isinstance(array, np.ma.MaskedArray):
            array.mask = False


def test_writing_into_a_result_does_not_change_what_is_kept(scheduler: BundleScheduler) -> None:
    kept = arrays()[0].rechunk(-1).persist(scheduler=scheduler)
    for _ in range(2):
        computed = kept.compute(scheduler=scheduler)
        np.testing.assert_array_equal(computed, A)
        computed[...] = 0


class OwnError(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{text} ({code})")
        self.code = code


def fails(block: np.ndarray) -> np.ndarray:
    if block.size:
        raise_it()
    return block


def raise_it() -> None:
    raise ValueError("no good")


def test_exceptions_keep_their_type_and_traceback(scheduler: BundleScheduler) -> None:
    lazy = arrays()[0].map_blocks(fails, dtype=float, meta=A[:0, :0]).sum()
    for _ in range(2):
        with pytest.raises(ValueError, match="no good") as caught:
            lazy.compute(scheduler=scheduler)
        assert type(caught.value) is ValueError
        assert str(caught.value) == "no good"
        assert "in raise_it" in "".join(traceback.format_exception(caught.value))
    assert inc_later(scheduler) == 2


def inc_later(scheduler: BundleScheduler) -> int:
    return dask.delayed(inc)(1).compute(scheduler=scheduler)


def test_exceptions_that_cannot_be_pickled(scheduler: BundleScheduler) -> None:
    def fail() -> None:
        raise OwnError(3, "own")

    with pytest.raises(Exception, match=r"own \(3\)"):
        dask.delayed(fail)().compute(scheduler=scheduler)


def test_exceptions_of_what_was_persisted(scheduler: BundleScheduler) -> None:
    with pytest.raises(ValueError, match="no good"):
        kept = arrays()[0].map_blocks(fails, dtype=float, meta=A[:0, :0]).persist(scheduler=scheduler)
        (kept + 1).sum().compute(scheduler=scheduler)


def test_key_errors_and_stop_iteration(scheduler: BundleScheduler) -> None:
    def fail(error: type[Exception]) -> None:
        raise error("mine")

    for error in (KeyError, StopIteration, ZeroDivisionError):
        with pytest.raises(error, match="mine"):
            dask.delayed(fail)(error).compute(scheduler=scheduler)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.filterwarnings("ignore:unclosed")
def test_a_bundle_whose_worker_dies_is_run_again(tmp_path: Path) -> None:
    from deisa.ray import deisa_ray_get

    marker = tmp_path / "died"

    def die_once(block: np.ndarray) -> np.ndarray:
        if not marker.exists():
            marker.touch()
            os._exit(1)
        return block

    lazy = arrays()[0].map_blocks(die_once, dtype=float, meta=A[:0, :0]).sum()
    assert lazy.compute(scheduler=deisa_ray_get) == pytest.approx(A.sum())
    assert marker.exists()


def test_compute_inside_of_a_task(scheduler: BundleScheduler) -> None:
    def inner() -> float:
        return float(da.ones(10, chunks=3).sum().compute())

    with dask.config.set(scheduler=scheduler):
        assert dask.delayed(inner)().compute() == 10


def test_many_threads_compute_at_once(scheduler: BundleScheduler) -> None:
    from concurrent.futures import ThreadPoolExecutor

    a, _ = arrays()
    with ThreadPoolExecutor(4) as pool:
        totals = list(pool.map(lambda i: (a + i).sum().compute(scheduler=scheduler), range(8)))
    np.testing.assert_allclose(totals, [A.sum() + i * A.size for i in range(8)])
