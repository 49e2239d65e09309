"""Physical times: one for each timestep of an array, whoever says it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from deisa.ray._state.arrivals import NodeArrivals
from deisa.ray._state.events import StepComplete, TimesDiffer
from deisa.ray._state.takeover import resume
from deisa.ray._state.timeline import CompleteStep, Subscription, Timeline
from deisa.ray._state.times import physical_time
from deisa.ray.errors import PhysicalTimeError, ProtocolError
from tests.unit.parts import number_counted


def arrivals_of(bridges: int) -> NodeArrivals:
    arrivals = NodeArrivals()
    for bridge in range(bridges):
        arrivals.join(bridge)
    parts = number_counted({bridge: {"a": 1} for bridge in range(bridges)}, {"a": None})
    arrivals.subscribe({"a": 2}, parts, ["c"])
    return arrivals


@pytest.mark.parametrize(
    "given", [0, -1, True, 0.5, np.float32(0.5), np.int64(3), np.array(2.5), Fraction(1, 4)]
)
def test_a_physical_time_is_any_finite_number(given: Any) -> None:
    time = physical_time(given, "")
    assert type(time) is float and time == given


@pytest.mark.parametrize(
    "given", [np.nan, np.inf, -np.inf, "0.5", b"1", [1, 2], 1j, 10**400, np.datetime64("now"), object()]
)
def test_other_times_are_refused(given: Any) -> None:
    with pytest.raises(PhysicalTimeError, match="bridge 3: a physical time is a finite number, got"):
        physical_time(given, "bridge 3")


def test_a_timestep_has_the_time_that_its_chunks_have() -> None:
    arrivals = arrivals_of(2)
    for timestep, time in ((0, 0.5), (1, None)):
        for bridge in range(2):
            arrivals.put(bridge, bridge, timestep, time)
        assert arrivals.take_events() == [StepComplete("a", timestep, timestep, time)]
    held = arrivals.held()
    assert held["a"].times == {0: 0.5}
    assert [event for _, event in resume({"x": held}).events][:2] == [
        StepComplete("a", 0, 0, 0.5),
        StepComplete("a", 1, 1),
    ]


@pytest.mark.parametrize(("one", "other"), [(0.5, 0.25), (0.5, None), (None, 0.5)])
def test_a_timestep_whose_times_differ_is_not_delivered(one: float | None, other: float | None) -> None:
    arrivals = arrivals_of(3)
    arrivals.put(1, 1, 4, one)
    arrivals.put(0, 0, 4, other)
    arrivals.put(2, 2, 4, one)
    differ = TimesDiffer("a", 4, (1, 0), (one, other))
    assert arrivals.take_events() == [differ]
    assert arrivals.held()["a"].held == {}
    assert arrivals.lasting_events == [differ]  # for an analytics that takes over
    arrivals.check()


@pytest.mark.parametrize("time", [np.inf, np.nan])
def test_a_rank_that_submits_a_time_which_is_none_is_refused(time: float) -> None:
    with pytest.raises(ProtocolError, match="bridge 0 sent region 0 with time"):
        arrivals_of(1).put(0, 0, 0, time)


def test_times_that_differ_between_nodes_name_the_bridges_of_both() -> None:
    timeline = Timeline({"a": {"x": (0, 4), "y": (1,)}}, [Subscription((("a", 1),), "AND")])
    timeline.step_complete("x", StepComplete("a", 0, 0, 0.5))
    assert timeline.step_complete("y", StepComplete("a", 0, 1, 0.5)) == CompleteStep(
        "a", 0, {"x": 0, "y": 1}, 0.5
    )
    timeline.step_complete("x", StepComplete("a", 1, 1, 1.5))
    said = "'a' at timestep 1: the physical time differs between bridges: bridges 0 and 4: time=1.5; bridge 1: none"
    with pytest.raises(PhysicalTimeError, match=said):
        timeline.step_complete("y", StepComplete("a", 1, 0))
