"""What windows want of arrays, and what that is of each chunk."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._session.selection import Streams
from deisa.ray._state.boxes import merge, separate
from deisa.ray._state.descriptions import describe_arrays
from deisa.ray._state.dtypes import CONVERTIBLE, converts
from deisa.ray._state.layout import ArrayLayout, resolve_layout
from deisa.ray._state.streams import Stream, cut, number_regions, whole
from deisa.ray.errors import WindowError
from deisa.ray.types import WindowSpec
from tests.unit.test_layout import resolve, tilings


def grid_of(shape: tuple[int, ...], parts: tuple[int, ...]) -> ArrayLayout:
    """An array "a" of equal chunks, each of a bridge of its own."""
    chunk = tuple(n // k for n, k in zip(shape, parts, strict=True))
    said = [
        {"chunk_position": p, "chunk_shape": chunk, "global_shape": shape, "dtype": "f8"}
        for p in np.ndindex(parts)
    ]
    return resolve(*said)


def stream_of(layout: ArrayLayout, **asked: Any) -> Stream:
    return Streams({layout.name: layout}).of(WindowSpec(layout.name, **asked))


# What a window asks for.


def test_a_window_of_everything_is_the_array_itself() -> None:
    layout = grid_of((6, 4), (2, 2))
    for select in (None, ..., (), slice(None), (slice(0, 6), ...), {}, {0: slice(0, 6, 1)}):
        assert stream_of(layout, select=select, astype="f8") == whole(layout)
    assert cut(layout, whole(layout)).cells.tolist() == layout.cells.tolist()


@pytest.mark.parametrize(
    ("select", "name", "shape", "dropped"),
    [
        (3, "a[3, 0:4]", (1, 4), (0,)),
        ((-1, slice(None, None, 3)), "a[5, 0:4:3]", (1, 2), (0,)),
        ((..., np.int64(1)), "a[0:6, 1]", (6, 1), (1,)),
        ({1: slice(1, None)}, "a[0:6, 1:4]", (6, 3), ()),
        ({-1: 2, 0: slice(-2, None)}, "a[4:6, 2]", (2, 1), (1,)),
        (slice(0, 6, 100), "a[0:1, 0:4]", (1, 4), ()),
    ],
)
def test_indices_as_numpy_reads_them(
    select: Any, name: str, shape: tuple[int, ...], dropped: tuple[int, ...]
) -> None:
    stream = stream_of(grid_of((6, 4), (2, 2)), select=select)
    assert (stream.name, stream.shape, stream.dropped) == (name, shape, dropped)


def test_windows_that_want_the_same_have_one_stream() -> None:
    streams = Streams({"a": grid_of((6, 4), (2, 2))})
    asked = [
        WindowSpec("a", 3, select=slice(-2, None), every=2),
        WindowSpec("a", select={0: slice(4, 6)}, every=2),
    ]
    first, second = map(streams.of, asked)
    assert first is second
    streams.of(WindowSpec("a"))
    assert streams.of(WindowSpec("a", astype="f4")).name == "a as float32"
    assert list(streams.by_name) == ["a[4:6, 0:4] every 2", "a", "a as float32"]


def test_an_array_that_is_called_like_a_stream() -> None:
    said = {"chunk_shape": (4,), "global_shape": (4,), "offset": (0,)}
    layouts = resolve_layout({0: describe_arrays({"a": said, "a every 2": said})})
    streams = Streams(layouts)
    own, other = streams.of(WindowSpec("a every 2")), streams.of(WindowSpec("a", every=2))
    assert (own.name, own.array, other.name, other.array) == ("a every 2", "a every 2", "a every 2'", "a")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"select": (0, 0, 0)}, r"select=\(0, 0, 0\) has 3 indices, the array has 2 dimensions"),
        ({"select": (..., ...)}, "has 0 indices"),
        ({"select": 6}, "dimension 0 of 6 elements: there is no element 6"),
        ({"select": (0, -5)}, "dimension 1 of 4 elements: there is no element -5"),
        (
            {"select": slice(None, None, -1)},
            "the step of slice.* must be positive; reverse the array in the callback",
        ),
        ({"select": slice(4, 2)}, "selects nothing"),
        ({"select": [0, 1]}, "expected a slice or an integer, got .*select anything else in the callback"),
        ({"select": 0.5}, "expected a slice or an integer, got 0.5"),
        ({"select": slice(0, None, 0)}, "expected a slice or an integer"),
        ({"select": {2: 0}}, "names 2, which is no dimension of the array; it has 2 without names"),
        ({"select": {"x": 0}}, "names 'x', which is no dimension"),
        ({"astype": "i4"}, "elements of dtype float64 are not converted to int32 where they are sent"),
        ({"astype": "U3"}, "are not converted"),
    ],
)
def test_what_cannot_be_selected(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(WindowError, match=message) as caught:
        stream_of(grid_of((6, 4), (2, 2)), **asked)
    assert "window of 'a'" in str(caught.value)


LABELLED = {
    "chunk_shape": (6, 4),
    "global_shape": (6, 4),
    "offset": (0, 0),
    "dims": ("x", "y"),
    "coords": {"x": np.linspace(0, 1, 6), "name": ("y", np.array(["a", "b", "c", "d"]))},
    "dtype": "f8",
}


@pytest.mark.parametrize(
    ("select", "index"),
    [
        ({"x": slice(0.2, 0.8)}, (slice(1, 5), slice(0, 4))),  # labels, both ends included
        ({"x": 0.4, "y": slice(1, 3)}, (2, slice(1, 3))),  # `y` has no coordinate of its own
        ({"x": slice(None, None, 2), "y": -1}, (slice(0, 5, 2), 3)),
        ({0: slice(2, 4)}, (slice(2, 4), slice(0, 4))),  # by number: positions
    ],
)
def test_labels_as_xarray_reads_them(select: Any, index: tuple[Any, ...]) -> None:
    layout = resolve(LABELLED)
    stream = stream_of(layout, select=select)
    field = np.arange(24).reshape(6, 4)
    np.testing.assert_array_equal(field[stream.index], field[index])
    labels = cut(layout, stream).labels
    assert labels.dims == tuple(d for d, i in zip("xy", index, strict=True) if isinstance(i, slice))
    x, name = labels.coords
    np.testing.assert_array_equal(x.values, np.linspace(0, 1, 6)[index[0]])
    np.testing.assert_array_equal(name.values, np.array(["a", "b", "c", "d"])[index[1]])


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ({"x": 0.5}, r"0\.5 is not found along 'x', whose labels go from 0\.0 to 1\.0 \(KeyError"),
        ({"x": slice(2.0, 3.0)}, "along 'x' selects nothing"),
        ({"x": [0.0, 0.2, 1.0]}, "along 'x' selects positions that no slice with a positive step has"),
        ({"z": 0}, "names 'z', which is no dimension of the array; it has 'x', 'y'"),
    ],
)
def test_labels_that_are_not_there(select: Any, message: str) -> None:
    with pytest.raises(WindowError, match=message):
        stream_of(resolve(LABELLED), select=select)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"every": 0}, "every is 0, it must be at least 1"),
        ({"every": 1.5}, "every must be an integer, got 1.5"),
        ({"astype": "no dtype"}, "'no dtype' is not a NumPy dtype"),
    ],
)
def test_windows_that_make_no_sense(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(WindowError, match=message):
        WindowSpec("a", **asked)


def test_dtypes_convert_where_no_value_changes_beyond_rounding() -> None:
    dtypes = [np.dtype(text) for text in sorted(CONVERTIBLE)]
    for own in dtypes:
        for wanted in dtypes:
            allowed = np.can_cast(own, wanted, "same_kind" if wanted.kind in "fc" else "safe")
            assert converts(own, wanted) == allowed, (own, wanted)
    assert not converts(np.dtype(">f8"), np.dtype("f4"))
    assert not converts(np.dtype("f8"), np.dtype("f2"))


# What that is of each chunk.


@given(tilings(), st.data())
def test_the_parts_of_chunks_make_the_selection(bridges: list[list[dict]], data: st.DataObject) -> None:
    layout = resolve(*bridges)
    index: list[Any] = []
    for length in layout.shape:
        start = data.draw(st.integers(0, length - 1))
        chosen: Any = slice(start, data.draw(st.integers(start + 1, length)), data.draw(st.integers(1, 4)))
        index.append(data.draw(st.sampled_from([chosen, start])))
    field = np.arange((layout.shape and np.prod(layout.shape)) or 1).reshape(layout.shape)
    stream = stream_of(layout, select=tuple(index))
    taken = cut(layout, stream)
    by_chunk, by_cell = np.full(stream.shape, -1), taken.cells
    for number, chunk in enumerate(taken.chunks):
        (owner,) = (c for c in layout.chunks if (c.bridge_id, c.index) == (chunk.bridge_id, chunk.index))
        own = field[tuple(slice(o, o + n) for o, n in zip(owner.offset, owner.shape, strict=True))]
        corners = zip(chunk.start or (), stream.step, chunk.shape, strict=False)
        part = own[tuple(slice(s, s + (n - 1) * step + 1, step) for s, step, n in corners)]
        box = tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True))
        assert np.all(by_chunk[box] == -1)
        by_chunk[box] = part
        assert number in taken.cells
    np.testing.assert_array_equal(by_chunk.squeeze(stream.dropped), field[tuple(index)])
    for axis, sizes in enumerate(taken.cuts):
        assert sum(sizes) == stream.shape[axis]
        by_cell = np.repeat(by_cell, sizes, axis=axis)
    owner_of = np.full(stream.shape, -1)
    for number, chunk in enumerate(taken.chunks):
        owner_of[tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True))] = number
    np.testing.assert_array_equal(by_cell, owner_of)
    nodes = ["n"] * len(taken.chunks)
    for tiling in (separate(taken, nodes), merge(taken, nodes, {"n": 2})):  # boxes take it as any layout
        assert sum(np.prod(box.shape, dtype=int) for box in tiling.boxes) == np.prod(stream.shape, dtype=int)


def test_the_regions_of_all_streams_are_numbered_on_each_node() -> None:
    layout = grid_of((6, 4), (2, 2))
    streams = [whole(layout), stream_of(layout, select=(0, ...))]
    layouts = [cut(layout, stream) for stream in streams]
    node_of = {0: "x", 1: "y", 2: "y", 3: "x"}
    assert number_regions(layouts, node_of.__getitem__) == {"a": (0, 0, 1, 1), "a[0, 0:4]": (2, 2)}
