"""Arrays and windows under their labels: as xarray has them, and as they are shown."""

from __future__ import annotations

import copy
import pickle
import sys
from typing import Any

import dask
import dask.array as da
import numpy as np
import pytest
import xarray as xr

from deisa.ray import to_dataset
from deisa.ray._state.descriptions import describe_arrays
from deisa.ray._state.layout import resolve_layout
from deisa.ray.errors import LabelError, MissingPackageError
from deisa.ray.labels import About
from deisa.ray.types import DeisaArray, Timesteps

DESCRIPTION = {
    "chunk_shape": (4, 6),
    "global_shape": (4, 6),
    "offset": (0, 0),
    "dims": ("y", "x"),
    "coords": {"x": ("x", {"start": 0.0, "step": 0.5}, {"units": "m"}), "name": ("y", list("abcd"))},
    "attrs": {"units": "K", "long_name": "<b>air</b>", "range": [0, 1]},
}


def about(name: str | None = "T", time: float | None = None, **change: Any) -> About:
    labels = resolve_layout({0: describe_arrays({"a": DESCRIPTION | change})})["a"].labels
    return About(name, time, labels)


def array_at(
    t: int, of: About | None = None, shape: tuple[int, ...] = (4, 6), chunks: Any = (2, 3)
) -> DeisaArray:
    return DeisaArray(da.from_array(np.arange(float(np.prod(shape))).reshape(shape) + t, chunks), t, about=of)


def window(of: About, times: list[float | None]) -> Timesteps:
    return Timesteps([array_at(t, About(of.array, time, of.labels)) for t, time in enumerate(times)], "T")


# As xarray has them.


def test_an_array_has_its_labels_and_its_timestep() -> None:
    found = array_at(7, about(time=3.5)).xarray
    assert (found.name, found.dims, found.attrs) == ("T", ("y", "x"), DESCRIPTION["attrs"])
    assert found.chunks == ((2, 2), (3, 3))
    assert found.x.values.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5] and found.x.attrs == {"units": "m"}
    assert found.coords["name"].dims == ("y",)
    assert (found.timestep.item(), found.time.item()) == (7, 3.5)
    assert "time" not in array_at(7, about()).xarray.coords


def test_without_labels_dimensions_have_the_names_of_xarray() -> None:
    found = array_at(7).xarray
    assert (found.name, found.dims, dict(found.attrs)) == (None, ("dim_0", "dim_1"), {})
    assert list(found.coords) == ["timestep"]


def test_labels_stay_with_an_array() -> None:
    array = array_at(7, about(time=3.5))
    with dask.config.set(scheduler="sync"):
        for again in (
            array.copy(),
            copy.copy(array),
            copy.deepcopy(array),
            pickle.loads(pickle.dumps(array)),
            array.persist(),
        ):
            assert (again.time, again.t) == (3.5, 7)
            xr.testing.assert_identical(again.xarray.compute(), array.xarray.compute())


def test_what_is_changed_in_one_array_of_xarray_does_not_show_in_the_next() -> None:
    array = array_at(0, about())
    changed = array.xarray
    changed.attrs["units"] = "C"
    changed.attrs["range"][0] = 9
    changed.coords["x"].attrs["units"] = "km"
    changed["x"] = changed.x + 1
    assert array.xarray.attrs["units"] == "K" and array.xarray.attrs["range"] == [0, 1]
    assert array.xarray.x.attrs["units"] == "m" and array.xarray.x[0] == 0


@pytest.mark.parametrize(
    "dtype", ["f2", "f4", "longdouble", "c16", "?", "u1", "i8", "M8[D]", "M8[ns]", "m8[s]", "U3", "S2"]
)
def test_coordinates_of_every_kind(dtype: str) -> None:
    values = np.arange(6).astype("U3" if dtype == "S2" else "i8").astype(dtype)
    found = array_at(0, about(coords={"x": values})).xarray
    np.testing.assert_array_equal(found.x.values, values)
    value = values[2]
    if dtype != "?":  # which is no place, but a choice
        assert found.sel(x=value if dtype != "f2" else float(value)).timestep == 0


@pytest.mark.parametrize("shape", [(4, 6), (5,), ()])
def test_a_window_is_stacked(shape: tuple[int, ...]) -> None:
    of = about() if len(shape) == 2 else About("T")
    arrays = [array_at(t, About("T", t / 4, of.labels), shape, -1 if shape == () else 2) for t in (3, 5, 9)]
    found = Timesteps(arrays, "T").xarray
    assert found.dims[0] == "time" and found.shape == (3, *shape)
    assert found.chunks[0] == (1, 1, 1)  # type: ignore[index]
    assert found.timestep.values.tolist() == [3, 5, 9] and found.time.values.tolist() == [0.75, 1.25, 2.25]
    with dask.config.set(scheduler="sync"):
        for n, array in enumerate(arrays):
            np.testing.assert_array_equal(found[n].values, array.compute())


def test_chunks_that_differ_between_timesteps_are_stacked_as_well() -> None:
    arrays = Timesteps([array_at(0, about()), array_at(1, about(), chunks=(4, 2))], "T")
    with dask.config.set(scheduler="sync"):
        np.testing.assert_array_equal(arrays.xarray[1].values, arrays[1].compute())
    assert arrays.xarray.chunks[0] == (1, 1)  # type: ignore[index]


def test_a_window_has_times_if_every_timestep_has_one() -> None:
    assert "time" in window(about(), [0.5, 1.0]).xarray.coords
    mixed = window(about(), [None, 1.0]).xarray
    assert "time" not in mixed.coords and mixed.timestep.values.tolist() == [0, 1]


def test_what_cannot_be_stacked_is_refused() -> None:
    with pytest.raises(LabelError, match="no timesteps"):
        _ = window(about(), [])[:0].xarray
    arrays = [array_at(0, About("T"), (4,), 2), array_at(1, About("T"), (5,), 2)]
    with pytest.raises(LabelError, match="array 'T' has another shape at each timestep"):
        _ = Timesteps(arrays, "T").xarray


def test_several_arrays_make_a_dataset() -> None:
    a, b = array_at(3, about("a", 0.5)), array_at(3, about("b", 0.5))
    found = to_dataset(a, b, (a.xarray * 2).rename("c"))
    assert list(found.data_vars) == ["a", "b", "c"] and found.sizes == {"y": 4, "x": 6}
    assert found.a.attrs["units"] == "K" and all(v.chunks for v in found.data_vars.values())
    both = to_dataset(window(about("a"), [0.5, 1.0]), window(about("b"), [0.5, 1.0]))
    assert both.sizes == {"time": 2, "y": 4, "x": 6}


@pytest.mark.parametrize(
    ("items", "says"),
    [
        (lambda: [array_at(3, about("a")), array_at(4, about("b"))],
         "different timesteps: 'a': timestep 3; 'b': timestep 4"),
        (lambda: [window(about("a"), [None, None]), array_at(0, about("b"))],
         "different timesteps: 'a': timesteps 0, 1; 'b': timestep 0"),
        (lambda: [array_at(3, about("a", 0.5)), array_at(3, about("b", 0.75))], "do not fit into one Dataset"),
        (lambda: [array_at(3, about("a")), array_at(3, about("b", coords={"x": np.arange(6.0)}))],
         "'a', 'b' do not fit into one Dataset"),
        (lambda: [array_at(3, about("a")), array_at(3, about("b", coords={"name": ("y", list("abce"))}))],
         "'a', 'b' do not fit into one Dataset"),
        (lambda: [array_at(3, about("a")), array_at(3, about("a"))], "two arrays are called 'a'"),
        (lambda: [array_at(3)], "an array without a name"),
        (lambda: [array_at(3, about("x"))], "do not fit into one Dataset"),
        (lambda: [np.zeros(3)], "expected arrays or windows of a callback, got ndarray"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_into_a_dataset(items: Any, says: str) -> None:
    with pytest.raises(LabelError, match=says):
        to_dataset(*items())


def test_without_xarray_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xarray", None)
    array = array_at(0, about(time=0.5))
    for ask in (lambda: array.xarray, lambda: window(about(), [None]).xarray, lambda: to_dataset(array)):
        with pytest.raises(MissingPackageError, match=r"pip install 'deisa-ray\[xarray\]'"):
            ask()
    assert (array.time, array.labels.dims) == (0.5, ("y", "x"))


# As they are shown.


def test_an_array_as_text() -> None:
    assert repr(array_at(7, about(time=3.5))) == (
        "<DeisaArray 'T' t=7 time=3.5 (y: 4, x: 6) float64, 4 chunks of (2, 3)>"
    )
    assert repr(array_at(7)) == "<DeisaArray t=7 (4, 6) float64, 4 chunks of (2, 3)>"
    assert repr(array_at(7, shape=(), chunks=-1)) == "<DeisaArray t=7 () float64, 1 chunk of ()>"


def test_a_window_as_text() -> None:
    assert repr(window(about(), [0.5, None])) == (
        "<window 'T': 2 timesteps, oldest first; (y: 4, x: 6) float64, 4 chunks of (2, 3)>\n"
        "  [0] t=0 time=0.5\n"
        "  [1] t=1"
    )
    assert repr(window(about(), [])) == "<window 'T': no timesteps>"
    long = repr(window(about(), [None] * 30)).splitlines()
    assert len(long) == 12 and long[6] == "  ... 20 more timesteps ..." and long[-1] == "  [29] t=29"


def test_html_has_the_labels_and_nothing_of_theirs_is_taken_for_html() -> None:
    html = array_at(7, about(time=3.5))._repr_html_()
    for text in (
        "DeisaArray T",
        "timestep",
        ">7<",
        ">3.5<",
        "(y: 4, x: 6) float64",
        "coordinate x<",
        "0.0 ... 2.5 m",
        "coordinate name along y",
        "a ... d",
        "<svg",
    ):
        assert text in html
    assert "&lt;b&gt;air&lt;/b&gt;" in html and "<b>air" not in html
    html = window(about(), [0.5] * 30)._repr_html_()
    for text in ("window T", "30, oldest first", "20 more", "[29]", "<svg"):
        assert text in html
    assert "no timesteps" in window(about(), [])._repr_html_()
