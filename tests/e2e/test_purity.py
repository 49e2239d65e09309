"""What user code sees and leaves behind: the same on both engines, and nothing from one timestep to the next."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest

from deisa.ray import DeisaArray
from deisa.ray.errors import NotPicklableError
from tests.e2e import own_module
from tests.e2e.simulation import Site
from tests.e2e.squares import run_squares, square

STEPS = 8  # more than it takes until plans are reused and bundles have become short
META = np.empty((0, 0))

HITS = [0]


def each_timestep(site: Site, compute: Callable[[DeisaArray], Any], **options: Any) -> list[Any]:
    """What `compute` returns for each timestep."""
    found: list[Any] = []
    run_squares(site, lambda window: found.append(compute(window[-1])), STEPS, **options)
    assert len(found) == STEPS
    return found


def test_a_generator_starts_anew_at_every_timestep(site: Site) -> None:
    def noisy(x: DeisaArray) -> np.ndarray:
        rng = np.random.default_rng(42)
        return (x.dask.map_blocks(lambda b: b + rng.normal(), dtype=float, meta=META) - x.dask).compute()

    first = np.random.default_rng(42).normal()
    for noise in each_timestep(site, noisy, grid=(1, 1)):
        np.testing.assert_allclose(noise, first)


@pytest.mark.parametrize("where", ["inside the callback", "outside"])
def test_what_a_task_changes_is_gone_at_the_next_timestep(site: Site, where: str) -> None:
    outer: dict[str, Any] = {"seen": [], "count": 0}

    def counting(x: DeisaArray) -> float:
        state: dict[str, Any] = {"seen": [], "count": 0} if where == "inside the callback" else outer

        def count(block: np.ndarray) -> np.ndarray:
            state["count"] += 1
            state["seen"].append(block.sum())
            return np.full_like(block, state["count"] + len(state["seen"]))

        return float(x.dask.map_blocks(count, dtype=float, meta=META).max().compute())

    assert each_timestep(site, counting, grid=(1, 1)) == [2.0] * STEPS
    assert outer == {"seen": [], "count": 0}


def test_random_arrays_of_dask_are_the_same_each_time(site: Site) -> None:
    def noisy(x: DeisaArray) -> float:
        noise = da.random.default_rng(7).normal(size=x.shape, chunks=x.chunks)
        return float((x.dask - x.dask + noise).sum().compute())

    found = each_timestep(site, noisy)
    assert found == [found[0]] * STEPS


def default_of_a_list(block: np.ndarray, seen: list[int] = []) -> np.ndarray:  # noqa: B006
    seen.append(1)
    return np.full_like(block, os.getpid())


def test_user_code_never_runs_in_the_analytics_on_ray(site: Site) -> None:
    """However short it is; and functions that are found by name are user code, too."""

    def where(x: DeisaArray) -> set[int]:
        by_name = x.dask.map_blocks(default_of_a_list, dtype=float, meta=META)
        by_value = x.dask.map_blocks(lambda b: np.full_like(b, os.getpid()), dtype=float, meta=META)
        return {int(pid) for pid in np.unique(np.stack(dask.compute(by_name, by_value)))}

    for pids in each_timestep(site, where):
        assert (os.getpid() in pids) == (site.engine == "local")


def write_here(block: np.ndarray, name: str) -> np.ndarray:
    with open(name, "a") as file:
        file.write(f"{os.getcwd()}\n")
    return block


def test_relative_paths_mean_the_directory_of_the_analytics(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    each_timestep(
        site,
        lambda x: x.dask.map_blocks(write_here, "seen.txt", dtype=float, meta=META).compute(),
        grid=(1, 1),
    )
    assert (tmp_path / "seen.txt").read_text().split() == [str(tmp_path)] * STEPS
    assert Path.cwd() == tmp_path


def test_what_the_script_has_set_in_its_own_modules(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also later on, when plans are reused; and what a task leaves there is gone at the next timestep."""
    monkeypatch.setattr(own_module, "ALPHA", 10.0)
    monkeypatch.setattr(own_module, "TABLE", {"beta": [0.0]})
    monkeypatch.setattr(own_module, "SEEN", [])

    def use(x: DeisaArray) -> tuple[float, float]:
        own_module.TABLE["beta"][0] = float(x.t // 3)
        if site.engine == "local":  # where the module is the script's
            own_module.SEEN.clear()
        by_value = x.dask.map_blocks(
            lambda b: 0 * b + own_module.ALPHA + own_module.TABLE["beta"][0], dtype=float, meta=META
        )
        by_name = x.dask.map_blocks(own_module.shift, dtype=float, meta=META)
        return float(by_value.max().compute()), float(by_name.max().compute())

    found = each_timestep(site, use, grid=(1, 1))
    assert found == [(10.0 + t // 3, 10.0 + t // 3) for t in range(STEPS)]


# Targets in the script.


@pytest.mark.parametrize("lock", [True, False, threading.Lock()], ids=["dask's lock", "no lock", "a lock"])
def test_store_fills_an_array_of_the_script(site: Site, lock: Any) -> None:
    outs: list[np.ndarray] = []

    def store(x: DeisaArray) -> None:
        out = np.full(x.shape, np.nan)
        assert (x.dask + 1).store(out, lock=lock) is None
        outs.append(out)

    each_timestep(site, store)
    for t, out in enumerate(outs):
        np.testing.assert_array_equal(out, square(t) + 1)


def test_store_after_user_code_runs_that_in_a_worker(site: Site) -> None:
    outs: list[np.ndarray] = []

    def store(x: DeisaArray) -> None:
        out = np.zeros((2, *x.shape))
        pids = x.dask.map_blocks(lambda b: np.full_like(b, os.getpid()), dtype=float, meta=META)
        da.store([x.dask, pids], [out[0], out[1]])
        outs.append(out)

    each_timestep(site, store)
    for t, (values, pids) in enumerate(outs):
        np.testing.assert_array_equal(values, square(t))
        assert (os.getpid() in pids) == (site.engine == "local")


class Target:
    """Something that can be stored into."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.values = np.zeros(shape)
        self.threads = threading.Lock()  # cannot be pickled

    def __setitem__(self, index: Any, value: np.ndarray) -> None:
        self.values[index] = value

    def __getitem__(self, index: Any) -> np.ndarray:
        return self.values[index]


@pytest.mark.parametrize("regions", [None, (slice(0, 16), slice(4, 20))])
def test_store_into_any_object_and_what_it_returns(site: Site, regions: Any) -> None:
    def store(x: DeisaArray) -> bool:
        target = Target((20, 24))
        stored = x.dask.store(target, return_stored=True, regions=regions, lock=False)
        whole = np.zeros((20, 24))
        whole[regions or (slice(0, 16), slice(0, 16))] = square(x.t)
        np.testing.assert_array_equal(target.values, whole)
        np.testing.assert_array_equal(stored.compute(), square(x.t))
        later = x.dask.store(target, compute=False, lock=False)
        target.values[...] = 0
        later.compute()
        np.testing.assert_array_equal(target.values[:16, :16], square(x.t))
        return float(stored.map_blocks(lambda b: b * 2, dtype=float, meta=META).sum().compute()) >= 0

    assert all(each_timestep(site, store))


def test_hdf5_and_netcdf(site: Site, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    xr = pytest.importorskip("xarray")

    def write(x: DeisaArray) -> None:
        x.dask.to_hdf5(tmp_path / f"one-{x.t}.h5", "/T")
        da.to_hdf5(tmp_path / f"two-{x.t}.h5", {"/a": x.dask, "/b": x.dask * 2})
        with h5py.File(tmp_path / "all.h5", "a") as file:
            data = file.require_dataset("T", (STEPS, *x.shape), "f8")
            data.attrs["units"] = "K"
            da.store(x.dask[None], data, regions=(slice(x.t, x.t + 1), slice(None), slice(None)))
        labelled = xr.Dataset({"T": (("y", "x"), x.dask), "mean": ((), x.dask.mean())})
        for engine in ("netcdf4", "h5netcdf", "scipy"):
            labelled.to_netcdf(tmp_path / f"{engine}-{x.t}.nc", engine=engine)

    each_timestep(site, write)
    with h5py.File(tmp_path / "all.h5") as file:
        for t in range(STEPS):
            np.testing.assert_array_equal(file["T"][t], square(t))
    for t in range(STEPS):
        with h5py.File(tmp_path / f"one-{t}.h5") as one, h5py.File(tmp_path / f"two-{t}.h5") as two:
            np.testing.assert_array_equal(one["T"], square(t))
            np.testing.assert_array_equal(two["a"], square(t))
            np.testing.assert_array_equal(two["b"], 2 * square(t))
        for engine in ("netcdf4", "h5netcdf", "scipy"):
            with xr.open_dataset(tmp_path / f"{engine}-{t}.nc", engine=engine) as found:
                np.testing.assert_array_equal(found["T"], square(t))
                assert found["mean"] == square(t).mean()


def test_an_open_file_is_read_where_it_is_open(site: Site, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "reference.h5", "w") as file:
        file["T"] = square(0)

    def change(x: DeisaArray) -> np.ndarray:
        with h5py.File(tmp_path / "reference.h5") as file:
            reference = da.from_array(file["T"], chunks=(8, 8))
            return (x.dask - reference).map_blocks(lambda b: b + 1, dtype=float, meta=META).compute()

    for t, found in enumerate(each_timestep(site, change)):
        np.testing.assert_array_equal(found, square(t) - square(0) + 1)


@pytest.mark.parametrize("chunks", [(8, 8), (5, 7), (16, 16)])
def test_zarr_chunks_that_blocks_share_lose_nothing(
    site: Site, tmp_path: Path, chunks: tuple[int, int]
) -> None:
    zarr = pytest.importorskip("zarr")

    def write(x: DeisaArray) -> None:
        for store in (tmp_path / f"{x.t}.zarr", zarr.storage.MemoryStore()):
            target = zarr.create_array(store, shape=x.shape, chunks=chunks, dtype=float)
            x.dask.store(target, lock=False)
            np.testing.assert_array_equal(target[...], square(x.t))

    each_timestep(site, write)


# Tasks that cannot go to a worker.


def raised_by(site: Site, compute: Callable[[DeisaArray], Any]) -> list[BaseException]:
    """What `compute` raises at each timestep."""
    errors: list[BaseException] = []

    def failing(x: DeisaArray) -> None:
        try:
            compute(x)
        except BaseException as error:
            errors.append(error.with_traceback(None))  # which would keep the array

    each_timestep(site, failing)
    assert len(errors) == STEPS
    return errors


LOCK = threading.Lock()


class Holder:
    def __init__(self) -> None:
        self.inner = {"lock": threading.Lock()}

    def apply(self, block: np.ndarray) -> np.ndarray:
        return block


def test_what_cannot_be_pickled_is_named(site: Site, tmp_path: Path) -> None:
    lock = threading.Lock()
    holder = Holder()

    def guarded(block: np.ndarray) -> np.ndarray:
        with lock:
            return block

    with open(tmp_path / "log.txt", "w") as log:

        def logged(block: np.ndarray) -> np.ndarray:
            log.write("seen")
            return block

        cases: list[tuple[Any, str]] = [
            (guarded, "function 'guarded' .* uses the variable 'lock', which is a .*lock"),
            (logged, "function 'logged' .* uses the variable 'log', which is a .*TextIOWrapper"),
            (holder.apply, "'apply'.*attribute 'inner' of a Holder.*'lock'"),
            (lambda b, it: b, "an argument of .* is a generator"),
        ]

        def compute(x: DeisaArray) -> None:
            for function, expected in cases:
                more = [(i for i in range(3))] if expected.endswith("generator") else []
                with pytest.raises(NotPicklableError, match=expected) as caught:
                    x.dask.map_blocks(function, *more, dtype=float, meta=META).compute()
                assert len(str(caught.value)) < 600
                caught.value.__traceback__ = None
            raise caught.value

        raised_by(site, compute)


def test_results_that_cannot_leave_a_worker_are_named(site: Site) -> None:
    def compute(x: DeisaArray) -> None:
        dask.delayed(lambda total: (i for i in range(int(total))))(x.dask.sum()).compute()

    for error in raised_by(site, compute):
        assert isinstance(error, NotPicklableError)
        assert "returned a value that cannot be handed" in str(error)


# Exceptions of tasks.


class TwoArgumentsError(Exception):
    def __init__(self, what: str, where: int) -> None:
        super().__init__(f"{what} at {where}")
        self.what, self.where = what, where


class HoldsALockError(Exception):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lock = threading.Lock()
        self.code = 7


def raising(block: np.ndarray, build: Callable[[], BaseException]) -> np.ndarray:
    error = build()
    error.add_note("the note")
    raise error


@pytest.mark.parametrize(
    ("build", "attributes"),
    [
        (lambda: TwoArgumentsError("bad", 3), {"what": "bad", "where": 3}),
        (lambda: HoldsALockError("held"), {"code": 7}),
        (lambda: OSError(28, "No space left on device", "/x"), {"errno": 28, "filename": "/x"}),
        (lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), {"reason": "bad"}),
        (lambda: KeyError("missing"), {}),
        (lambda: SystemExit(3), {"code": 3}),
        (lambda: KeyboardInterrupt("stop"), {}),
    ],
)
def test_exceptions_keep_type_attributes_and_notes(
    site: Site, build: Callable[[], BaseException], attributes: dict[str, Any]
) -> None:
    expected = build()
    errors = raised_by(
        site, lambda x: x.dask.map_blocks(raising, build, dtype=float, meta=META).sum().compute()
    )
    for error in errors:
        assert type(error).__name__ == type(expected).__name__
        assert str(error) == str(expected)
        assert error.__notes__[0] == "the note"
        assert {name: getattr(error, name) for name in attributes} == attributes


def test_a_task_that_changes_its_block_is_told_to_copy_it(site: Site) -> None:
    def change(block: np.ndarray) -> np.ndarray:
        block += 1
        return block

    for error in raised_by(site, lambda x: x.dask.map_blocks(change, dtype=float, meta=META).compute()):
        assert isinstance(error, ValueError)
        assert "block = block.copy()" in error.__notes__[0]


# Graphs that Dask has worked on.


def test_graphs_that_have_been_optimized_or_cloned(site: Site) -> None:
    from dask.graph_manipulation import bind, checkpoint, clone, wait_on

    def compare(window: list[DeisaArray]) -> None:
        x = window[-1]
        (earlier,) = dask.optimize(window[0].dask)
        change = (x.dask - earlier).max().compute()
        assert change == (square(x.t) - square(window[0].t)).max()
        np.testing.assert_array_equal(clone(x.dask).compute(), square(x.t))
        after = bind(x.dask * 2, [window[0].dask.sum()])
        np.testing.assert_array_equal(after.compute(), 2 * square(x.t))
        np.testing.assert_array_equal(wait_on(x.dask + 1).compute(), square(x.t) + 1)
        assert checkpoint(x.dask).compute() is None
        ran.append(x.t)

    ran: list[int] = []
    run_squares(site, compare, 10, window_size=3)
    assert ran == list(range(10))


def test_numpy_is_told_to_raise_in_the_script_only(site: Site) -> None:
    """Else it would depend on where a bundle runs whether it raises."""

    def divide(x: DeisaArray) -> float:
        with np.errstate(all="raise"), warnings.catch_warnings():
            warnings.simplefilter("ignore" if site.engine == "local" else "error")
            return float((1 / (x.dask - x.dask)).max().compute())

    assert each_timestep(site, divide) == [np.inf] * STEPS


@pytest.mark.parametrize("scheduler", ["sync", "threads"])
def test_other_schedulers_get_the_values_of_their_timestep(site: Site, scheduler: str) -> None:
    """Also when slots have been used again since; and they keep no slot."""
    kept: list[tuple[int, Any, np.ndarray]] = []

    def keep(x: DeisaArray) -> None:
        block = x.dask.to_delayed()[1, 0].compute(scheduler=scheduler)
        kept.append((x.t, x.dask.persist(scheduler=scheduler), block))

    each_timestep(site, keep)
    for t, persisted, block in kept:
        np.testing.assert_array_equal(persisted.compute(scheduler="sync"), square(t))
        np.testing.assert_array_equal(block, square(t)[8:, :8])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_scheduler_by_itself_on_either_engine(site: Site) -> None:
    from deisa.ray import deisa_ray_get

    def compute(x: DeisaArray) -> None:
        doubled = x.dask.map_blocks(lambda b: 2 * b, dtype=float, meta=META)
        np.testing.assert_array_equal(doubled.compute(scheduler=deisa_ray_get), 2 * square(x.t))
        kept.append((x.t, x.dask.persist(scheduler=deisa_ray_get)))
        total = (x.dask + kept[0][1]).sum().compute(scheduler=deisa_ray_get)
        assert total == (square(x.t) + square(0)).sum()

    kept: list[tuple[int, Any]] = []
    each_timestep(site, compute)
    for t, persisted in kept:
        np.testing.assert_array_equal(persisted.compute(scheduler=deisa_ray_get), square(t))


def test_a_thread_of_the_user_may_compute_while_the_run_ends(site: Site) -> None:
    ended = threading.Event()
    errors: list[BaseException] = []
    counted = [0]

    def compute_on() -> None:
        while not ended.is_set():
            try:
                assert int(da.arange(10, chunks=5).sum().compute()) == 45
                counted[0] += 1
            except BaseException as error:
                errors.append(error)

    thread = threading.Thread(target=compute_on)
    thread.start()
    try:
        for _ in range(2):
            each_timestep(site, lambda x: x.dask.sum().compute())
    finally:
        ended.set()
        thread.join()
    assert not errors
    assert counted[0]
