"""What no window asks for is not handed over, and what one asks for arrives."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from deisa.ray import DeisaArray, WindowSpec
from deisa.ray.errors import WindowError
from tests.e2e.simulation import Ranks, Site, grid_boxes, ranks, values
from tests.support.patience import PATIENCE_S

SHAPE = (12, 8, 6)
BOXES = grid_boxes((0, 5, 12), (0, 8), (0, 2, 6))  # chunks of four shapes
STEPS = range(-4, 8)


def described(position: tuple[int, ...], **more: Any) -> dict[str, Any]:
    box = BOXES[position]
    shape = tuple(side.stop - side.start for side in box)
    return {
        "chunk_shape": shape,
        "offset": tuple(side.start for side in box),
        "global_shape": SHAPE,
        "dtype": float,
        **more,
    }


def simulate(site: Site, dtype: Any = float, *, declared: bool = True) -> Ranks:
    """One rank for each box, which sends the whole field, its chunk in Fortran order."""

    def rank(number: int, position: tuple[int, ...]) -> None:
        said = described(position, dtype=dtype if declared else None)
        with site.bridge(number, len(BOXES), {"x": said}) as bridge:
            for timestep in STEPS:
                field = np.asfortranarray(values(SHAPE, timestep)[BOXES[position]].astype(dtype))
                bridge.send("x", field, timestep)

    return Ranks([lambda n=n, p=p: rank(n, p) for n, p in enumerate(BOXES)])


class Seen(dict[int, list[np.ndarray]]):
    """What a callback got, by timestep."""

    def __call__(self, window: list[DeisaArray]) -> None:
        assert window[-1].t not in self
        self[window[-1].t] = [array.compute() for array in window]
        self.timesteps = [array.t for array in window]


SELECTIONS: dict[str, Any] = {
    "plane": (slice(None), 3),
    "corner": (0, 0, 0),
    "in one chunk": (slice(0, 4), slice(2, 5), slice(0, 2)),
    "coarse": (slice(None, None, 4), slice(1, None, 3), slice(None, None, 5)),
    "by dimension": {2: slice(-1, None)},
}


@pytest.mark.parametrize("merged", [False, True], ids=["apart", "merged"])
def test_selections_beside_each_other(site: Site, merged: bool) -> None:
    deisa = site.deisa(merge_chunks_beyond=1 if merged else 32)
    seen = {name: Seen() for name in SELECTIONS}
    for name, select in SELECTIONS.items():
        deisa.register_callback(seen[name], WindowSpec("x", select=select))
    running = simulate(site)
    report = deisa.execute_callbacks()
    running.check()
    for name, select in SELECTIONS.items():
        index = select if isinstance(select, tuple) else (..., select[2])
        assert list(seen[name]) == list(STEPS)
        for timestep, (array,) in seen[name].items():
            np.testing.assert_array_equal(array, values(SHAPE, timestep)[index])
    sent = len(STEPS) * 8 * 12 * 8 * 6
    selected = len(STEPS) * 8 * (12 * 6 + 1 + 4 * 3 * 2 + 3 * 3 * 2 + 12 * 8)
    assert sum(stats.bytes_handed_over for stats in report.bridges.values()) == selected
    assert 0 < report.bytes_left_out <= sent - selected + 4 * 8 * len(STEPS)
    assert "that no window asked for were not copied" in str(report)


def test_timesteps_that_are_multiples(site: Site) -> None:
    deisa = site.deisa()
    rare, often, both = Seen(), Seen(), Seen()
    deisa.register_callback(rare, WindowSpec("x", 2, every=3))
    deisa.register_callback(often, WindowSpec("x"))
    deisa.register_callback(both, WindowSpec("x", every=4, select=(0, 0)))
    running = simulate(site)
    deisa.execute_callbacks()
    running.check()
    assert list(rare) == [-3, 0, 3, 6] and list(both) == [-4, 0, 4] and list(often) == list(STEPS)
    assert rare.timesteps == [3, 6]
    np.testing.assert_array_equal(rare[6], [values(SHAPE, 3), values(SHAPE, 6)])


@pytest.mark.parametrize(("when", "expected"), [("AND", [0, 4]), ("OR", list(range(0, 8)))])
def test_windows_of_several_arrays_that_take_other_timesteps(
    site: Site, when: Any, expected: list[int]
) -> None:
    """Where one has nothing for a timestep, the other's does not wait for it."""
    deisa = site.deisa()
    seen: list[tuple[int, list[int], list[int]]] = []
    deisa.register_callback(
        lambda x, y: seen.append((max(x[-1].t, y[-1].t), [a.t for a in x], [a.t for a in y])),
        WindowSpec("x", every=4),
        WindowSpec("y", 2),
        when=when,
    )

    def rank() -> None:
        said = {"chunk_shape": (4,), "global_shape": (4,), "offset": (0,), "dtype": float}
        with site.bridge(0, 1, {"x": said, "y": said}) as bridge:
            for timestep in range(8):
                bridge.send("x", np.ones(4), timestep)
                bridge.send("y", np.ones(4), timestep)

    with ranks(rank):
        deisa.execute_callbacks()
    assert [t for t, _, _ in seen] == expected
    assert all(xs == [t - t % 4] and ys == [s for s in (t - 1, t) if s >= 0] for t, xs, ys in seen)


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "with the first chunk"])
@pytest.mark.parametrize(
    ("dtype", "astype"), [("f8", "f4"), ("i4", "f8"), ("i2", "i4"), ("c16", "c8"), ("f4", "c16")]
)
def test_elements_of_another_dtype(site: Site, dtype: str, astype: str, declared: bool) -> None:
    deisa = site.deisa()
    converted, native = Seen(), Seen()
    deisa.register_callback(converted, WindowSpec("x", astype=astype, select=(..., slice(1, None, 2))))
    deisa.register_callback(native, WindowSpec("x", every=2))
    running = simulate(site, dtype, declared=declared)
    deisa.execute_callbacks()
    running.check()
    for timestep in STEPS:
        field = values(SHAPE, timestep).astype(dtype)
        (array,) = converted[timestep]
        assert array.dtype == np.dtype(astype)
        np.testing.assert_array_equal(array, field.astype(astype)[..., 1::2])
        if timestep % 2 == 0:
            np.testing.assert_array_equal(native[timestep][0], field)


def test_a_dtype_that_comes_late_and_does_not_convert(site: Site) -> None:
    deisa = site.deisa()
    deisa.register_callback(Seen(), WindowSpec("x", astype="i8"))
    running = simulate(site, "f8", declared=False)
    with pytest.raises(WindowError, match="elements of dtype float64 are not converted to int64"):
        deisa.execute_callbacks()
    assert all(running.errors())


def test_what_cannot_be_selected_names_the_callback(site: Site) -> None:
    deisa = site.deisa()
    deisa.register_callback(Seen(), WindowSpec("x", select=99))
    running = simulate(site)
    with pytest.raises(WindowError, match="there is no element 99") as caught:
        deisa.execute_callbacks()
    assert any("asked for by callback" in note for note in caught.value.__notes__)
    assert all(running.errors())


def test_computing_into_a_slot_where_windows_want_several_things(site: Site) -> None:
    """A slot is given out where one window wants the chunk as it is; others get what they want of it."""
    deisa = site.deisa()
    everything, plane = Seen(), Seen()
    deisa.register_callback(everything, WindowSpec("x", every=2))
    deisa.register_callback(plane, WindowSpec("x", select=0, astype="f4"))

    def rank() -> None:
        said = {"chunk_shape": (4, 3), "global_shape": (4, 3), "offset": (0, 0), "dtype": float}
        with site.bridge(0, 1, {"x": said}) as bridge:
            for timestep in range(6):
                slot = bridge.slot("x", timestep)
                slot[...] = values((4, 3), timestep)
                bridge.send("x", slot, timestep)

    with ranks(rank):
        deisa.execute_callbacks()
    assert list(everything) == [0, 2, 4] and list(plane) == list(range(6))
    for timestep, (array,) in everything.items():
        np.testing.assert_array_equal(array, values((4, 3), timestep))
    for timestep, (array,) in plane.items():
        np.testing.assert_array_equal(array, values((4, 3), timestep)[0])


def test_a_rank_outside_of_every_selection_does_not_wait(site: Site) -> None:
    """The other one is held up by a callback that does not return; this one sends all it has."""
    deisa = site.deisa()
    done = threading.Event()
    deisa.register_callback(lambda window: done.wait(PATIENCE_S), WindowSpec("x", select=slice(0, 4)))

    def rank(number: int) -> None:
        said = {"chunk_shape": (4,), "global_shape": (8,), "offset": (4 * number,), "dtype": float}
        with site.bridge(number, 2, {"x": said}) as bridge:
            for timestep in range(20):
                bridge.send("x", np.ones(4), timestep)
            if number == 1:
                assert bridge.stats.chunks == 0 and bridge.stats.bytes_left_out == 20 * 32
                done.set()

    with ranks(lambda: rank(0), lambda: rank(1)):
        deisa.execute_callbacks()
    assert done.is_set()


def test_a_selection_by_labels_has_the_labels_of_its_part(site: Site) -> None:
    deisa = site.deisa()
    seen: list[Any] = []
    select = {"x": slice(1.0, 2.0), "y": 30}
    shown: list[str] = []

    def look(window: list[DeisaArray]) -> None:
        seen.append(window[-1].xarray.compute())
        shown.append(window[-1]._repr_html_())

    deisa.register_callback(look, WindowSpec("x", select=select))

    def rank(number: int) -> None:
        said = {
            "chunk_shape": (4, 3),
            "global_shape": (8, 3),
            "offset": (4 * number, 0),
            "dims": ("x", "y"),
            "coords": {"x": np.arange(8) / 2, "y": np.array([10, 20, 30])},
            "attrs": {"units": "K"},
            "dtype": float,
        }
        with site.bridge(number, 2, {"x": said}) as bridge:
            bridge.send("x", values((8, 3), 0)[4 * number : 4 * number + 4], 0)

    with ranks(lambda: rank(0), lambda: rank(1)):
        deisa.execute_callbacks()
    (array,) = seen
    assert array.name == "x" and array.dims == ("x",) and array.attrs == {"units": "K"}
    assert array.x.values.tolist() == [1.0, 1.5, 2.0] and array.y == 30
    np.testing.assert_array_equal(array, values((8, 3), 0)[2:5, 2])
    assert "coordinate y<" in shown[0] and ">30<" in shown[0]


def test_only_timesteps_that_are_saved_are_handed_over(site: Site, tmp_path: Path) -> None:
    deisa = site.deisa()
    deisa.save(WindowSpec("x", select=(slice(None), 0), astype="f4"), tmp_path / "out.zarr", every=4)
    running = simulate(site)
    report = deisa.execute_callbacks()
    running.check()
    saved = xr.open_zarr(tmp_path / "out.zarr")
    assert saved.timestep.values.tolist() == [-4, 0, 4]
    for at, timestep in enumerate([-4, 0, 4]):
        np.testing.assert_array_equal(saved.x.values[at], values(SHAPE, timestep)[:, 0].astype("f4"))
    assert sum(stats.bytes_handed_over for stats in report.bridges.values()) == 3 * 4 * 12 * 6
