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
from deisa.ray.types import DeisaArray, Timesteps, Window, WindowSpec, can_be_formatted, window_spec


@pytest.mark.parametrize(
    "spelled",
    [
        "a",
        Window("a"),
        Window("a", None),
        WindowSpec("a"),
        WindowSpec("a", window_size=np.int8(1)),
        WindowSpec("a", window_size=None),  # type: ignore[arg-type]
        deisa.core.Window("a", None),
    ],
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
        (lambda: window_spec(WindowSpec), "expected an array name"),
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
    assert repr(array) == "<DeisaArray t=7 (3, 4) float64, 4 chunks of at most (2, 2)>"
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
    for again in (copy.copy(array), copy.deepcopy(array), array.copy(), pickle.loads(pickle.dumps(array))):
        assert type(again) is DeisaArray
        assert (again.t, again.timestep) == (7, 7)
        same(again.dask, NUMBERS)


def test_what_is_assigned_shows_in_the_array_and_in_no_copy(array: DeisaArray) -> None:
    before = array.copy()
    array[array > 5] = -1.0
    expected = np.where(NUMBERS > 5, -1, NUMBERS)
    same(array + 0, expected)
    same(array.dask, expected)
    array.dask[0] = 8.0
    expected[0] = 8
    same(array + 0, expected)
    same(array.dask, expected)
    assert (array.shape, array.chunks, array.name) == (array.dask.shape, array.dask.chunks, array.dask.name)
    same(before.dask, NUMBERS)


def test_text() -> None:
    scalar = DeisaArray(da.from_array(np.array(2.5)), 0)
    with dask.config.set(scheduler="sync"):
        assert f"{scalar:.2f} {scalar:>6}" == "2.50    2.5"
        assert f"{scalar}" == repr(scalar)
    with pytest.raises(
        TypeError, match=r"an array of shape \(3, 4\) .* as in f'\{x.mean\(\).compute\(\):.2f\}'"
    ):
        _ = f"{DeisaArray(da.from_array(NUMBERS), 0):.2f}"


def test_numbers_that_are_still_to_be_computed_can_be_formatted(array: DeisaArray) -> None:
    with dask.config.set(scheduler="sync", array_plugins=[can_be_formatted]):
        assert (
            f"{array.mean():.2f}, {abs(array - 1).max() ** 2:g}, {np.sum(array.dask):.0f}" == "5.50, 100, 66"
        )
        assert f"{array[0, 1]:.1f} {(array > 3).any():d} {(array + 1j).sum():.1f}" == "1.0 1 66.0+12.0j"
        assert f"{array.mean()}".startswith("dask.array<mean_agg")
        again = pickle.loads(pickle.dumps(array.mean()))
        assert f"{again:.1f} {again - 1:.1f}" == "5.5 4.5"
    assert type(array.mean()) is type(array.dask) is da.Array


# Windows that are taken for their newest array.


@pytest.fixture
def window() -> Timesteps:
    return Timesteps([DeisaArray(da.from_array(NUMBERS + t, chunks=(2, 2)), t) for t in (0, 1)], "u")


@pytest.mark.parametrize(
    ("take", "hint"),
    [
        (lambda u: u.mean(), "u[-1].mean "),
        (lambda u: u.shape, "u[-1].shape "),
        (lambda u: u.dask, "u[-1].dask "),
        (lambda u: u.t, "u[-1].t "),
        (lambda u: u - 1, "u[-1] "),
        (lambda u: 1 - u, "u[-1] "),
        (lambda u: u * 2, "u[-1] "),
        (lambda u: 2 * u, "u[-1] "),
        (lambda u: u + u, "u[-1] "),
        (lambda u: u + NUMBERS, "u[-1] "),
        (lambda u: NUMBERS + u, "u[-1] "),
        (lambda u: u[-1] - u, "u[-1] "),
        (lambda u: u - u[-1].dask, "u[-1] "),
        (lambda u: u[-1].dask - u, "u[-1] "),
        (lambda u: -u, "u[-1] "),
        (lambda u: abs(u), "u[-1] "),
        (lambda u: u**2, "u[-1] "),
        (lambda u: u @ NUMBERS.T, "u[-1] "),
        (lambda u: u > 3, "u[-1] "),
        (lambda u: u[:, 0], "u[-1][...] "),
        (lambda u: u["T"], "u[-1][...] "),
        (lambda u: u[u[-1] > 3], "u[-1][...] "),
        (lambda u: np.mean(u), "u[-1] "),
        (lambda u: np.sqrt(u), "u[-1] "),
        (lambda u: np.asarray(u), "u[-1] "),
        (lambda u: np.where(u[-1] > 3, u, 0), "u[-1] "),
        (lambda u: da.mean(u), "u[-1].dtype "),
        (lambda u: da.sqrt(u), "u[-1] "),
        (lambda u: da.asarray(u), "u[-1] "),
        (lambda u: float(u), "u[-1] "),
        (lambda u: f"{u:.2f}", "u[-1] "),
        (lambda u: u[-1:].mean(), "u[-1].mean "),
    ],
)
def test_a_window_is_no_array(window: Timesteps, take: Any, hint: str) -> None:
    with pytest.raises((TypeError, AttributeError)) as caught:
        take(window)
    said = f"u is a window: a list of timesteps, oldest first; use {hint}for the newest one"
    assert str(caught.value).startswith(said)


def test_a_window_is_a_list(window: Timesteps) -> None:
    earlier, latest = window
    assert isinstance(window, list)
    assert len(window) == 2
    assert [array.t for array in window] == [0, 1]
    assert [array.t for array in window[-1:]] == [1]
    assert window[-1] is latest and window == [earlier, latest] and window != []
    one = [1]
    assert window + one == [earlier, latest, 1] and one + window == [1, earlier, latest]
    assert not hasattr(window, "shape")
    for both in (da.stack(window), da.stack([array.dask for array in window]), np.stack(window)):
        same(both, np.stack([NUMBERS, NUMBERS + 1]))
    same(sum(window), 2 * NUMBERS + 1)
    assert [array.t for array in copy.copy(window)] == [0, 1]
    assert type(pickle.loads(pickle.dumps(window))) is list


def test_dask_computes_a_window_as_it_does_a_list(window: Timesteps) -> None:
    with dask.config.set(scheduler="sync"):
        for arrays in dask.compute(window, {"u": window})[0], dask.delayed(list)(window).compute():
            assert type(arrays) is list
            np.testing.assert_array_equal(arrays, [NUMBERS, NUMBERS + 1])
        assert dask.delayed(type)(window).compute() is list
        (kept,) = dask.persist(window)
        assert [(type(array), array.t) for array in kept] == [(DeisaArray, 0), (DeisaArray, 1)]
