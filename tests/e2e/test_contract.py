"""What deisa-ray promises, whichever engine runs it."""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from deisa.ray import Deisa, DeisaArray, Settings, Window, WindowSpec
from deisa.ray.bridge import Bridge
from deisa.ray.errors import (
    AnalyticsLostError,
    BridgeLostError,
    ClosedError,
    ConfigurationError,
    NoCallbacksError,
    RegistrationError,
    WaitTimeoutError,
    WindowError,
)
from deisa.ray.report import ArrayFigures
from tests.e2e.simulation import Comm, Ranks, Site, grid_boxes, ranks, rows, values
from tests.support.patience import PATIENCE_S, wait_until

# Values: every element arrives, in its place, at its timestep.


def wholes(deisa: Deisa, name: str = "x") -> dict[int, np.ndarray]:
    """Fetch the whole array at each timestep, into the dictionary returned."""
    seen: dict[int, np.ndarray] = {}

    def fetch(window: list[DeisaArray]) -> None:
        assert window[-1].t not in seen
        seen[window[-1].t] = window[-1].compute()

    deisa.register_callback(fetch, [WindowSpec(name)])
    return seen


def assert_fields(seen: dict[int, np.ndarray], shape: tuple[int, ...], timesteps: list[int]) -> None:
    assert list(seen) == timesteps
    for timestep, whole in seen.items():
        assert whole.shape == shape
        np.testing.assert_array_equal(whole, values(shape, timestep))


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((), ()), ((12,), (3,)), ((6, 4), (2, 2)), ((4, 3, 2), (2, 1, 2))],
    ids=["0-d", "1-d", "2-d", "3-d"],
)
def test_metadata_of_the_quick_start(site: Site, shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    boxes = grid_boxes(*(range(0, n + 1, n // parts) for n, parts in zip(shape, grid, strict=True)))

    def rank(number: int, position: tuple[int, ...], box: tuple[slice, ...]) -> None:
        described = {
            "chunk_shape": tuple(n // parts for n, parts in zip(shape, grid, strict=True)),
            "nb_chunks_per_dim": grid,
            "nb_chunks_of_node": 1,
            "dtype": np.float64,
            "chunk_position": position,
        }
        bridge = site.bridge(number, len(boxes), {"x": described})
        for timestep in range(3):
            bridge.send(array_name="x", chunk=values(shape, timestep)[box], timestep=timestep)
        bridge.close(timestep=3)

    deisa = site.deisa()
    seen = wholes(deisa)
    with ranks(*(partial(rank, number, *box) for number, box in enumerate(boxes.items()))):
        deisa.execute_callbacks()
    assert_fields(seen, shape, [0, 1, 2])


def test_communicator_and_global_shape_without_dtype(site: Site) -> None:
    shape, boxes = (4, 6), grid_boxes((0, 2, 4), (0, 3, 6))

    def rank(number: int, position: tuple[int, ...], box: tuple[slice, ...]) -> None:
        described = {"global_shape": shape, "chunk_shape": (2, 3), "chunk_position": position}
        with Bridge(
            comm=Comm(number, len(boxes)), arrays_metadata={"x": described}, settings=site.settings
        ) as bridge:
            for timestep in range(3):
                bridge.send("x", values(shape, timestep)[box].astype(np.float32), timestep)

    deisa = site.deisa()
    seen = wholes(deisa)
    with ranks(*(partial(rank, number, *box) for number, box in enumerate(boxes.items()))):
        deisa.execute_callbacks()
    assert_fields(seen, shape, [0, 1, 2])
    assert seen[0].dtype == np.float32


def test_offsets_of_bricks_that_form_no_grid(site: Site) -> None:
    """Rows of bricks, each row's joints elsewhere than the next one's."""
    shape = (4, 6)
    bricks = [((0, 0), (2, 4)), ((0, 4), (2, 2)), ((2, 0), (2, 1)), ((2, 1), (2, 5))]

    def rank(number: int, offset: tuple[int, int], chunk_shape: tuple[int, int]) -> None:
        described = {"global_shape": shape, "offset": offset, "chunk_shape": chunk_shape, "dtype": "f8"}
        box = tuple(slice(o, o + n) for o, n in zip(offset, chunk_shape, strict=True))
        with site.bridge(number, 4, {"x": described}) as bridge:
            for timestep in range(2):
                bridge.send("x", values(shape, timestep)[box], timestep)

    deisa = site.deisa()
    seen = wholes(deisa)
    with ranks(*(partial(rank, number, *brick) for number, brick in enumerate(bricks))):
        deisa.execute_callbacks()
    assert_fields(seen, shape, [0, 1])


def test_tiles_of_unequal_size(site: Site) -> None:
    shape, boxes = (5, 7), grid_boxes((0, 1, 5), (0, 4, 7))

    def rank(number: int, position: tuple[int, ...], box: tuple[slice, ...]) -> None:
        described = rows(0, 1, chunk_shape=values(shape, 0)[box].shape, chunk_position=position)
        with site.bridge(number, 4, {"x": described | {"nb_chunks_per_dim": (2, 2)}}) as bridge:
            bridge.send("x", values(shape, 0)[box], 0)

    deisa = site.deisa()
    seen = wholes(deisa)
    with ranks(*(partial(rank, number, *box) for number, box in enumerate(boxes.items()))):
        deisa.execute_callbacks()
    assert_fields(seen, shape, [0])


def test_bridges_with_several_chunks_and_with_none(site: Site) -> None:
    owners = {0: [1, 3], 1: [], 2: [0, 2, 4], 3: None}

    def rank(number: int, positions: list[int] | None) -> None:
        arrays = {} if positions is None else {"x": [rows(position, 5) for position in positions]}
        with site.bridge(number, 4, arrays) as bridge:
            for timestep in range(3):
                for index, position in enumerate(positions or ()):
                    chunk = values((20,), timestep)[4 * position : 4 * position + 4]
                    bridge.send("x", chunk, timestep, chunk_index=index)

    deisa = site.deisa()
    seen = wholes(deisa)
    with ranks(*(partial(rank, *owner) for owner in owners.items())):
        deisa.execute_callbacks()
    assert_fields(seen, (20,), [0, 1, 2])


def test_ghost_cells_stay_in_the_ranks(site: Site) -> None:
    """Two bridges with two chunks each, which share memory; the ghost cells are the neighbours'."""
    shape, boxes = (5, 7), list(grid_boxes((0, 1, 5), (0, 4, 7)).items())

    def rank(number: int) -> None:
        own = boxes[number::2]
        described = [
            rows(0, 1, nb_chunks_per_dim=(2, 2), chunk_position=position, halo=((2, 1), (0, 3)))
            | {"chunk_shape": values(shape, 0)[box].shape}
            for position, box in own
        ]
        with site.bridge(number, 2, {"x": described}) as bridge:
            for timestep in range(3):
                around = np.pad(values(shape, timestep), ((2, 1), (0, 3)), constant_values=-1)
                for index, (_, (row, column)) in enumerate(own):
                    local = around[row.start : row.stop + 3, column.start : column.stop + 3]
                    bridge.send("x", local, timestep, chunk_index=index)

    deisa = site.deisa(merge_chunks_beyond=0)
    seen = wholes(deisa)
    with ranks(partial(rank, 0), partial(rank, 1)):
        deisa.execute_callbacks()
    assert_fields(seen, shape, [0, 1, 2])


def test_dtypes_and_strides(site: Site) -> None:
    particles = np.array([(1, 0.5), (2, 1.5)] * 3, dtype=[("id", "i4"), ("mass", "f8")]).reshape(2, 3)
    sent = {
        "float32": np.arange(6, dtype="f4").reshape(2, 3),
        "int8": np.arange(-3, 3, dtype="i1").reshape(2, 3),
        "complex": np.arange(6).reshape(2, 3) * (1 + 2j),
        "dates": np.arange("2024-01-01", "2024-01-07", dtype="M8[D]").reshape(2, 3),
        "records": particles,
        "transposed": np.arange(6.0).reshape(3, 2).T,
        "every_second": np.arange(24.0).reshape(4, 6)[::2, ::2],
        "backwards": np.arange(6.0).reshape(2, 3)[::-1],
        "big_endian": np.arange(6, dtype=">i4").reshape(2, 3),
    }

    def rank() -> None:
        described = {
            name: rows(
                0, 1, chunk_shape=(2, 3), nb_chunks_per_dim=(1, 1), chunk_position=(0, 0), dtype=a.dtype
            )
            for name, a in sent.items()
        }
        with site.bridge(0, 1, described) as bridge:
            for name, array in sent.items():
                bridge.send(name, array, 0)

    deisa = site.deisa()
    seen = {name: wholes(deisa, name) for name in sent}
    with ranks(rank):
        deisa.execute_callbacks()
    for name, array in sent.items():
        assert seen[name][0].dtype == array.dtype
        np.testing.assert_array_equal(seen[name][0], array)


@pytest.mark.parametrize("fields", [["x", "id"], ["id", "kind"]], ids=["out of order", "with a gap"])
def test_fields_that_were_picked(site: Site, fields: list[str]) -> None:
    text = np.dtype("S3", metadata={"h5py_encoding": "utf-8"})
    particles = np.zeros(8, [("id", "i4"), ("x", "f8"), ("kind", text)])
    particles["id"], particles["x"], particles["kind"] = range(8), np.arange(8) / 2, b"gas"
    deisa = site.deisa()
    seen = wholes(deisa)
    sums: list[float] = []
    deisa.register_callback(lambda window: sums.append(float(window[-1][fields[0]].sum().compute())), "x")

    def rank(number: int) -> None:
        own = particles[4 * number : 4 * number + 4][fields]
        with site.bridge(number, 2, {"x": rows(number, 2, dtype=own.dtype)}) as bridge:
            for timestep in range(3):
                bridge.send("x", own, timestep)

    with ranks(partial(rank, 0), partial(rank, 1)):
        deisa.execute_callbacks()
    assert [whole.tolist() for whole in seen.values()] == [particles[fields].tolist()] * 3
    assert sums == [particles[fields[0]].sum()] * 3


def test_a_rank_may_overwrite_its_buffer_and_leave(site: Site) -> None:
    """What was sent belongs to the agent: the callback runs when the rank is gone and its buffer full of NaN."""

    def rank() -> None:
        buffer = np.empty(4)
        with site.bridge(0, 1, {"x": rows(0, 1)}) as bridge:
            for timestep in range(2):
                buffer[:] = values((4,), timestep)
                bridge.send("x", buffer, timestep)
                buffer[:] = np.nan

    deisa = site.deisa()
    seen: dict[int, np.ndarray] = {}

    @deisa.register("x")
    def fetch(x: list[DeisaArray]) -> None:
        wait_until(lambda: simulation.ended, "the rank has closed")
        seen[x[-1].t] = x[-1].compute()

    with ranks(rank) as simulation:
        deisa.execute_callbacks()
    assert_fields(seen, (4,), [0, 1])


def test_a_slot_is_handed_over_without_a_copy(site: Site) -> None:
    def rank() -> None:
        with site.bridge(0, 1, {"x": rows(0, 1)}) as bridge:
            for timestep in range(4):
                slot = bridge.slot("x", timestep)
                assert slot is bridge.slot("x", timestep)
                slot[:] = values((4,), timestep)
                assert slot.flags.writeable
                bridge.send("x", slot, timestep)
                assert not slot.flags.writeable
            slot = bridge.slot("x", 4)  # asked for, but something else is sent
            slot[:] = np.nan
            bridge.send("x", values((4,), 4), 4)

    deisa = site.deisa()
    seen = wholes(deisa)
    with ranks(rank):
        deisa.execute_callbacks()
    assert_fields(seen, (4,), [0, 1, 2, 3, 4])


def test_what_a_slot_holds_is_what_the_analytics_reads(site: Site) -> None:
    """Written behind the bridge's back after `send`: seen by the callback, since nothing was copied."""
    written = threading.Event()

    def rank() -> None:
        with site.bridge(0, 1, {"x": rows(0, 1)}) as bridge:
            slot = bridge.slot("x", 0)
            below = slot.base
            bridge.send("x", slot, 0)
            below[:] = 42.0
            written.set()

    deisa = site.deisa()

    @deisa.register("x")
    def check(x: list[DeisaArray]) -> None:
        assert written.wait(PATIENCE_S)
        seen.append(x[-1].sum().compute())

    seen: list[float] = []
    with ranks(rank):
        deisa.execute_callbacks()
    assert seen == [4 * 42.0]


# Windows: the last timesteps that were sent.


def test_windows_are_shorter_at_first_and_hold_only_what_was_sent(site: Site) -> None:
    sent = [0, 3, 4, 10]
    deisa = site.deisa()
    seen: dict[int, list[list[int]]] = {1: [], 2: [], 3: []}

    def callback(size: int, window: list[DeisaArray]) -> None:
        seen[size].append([array.t for array in window])
        for array in window:
            np.testing.assert_array_equal(array.compute(), values((8,), array.t))

    for size in seen:
        deisa.register_callback(partial(callback, size), [WindowSpec("x", window_size=size)])
    with ranks(*(partial(site.send_rows, rank, 2, sent) for rank in range(2))):
        report = deisa.execute_callbacks()
    assert seen == {
        1: [[0], [3], [4], [10]],
        2: [[0], [0, 3], [3, 4], [4, 10]],
        3: [[0], [0, 3], [0, 3, 4], [3, 4, 10]],
    }
    assert report.callbacks_failed == 0


def test_arrays_of_different_cadence(site: Site) -> None:
    """`often` at each timestep; `seldom` at timesteps 2 and 5 of 0 to 6."""

    def rank(number: int) -> None:
        with site.bridge(number, 2, {"often": rows(number, 2), "seldom": rows(number, 2)}) as bridge:
            for timestep in range(7):
                chunk = values((8,), timestep)[4 * number : 4 * number + 4]
                bridge.send("often", chunk, timestep)
                if timestep % 3 == 2:
                    bridge.send("seldom", chunk, timestep)

    deisa = site.deisa()
    both: list[tuple[list[int], list[int]]] = []
    either: list[tuple[list[int], list[int]]] = []

    @deisa.register(WindowSpec("often", 2), WindowSpec("seldom", 2))
    def on_both(often: list[DeisaArray], seldom: list[DeisaArray]) -> None:
        both.append(([a.t for a in often], [a.t for a in seldom]))

    @deisa.register(WindowSpec("often", 1), WindowSpec("seldom", 2), when="OR")
    def on_either(often: list[DeisaArray], seldom: list[DeisaArray]) -> None:
        either.append(([a.t for a in often], [a.t for a in seldom]))
        for array in (*often, *seldom):
            assert array.sum().compute() == values((8,), array.t).sum()

    with ranks(*(partial(rank, number) for number in range(2))):
        report = deisa.execute_callbacks()
    assert both == [([1, 2], [2]), ([4, 5], [2, 5])]
    assert either == [([2], [2]), ([3], [2]), ([4], [2]), ([5], [2, 5]), ([6], [2, 5])]
    assert report.callbacks_failed == 0


def test_callbacks_run_once_by_timestep_then_by_registration(site: Site) -> None:
    deisa = site.deisa()
    calls: list[tuple[int, str]] = []
    for name in ("first", "second", "third"):
        deisa.register_callback(lambda window, name=name: calls.append((window[-1].t, name)), "x")
    with ranks(*(partial(site.send_rows, rank, 3, range(4)) for rank in range(3))):
        deisa.execute_callbacks()
    assert calls == [(t, name) for t in range(4) for name in ("first", "second", "third")]


# Arguments.


def test_arguments_by_name_or_by_position(site: Site) -> None:
    core = pytest.importorskip("deisa.core")
    seen: list[tuple[str, str, float, float]] = []

    def note(how: str, one: list[DeisaArray], two: list[DeisaArray]) -> None:
        seen.append((how, f"{len(one)}{len(two)}", one[-1].max().compute(), two[-1].max().compute()))

    def rank() -> None:
        with site.bridge(0, 1, {"one": rows(0, 1), "two": rows(0, 1)}) as bridge:
            for timestep in range(2):
                bridge.send("one", np.full(4, 1.0), timestep)
                bridge.send("two", np.full(4, 2.0), timestep)

    deisa = site.deisa()

    def by_name(two: list[DeisaArray], one: list[DeisaArray]) -> None:
        note("name", one, two)

    def by_position(a: list[DeisaArray], b: list[DeisaArray]) -> None:
        note("position", a, b)

    deisa.register_callback(by_name, [WindowSpec("one"), WindowSpec("two", window_size=2)])
    deisa.register_callback(by_position, Window("one"), Window("two", 2))
    deisa.register_callback(by_position, "one", core.Window("two", 2))
    deisa.register_callback(lambda *both: note("starred", *both), ["one", "two"])

    @deisa.register("one", "two", when="OR")
    def decorated(one: list[DeisaArray], *, two: list[DeisaArray]) -> None:
        note("decorated", one, two)

    with ranks(rank):
        report = deisa.execute_callbacks()
    assert seen[5:] == [
        ("name", "12", 1.0, 2.0),
        ("position", "12", 1.0, 2.0),
        ("position", "12", 1.0, 2.0),
        ("starred", "11", 1.0, 2.0),
        ("decorated", "11", 1.0, 2.0),
    ]
    assert (report.callbacks_run, report.callbacks_failed) == (10, 0)


def test_callbacks_that_can_never_be_called_are_refused(site: Site) -> None:
    deisa = site.deisa()
    with pytest.raises(RegistrationError, match=r"'<lambda>' takes \(one\), but is registered on 2 windows"):
        deisa.register_callback(lambda one: None, "one", "two")
    with pytest.raises(WindowError, match="at least one window"):
        deisa.register_callback(lambda: None)
    with pytest.raises(WindowError, match="size is 0"):
        deisa.register_callback(lambda x: None, WindowSpec("x", 0))
    with pytest.raises(RegistrationError, match="'AND' or 'OR', got 'XOR'"):
        deisa.register_callback(lambda x: None, "x", when="XOR")


# What a callback raises.


def test_an_exception_is_logged_and_the_run_goes_on(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    deisa = site.deisa()
    reached: list[int] = []

    @deisa.register("x")
    def fragile(x: list[DeisaArray]) -> None:
        if x[-1].t == 1:
            raise ZeroDivisionError("at the second timestep")
        reached.append(x[-1].t)

    with ranks(*(partial(site.send_rows, rank, 2, range(4)) for rank in range(2))):
        report = deisa.execute_callbacks()
    assert reached == [0, 2, 3]
    assert (report.callbacks_run, report.callbacks_failed) == (4, 1)
    (record,) = [r for r in caplog.records if r.exc_info]
    assert record.levelno == logging.ERROR
    assert "ZeroDivisionError: at the second timestep" in caplog.text
    assert "in callback 'fragile' at timestep 1" in caplog.text


def test_an_exception_inside_a_task_keeps_its_type(site: Site) -> None:
    def explode(block: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError(f"a block of shape {block.shape}")

    deisa = site.deisa()
    raised: list[Exception] = []
    deisa.register_callback(
        lambda x: x[-1].dask.map_blocks(explode, dtype=float).compute(), "x", exception_handler=raised.append
    )
    with ranks(*(partial(site.send_rows, rank, 2, range(2)) for rank in range(2))):
        deisa.execute_callbacks()
    assert [type(error) for error in raised] == [ZeroDivisionError] * 2
    assert "a block of shape (4,)" in str(raised[0])


def test_a_handler_may_keep_what_was_raised(site: Site) -> None:
    """A traceback holds the callback's windows; the simulation must not wait for ever for their slots."""
    deisa = site.deisa()
    raised: list[Exception] = []

    @deisa.register("x", exception_handler=raised.append)
    def fails(x: list[DeisaArray]) -> None:
        latest = x[-1].dask
        try:
            raise KeyError(x[-1].t)
        except KeyError:
            raise ZeroDivisionError(latest.shape)  # noqa: B904

    with ranks(*(partial(site.send_rows, rank, 2, range(6)) for rank in range(2))):
        report = deisa.execute_callbacks()
    assert report.callbacks_failed == len(raised) == 6


def test_a_handler_that_raises_stops_the_run(site: Site) -> None:
    deisa = site.deisa()

    def stop(error: Exception) -> None:
        raise error

    @deisa.register("x", exception_handler=stop)
    def fails(x: list[DeisaArray]) -> None:
        if x[-1].t == 1:
            raise ZeroDivisionError("enough")

    simulation = Ranks([partial(site.send_rows, rank, 2, range(1000)) for rank in range(2)])
    with pytest.raises(ZeroDivisionError, match="enough"):
        deisa.execute_callbacks()
    for error in simulation.errors():
        assert isinstance(error, AnalyticsLostError)
        assert "the analytics has ended" in str(error)
        assert "ZeroDivisionError" in str(error) and "enough" in str(error)


def test_keyboard_interrupt_stops_the_run(site: Site) -> None:
    deisa = site.deisa()

    @deisa.register("x")
    def interrupted(x: list[DeisaArray]) -> None:
        raise KeyboardInterrupt

    simulation = Ranks([partial(site.send_rows, rank, 2, range(1000)) for rank in range(2)])
    with pytest.raises(KeyboardInterrupt):
        deisa.execute_callbacks()
    assert [type(error) for error in simulation.errors()] == [AnalyticsLostError] * 2


# Names.


def test_a_window_on_no_array_says_so_and_the_others_run(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    deisa = site.deisa()
    deisa.register_callback(lambda window: pytest.fail("it has no array"), "temprature")
    seen = wholes(deisa, "temperature")
    with ranks(partial(site.send_rows, 0, 1, range(2), "temperature")):
        deisa.execute_callbacks()
    assert_fields(seen, (4,), [0, 1])
    assert "will not run: no bridge has an array 'temprature'" in caplog.text
    assert "there are 'temperature'; did you mean 'temperature'?" in caplog.text


def test_an_array_nobody_asked_for_costs_nothing(site: Site) -> None:
    stats = []

    def rank() -> None:
        with site.bridge(0, 1, {"x": rows(0, 1), "unasked": rows(0, 1)}) as bridge:
            for timestep in range(50):
                bridge.send("unasked", np.zeros(4), timestep)
            bridge.slot("unasked", 50)[:] = 1.0
            bridge.send("x", values((4,), 50), 50)
        stats.append(bridge.stats)

    deisa = site.deisa()
    seen = wholes(deisa)
    with ranks(rank):
        report = deisa.execute_callbacks()
    assert_fields(seen, (4,), [50])
    assert (stats[0].chunks, stats[0].bytes_handed_over) == (1, 32)
    assert report.timesteps == {"x": 1}


# Figures, memory and pace.


def test_the_report(site: Site) -> None:
    deisa = site.deisa()
    deisa.register_callback(lambda x: x[-1].sum().compute(), WindowSpec("x", 2))
    with ranks(*(partial(site.send_rows, rank, 3, range(5)) for rank in range(3))):
        report = deisa.execute_callbacks()
    assert report is deisa.report
    assert report.timesteps == {"x": 5}
    assert report.bytes_handed_over == {"x": 5 * 3 * 4 * 8}
    assert (report.callbacks_run, report.callbacks_failed) == (5, 0)
    assert sorted(report.held_up_s) == [0, 1, 2]
    (bound,) = report.bound_bytes.values()
    # Ranks, slots, a page each; and the pages that ranks share.
    assert 3 * 3 * 4096 <= bound < 2 * 3 * 3 * 4096
    assert 0 < report.callbacks_s <= report.wall_s
    assert (report.arrays["x"].delivered, report.arrays["x"].skipped) == (5, 0)
    sent = {bridge_id: (stats.chunks, stats.bytes_handed_over) for bridge_id, stats in report.bridges.items()}
    assert sent == dict.fromkeys(range(3), (5, 5 * 4 * 8))
    (callback,) = report.callbacks
    assert (callback.name, callback.calls, callback.failures) == ("<lambda>", 5, 0)
    assert 0 < callback.mean_s <= callback.longest_s <= callback.total_s == report.callbacks_s
    done = report.computations
    assert (done.graphs, done.bundles, done.moved_bytes) == (5, 5, 0)
    assert done.reused_plans == (4 if site.engine == "ray" else 0)
    assert done.planning_s + done.waiting_s < report.callbacks_s
    assert min(done.planning_s, done.waiting_s, done.run_s) > 0
    assert json.loads(report.to_json()) == report.to_dict()
    assert re.search(r"^x +5 +5 +0 +480 B$", str(report), re.MULTILINE)


def test_the_report_of_failures_and_skipped_timesteps(site: Site) -> None:
    def rank() -> None:
        with site.bridge(0, 1, {"x": rows(0, 1), "y": rows(0, 1)}) as bridge:
            for timestep in range(6):
                bridge.send("x", values((4,), timestep), timestep)
                if timestep % 3 == 0:
                    bridge.send("y", values((4,), timestep), timestep)

    def explode(block: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError

    deisa = site.deisa()

    @deisa.register(WindowSpec("x", 2), "y")
    def both(x: list[DeisaArray], y: list[DeisaArray]) -> None:
        (x[-1].dask - y[-1].dask).max().compute()

    @deisa.register("y", exception_handler=lambda error: None)
    def fails(y: list[DeisaArray]) -> None:
        if y[-1].t == 3:
            y[-1].dask.map_blocks(explode, dtype=float).compute()

    deisa.register_callback(both, "x", "y")
    deisa.register_callback(lambda other: None, "other")
    with ranks(rank):
        report = deisa.execute_callbacks()
    assert report.arrays == {"x": ArrayFigures(6, 2, 6 * 32), "y": ArrayFigures(2, 2, 2 * 32)}
    assert report.arrays["x"].skipped == 4
    assert [(c.name, c.calls, c.failures) for c in report.callbacks] == [
        ("both", 2, 0),
        ("fails", 2, 1),
        ("both", 2, 0),
        ("<lambda>", 0, 0),
    ]
    assert (report.computations.graphs, report.computations.bundles) == (5, 5)


def test_an_old_window_does_not_deliver_an_array_again(site: Site) -> None:
    """With OR, `y` is in every window from timestep 2 on, but it is only news at 2 and 5."""

    def rank() -> None:
        with site.bridge(0, 1, {"x": rows(0, 1), "y": rows(0, 1)}) as bridge:
            for timestep in range(6):
                bridge.send("x", values((4,), timestep), timestep)
                if timestep % 3 == 2:
                    bridge.send("y", values((4,), timestep), timestep)

    deisa = site.deisa()
    deisa.register_callback(lambda x, y: None, "x", "y", when="OR")
    with ranks(rank):
        report = deisa.execute_callbacks()
    assert report.callbacks_run == 4
    assert report.arrays == {"x": ArrayFigures(6, 4, 6 * 32), "y": ArrayFigures(2, 2, 2 * 32)}


def test_a_run_that_ends_in_an_error_leaves_its_report(site: Site) -> None:
    first_closed = threading.Event()

    def first() -> None:
        site.send_rows(0, 2, range(3))
        first_closed.set()

    def second() -> None:
        with site.bridge(1, 2, {"x": rows(1, 2)}) as bridge:
            for timestep in range(3):
                bridge.send("x", values((8,), timestep)[4:], timestep)
            wait_until(first_closed.is_set, "the other rank has closed")
            raise ZeroDivisionError

    deisa = site.deisa()
    seen = wholes(deisa)
    simulation = Ranks([first, second])
    with pytest.raises(BridgeLostError):
        deisa.execute_callbacks()
    simulation.errors()
    report = deisa.report
    assert report is not None
    assert_fields(seen, (8,), [0, 1, 2])
    assert report.arrays == {"x": ArrayFigures(3, 3, 3 * 64)}
    assert (report.callbacks_run, report.callbacks_failed, report.computations.graphs) == (3, 0, 3)
    assert [(b, stats.chunks) for b, stats in report.bridges.items()] == [(0, 3)]
    assert 0 < report.callbacks_s <= report.wall_s


def test_a_run_that_a_handler_stops_leaves_its_report(site: Site) -> None:
    deisa = site.deisa()

    def stop(error: Exception) -> None:
        raise error

    @deisa.register("x", exception_handler=stop)
    def fails(x: list[DeisaArray]) -> None:
        if x[-1].t == 1:
            raise ZeroDivisionError

    simulation = Ranks([partial(site.send_rows, 0, 1, range(1000))])
    with pytest.raises(ZeroDivisionError):
        deisa.execute_callbacks()
    simulation.errors()
    report = deisa.report
    assert report is not None
    assert [(c.name, c.calls, c.failures) for c in report.callbacks] == [("fails", 2, 1)]
    assert (report.arrays["x"].delivered, report.bridges) == (2, {})


def test_a_run_that_never_starts_leaves_an_empty_report(site: Site) -> None:
    deisa = site.deisa(start_timeout_s=0.1)
    wholes(deisa)
    with pytest.raises(WaitTimeoutError):
        deisa.execute_callbacks()
    report = deisa.report
    assert report is not None
    assert (report.arrays, report.bridges, report.callbacks_run, report.wall_s) == ({}, {}, 0, 0.0)


@pytest.mark.parametrize(("window_size", "ahead"), [(1, 1), (1, 3), (3, 2)])
def test_the_simulation_runs_no_further_ahead_than_allowed(site: Site, window_size: int, ahead: int) -> None:
    """While the first callback runs, exactly the slots can be filled: the next `send` waits."""
    sent: list[int] = []

    def rank() -> None:
        with site.bridge(0, 1, {"x": rows(0, 1)}, send_timeout_s=0.3) as bridge:
            for timestep in range(10):
                bridge.send("x", values((4,), timestep), timestep)
                sent.append(timestep)

    deisa = site.deisa(max_simulation_ahead=ahead)
    deisa.register_callback(
        lambda x: wait_until(lambda: simulation.ended, "the rank has given up"), WindowSpec("x", window_size)
    )
    simulation = Ranks([rank])
    with pytest.raises(BridgeLostError):
        deisa.execute_callbacks()
    (error,) = simulation.errors()
    assert isinstance(error, WaitTimeoutError)
    assert f"all {len(sent)} slots of array 'x' are in use: timestep {len(sent)} waits" in str(error)
    assert sent == list(range(window_size + ahead))


def test_a_slow_analytics_holds_the_simulation_up_and_loses_nothing(site: Site) -> None:
    timesteps, ahead = 30, 1
    begun = [-1, -1]  # the newest timestep that a rank is about to send

    def rank(number: int) -> None:
        with site.bridge(number, 2, {"x": rows(number, 2)}) as bridge:
            for timestep in range(timesteps):
                begun[number] = timestep
                bridge.send("x", values((8,), timestep)[4 * number : 4 * number + 4], timestep)

    deisa = site.deisa(max_simulation_ahead=ahead)
    seen: dict[int, np.ndarray] = {}

    @deisa.register("x")
    def fetch(x: list[DeisaArray]) -> None:
        without_slot = min(x[-1].t + 1 + ahead, timesteps - 1)
        wait_until(lambda: begun == [without_slot] * 2, "both ranks have run as far ahead as they may")
        seen[x[-1].t] = x[-1].compute()

    with ranks(partial(rank, 0), partial(rank, 1)):
        report = deisa.execute_callbacks()
    assert_fields(seen, (8,), list(range(timesteps)))
    assert all(held_up_s > 0 for held_up_s in report.held_up_s.values())


def test_persisted_arrays_hold_nothing_up(site: Site) -> None:
    deisa = site.deisa()
    kept: list[DeisaArray] = []
    deisa.register_callback(lambda x: kept.append(x[-1].persist()), "x")
    with ranks(*(partial(site.send_rows, rank, 2, range(8)) for rank in range(2))):
        deisa.execute_callbacks()
    for timestep, array in enumerate(kept):
        assert array.t == timestep
        np.testing.assert_array_equal(array.compute(), values((8,), timestep))


def test_arrays_kept_alive_hold_the_simulation_up_and_are_named(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    deisa = site.deisa(warn_every_s=0.6)
    kept: list[DeisaArray] = []
    deisa.register_callback(lambda x: kept.append(x[-1]), "x")
    named = "arrays of earlier timesteps are kept alive: 'x' at 0"

    class DropWhenNamed(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if named in record.getMessage():
                kept.clear()

    logging.getLogger("deisa.ray").addHandler(dropper := DropWhenNamed())
    try:
        with ranks(partial(site.send_rows, 0, 1, range(4))):
            report = deisa.execute_callbacks()
    finally:
        logging.getLogger("deisa.ray").removeHandler(dropper)
    assert named in caplog.text
    assert report.timesteps == {"x": 4}


def test_an_array_can_be_used_after_the_run_while_it_is_alive(site: Site) -> None:
    deisa = site.deisa()
    kept: list[DeisaArray] = []
    deisa.register_callback(lambda x: kept.append(x[-1]), "x")
    with ranks(partial(site.send_rows, 0, 1, range(2))):
        deisa.execute_callbacks()
    assert kept[1].sum().compute() == values((4,), 1).sum()
    kept.clear()


# Runs.


def test_one_run_after_another_in_one_process(site: Site) -> None:
    for first in (0, 100, 200):
        deisa = site.deisa()
        seen = wholes(deisa)
        with ranks(*(partial(site.send_rows, rank, 2, range(first, first + 3)) for rank in range(2))):
            deisa.execute_callbacks()
        assert_fields(seen, (8,), list(range(first, first + 3)))


def test_two_sessions_side_by_side(site: Site) -> None:
    """In one process, the one that began first ending first."""
    import dask

    configured = dask.config.get("scheduler", None)
    other = Site(site.engine, Settings(session=f"{site.settings.session}-other"))
    seen: dict[str, list[float]] = {"first": [], "second": []}
    second_runs, first_ended = threading.Event(), threading.Event()
    first, second = site.deisa(), other.deisa()

    @first.register("x")
    def in_first(x: list[DeisaArray]) -> None:
        assert second_runs.wait(PATIENCE_S)
        seen["first"].append(x[-1].sum().compute())

    @second.register("x")
    def in_second(x: list[DeisaArray]) -> None:
        second_runs.set()
        assert first_ended.wait(PATIENCE_S)
        scheduler = dask.config.get("scheduler", None)
        assert scheduler is not None and scheduler is not configured
        seen["second"].append(x[-1].sum().compute())

    def run_first() -> None:
        first.execute_callbacks()
        first_ended.set()

    def run_second() -> None:
        assert second.execute_callbacks().callbacks_failed == 0

    analytics = Ranks([run_first])
    with ranks(
        partial(site.send_rows, 0, 1, range(3)),
        partial(other.send_rows, 0, 1, range(10, 13)),
    ):
        wait_until(lambda: dask.config.get("scheduler", None) is not configured, "the first session runs")
        run_second()
    analytics.check()
    other.close()
    assert seen["first"] == [values((4,), t).sum() for t in range(3)]
    assert seen["second"] == [values((4,), t).sum() for t in range(10, 13)]
    assert dask.config.get("scheduler", None) is configured


def test_a_run_without_a_single_timestep(site: Site) -> None:
    deisa = site.deisa()
    seen = wholes(deisa)
    with ranks(*(partial(site.send_rows, rank, 2, []) for rank in range(2))):
        report = deisa.execute_callbacks()
    assert seen == {}
    assert (report.timesteps, report.bytes_handed_over) == ({"x": 0}, {"x": 0})


def test_callbacks_are_executed_once(site: Site) -> None:
    deisa = site.deisa()
    wholes(deisa)
    with ranks(partial(site.send_rows, 0, 1, [0])):
        deisa.execute_callbacks()
    with pytest.raises(ClosedError, match="runs once; create a new Deisa"):
        deisa.execute_callbacks()
    with pytest.raises(ClosedError, match="create a new Deisa"):
        deisa.register_callback(lambda x: None, "x")


def test_a_run_needs_a_callback(site: Site) -> None:
    deisa = site.deisa()
    with pytest.raises(NoCallbacksError, match=r"call register_callback\(\) before execute_callbacks\(\)"):
        deisa.execute_callbacks()


def test_ranks_that_never_close(site: Site) -> None:
    """Their bridges close when nobody has them any more."""
    deisa = site.deisa()
    seen = wholes(deisa)

    def rank(number: int) -> None:
        bridge = site.bridge(number, 2, {"x": rows(number, 2)})
        for timestep in range(3):
            bridge.send("x", values((8,), timestep)[4 * number : 4 * number + 4], timestep)

    with ranks(partial(rank, 0), partial(rank, 1)):
        report = deisa.execute_callbacks()
    assert_fields(seen, (8,), [0, 1, 2])
    assert sum(stats.chunks for stats in report.bridges.values()) == 6


def test_a_bridge_is_closed_once_and_for_all(site: Site) -> None:
    def rank() -> None:
        bridge = site.bridge(0, 1, {"x": rows(0, 1)})
        bridge.send("x", values((4,), 0), 0)
        bridge.close()
        bridge.close(timestep=1)
        with pytest.raises(ClosedError, match="bridge 0 is closed"):
            bridge.send("x", values((4,), 1), 1)

    deisa = site.deisa()
    seen = wholes(deisa)
    with ranks(rank):
        deisa.execute_callbacks()
    assert_fields(seen, (4,), [0])


def test_a_socket_path_where_nothing_can_listen_is_refused(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_text("kept")
    with pytest.raises(ConfigurationError, match="is a file that is no socket, which stays as it is"):
        site.deisa(socket_path=str(path))
    assert path.read_text() == "kept"
    with pytest.raises(ConfigurationError, match="there is no folder"):
        site.deisa(socket_path=str(tmp_path / "folder" / "agent"))


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'ray' or 'local', got 'dask'"):
        Deisa(engine="dask")  # type: ignore[arg-type]


# What callbacks compute.


def test_what_dask_arrays_can_do(site: Site) -> None:
    """Reductions, slices across chunks, neighbourhoods, matrix products and differences in time."""
    import dask.array as da

    shape, boxes = (6, 8), grid_boxes((0, 3, 6), (0, 4, 8))

    def rank(number: int, position: tuple[int, ...], box: tuple[slice, ...]) -> None:
        described = {"global_shape": shape, "chunk_shape": (3, 4), "chunk_position": position, "dtype": float}
        with site.bridge(number, 4, {"x": described}) as bridge:
            for timestep in range(3):
                bridge.send("x", values(shape, timestep)[box], timestep)

    deisa = site.deisa()
    checked: list[int] = []

    @deisa.register(WindowSpec("x", 2))
    def check(x: list[DeisaArray]) -> None:
        now, whole = x[-1], values(shape, x[-1].t)
        assert math.isclose(now.dask.mean().compute(), whole.mean())
        np.testing.assert_allclose(now.std(axis=0).compute(), whole.std(axis=0))
        np.testing.assert_array_equal(now[2:5, 1:-1:2].compute(), whole[2:5, 1:-1:2])
        np.testing.assert_array_equal((now.dask.T @ now.dask).compute(), whole.T @ whole)
        blurred = da.map_overlap(lambda b: b + np.roll(b, 1, 0) + np.roll(b, -1, 0), now.dask, depth=1)
        np.testing.assert_array_equal(
            blurred.compute()[1:-1], (whole + np.roll(whole, 1, 0) + np.roll(whole, -1, 0))[1:-1]
        )
        rate = (now - x[0]).max().compute()
        assert rate == (1000.0 if len(x) == 2 else 0.0)
        checked.append(now.t)

    with ranks(*(partial(rank, number, *box) for number, box in enumerate(boxes.items()))):
        report = deisa.execute_callbacks()
    assert checked == [0, 1, 2], report
