"""What one bridge says about its chunks, and what all of them together make."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._state.descriptions import ArrayDescription, ChunkDescription, describe_arrays
from deisa.ray._state.layout import ArrayLayout, check_bridge_ids, resolve_layout
from deisa.ray._state.naming import missing_bridges, name_bridges
from deisa.ray.errors import (
    BridgeIdError,
    DescriptionError,
    DescriptionMismatchError,
    HoleError,
    LayoutError,
    OverlapError,
    WorldSizeError,
)

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset, shape


def resolve(*bridges: Any) -> ArrayLayout:
    """Resolve array "a"; each argument is what one bridge says about it."""
    return resolve_layout({b: describe_arrays({"a": said}) for b, said in enumerate(bridges)})["a"]


def owners_by_chunk(layout: ArrayLayout) -> np.ndarray:
    """For each element, the position in `layout.chunks` of the chunk that covers it."""
    owners = np.full(layout.shape, -1)
    for number, chunk in enumerate(layout.chunks):
        box = tuple(slice(o, o + n) for o, n in zip(chunk.offset, chunk.shape, strict=True))
        assert np.all(owners[box] == -1)
        owners[box] = number
    assert np.all(owners >= 0)
    return owners


def owners_by_cell(layout: ArrayLayout) -> np.ndarray:
    """The same, from the grid of cells that Dask will see."""
    owners = layout.cells
    for axis, sizes in enumerate(layout.cuts):
        owners = np.repeat(owners, sizes, axis=axis)
    return owners


def check(layout: ArrayLayout) -> None:
    assert tuple(map(sum, layout.cuts)) == layout.shape
    assert all(size > 0 for sizes in layout.cuts for size in sizes)
    assert layout.cells.shape == tuple(map(len, layout.cuts))
    np.testing.assert_array_equal(owners_by_cell(layout), owners_by_chunk(layout))


# The three ways to describe an array.


def test_quick_start_description() -> None:
    layout = resolve(
        *(
            {
                "chunk_shape": (3, 5),
                "nb_chunks_per_dim": (2, 2),
                "nb_chunks_of_node": 1,
                "dtype": np.float64,
                "chunk_position": divmod(b, 2),
            }
            for b in range(4)
        )
    )
    assert layout.shape == (6, 10)
    assert layout.dtype == np.float64
    assert layout.cuts == ((3, 3), (5, 5))
    assert [c.offset for c in layout.chunks] == [(0, 0), (0, 5), (3, 0), (3, 5)]
    assert [c.bridge_id for c in layout.chunks] == [0, 1, 2, 3]
    check(layout)


def test_global_shape_with_position() -> None:
    layout = resolve(
        {"global_shape": (6,), "chunk_shape": (4,), "chunk_position": (0,)},
        {"global_shape": (6,), "chunk_shape": (2,), "chunk_position": (1,)},
    )
    assert layout.cuts == ((4, 2),)
    assert layout.dtype is None
    check(layout)


def test_offset_and_shape() -> None:
    layout = resolve(
        {"global_shape": (4, 4), "offset": (0, 0), "chunk_shape": (4, 2), "dtype": "i4"},
        {"global_shape": (4, 4), "offset": (0, 2), "chunk_shape": (1, 2), "dtype": "i4"},
        {"global_shape": (4, 4), "offset": (1, 2), "chunk_shape": (3, 2), "dtype": "i4"},
    )
    assert layout.cuts == ((1, 3), (2, 2))
    assert layout.cells.tolist() == [[0, 1], [0, 2]]
    check(layout)


def test_the_three_ways_agree() -> None:
    quick, newer, offsets = [], [], []
    for i, j in np.ndindex(2, 3):
        shape = ((2, 5)[i], (1, 4, 2)[j])
        quick.append({"chunk_shape": shape, "nb_chunks_per_dim": (2, 3), "chunk_position": (i, j)})
        newer.append({"chunk_shape": shape, "global_shape": (7, 7), "chunk_position": (i, j)})
        offsets.append({"chunk_shape": shape, "global_shape": (7, 7), "offset": ((0, 2)[i], (0, 1, 5)[j])})
    one, two, three = resolve(*quick), resolve(*newer), resolve(*offsets)
    assert one.shape == two.shape == three.shape == (7, 7)
    assert one.cuts == two.cuts == three.cuts
    assert one.chunks == two.chunks == three.chunks
    for layout in (one, two, three):
        check(layout)


@pytest.mark.parametrize("ndim", range(6))
@pytest.mark.parametrize("by", ["position", "offset"])
def test_any_number_of_dimensions(ndim: int, by: str) -> None:
    place = {"chunk_position": (0,) * ndim} if by == "position" else {"offset": (0,) * ndim}
    layout = resolve({"chunk_shape": (2,) * ndim, "global_shape": (2,) * ndim, **place})
    assert layout.shape == (2,) * ndim
    assert layout.cuts == ((2,),) * ndim
    check(layout)


def test_two_owners_of_a_scalar_overlap() -> None:
    said = {"chunk_shape": (), "nb_chunks_per_dim": (), "chunk_position": ()}
    with pytest.raises(OverlapError, match="bridge 0 and bridge 1"):
        resolve(said, said)


def test_no_chunk_and_several_chunks() -> None:
    layout = resolve(
        [],
        [
            {"chunk_shape": (2,), "nb_chunks_per_dim": (3,), "chunk_position": (2,)},
            {"chunk_shape": (4,), "nb_chunks_per_dim": (3,), "chunk_position": (0,)},
        ],
        {"chunk_shape": (1,), "nb_chunks_per_dim": (3,), "chunk_position": (1,)},
    )
    assert [(c.bridge_id, c.index, c.offset) for c in layout.chunks] == [
        (1, 0, (5,)),
        (1, 1, (0,)),
        (2, 0, (4,)),
    ]
    check(layout)


def test_array_without_any_chunk_does_not_exist() -> None:
    assert resolve_layout({0: describe_arrays({"a": []}), 1: describe_arrays({})}) == {}


def test_arrays_are_independent() -> None:
    said = {"chunk_shape": (1,), "global_shape": (1,), "chunk_position": (0,)}
    layouts = resolve_layout({0: describe_arrays({"a": said}), 1: describe_arrays({"b": said})})
    assert [layout.chunks[0].bridge_id for layout in layouts.values()] == [0, 1]


# What one bridge can get wrong by itself.

FINE = {"chunk_shape": (4, 4), "nb_chunks_per_dim": (2, 2), "chunk_position": (0, 0), "dtype": "f8"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_shap": (4, 4)}, "unknown keys chunk_shap; known are attrs, chunk_position"),
        ({"chunk_shape": 4}, "'chunk_shape' must be a tuple of integers, got 4"),
        ({"chunk_shape": "44"}, "'chunk_shape' must be a tuple of integers, got '44'"),
        ({"chunk_shape": (4.0, 4)}, "'chunk_shape' must hold integers, got 4.0"),
        (
            {"chunk_shape": (0, 4)},
            "at least 1 is needed; a bridge without a chunk of it leaves the array out",
        ),
        ({"chunk_shape": (1,) * 65}, "has 65 dimensions, NumPy's arrays have 64 at most"),
        ({"chunk_shape": (4,)}, r"\(4,\) has 1 dimensions, 'nb_chunks_per_dim' \(2, 2\) has 2"),
        ({"chunk_position": (0, 2)}, r"chunk_position \(0, 2\) lies outside nb_chunks_per_dim \(2, 2\)"),
        ({"chunk_position": (0, -1)}, "'chunk_position' holds -1, at least 0 is needed"),
        ({"chunk_position": None}, "neither given"),
        ({"offset": (0, 0)}, "both given"),
        ({"chunk_position": None, "offset": (0, 0)}, "'offset' needs 'global_shape' beside it"),
        ({"nb_chunks_per_dim": None}, "needs 'nb_chunks_per_dim' or 'global_shape' beside it"),
        ({"global_shape": (8, 3)}, r"chunk_shape \(4, 4\) is larger than global_shape \(8, 3\)"),
        (
            {"chunk_position": None, "offset": (5, 0), "global_shape": (8, 8)},
            r"at offset \(5, 0\) reaches beyond global_shape \(8, 8\)",
        ),
        ({"nb_chunks_of_node": -1}, "'nb_chunks_of_node' holds -1"),
        ({"dtype": object}, "cannot be shared"),
        ({"dtype": "U"}, "cannot be shared"),
        ({"dtype": [("a", "O")]}, "cannot be shared"),
        (
            {"dtype": ("f8", (2,))},
            r"dtype dtype\(\('<f8', \(2,\)\)\) cannot be shared: each element is an array; use dtype float64, and "
            r"describe a further dimension: 'chunk_shape' \(..., 2\), and one chunk along there$",
        ),
        (
            {"dtype": (">i2", (2, 3))},
            r"use dtype >i2, and describe 2 further dimensions: 'chunk_shape' \(..., 2, 3\), and",
        ),
        ({"dtype": "float46"}, "'float46' is not a NumPy dtype"),
    ],
)
def test_malformed_description(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DescriptionError, match=message) as caught:
        describe_arrays({"temperature": {**FINE, **change}})
    assert "'temperature'" in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([("a", FINE)], "must map array names to descriptions, got list"),
        ({3: FINE}, "array names must be non-empty strings, got 3"),
        ({"": FINE}, "array names must be non-empty strings"),
        ({"a\0b": FINE}, "array names must be UTF-8 without zeros, got 'a.x00b'"),
        ({"\udcff": FINE}, "array names must be UTF-8"),
        ({"a": 5}, "describe it by a dict, or by a list of dicts"),
        ({"a": [FINE, 5]}, "a chunk is described by a dict, got int"),
        ({"a": {"dtype": "f8"}}, "'chunk_shape' is missing"),
        ({"a": [FINE, {**FINE, "dtype": "f4"}]}, "two chunks of one bridge disagree on dtype: float64 and"),
        ({"a": [FINE, {**FINE, "nb_chunks_per_dim": (2, 3)}]}, "disagree on grid"),
    ],
)
def test_malformed_metadata(metadata: Any, message: str) -> None:
    with pytest.raises(DescriptionError, match=message):
        describe_arrays(metadata)


def test_numbers_may_be_of_any_integer_kind() -> None:
    (described,) = describe_arrays(
        {"a": {"chunk_shape": np.array([2, 3]), "global_shape": [4, 3], "chunk_position": (True, np.int8(0))}}
    )
    for numbers in (described.chunks[0].shape, described.chunks[0].position, described.global_shape):
        assert numbers is not None
        assert [type(n) for n in numbers] == [int, int]


# What only all of them together can get wrong.


def test_hole_names_positions() -> None:
    with pytest.raises(HoleError, match=r"no bridge owns chunk position \(1, 0\) of grid \(2, 2\): 3 of 4"):
        resolve(*({**FINE, "chunk_position": p} for p in [(0, 0), (0, 1), (1, 1)]))


def test_hole_in_a_huge_grid_is_found_at_once() -> None:
    with pytest.raises(HoleError, match=r"positions \(0,\), \(1,\), \(2,\), \(3,\), \(4,\) \.\.\."):
        resolve({"chunk_shape": (8,), "global_shape": (2**61,), "chunk_position": (10**12,)})


def test_hole_at_the_end() -> None:
    said = [
        {"chunk_shape": (2,), "global_shape": (7,), "chunk_position": (0,)},
        {"chunk_shape": (3,), "global_shape": (7,), "chunk_position": (1,)},
    ]
    with pytest.raises(HoleError, match=r"make an array of shape \(5,\), global_shape is \(7,\)"):
        resolve(*said)


def test_too_much_for_the_global_shape() -> None:
    said = [{"chunk_shape": (4,), "global_shape": (7,), "chunk_position": (p,)} for p in range(2)]
    with pytest.raises(OverlapError, match=r"shape \(8,\), global_shape is \(7,\)"):
        resolve(*said)


def test_rows_that_do_not_line_up() -> None:
    said = [{**FINE, "chunk_position": p} for p in np.ndindex(2, 2)]
    said[3] = {**said[3], "chunk_shape": (4, 5)}
    with pytest.raises(DescriptionMismatchError, match=r"dimension 1 .*bridge 1 says 4, bridge 3 says 5"):
        resolve(*said)


def test_offset_hole_and_overlap_say_where() -> None:
    one = {"global_shape": (4, 4), "offset": (0, 0), "chunk_shape": (2, 4)}
    with pytest.raises(HoleError, match=r"elements \(2, 0\) to \(4, 4\) of global_shape \(4, 4\)"):
        resolve(one)
    with pytest.raises(
        OverlapError, match=r"bridge 0's chunk at offset \(0, 0\).*bridge 1's at offset \(1, 0\)"
    ):
        resolve(one, {"global_shape": (4, 4), "offset": (1, 0), "chunk_shape": (3, 4)})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dtype": "f4"}, "dtype"),
        ({"dtype": ">f8"}, "dtype"),
        ({"dtype": None}, "dtype"),
        ({"global_shape": (8, 9)}, "global_shape"),
        ({"nb_chunks_per_dim": (2, 3)}, "nb_chunks_per_dim"),
        ({"chunk_position": None, "offset": (4, 4)}, "way to place chunks"),
        (
            {
                "chunk_shape": (4,),
                "nb_chunks_per_dim": None,
                "global_shape": (8,),
                "chunk_position": (1,),
            },
            "global_shape",
        ),
    ],
)
def test_bridges_that_disagree(change: dict[str, Any], what: str) -> None:
    said = [{**FINE, "global_shape": (8, 8), "chunk_position": p} for p in np.ndindex(2, 2)]
    said[2] = {**said[2], **change}
    with pytest.raises(DescriptionMismatchError, match=f"'a': the {what}.*bridges 0, 1 and 3.*bridge 2"):
        resolve(*said)


def test_bridges_that_disagree_on_the_number_of_dimensions() -> None:
    with pytest.raises(DescriptionMismatchError, match=r"number of dimensions .*bridge 0: 1; bridge 1: 2"):
        resolve_layout(
            {
                0: [ArrayDescription("a", None, None, None, (ChunkDescription((4,), position=(0,)),))],
                1: [ArrayDescription("a", None, None, None, (ChunkDescription((4, 4), position=(0, 0)),))],
            }
        )


def test_too_many_cells() -> None:
    n = 10_001
    said = [
        [{"global_shape": (n, n), "offset": (i, 0), "chunk_shape": (1, n)} for i in range(1, n)],
        [{"global_shape": (n, n), "offset": (0, i), "chunk_shape": (1, 1)} for i in range(n)],
    ]
    with pytest.raises(LayoutError, match="cells, more than 10000000; align"):
        resolve(*said)


# Bridge ids.


def test_bridge_ids_that_are_fine() -> None:
    check_bridge_ids([])
    check_bridge_ids([(2, 3), (0, 3)])


@pytest.mark.parametrize(
    ("bridges", "error", "message"),
    [
        ([(0, 2), (1, 3), (2, 3)], WorldSizeError, "bridge 0 said 2; bridges 1 and 2 said 3"),
        ([(0, 2), (0, 2)], BridgeIdError, "bridge_id 0 was registered 2 times"),
        ([(0, 2), (2, 2)], BridgeIdError, r"bridge_id 2 lies outside 0\.\.1"),
        ([(-1, 2)], BridgeIdError, "bridge_id -1 lies outside"),
    ],
)
def test_bridge_ids_that_are_not(
    bridges: Sequence[tuple[int, int]], error: type[LayoutError], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_bridge_ids(bridges)


def test_naming_bridges() -> None:
    assert name_bridges([3]) == "bridge 3"
    assert name_bridges([3, 1]) == "bridges 1 and 3"
    assert name_bridges([3, 1, 2, 2]) == "bridges 1, 2 and 3"
    assert name_bridges(range(100)) == "bridges 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 ... (100 in all)"
    assert missing_bridges([0, 3], 4) == "bridges 1 and 2 of 4"


# Any tiling at all.


@st.composite
def grid_tilings(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Chunks of a grid with random cuts, in any order."""
    ndim = draw(st.integers(0, 4))
    sizes = [draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)) for _ in range(ndim)]
    way = draw(st.sampled_from(["grid", "global", "both"]))
    fixed: dict[str, Any] = {"dtype": "f4"}
    if way != "global":
        fixed["nb_chunks_per_dim"] = tuple(map(len, sizes))
    if way != "grid":
        fixed["global_shape"] = tuple(map(sum, sizes))
    chunks = [
        {"chunk_position": p, "chunk_shape": tuple(s[i] for s, i in zip(sizes, p, strict=True)), **fixed}
        for p in itertools.product(*(range(len(s)) for s in sizes))
    ]
    return draw(st.permutations(chunks))


@st.composite
def box_tilings(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Chunks made by cutting a box again and again (bricks in general, no grid), in any order."""
    ndim = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, 8)) for _ in range(ndim))
    boxes: list[Box] = [((0,) * ndim, shape)]
    for _ in range(draw(st.integers(0, 7))):
        offset, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        axis = draw(st.integers(0, ndim - 1))
        if size[axis] == 1:
            boxes.append((offset, size))
            continue
        cut = draw(st.integers(1, size[axis] - 1))
        low = (*size[:axis], cut, *size[axis + 1 :])
        high = (*size[:axis], size[axis] - cut, *size[axis + 1 :])
        moved = (*offset[:axis], offset[axis] + cut, *offset[axis + 1 :])
        boxes += [(offset, low), (moved, high)]
    chunks = [{"global_shape": shape, "offset": o, "chunk_shape": s, "dtype": "f4"} for o, s in boxes]
    return draw(st.permutations(chunks))


@st.composite
def tilings(draw: st.DrawFn) -> list[list[dict[str, Any]]]:
    """A tiling shared out among bridges, some of which may have nothing."""
    chunks = draw(st.one_of(grid_tilings(), box_tilings()))
    bridges: list[list[dict[str, Any]]] = [[] for _ in range(draw(st.integers(1, len(chunks) + 2)))]
    for chunk in chunks:
        bridges[draw(st.integers(0, len(bridges) - 1))].append(chunk)
    return bridges


@given(tilings())
def test_any_tiling_resolves(bridges: list[list[dict[str, Any]]]) -> None:
    layout = resolve(*bridges)
    check(layout)
    assert [(c.bridge_id, c.index) for c in layout.chunks] == [
        (b, i) for b, owned in enumerate(bridges) for i in range(len(owned))
    ]
    for chunk in layout.chunks:
        assert chunk.shape == bridges[chunk.bridge_id][chunk.index]["chunk_shape"]
    assert math.prod(layout.shape) == sum(math.prod(c.shape) for c in layout.chunks)


@given(tilings(), st.data())
def test_a_chunk_less_is_a_hole(bridges: list[list[dict[str, Any]]], data: st.DataObject) -> None:
    owners = [b for b, owned in enumerate(bridges) for _ in owned]
    if len(owners) == 1:
        return
    owned = bridges[data.draw(st.sampled_from(owners))]
    removed = owned.pop(data.draw(st.integers(0, len(owned) - 1)))
    if "nb_chunks_per_dim" in removed or "global_shape" in removed:
        with pytest.raises(HoleError, match="'a'"):
            resolve(*bridges)


@given(tilings(), st.data())
def test_a_chunk_twice_is_an_overlap(bridges: list[list[dict[str, Any]]], data: st.DataObject) -> None:
    chunk = data.draw(st.sampled_from([c for owned in bridges for c in owned]))
    with pytest.raises(OverlapError, match="'a'"):
        resolve(*bridges, chunk)


@given(tilings(), st.data())
def test_one_that_differs_is_named(bridges: list[list[dict[str, Any]]], data: st.DataObject) -> None:
    owners = [b for b, owned in enumerate(bridges) if owned]
    if len(owners) < 2:
        return
    culprit = data.draw(st.sampled_from(owners))
    key = "dtype"
    if "global_shape" in bridges[culprit][0] and bridges[culprit][0]["chunk_shape"]:
        key = data.draw(st.sampled_from(["dtype", "global_shape"]))
    other = "f8" if key == "dtype" else tuple(n + 1 for n in bridges[culprit][0]["global_shape"])
    bridges[culprit] = [{**c, key: other} for c in bridges[culprit]]
    with pytest.raises(DescriptionMismatchError, match=rf"{key} differs .*\b{culprit}\b"):
        resolve(*bridges)
