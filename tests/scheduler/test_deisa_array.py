"""What callbacks get behaves as a Dask array, on both engines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest

from deisa.ray import DeisaArray, Settings, WindowSpec
from tests.scheduler.simulation import Simulation, run


def nothing(x: Any) -> Any:
    return x


# Each is done with two arrays, as DeisaArray and as NumPy array.
EXPRESSIONS: dict[str, Callable[[Any, Any], Any]] = {
    "x.mean()": lambda a, b: a.mean(),
    "x.mean(axis=0)": lambda a, b: a.mean(axis=0),
    "np.sqrt(x)": lambda a, b: np.sqrt(abs(a)),
    "a - b": lambda a, b: a - b,
    "1 - a": lambda a, b: 1 - a,
    "a @ b.T": lambda a, b: a @ b.T,
    "a > b": lambda a, b: a > b,
    "divmod(a, 2)": lambda a, b: divmod(a, 2)[1],
    "-abs(a)": lambda a, b: -abs(a),
    "x[0]": lambda a, b: a[0],
    "x[3:50, ::2]": lambda a, b: a[3:50, ::2],
    "x[..., None]": lambda a, b: a[..., None],
    "x[x > 5]": lambda a, b: a[a > 1005],
    "x.T": lambda a, b: a.T,
    "x.sum()": lambda a, b: a.sum(),
    "np.mean(x)": lambda a, b: np.mean(a),
    "np.mean(x, axis=1)": lambda a, b: np.mean(a, axis=1),
    "np.concatenate([a, b])": lambda a, b: np.concatenate([a, b]),
    "np.stack((a, b))": lambda a, b: np.stack((a, b)),
    "np.stack((a, b))[:, :5, :5]": lambda a, b: np.stack((a, b))[:, :5, :5],
    "np.concatenate([a[None], b[None]])[0, 3:5]": lambda a, b: np.concatenate([a[None], b[None]])[0, 3:5],
    "np.add.reduce": lambda a, b: np.add(a, b),
    "np.where": lambda a, b: np.where(a > b, a, b),
    "np.tensordot": lambda a, b: np.tensordot(a, b, axes=([0], [0])),
    "NumPy array and x": lambda a, b: np.ones(60) + a,
    "astype": lambda a, b: a.astype("f4"),
    "reshape": lambda a, b: a.reshape(-1),
    "round": lambda a, b: a.round(1),
    "len": lambda a, b: np.asarray(len(a)),
}


def test_expressions(engine: str, session_name: str) -> None:
    settings = Settings(session=session_name)
    simulation = Simulation(settings, 2)
    done: list[str] = []

    def callback(window: list[DeisaArray]) -> None:
        if len(window) < 2:
            return
        earlier, latest = window
        for name, expression in EXPRESSIONS.items():
            lazy = expression(latest, earlier)
            assert isinstance(lazy, da.Array | np.ndarray), name
            expected = expression(simulation.at(1), simulation.at(0))
            computed = lazy.compute() if isinstance(lazy, da.Array) else lazy
            np.testing.assert_allclose(computed, expected, err_msg=name)
            done.append(name)

    run(engine, settings, callback, [WindowSpec("x", 2)], timesteps=2)
    assert done == list(EXPRESSIONS)


def test_dask_functions(engine: str, session_name: str) -> None:
    settings = Settings(session=session_name)
    simulation = Simulation(settings, 2)
    ran = []

    def callback(window: list[DeisaArray]) -> None:
        latest = window[-1]
        x = simulation.at(latest.t)
        first, second = dask.compute(latest, window[0])
        np.testing.assert_array_equal(first, x)
        np.testing.assert_array_equal(second, simulation.at(window[0].t))
        assert type(first) is np.ndarray
        first[...] = 0  # a copy of the caller's own
        np.testing.assert_array_equal(latest.compute(), x)

        (listed,) = dask.compute({"x": [latest, latest.sum()]})
        np.testing.assert_array_equal(listed["x"][0], x)
        assert listed["x"][1] == pytest.approx(x.sum())

        (kept,) = dask.persist(latest)
        assert type(kept) is DeisaArray and kept.t == latest.t
        np.testing.assert_array_equal(kept.compute(), x)
        also = latest.persist()
        assert type(also) is DeisaArray and also.t == latest.t
        np.testing.assert_array_equal((also - kept).compute(), 0 * x)
        assert type(dask.optimize(latest)[0].dask) is da.Array

        assert da.sum(latest).compute() == pytest.approx(x.sum())
        assert da.mean(latest, axis=0).shape == (60,)
        np.testing.assert_array_equal(da.sqrt(abs(latest)).compute(), np.sqrt(abs(x)))
        np.testing.assert_array_equal(da.concatenate([latest, latest]).compute(), np.concatenate([x, x]))
        np.testing.assert_array_equal(da.stack([latest, latest]).compute(), np.stack([x, x]))
        np.testing.assert_array_equal(da.where(latest > 5, latest, 0).compute(), np.where(x > 5, x, 0))
        np.testing.assert_array_equal(da.asarray(latest).compute(), x)
        np.testing.assert_array_equal(da.map_blocks(np.negative, latest.dask).compute(), -x)
        largest = da.map_blocks(lambda block: block.max(keepdims=True), latest, dtype=float, chunks=(1, 1))
        assert largest.shape == (2, 2)
        np.testing.assert_array_equal(
            largest.compute(), [[x[:40, :30].max(), x[:40, 30:].max()], [x[40:, :30].max(), x.max()]]
        )
        twice = latest.dask.map_blocks(np.add, latest, dtype=float)
        np.testing.assert_array_equal(twice.compute(), 2 * x)
        np.testing.assert_array_equal(latest.map_blocks(np.negative).compute(), -x)
        np.testing.assert_array_equal(dask.delayed(nothing)(latest).compute(), x)
        np.testing.assert_array_equal(dask.delayed(nothing)([latest])[0].compute(), x)
        assert dask.is_dask_collection(latest)

        np.testing.assert_array_equal(np.asarray(latest), x)
        np.testing.assert_array_equal(np.array(latest, dtype="f4"), x.astype("f4"))
        assert float(latest.sum()) == pytest.approx(x.sum())
        assert dask.base.tokenize(latest) == dask.base.tokenize(latest)
        assert dask.base.tokenize(latest) != dask.base.tokenize(latest + 1)
        assert copy.copy(latest).t == latest.copy().t == latest.t
        assert f"{latest.mean():.3f} {abs(latest - 1).max():.3f}" == (
            f"{x.mean():.3f} {abs(x - 1).max():.3f}"
        )
        both = dask.compute(window)[0]
        np.testing.assert_array_equal(both[-1], x)
        assert type(both) is list and len(both) == len(window)
        ran.append(latest.t)

    run(engine, settings, callback, [WindowSpec("x", 2)], timesteps=2)
    assert ran == [0, 1]


def test_attributes(session_name: str) -> None:
    settings = Settings(session=session_name)

    def callback(window: list[DeisaArray]) -> None:
        (x,) = window
        assert (x.shape, x.ndim, x.dtype, x.size, x.nbytes) == ((80, 60), 2, np.dtype("f8"), 4800, 38400)
        assert x.chunks == ((40, 40), (30, 30))
        assert (x.t, x.timestep, len(x), x.numblocks) == (0, 0, 80, (2, 2))
        assert type(x.dask) is da.Array and x.to_dask_array() is x.dask
        assert "mean" in dir(x) and hasattr(x, "rechunk") and not hasattr(x, "no_such_thing")
        assert "t=0" in repr(x)
        assert len(list(x)) == 80
        with pytest.raises(ValueError, match="ambiguous"):
            bool(x)

    run("local", settings, callback, [WindowSpec("x")], timesteps=1)


def test_two_arrays_in_one_expression(engine: str, session_name: str) -> None:
    settings = Settings(session=session_name)
    simulation = Simulation(settings, 2)
    ran = []

    def callback(x: list[DeisaArray], y: list[DeisaArray]) -> None:
        t = x[-1].t
        both = (x[-1] * y[-1]).sum() + (x[0] - y[0]).max()
        expected = (simulation.at(t) * simulation.at(t, "y")).sum() + (
            simulation.at(x[0].t) - simulation.at(t, "y")
        ).max()
        assert both.compute() == pytest.approx(expected)
        ran.append(t)

    run(engine, settings, callback, [WindowSpec("x", 2), WindowSpec("y")], timesteps=3, names=("x", "y"))
    assert ran == [0, 1, 2]


def test_what_a_callback_assigns_shows_nowhere_else(engine: str, session_name: str) -> None:
    """Not in its own window at the next timestep."""
    settings = Settings(session=session_name)
    simulation = Simulation(settings, 3)
    ran = []

    def callback(x: list[DeisaArray]) -> None:
        for array in x:
            np.testing.assert_array_equal(array.compute(), simulation.at(array.t))
        x[-1][0] = -1.0
        x[-1].dask[:, 0] = -2.0
        expected = simulation.at(x[-1].t)
        expected[0], expected[:, 0] = -1, -2
        np.testing.assert_array_equal(x[-1].compute(), expected)
        ran.append(x[-1].t)

    run(engine, settings, callback, [WindowSpec("x", 2)], timesteps=3)
    assert ran == [0, 1, 2]
