"""The analytics steers a simulation, on both engines."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deisa.ray import Deisa, WindowSpec
from deisa.ray.errors import ClosedError, FeedbackTypeError, UnsupportedValueError
from tests.e2e.parties import Parties
from tests.e2e.simulation import Site, ranks, rows
from tests.support.patience import PATIENCE_S

SIZE = 2


def stop_at_the_same_timestep(site: Site, deisa: Deisa) -> list[int]:
    """Run ranks that stop when told; returns the timesteps at which they have."""
    stopped = [-1] * SIZE

    def simulate(rank: int) -> None:
        with site.bridge(rank, SIZE, {"x": rows(rank, SIZE)}) as bridge:
            for timestep in range(100):
                bridge.send("x", np.full(4, float(timestep)), timestep)
                if bridge.get("stop", timestep, default=False, wait=PATIENCE_S):
                    stopped[rank] = timestep
                    break

    with ranks(*(lambda rank=rank: simulate(rank) for rank in range(SIZE))):
        deisa.execute_callbacks()
    return stopped


def test_a_simulation_stops_when_told(site: Site) -> None:
    deisa = site.deisa()

    @deisa.register("x")
    def watch(x: Any) -> None:
        if x[-1].dask.mean().compute() >= 7:
            deisa.set("stop", True, timestep=x[-1].t)

    assert stop_at_the_same_timestep(site, deisa) == [7, 7]
    assert deisa.report is not None
    assert deisa.report.feedback.values == 1
    assert deisa.report.timesteps == {"x": 8}


def test_a_rank_that_waits_is_told_of_timesteps_that_no_window_takes(site: Site) -> None:
    deisa = site.deisa()
    answers: list[Any] = []

    @deisa.register(WindowSpec("x", every=4))
    def watch(x: Any) -> None:
        deisa.set("mean", float(x[-1].dask.mean().compute()), timestep=x[-1].t)

    def simulate() -> None:
        with site.bridge(0, 1, {"x": rows(0, 1)}) as bridge:
            for timestep in range(-2, 6):
                bridge.send("x", np.full(4, float(timestep)), timestep)
                answers.append(bridge.get("mean", timestep, default=None, wait=PATIENCE_S))

    with ranks(simulate):
        deisa.execute_callbacks()
    assert answers == [None, None, 0.0, None, None, None, 4.0, None]


def test_a_rank_that_waits_is_told_of_timesteps_that_no_callback_looks_at(site: Site) -> None:
    """The array of one of two callbacks is sent at every third timestep only."""
    deisa = site.deisa()
    answers: list[Any] = []

    @deisa.register("x")
    def every(x: Any) -> None:
        deisa.set("seen", x[-1].t, timestep=x[-1].t + 1)

    @deisa.register("y")
    def sometimes(y: Any) -> None:
        deisa.set("seen y", y[-1].t, timestep=y[-1].t)

    def simulate() -> None:
        with site.bridge(0, 1, {"x": rows(0, 1), "y": rows(0, 1)}) as bridge:
            for timestep in range(7):
                bridge.send("x", np.zeros(4), timestep)
                if timestep % 3 == 0:
                    bridge.send("y", np.zeros(4), timestep)
                bridge.advance(timestep + 1)
                keys = ("seen", "seen y")
                answers.append([bridge.get(key, timestep, wait=PATIENCE_S) for key in keys])

    with ranks(simulate):
        deisa.execute_callbacks()
    assert answers == [[t - 1 if t else None, t if t % 3 == 0 else None] for t in range(7)]


def relax(site: Site) -> tuple[list[np.ndarray], list[float]]:
    """A simulation whose rate the analytics changes by what it sees; returns its end, and the rates it had."""
    deisa = site.deisa()
    fields = [np.array([1.0, 2.0, 4.0, 8.0]) * (rank + 1) for rank in range(SIZE)]
    rates: list[float] = []
    deisa.set("rate", 0.5, timestep=0)

    @deisa.register("x")
    def choose(x: Any) -> None:
        deviation = float(x[-1].dask.std().compute())
        deisa.set("rate", 0.1 + deviation / 100, timestep=x[-1].t + 1)

    def simulate(rank: int) -> None:
        with site.bridge(rank, SIZE, {"x": rows(rank, SIZE)}) as bridge:
            for timestep in range(12):
                rate = bridge.get("rate", timestep, wait=PATIENCE_S)
                if rank == 0:
                    rates.append(rate)
                fields[rank] += rate * (fields[rank].mean() - fields[rank])
                bridge.send("x", fields[rank], timestep)

    with ranks(*(lambda rank=rank: simulate(rank) for rank in range(SIZE))):
        deisa.execute_callbacks()
    deisa.close()
    return fields, rates


def test_two_runs_are_identical(site: Site) -> None:
    fields, rates = relax(site)
    again, rates_again = relax(site)
    np.testing.assert_array_equal(fields, again)
    assert rates == rates_again
    assert len(set(rates)) == 12


def test_values_from_another_thread(site: Site) -> None:
    deisa = site.deisa()
    begun = threading.Event()
    answers: list[list[Any]] = [[] for _ in range(SIZE)]

    @deisa.register("x")
    def begin(x: Any) -> None:
        begun.set()

    def slide() -> None:
        begun.wait(PATIENCE_S)
        with suppress(ClosedError):  # the run may have ended by then
            for timestep in range(1, 40):
                deisa.set("feed", timestep / 100, timestep)

    def simulate(rank: int) -> None:
        with site.bridge(rank, SIZE, {"x": rows(rank, SIZE)}) as bridge:
            for timestep in range(40):
                bridge.send("x", np.zeros(4), timestep)
                answers[rank].append(bridge.get("feed", timestep, 0.0))

    slider = threading.Thread(target=slide)
    slider.start()
    with ranks(*(lambda rank=rank: simulate(rank) for rank in range(SIZE))):
        try:
            deisa.execute_callbacks()
        finally:
            slider.join(PATIENCE_S)
    assert answers[0] == answers[1]
    assert set(answers[0]) <= {timestep / 100 for timestep in range(40)}


def test_a_value_that_comes_too_late(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    deisa = site.deisa()

    @deisa.register("x")
    def late(x: Any) -> None:
        for _ in range(2):
            deisa.set("feed", 0.1, timestep=x[-1].t)

    def simulate() -> None:
        with site.bridge(0, 1, {"x": rows(0, 1)}) as bridge:
            for timestep in range(3):
                assert bridge.get("feed", timestep, 0.0) == 0.0
                bridge.send("x", np.zeros(4), timestep)

    with ranks(simulate):
        report = deisa.execute_callbacks()
    assert report.feedback.too_late == {"feed": 6}
    late_ones = [
        r for r in caplog.records if r.levelno == logging.WARNING and "comes too late" in r.getMessage()
    ]
    assert len(late_ones) == 1


def test_what_cannot_be_set(site: Site) -> None:
    deisa = site.deisa()
    with pytest.raises(FeedbackTypeError, match="timestep is an integer"):
        deisa.set("feed", 0.1, timestep=None)  # type: ignore[arg-type]
    with pytest.raises(
        UnsupportedValueError, match=r"set\('feed', timestep=1\): \['a'\]: object is not supported"
    ):
        deisa.set("feed", {"a": object()}, timestep=1)
    deisa.close()
    with pytest.raises(ClosedError, match="values can be set until the run has ended"):
        deisa.set("feed", 0.1, timestep=1)


@pytest.fixture
def parties(ray_cluster: str, tmp_path: Path, session_name: str) -> Iterator[Parties]:
    """The processes of one session; what is left is killed."""
    parties = Parties(tmp_path, session_name)
    yield parties
    parties.stop()


@pytest.mark.slow
@pytest.mark.ray
def test_another_analytics_finds_what_was_set(parties: Parties) -> None:
    first = parties.start("steering_analytics", "analytics", [], {})
    steered = [
        parties.start("steered_rank", f"rank-{rank}", [f"--rank={rank}", "--size=2", "--steps=150"], {})
        for rank in range(2)
    ]
    steered[0].reached("got 20: 20")
    first.kill()
    second = parties.start("steering_analytics", "analytics", [], {})
    for rank in steered:
        assert rank.ended() == "well"
        assert rank.numbers("got") == list(range(150))
        got = [line.split()[1:] for line in rank.lines() if line.startswith("got")]
        assert [(timestep, value) for timestep, value in got if timestep != f"{value}:"] == []
    assert second.ended() == "well"
