"""Windows in their spellings, and the arrays that callbacks get."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest

import deisa.core
from deisa.ray.errors import WindowError
from deisa.ray.types import DeisaArray, Window, WindowSpec, window_spec


@pytest.mark.parametrize(
    "spelled", ["a", Window("a"), WindowSpec("a"), WindowSpec("a", window_size=np.int8(1))]
)
def test_spellings_of_a_window(spelled: Any) -> None:
    assert window_spec(spelled) == WindowSpec("a", 1)


def test_the_window_of_deisa_core() -> None:
    spec = window_spec(deisa.core.Window("a", 3))
    assert spec == window_spec(Window("a", 3)) == WindowSpec("a", window_size=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowSpec(""), "needs the name of an array, got ''"),
        (lambda: WindowSpec(3), "needs the name of an array, got 3"),  # type: ignore[arg-type]
        (lambda: WindowSpec("a", 0), "'a': size is 0, it must be at least 1"),
        (lambda: WindowSpec("a", 1.5), "'a': size must be an integer, got 1.5"),  # type: ignore[arg-type]
        (lambda: window_spec(7), "expected an array name, a Window or a WindowSpec, got 7"),
        (lambda: window_spec(("a", 3)), "expected an array name"),
        (lambda: window_spec(Window("a", -1)), "size is -1"),
    ],
)
def test_windows_that_are_refused(make: Any, message: str) -> None:
    with pytest.raises(WindowError, match=message):
        make()


NUMBERS = np.arange(12.0).reshape(3, 4)


@pytest.fixture
def array() -> DeisaArray:
    return DeisaArray(da.from_array(NUMBERS, chunks=(2, 2)), 7)


def same(result: Any, expected: Any) -> None:
    assert isinstance(result, da.Array)
    np.testing.assert_array_equal(result.compute(scheduler="sync"), expected)


def test_it_looks_like_its_dask_array(array: DeisaArray) -> None:
    assert (array.t, array.timestep) == (7, 7)
    assert (array.shape, array.dtype, array.chunks) == (NUMBERS.shape, NUMBERS.dtype, ((2, 1), (2, 2)))
    assert array.to_dask_array() is array.dask
    assert len(array) == 3
    assert {"dask", "t", "mean", "timestep"} <= set(dir(array))
    assert repr(array).startswith("<DeisaArray t=7 dask.array<")
    with pytest.raises(AttributeError):
        _ = array.no_such_method


@pytest.mark.parametrize(
    "operate",
    [
        lambda x: x + 1,
        lambda x: 2 / (x + 1),
        lambda x: x > x.mean(),
        lambda x: -x,
        lambda x: abs(x - 5),
        lambda x: x @ x.T,
        lambda x: x[1:, ::2],
        lambda x: x[1],
        lambda x: np.sqrt(x),
        lambda x: np.sum(x, axis=1),
        lambda x: np.concatenate([x, x + 1]),
        lambda x: np.stack((x, x)),
        lambda x: x.mean(axis=0),
        lambda x: np.where(x > 3, x, 0),
        lambda x: NUMBERS + x,
    ],
)
def test_it_computes_as_numpy_does(array: DeisaArray, operate: Any) -> None:
    same(operate(array), operate(NUMBERS))


def test_two_of_them(array: DeisaArray) -> None:
    earlier = DeisaArray(array.dask * 0, 6)
    same(array - earlier, NUMBERS)
    same(da.stack([array, earlier])[0], NUMBERS)


def test_iteration_and_scalars(array: DeisaArray) -> None:
    rows = list(array)
    assert len(rows) == 3
    same(rows[1], NUMBERS[1])
    scalar = DeisaArray(da.from_array(np.array(2.5)), 0)
    with dask.config.set(scheduler="sync"):
        assert (float(scalar), int(scalar), complex(scalar), bool(scalar)) == (2.5, 2, 2.5 + 0j, True)


def test_to_numpy(array: DeisaArray) -> None:
    with dask.config.set(scheduler="sync"):
        np.testing.assert_array_equal(np.asarray(array), NUMBERS)
        assert np.asarray(array, dtype="i4").dtype == np.int32
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(array, copy=False)


def test_it_is_a_collection(array: DeisaArray) -> None:
    assert dask.is_dask_collection(array)
    one, two = dask.compute(array, array.dask.sum(), scheduler="sync")
    np.testing.assert_array_equal(one, NUMBERS)
    assert two == NUMBERS.sum()
    (persisted,) = dask.persist(array, scheduler="sync")
    assert isinstance(persisted, DeisaArray)
    assert persisted.t == 7
    kept = array.persist(scheduler="sync")
    assert isinstance(kept, DeisaArray)
    assert kept.t == 7
    same(kept.dask, NUMBERS)


def test_copies(array: DeisaArray) -> None:
    for again in (copy.copy(array), pickle.loads(pickle.dumps(array))):
        assert again.t == 7
        same(again.dask, NUMBERS)
