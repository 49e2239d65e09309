"""Which chunks share memory: boxes never leave a node, and boxes and cells cover an array exactly once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._state.boxes import Tiling, merge, separate
from deisa.ray._state.layout import ArrayLayout
from tests.unit.test_layout import resolve, tilings


def covered_by(
    boxes: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], shape: tuple[int, ...]
) -> np.ndarray:
    """For each element of an array, the position of the (offset, shape) that covers it: exactly one must."""
    owners = np.full(shape, -1)
    for number, (offset, size) in enumerate(boxes):
        box = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
        assert np.all(owners[box] == -1)
        owners[box] = number
    assert np.all(owners >= 0)
    return owners


def check(tiling: Tiling, layout: ArrayLayout, nodes: Sequence[str]) -> None:
    box_at = covered_by([(box.offset, box.shape) for box in tiling.boxes], layout.shape)
    chunk_at = covered_by([(chunk.offset, chunk.shape) for chunk in layout.chunks], layout.shape)
    assert sorted(n for box in tiling.boxes for n in box.chunks) == list(range(len(layout.chunks)))
    for number, box in enumerate(tiling.boxes):
        assert {nodes[n] for n in box.chunks} == {box.node_id}
        assert set(chunk_at[box_at == number]) == set(box.chunks)  # which lie in it entirely, as boxes tile
    assert tuple(map(sum, tiling.cuts)) == layout.shape
    assert all(size > 0 for sizes in tiling.cuts for size in sizes)
    assert tiling.cells.shape == tuple(map(len, tiling.cuts))
    assert tiling.cells.dtype == np.int32
    cell_in = tiling.cells
    for axis, sizes in enumerate(tiling.cuts):
        cell_in = np.repeat(cell_in, sizes, axis=axis)
    np.testing.assert_array_equal(cell_in, box_at)
    assert tiling.cells.size <= layout.cells.size


def grid(shape: tuple[int, ...], chunk: tuple[int, ...]) -> ArrayLayout:
    """Chunks of one size, the last dimension fastest."""
    return resolve(
        [
            {"chunk_shape": chunk, "nb_chunks_per_dim": shape, "chunk_position": position, "dtype": "f8"}
            for position in np.ndindex(shape)
        ]
    )


def extents(tiling: Tiling) -> set[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    return {(box.node_id, box.offset, box.shape) for box in tiling.boxes}


# Layouts as simulations have them.


def test_rows_of_a_node_become_one_box() -> None:
    layout = grid((4, 3), (2, 5))
    nodes = ["a"] * 6 + ["b"] * 6
    tiling = merge(layout, nodes, {"a": 1, "b": 1})
    check(tiling, layout, nodes)
    assert extents(tiling) == {("a", (0, 0), (4, 15)), ("b", (4, 0), (4, 15))}
    assert tiling.cuts == ((4, 4), (15,))


def test_a_box_is_cut_into_as_many_cells_as_asked_for() -> None:
    layout = grid((4, 3), (2, 5))
    nodes = ["a"] * 6 + ["b"] * 6
    tiling = merge(layout, nodes, {"a": 2, "b": 3})
    check(tiling, layout, nodes)
    assert len(tiling.boxes) == 2
    assert tiling.cuts == ((2, 2, 1, 1, 2), (15,))


def test_a_box_too_short_for_its_parts_is_cut_along_the_next_dimension() -> None:
    layout = grid((2, 8), (1, 1))
    tiling = merge(layout, ["a"] * 16, {"a": 4})
    check(tiling, layout, ["a"] * 16)
    assert tiling.cuts == ((2,), (2, 2, 2, 2))


def test_a_box_that_is_too_short_everywhere_stays_whole() -> None:
    layout = grid((3, 3), (1, 1))
    tiling = merge(layout, ["a"] * 9, {"a": 4})
    check(tiling, layout, ["a"] * 9)
    assert tiling.cuts == ((3,), (3,))


def test_two_by_two_nodes() -> None:
    layout = grid((4, 4), (3, 2))
    nodes = [f"{i // 2}{j // 2}" for i, j in np.ndindex(4, 4)]
    tiling = merge(layout, nodes, dict.fromkeys(nodes, 1))
    check(tiling, layout, nodes)
    assert extents(tiling) == {
        ("00", (0, 0), (6, 4)),
        ("01", (0, 4), (6, 4)),
        ("10", (6, 0), (6, 4)),
        ("11", (6, 4), (6, 4)),
    }
    assert tiling.cuts == ((6, 6), (4, 4))


def test_on_a_checkerboard_nothing_merges() -> None:
    layout = grid((4, 4), (3, 2))
    nodes = ["ab"[(i + j) % 2] for i, j in np.ndindex(4, 4)]
    tiling = merge(layout, nodes, {"a": 1, "b": 1})
    check(tiling, layout, nodes)
    assert len(tiling.boxes) == 16
    assert tiling.cuts == layout.cuts


def test_parts_are_given_up_where_they_would_make_more_cells_than_there_are_chunks() -> None:
    layout = grid((2, 2), (8, 8))
    nodes = ["a", "a", "b", "b"]
    tiling = merge(layout, nodes, {"a": 8, "b": 8})
    check(tiling, layout, nodes)
    assert tiling.cuts == ((8, 8), (16,))


def test_chunks_that_make_no_larger_box_stay_apart() -> None:
    layout = pinwheel()
    nodes = ["a"] * 5
    tiling = merge(layout, nodes, {"a": 2})
    check(tiling, layout, nodes)
    assert {box.chunks for box in tiling.boxes} == {(n,) for n in range(5)}
    assert tiling.cuts == layout.cuts


def test_what_a_merge_makes_merges_further() -> None:
    """Two chunks on top of each other are as high as their neighbour only once they are one."""
    boxes = [((0, 0), (1, 1)), ((1, 0), (1, 1)), ((0, 1), (2, 1))]
    layout = resolve(
        [{"global_shape": (2, 2), "offset": o, "chunk_shape": s, "dtype": "f8"} for o, s in boxes]
    )
    tiling = merge(layout, ["a"] * 3, {"a": 1})
    check(tiling, layout, ["a"] * 3)
    assert extents(tiling) == {("a", (0, 0), (2, 2))}


def pinwheel() -> ArrayLayout:
    """Four chunks that turn around a fifth."""
    boxes = [((0, 0), (2, 4)), ((0, 4), (4, 2)), ((4, 2), (2, 4)), ((2, 0), (4, 2)), ((2, 2), (2, 2))]
    return resolve([{"global_shape": (6, 6), "offset": o, "chunk_shape": s, "dtype": "f8"} for o, s in boxes])


def test_separate_gives_each_chunk_its_box() -> None:
    layout = pinwheel()
    nodes = ["a", "b", "a", "b", "a"]
    tiling = separate(layout, nodes)
    check(tiling, layout, nodes)
    assert [(box.node_id, box.chunks) for box in tiling.boxes] == [
        (node, (n,)) for n, node in enumerate(nodes)
    ]
    assert tiling.cells is layout.cells


# Any layout at all, on any nodes.


@given(tilings(), st.data())
def test_boxes_and_cells_cover_any_array_once(bridges: list[list[dict]], data: st.DataObject) -> None:
    layout = resolve(*bridges)
    names = data.draw(st.sampled_from(["a", "ab", "abcd"]))
    on = [data.draw(st.sampled_from(names)) for _ in bridges]
    nodes = [on[chunk.bridge_id] for chunk in layout.chunks]
    parts = {node: data.draw(st.integers(1, 5)) for node in set(nodes)}
    check(separate(layout, nodes), layout, nodes)
    tiling = merge(layout, nodes, parts)
    check(tiling, layout, nodes)
    assert len(tiling.boxes) <= len(layout.chunks)
    if len(set(nodes)) == 1 and len(layout.cells.shape):
        assert tiling.boxes == merge(layout, nodes, dict.fromkeys(parts, 1)).boxes


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 6))
def test_a_grid_on_one_node_is_one_box(shape: list[int], parts: int) -> None:
    layout = grid(tuple(shape), (2,) * len(shape))
    nodes = ["a"] * len(layout.chunks)
    tiling = merge(layout, nodes, {"a": parts})
    check(tiling, layout, nodes)
    assert extents(tiling) == {("a", (0,) * len(shape), layout.shape)}
    enough = any(2 * n >= parts for n in shape) and parts <= len(layout.chunks)
    assert tiling.cells.size == (parts if enough else 1)
