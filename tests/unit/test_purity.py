"""What counts as pure: everything that computes the same from the same inputs, and nothing else."""

from __future__ import annotations

import functools
import operator
import re
import threading
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import scipy.ndimage
import scipy.special
from dask.utils import methodcaller

from deisa.ray._graph.purity import pack

RNG = np.random.default_rng(0)


def by_name(block: np.ndarray) -> np.ndarray:
    return block


class Callable:
    def __call__(self, block: np.ndarray) -> np.ndarray:
        return block


PURE: list[Any] = [
    np.sqrt, np.gradient, np.float32, np.dtype("i8,U4"), np.float64(3), np.arange(3), scipy.special.erf,
    scipy.ndimage.gaussian_filter, operator.add, functools.partial(np.sum, axis=0), slice(1, None), 3, "text",
    {"axis": (0, 1), "keepdims": True}, [1, 2.0, None], methodcaller("reshape"), da.chunk.mean if
    hasattr(da.chunk, "mean") else np.mean, Ellipsis,
]  # fmt: skip
NOT_PURE: list[Any] = [
    by_name, lambda block: block, Callable(), Callable().__call__, RNG, RNG.normal, np.random.normal,
    np.random.default_rng, np.random.RandomState(0), functools.partial(by_name), functools.partial(np.add, RNG),
    np.save, np.load, np.memmap, np.savetxt, methodcaller("tofile"), open, print, exec, getattr, {"key": RNG},
    [by_name], np.vectorize(by_name), scipy.stats.norm if hasattr(scipy, "stats") else RNG, "x".join,
    np.array([RNG], dtype=object), [].append, threading.current_thread,
]  # fmt: skip


def shown(thing: object) -> str:
    """The beginning of its `repr`, without addresses: a test has the same name each time."""
    return re.sub(" at 0x[0-9a-fA-F]+", "", repr(thing))[:40]


@pytest.mark.parametrize("thing", PURE, ids=shown)
def test_pure(thing: Any) -> None:
    assert pack(thing).pure


@pytest.mark.parametrize("thing", NOT_PURE, ids=shown)
def test_not_pure(thing: Any) -> None:
    assert not pack(thing).pure


def impure_name(block: np.ndarray) -> np.ndarray:
    return block


impure_name.__module__ = "numpy"  # as functools.wraps makes it


def test_a_function_that_only_says_it_is_numpys() -> None:
    assert not pack(impure_name).pure


X = da.ones((20, 20), chunks=5)


@pytest.mark.parametrize(
    ("lazy", "pure"),
    [
        (X.mean(), True),
        (X.std(axis=0), True),
        ((X[1:] - X[:-1]).max(), True),
        (X @ X, True),
        (da.map_overlap(np.gradient, X, depth=1, boundary="reflect", meta=X._meta), True),
        (da.histogram(X, bins=4, range=(0, 1))[0], True),
        (X.rechunk((7, 7)).cumsum(axis=0), True),
        (X[X > 0].sum(), True),
        (X.map_blocks(by_name, dtype=float), False),
        (X.map_blocks(np.add, np.ones((5, 5)), dtype=float), True),
        (X + da.random.default_rng(1).normal(size=(20, 20), chunks=5), False),
        (X.map_blocks(by_name, dtype=float).mean(), False),
    ],
)
def test_graphs(lazy: da.Array, pure: bool) -> None:
    with dask.config.set({"optimization.fuse.active": False}):
        graph = dict(dask.optimize(lazy)[0].__dask_graph__())
    assert pack(tuple(graph.values())).pure == pure


def test_a_vectorized_function_can_be_packed_after_it_was_called() -> None:
    function = np.vectorize(lambda value: value + 1, otypes=[float])
    function(np.zeros(2))
    packed = pack(function).data
    import pickle

    np.testing.assert_array_equal(pickle.loads(packed)(np.zeros(2)), np.ones(2))
