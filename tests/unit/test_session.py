"""What a session decides between the first bridge and the start, without any agent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from deisa.ray._session.predecessor import Predecessor
from deisa.ray._session.registration import Bridges
from deisa.ray._session.start import announce, count_slots, make_plan, plan_nodes
from deisa.ray._session.tiling import PlacedArray, place_stream
from deisa.ray._state.descriptions import describe_arrays
from deisa.ray._state.events import (
    AgentLost,
    BridgeClosed,
    BridgeJoined,
    BridgeLost,
    DtypeDeclared,
    Event,
    StepComplete,
    StepTorn,
)
from deisa.ray._state.journal import Handled
from deisa.ray._state.plan import SharedBox, StartPlan
from deisa.ray._state.stats import BridgeStats
from deisa.ray._state.streams import Part, whole
from deisa.ray._state.takeover import HeldArray, NodeSnapshot
from deisa.ray._state.timeline import Subscription
from deisa.ray.errors import (
    AgentLostError,
    BridgeIdError,
    BridgeLostError,
    WindowError,
    WorldSizeError,
)
from tests.unit.parts import start_plan

F8 = np.dtype("f8")


def joined(bridge_id: int, world_size: int = 4) -> BridgeJoined:
    """A bridge that owns two rows of `x`."""
    rows = {"chunk_shape": (2, 3), "global_shape": (8, 3), "offset": (2 * bridge_id, 0), "dtype": "f8"}
    arrays = describe_arrays({"x": rows})
    return BridgeJoined(bridge_id, world_size, arrays, pid=100 + bridge_id, host="h")


def four_bridges() -> Bridges:
    """Two on node `a`, two on node `b`."""
    bridges = Bridges("s")
    for bridge_id, node in enumerate("aabb"):
        bridges.register(node, joined(bridge_id))
    return bridges


def place(bridges: Bridges, merge_chunks_beyond: int, plan: StartPlan | None = None) -> PlacedArray:
    def cpus() -> Mapping[str, int]:
        return {"a": 1, "b": 1}

    layout = bridges.layouts()["x"]
    return place_stream(whole(layout), layout, (0, 1, 0, 1), bridges, plan, merge_chunks_beyond, cpus)


# Registration.


def test_who_is_missing() -> None:
    bridges = Bridges("s")
    assert bridges.waiting_for == "waiting for the first bridge of session 's'"
    for bridge_id in (3, 1):
        bridges.register("a", joined(bridge_id))
    assert not bridges.complete
    assert bridges.waiting_for == "waiting for bridges 0 and 2 of 4"
    for bridge_id in (2, 0):
        bridges.register("b", joined(bridge_id))
    assert bridges.complete
    assert bridges.nodes == {"a", "b"}
    assert bridges.layouts()["x"].shape == (8, 3)


@pytest.mark.parametrize(
    ("second", "error"),
    [(joined(0, 2), BridgeIdError), (joined(1, 3), WorldSizeError), (joined(2, 2), BridgeIdError)],
)
def test_a_bridge_that_does_not_fit(second: BridgeJoined, error: type[Exception]) -> None:
    bridges = Bridges("s")
    bridges.register("a", joined(0, 2))
    with pytest.raises(error, match=r"bridge 0 is pid 100 on host h and bridge \d is pid \d+ on host h"):
        bridges.register("b", second)


def test_a_bridge_that_leaves_before_the_start() -> None:
    bridges = four_bridges()
    with pytest.raises(BridgeLostError, match="bridge 2 left before the session started: killed"):
        bridges.register("b", BridgeLost(2, None, "killed"))


def test_another_bridge_may_come_for_one_of_a_run_that_never_started() -> None:
    bridges = Bridges("s", inherited={0})
    bridges.register("a", joined(0, 2))
    bridges.register("a", BridgeLost(0, None, "killed"))
    assert bridges.world_size is None
    bridges.register("b", joined(0, 1))
    assert bridges.complete
    assert bridges.node_of(0) == "b"
    with pytest.raises(BridgeLostError):
        bridges.register("b", BridgeLost(0, None, "killed"))


def test_an_agent_without_bridges_may_go() -> None:
    bridges = four_bridges()
    bridges.register("c", AgentLost("its process died"))
    with pytest.raises(AgentLostError, match="node b, with bridges 2 and 3, has gone: its process died"):
        bridges.register("b", AgentLost("its process died"))


# The start.


def test_the_largest_window_counts() -> None:
    subscriptions = [
        Subscription((("x", 3), ("y", 2)), "AND"),
        Subscription((("x", 1),), "AND"),
    ]
    counts = count_slots(subscriptions, 2, None)
    assert counts.windows == {"x": 3, "y": 2}
    assert counts.slots == {"x": 5, "y": 4}


def test_slots_that_are_there_already_must_suffice() -> None:
    plan = start_plan({"x": 3, "y": 2}, {}, ())
    assert count_slots([Subscription((("x", 2),), "AND")], 9, plan).slots == {"x": 3, "y": 2}
    with pytest.raises(WindowError, match=r"a window of 3 timesteps of array 'x'.* 3 slots .*have 2 at most"):
        count_slots([Subscription((("x", 3),), "AND")], 9, plan)
    with pytest.raises(WindowError, match="'z'"):
        count_slots([Subscription((("z", 1),), "AND")], 9, plan)


def test_few_chunks_have_memory_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    array = place(four_bridges(), merge_chunks_beyond=4)
    assert not array.is_merged
    assert array.owners() == {"a": (0, 1), "b": (2, 3)}
    nodes = plan_nodes({"x": array})
    assert not nodes["a"].boxes and not nodes["b"].boxes
    assert nodes["b"].parts["x"] == [Part(b, 0, b - 2, (0, 0), (1, 1), (2, 3)) for b in (2, 3)]
    streams = {"x": whole(array.layout)}
    assert make_plan({"x": array}, {"x": 2}) == StartPlan(streams, {"x": 2}, {"x": F8}, ("analytics",), {})
    announce({"x": array}, {"x": 2}, {"a": 0})
    assert (
        capsys.readouterr().err == "deisa-ray: array 'x' (8, 3), 192 B a timestep, 4 chunks, 2 slots each\n"
    )


def test_many_chunks_share_memory(capsys: pytest.CaptureFixture[str]) -> None:
    array = place(four_bridges(), merge_chunks_beyond=3)
    box = SharedBox((4, 3), ((0, (0, 0)), (1, (2, 0))))
    assert {node: here.boxes for node, here in plan_nodes({"x": array}).items()} == {
        "a": {"x": [box]},
        "b": {"x": [box]},
    }
    plan = make_plan({"x": array}, {"x": 2})
    assert plan.merged == {"x": array.tiling}
    announce({"x": array}, {"x": 2}, {"a": 4096, "b": 8192})
    said = capsys.readouterr().err
    assert "4 chunks merged into 2, 2 slots each" in said
    assert "8.0 KiB at most on one node, 2 nodes" in said
    assert place(four_bridges(), merge_chunks_beyond=9, plan=plan).tiling is array.tiling  # as it was decided


# Where another analytics was.


def snapshot(
    bridges: Sequence[int], *since: Event, held: Mapping[str, HeldArray] | None = None, started: bool = True
) -> NodeSnapshot:
    plan = start_plan({"x": 3}, {"x": F8}, ("analytics",)) if started else None
    return NodeSnapshot(
        "run:node", plan, tuple(joined(b) for b in bridges), dict(held or {}), since, (Handled(4),)
    )


def test_there_was_no_other_analytics() -> None:
    nothing = Predecessor()
    bridges = Bridges("s", nothing.waiting_bridges)
    nothing.register(bridges)
    assert (nothing.plan, nothing.handled, len(bridges)) == (None, (), 0)


def test_a_session_that_was_never_started_is_registered_anew() -> None:
    predecessor = Predecessor({"a": snapshot([0, 1], started=False)})
    bridges = Bridges("s")
    predecessor.register(bridges)
    assert predecessor.waiting_bridges == {0, 1}
    assert len(bridges) == 0


def test_a_session_that_was_started_has_its_bridges() -> None:
    predecessor = Predecessor({"a": snapshot([0, 1]), "b": snapshot([2, 3])})
    bridges = Bridges("s")
    predecessor.register(bridges)
    assert bridges.complete
    assert not predecessor.waiting_bridges
    assert predecessor.handled == (Handled(4),)


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ({"a": snapshot([0, 1])}, "bridges 2 and 3 of 4 went with their agents"),
        (
            {"a": snapshot([0, 1]), "b": snapshot([2, 3], started=False)},
            "it died while it started the session",
        ),
    ],
)
def test_a_session_that_cannot_go_on(nodes: Mapping[str, NodeSnapshot], why: str) -> None:
    with pytest.raises(AgentLostError, match=f"cannot go on: {why}"):
        Predecessor(nodes).register(Bridges("s"))


def test_what_was_lost_is_heard_after_what_is_complete() -> None:
    """Dtypes first, without which no array can be made; then steps, and only then losses, which end the run."""
    loss, torn = BridgeLost(0, 3, "killed"), StepTorn("x", 3, (1,))
    declared, closed = DtypeDeclared(1, "x", F8), BridgeClosed(1, BridgeStats())
    later = ("a", BridgeLost(1, 4, "killed"))
    node = snapshot([0, 1], loss, closed, torn, declared, held={"x": HeldArray({2: 0}, 2, -np.inf)})
    resumption = Predecessor({"a": node}, (later,)).resumption("s")
    told = [event for _, event in resumption.events]
    assert told == [declared, StepComplete("x", 2, 0), closed, loss, torn, later[1]]
