"""From a rank's chunk to the memory that tasks read, over a real socket in one process."""

from __future__ import annotations

import errno
import gc
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deisa.ray._handoff import _native
from deisa.ray._handoff._native import store
from deisa.ray._state.descriptions import describe_arrays
from deisa.ray._state.events import (
    AgentLost,
    BridgeClosed,
    BridgeJoined,
    BridgeLost,
    DtypeDeclared,
    OwnersPassed,
    SendersBlocked,
    StepComplete,
)
from deisa.ray._state.stats import BridgeStats
from deisa.ray._transport import memory, messages, reader
from deisa.ray._transport import store as chunk_store
from deisa.ray._transport.address import agent_address, check_same_user, shown
from deisa.ray._transport.exchange import Exchange
from deisa.ray._transport.reader import attach, probe
from deisa.ray._transport.server import AgentServer
from deisa.ray.bridge import Bridge
from deisa.ray.errors import (
    AnalyticsLostError,
    BridgeIdError,
    DescriptionError,
    HoleError,
    MemoryBoundError,
    NoAnalyticsError,
    PeerIdentityError,
    PhysicalTimeError,
    ProtocolError,
    SessionEndedError,
    SessionInUseError,
    TimestepError,
    WaitTimeoutError,
)
from tests.oracle.pages import NOTIFIED, SUBMITTED, RingWriter
from tests.support.patience import PATIENCE_S, wait_until
from tests.unit.agent import (
    CLIENTS,
    Agent,
    Client,
    descriptors,
    mappings,
    new_settings,
    running,
    settings_with,
    whole,
)

pytestmark = pytest.mark.usefixtures("client")


SESSION = f"unit-{os.getpid()}-hand-off"


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running(session=SESSION) as agent:
        yield agent


def raw(agent: Agent) -> socket.socket:
    """A peer that says what it likes."""
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    peer.settimeout(PATIENCE_S)
    peer.connect(agent_address(agent.settings))
    return peer


def answers(peer: socket.socket) -> list[messages.Message]:
    """Everything the agent says until it hangs up."""
    frames = messages.FrameBuffer()
    said = []
    while data := peer.recv(65536):
        said += frames.feed(data)
    return said


# Data.


def test_chunks_arrive_as_they_were_sent(agent: Agent) -> None:
    one, two = agent.bridges(
        {"a": {**whole((4, 3)), "chunk_shape": (1, 3)}},
        {"a": {**whole((4, 3)), "chunk_shape": (3, 3), "offset": (1, 0)}},
        slots={"a": 2},
    )
    for t in range(2):
        two.send("a", np.full((3, 3), 10.0 + t, float), t)
        one.send("a", np.full((1, 3), t, float), t)
        step = agent.wait(StepComplete)
        assert (step.array, step.timestep) == ("a", t)
        assert sorted(chunk.flat[0] for chunk in agent.chunks(step)) == [t, 10 + t]
        assert not any(chunk.flags.writeable for chunk in agent.chunks(step))


def test_a_timestep_has_the_physical_time_that_it_was_sent_with(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usual times take no other way than a `send` without one."""
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 2})
    monkeypatch.setattr(Bridge, "_send_unusual", None)
    for t, time_ in enumerate((None, 0.5, -3, np.float64(1e300))):
        bridge.send("a", np.full(4, float(t)), t, time=time_)
        step = agent.wait(StepComplete)
        assert (step.timestep, step.time) == (t, time_) and (time_ is None or type(step.time) is float)
        agent.release(("a", t))
    monkeypatch.undo()
    for time_ in (np.float32(0.5), np.array(2)):
        bridge.send("a", np.zeros(4), int(10 * time_), time=time_)
        assert agent.wait(StepComplete).time == time_
        agent.release(("a", int(10 * time_)))
    for wrong in (np.nan, np.inf, 10**400, "1"):
        with pytest.raises(
            PhysicalTimeError, match="bridge 0, array 'a', timestep 99: a physical time is a finite"
        ):
            bridge.send("a", np.zeros(4), 99, time=wrong)  # type: ignore[arg-type]
    assert bridge.stats.chunks == 6


def test_labels_arrive_as_they_were_described(agent: Agent) -> None:
    described = whole(
        (2, 3),
        dims=("y", "x"),
        coords={
            "x": ("x", [1, 2, 3], {"units": "m"}),
            "name": ("y", ["a", "é"]),
            "y": {"start": 0.5, "step": 2},
        },
        attrs={"units": "K", "nested": {"list": [1, None, True]}},
    )
    agent.open_bridge(0, 1, {"a": described, "none": []})
    assert agent.wait(BridgeJoined).arrays == describe_arrays({"a": described, "none": []})


def test_the_caller_may_overwrite_its_buffer(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    buffer = np.arange(4.0)
    bridge.send("a", buffer, 0)
    buffer[:] = -1
    np.testing.assert_array_equal(agent.chunks(agent.wait(StepComplete))[0], np.arange(4.0))


@pytest.mark.parametrize(
    "turn",
    [lambda x: x, lambda x: x[:], lambda x: x[::-1], lambda x: x.T, lambda x: x[:, ::-1]],
    ids=["itself", "a view", "backwards", "transposed", "rows backwards"],
)
def test_what_lies_in_the_slot_in_another_order(
    agent: Agent, turn: Callable[[np.ndarray], np.ndarray]
) -> None:
    (bridge,) = agent.bridges({"a": whole((3, 3))}, slots={"a": 2})
    values = np.arange(9.0).reshape(3, 3)
    slot = bridge.slot("a", 0)
    slot[...] = values
    bridge.send("a", turn(slot), 0)
    np.testing.assert_array_equal(agent.chunks(agent.wait(StepComplete))[0], turn(values))
    assert not slot.flags.writeable


def test_a_reason_that_is_no_text(agent: Agent) -> None:
    """Names of files need not be UTF-8."""
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    with pytest.raises(ValueError, match="no mesh in"), bridge:
        raise ValueError("no mesh in " + os.fsdecode(b"\xff.dat"))
    assert agent.wait(BridgeLost).reason == "ValueError: no mesh in ?.dat"


def test_a_bridge_that_cannot_say_its_end_lets_go_of_its_memory(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    bridge.slot("a", 0)
    agent.server.close(None)
    with pytest.raises(AnalyticsLostError):
        bridge.close()
    gc.collect()
    assert mappings(agent.settings.session) == 0
    assert "closed" in repr(bridge)


def test_no_client_is_there_before_it_is_open() -> None:
    with pytest.raises(TypeError, match="missing required argument"):
        _native.Client.__new__(_native.Client)


def test_a_creation_that_is_interrupted_ends_its_bridge(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("deisa.ray.bridge._OwnChunk", interrupted)
    opening = agent.open_bridge(0, 1, {"a": whole((4,))}, client=Bridge)
    agent.wait(BridgeJoined)
    agent.start({"a": 1})
    assert isinstance(opening.exception(PATIENCE_S), KeyboardInterrupt)
    agent.forget()
    del opening
    gc.collect()
    assert agent.wait(BridgeClosed)


def test_the_rank_may_go(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    bridge.send("a", np.arange(4.0), 0)
    bridge.close()
    step = agent.wait(StepComplete)
    assert agent.wait(BridgeClosed) == BridgeClosed(0, BridgeStats(1, 32, 0.0))
    np.testing.assert_array_equal(agent.chunks(step)[0], np.arange(4.0))
    agent.release(("a", 0))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: np.asfortranarray(x),
        lambda x: np.repeat(np.repeat(x, 2, 0), 3, 1)[::2, ::3],
        lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
        lambda x: np.ascontiguousarray(x.T).T,
        lambda x: np.pad(x, 2)[2:-2, 2:-2],
        lambda x: x.view(type("Sub", (np.ndarray,), {})),
        lambda x: x.tolist(),
    ],
    ids=["fortran", "strided", "backwards", "transposed", "inside ghosts", "subclass", "list"],
)
def test_any_strides(agent: Agent, make: Any) -> None:
    expected = np.arange(12.0).reshape(3, 4)
    (bridge,) = agent.bridges({"a": whole((3, 4))}, slots={"a": 1})
    bridge.send("a", make(expected), 0)
    np.testing.assert_array_equal(agent.chunks(agent.wait(StepComplete))[0], expected)


@pytest.mark.parametrize(
    "dtype",
    ["?", "i1", ">u2", "i4", "<u8", "f2", ">f4", "longdouble", "c8", ">c16", "M8[ns]", ">m8[s]", "S5", "<U3", "V6",
     [("x", "<f4"), ("n", ">i2", (2,))], np.dtype([("a", "i1"), ("b", "f8")], align=True)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "with the chunk"])
def test_every_fixed_size_dtype(agent: Agent, dtype: Any, declared: bool) -> None:
    dtype = np.dtype(dtype)
    raw_bytes = np.arange(6 * dtype.itemsize, dtype="u1") % 2
    sent = (
        raw_bytes.view(dtype).reshape(2, 3) if dtype.kind != "U" else np.array([["a", "bcd", ""]] * 2, dtype)
    )
    said = dtype if declared else None
    (bridge,) = agent.bridges({"a": whole((2, 3), dtype=said)}, slots={"a": 1}, a=said)
    bridge.send("a", sent, 0)
    (chunk,) = agent.chunks(agent.wait(StepComplete))
    assert chunk.dtype == dtype
    np.testing.assert_array_equal(chunk, sent)


def test_a_dtype_is_that_of_the_first_chunk(agent: Agent) -> None:
    said = [whole((8,), dtype=None) | {"chunk_shape": (4,), "offset": (4 * i,)} for i in range(2)]
    (bridge,) = agent.bridges({"a": said}, slots={"a": 1}, a=None)
    assert not agent.server._store.segments
    bridge.send("a", np.arange(4, dtype="i2"), 0, chunk_index=1)
    assert agent.wait(DtypeDeclared) == DtypeDeclared(0, "a", np.dtype("i2"))
    bridge.send("a", np.zeros(4, dtype="i2"), 0, chunk_index=0)
    zeros, numbers = agent.chunks(agent.wait(StepComplete))
    assert zeros.tolist() == [0] * 4
    assert numbers.tolist() == [0, 1, 2, 3]


def test_a_scalar(agent: Agent) -> None:
    (bridge,) = agent.bridges({"energy": whole(())}, slots={"energy": 1})
    bridge.send("energy", 2.5, 0)
    assert agent.chunks(agent.wait(StepComplete))[0] == 2.5


def test_an_array_that_nobody_asks_for_is_not_copied(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((2,)), "unwanted": whole((2**20,))}, slots={"a": 1})
    assert mappings(agent.settings.session) == 1 + 2 * 5  # the rank's slots, and five pages on either side
    assert agent.server._store.segments[0].nbytes == memory.PAGE_BYTES
    for t in range(100):
        bridge.send("unwanted", np.zeros(2**20), t)
    assert bridge.stats == BridgeStats(bytes_left_out=100 * 8 * 2**20)
    while agent.wait(OwnersPassed) != OwnersPassed("a", 99):
        pass
    bridge.send("a", np.zeros(2), 100)


def test_a_slot_is_handed_over_without_a_copy(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 2})
    for t in range(2):
        given = bridge.slot("a", t)
        assert given.flags.writeable
        given[:] = t
        assert bridge.slot("a", t) is given
        bridge.send("a", given, t)
        assert not given.flags.writeable
        (chunk,) = agent.chunks(agent.wait(StepComplete))
        assert chunk.tolist() == [t] * 4
        given.flags.writeable = True  # the same memory, as only the owner of the base could show
        given[0] = 99
        assert chunk[0] == 99


def test_a_chunk_has_one_slot_at_a_time(agent: Agent) -> None:
    """What was meant for one timestep and what is meant for the next one must not become one."""
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 2})
    first = bridge.slot("a", 0)
    first[:] = 1
    second = bridge.slot("a", 1)
    with pytest.raises(ValueError, match="read-only"):
        first[:] = 1
    second[:] = 2
    with pytest.raises(TimestepError):
        bridge.send("a", first, 0)
    assert bridge.slot("a", 1) is second
    bridge.send("a", second, 1)
    step = agent.wait(StepComplete)
    assert (step.timestep, agent.chunks(step)[0].tolist()) == (1, [2] * 4)


def test_a_slot_that_is_not_used_does_not_get_lost(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    given = bridge.slot("a", 0)
    bridge.send("a", np.full(4, 3.0, float), 0)
    assert agent.chunks(agent.wait(StepComplete))[0].tolist() == [3] * 4
    assert not given.flags.writeable
    agent.release(("a", 0))
    bridge.send("a", np.full(4, 4.0, float), 1)


def test_a_slot_of_an_unwanted_array_is_any_memory(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((2, 2), dtype="i2")}, slots={})
    given = bridge.slot("a", 0)
    assert (given.shape, given.dtype) == ((2, 2), np.dtype("i2"))
    bridge.send("a", given, 0)


# Back-pressure.


@pytest.mark.parametrize("slots", [1, 3])
def test_send_waits_when_every_slot_is_in_use(agent: Agent, slots: int) -> None:
    (bridge,) = agent.bridges({"a": whole((4,)), "b": whole((4,))}, slots={"a": slots, "b": 1})
    for t in range(slots):
        bridge.send("a", np.full(4, t, float), t)
        agent.wait(StepComplete)
    late = agent.in_thread(bridge.send, "a", np.full(4, 99.0, float), slots)
    assert agent.wait(SendersBlocked) == SendersBlocked("a", {0: slots})
    assert not late.done()
    agent.release(("a", 0))
    late.result(PATIENCE_S)
    assert agent.wait(StepComplete).timestep == slots
    assert bridge.stats.held_up_s > 0
    bridge.send("b", np.zeros(4), slots)  # each array has slots of its own


def test_slots_are_reused_for_ever(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 2})
    for t in range(50):
        bridge.send("a", np.full(4, t, float), t)
        step = agent.wait(StepComplete)
        assert agent.chunks(step)[0].tolist() == [t] * 4
        agent.release(("a", t))
    assert bridge.stats.held_up_s == 0


def test_a_chunk_that_is_being_read_is_not_overwritten(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 2})
    bridge.send("a", np.full(4, 7.0, float), 0)
    (kept,) = agent.chunks(agent.wait(StepComplete))
    for t in range(1, 20):
        bridge.send("a", np.full(4, t, float), t)
        agent.wait(StepComplete)
        agent.release(("a", t))
    assert kept.tolist() == [7] * 4


def test_waiting_for_a_slot_ends(agent: Agent, caplog: pytest.LogCaptureFixture) -> None:
    impatient = settings_with(agent, send_timeout_s=0.5, warn_every_s=0.01)
    opening = agent.open_bridge(0, 1, {"a": whole((4,)), "b": whole((4,))}, impatient)
    agent.wait(BridgeJoined)
    agent.start({"a": 1, "b": 1})
    bridge = opening.result(PATIENCE_S)
    bridge.send("a", np.zeros(4), 0)
    with (
        caplog.at_level(logging.WARNING, "deisa.ray.bridge"),
        pytest.raises(
            WaitTimeoutError,
            match=r"all 1 slots of array 'a' are in use: timestep 1 waits.*after 0\.5 s "
            r"\(DEISA_RAY_SEND_TIMEOUT_S sets",
        ),
    ):
        bridge.send("a", np.ones(4), 1)
    assert "all 1 slots of array 'a' are in use" in caplog.text
    bridge.send("b", np.ones(4), 1)  # nothing is lost
    agent.wait(StepComplete)
    agent.release(("a", 0))
    bridge.send("a", np.ones(4), 1)
    assert {agent.wait(StepComplete).array for _ in range(2)} == {"a", "b"}


def test_leases_of_several_consumers(agent: Agent) -> None:
    opening = agent.connect({"a": whole((4,))})
    agent.server.start(*agent.plan({"a": 1}, ("one", "two")))
    (bridge,) = [future.result(PATIENCE_S) for future in opening]
    bridge.send("a", np.zeros(4), 0)
    late = agent.in_thread(bridge.send, "a", np.ones(4), 1)
    agent.wait(SendersBlocked)
    agent.server.release("one", [("a", 0)])
    assert not late.done()
    agent.server.release("two", [("a", 0)])
    late.result(PATIENCE_S)


# Starting.


def test_two_sessions_side_by_side() -> None:
    with running() as left, running() as right:
        bridges = [agent.bridges({"a": whole((2,))}, slots={"a": 1})[0] for agent in (left, right)]
        for number, bridge in enumerate(bridges):
            bridge.send("a", np.full(2, number, float), number)
        for number, agent in enumerate((left, right)):
            step = agent.wait(StepComplete)
            assert step.timestep == number
            assert agent.chunks(step)[0].tolist() == [number] * 2


def test_one_session_after_the_other() -> None:
    settings = new_settings()
    for t in range(3):
        with running(settings) as agent:
            (bridge,) = agent.bridges({"a": whole((2,))}, slots={"a": 1})
            bridge.send("a", np.full(2, t, float), t)
            assert agent.chunks(agent.wait(StepComplete))[0].tolist() == [t] * 2


def test_no_analytics(client: Client) -> None:
    settings = new_settings(connect_timeout_s=0.03)
    with pytest.raises(NoAnalyticsError) as caught:
        client(bridge_id=0, arrays_metadata={}, system_metadata={"world_size": 1}, settings=settings)
    assert str(caught.value).startswith(
        f"no analytics on this host for session {settings.session!r}: is Ray running here and the analytics started? "
        f"(tried {shown(agent_address(settings))} for 0.03 s; DEISA_RAY_CONNECT_TIMEOUT_S sets how long)"
    )


def test_the_rank_may_come_first() -> None:
    settings = new_settings()
    opening: list[Future[Bridge]] = []
    with running() as other:
        opening.append(other.open_bridge(0, 1, {}, settings))
        with running(settings) as agent:
            agent.wait(BridgeJoined)
            agent.start({})
            opening[0].result(PATIENCE_S).close()
            agent.wait(BridgeClosed)


def test_nobody_starts_the_session(agent: Agent, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    agent.server.report_progress("waiting for bridge 7 of 8")
    with (
        caplog.at_level(logging.WARNING, "deisa.ray.bridge"),
        pytest.raises(WaitTimeoutError, match=r"waiting for bridge 7 of 8; gave up after 0\.5 s"),
    ):
        client(
            bridge_id=0,
            arrays_metadata={},
            system_metadata={"world_size": 8},
            settings=settings_with(agent, start_timeout_s=0.5, warn_every_s=0.01),
        )
    assert "waiting for bridge 7 of 8" in caplog.text
    agent.wait(BridgeJoined)
    assert agent.wait(BridgeLost) == BridgeLost(0, None, "its process ended without close()")


def test_an_error_of_the_layout_reaches_every_rank(agent: Agent) -> None:
    opening = agent.connect({"a": whole((2,))}, {"a": whole((2,))})
    agent.server.close(HoleError("array 'a': no chunk covers ..."))
    for future in opening:
        with pytest.raises(HoleError, match=r"no chunk covers \.\.\.$"):
            future.result(PATIENCE_S)


def test_an_id_that_is_taken(agent: Agent) -> None:
    opening = [agent.open_bridge(0, 1, {"a": whole((2,))}) for _ in range(2)]
    joined = [agent.wait(BridgeJoined) for _ in range(2)]
    assert [event.bridge_id for event in joined] == [0, 0]
    agent.start({"a": 1})
    outcomes = [future.exception(PATIENCE_S) for future in opening]
    assert {type(outcome) for outcome in outcomes} == {BridgeIdError, type(None)}
    for future in opening:
        if future.exception() is None:
            future.result().send("a", np.zeros(2), 0)
            future.result().close()
    assert agent.wait(StepComplete).timestep == 0


def test_a_bridge_that_comes_late(agent: Agent, client: Client) -> None:
    agent.bridges({"a": whole((2,))}, slots={"a": 1})
    line = agent.follow()
    with pytest.raises(BridgeIdError) as refused:
        client(bridge_id=0, arrays_metadata={}, system_metadata={"world_size": 2}, settings=agent.settings)
    line.close()
    text = str(refused.value)
    pid, host, session = os.getpid(), socket.gethostname(), agent.settings.session
    assert text.startswith(
        f"bridge 0 (pid {pid}) came after session '{session}' had started with all its bridges"
    )
    assert f"bridge 0 being pid {pid} on this host ({host})" in text
    assert (
        "is a second simulation using the same session name? Here two programs seem to share session" in text
    )
    assert "Bridge(session=...) and Deisa(session=...), or DEISA_RAY_SESSION), or end the other one" in text


def test_a_session_in_use(agent: Agent) -> None:
    line = agent.follow()
    with pytest.raises(SessionInUseError) as refused:
        AgentServer(agent.settings, "another run", "node")
    line.close()
    assert f"session '{agent.settings.session}' is in use on this host" in str(refused.value)
    assert "by another analytics, pid 1 on host h; end it, or choose another name" in str(refused.value)


def test_two_nodes_on_one_host_share_an_agent(agent: Agent) -> None:
    second = AgentServer(agent.settings, agent.run_id, "other node")
    assert agent.server.serving
    assert not second.serving
    second.close()
    assert probe(agent_address(agent.settings)).agent_id == f"{agent.run_id}:node"


@pytest.mark.parametrize("left_behind", [False, True])
def test_socket_path(tmp_path: Path, left_behind: bool) -> None:
    path = tmp_path / "agent.sock"
    if left_behind:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
            killed.bind(str(path))
        assert path.exists()
    with running(socket_path=str(path)) as agent:
        (bridge,) = agent.bridges({"a": whole((2,))}, slots={"a": 1})
        bridge.send("a", np.ones(2), 0)
        assert agent.chunks(agent.wait(StepComplete))[0].tolist() == [1, 1]
    assert not path.exists()


def test_the_bound_on_memory(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    agent.connect({"a": whole((1024, 1024)), "open": whole((4,), dtype=None)})
    plan = agent.plan({"a": 3, "open": 2}, open=None)
    assert agent.server.bound_bytes(*plan) == 3 * 8 * 2**20
    monkeypatch.setattr(memory, "available_bytes", lambda: 20 * 2**20)
    with pytest.raises(MemoryBoundError, match=r"needs 24\.0 MiB of chunk memory, but only 16\.0 MiB"):
        agent.server.bound_bytes(*plan)
    assert not agent.server._store.segments


def test_the_bound_on_memory_of_an_array_whose_dtype_comes_late(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bridge,) = agent.bridges({"a": whole((1024, 1024), dtype=None)}, slots={"a": 3}, a=None)
    monkeypatch.setattr(memory, "available_bytes", lambda: 20 * 2**20)
    with pytest.raises(MemoryBoundError, match="array 'a' of bridge 0 needs 24"):
        bridge.send("a", np.zeros((1024, 1024)), 0)
    assert agent.wait(BridgeLost).bridge_id == 0


# Ends.


def test_a_rank_that_dies_is_reported(agent: Agent) -> None:
    one, two = agent.bridges({"a": whole((4,))}, {"b": whole((4,))}, slots={"a": 2, "b": 2})
    with pytest.raises(ZeroDivisionError), one:
        one.send("a", np.zeros(4), 3)
        raise ZeroDivisionError
    assert agent.wait(BridgeLost) == BridgeLost(0, 3, "ZeroDivisionError")
    two.send("b", np.zeros(4), 3)
    assert agent.wait(StepComplete).array == "b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("é" * 3000, "ValueError: " + "é" * (messages.MAX_TEXT - 12)),
        ("x" + "\U0001f600" * 3000, "ValueError: x" + "\U0001f600" * (messages.MAX_TEXT - 13)),
        ("a file's name: \udcff", "ValueError: a file's name: ?"),
    ],
    ids=["long", "long, of four bytes each", "not for UTF-8"],
)
def test_a_rank_that_dies_may_say_anything(agent: Agent, text: str, said: str) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    with pytest.raises(ValueError), bridge:
        raise ValueError(text)
    assert agent.wait(BridgeLost).reason == said


def test_a_rank_that_closes_with_mail_unread_has_closed(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    for _ in range(20):
        agent.server.report_progress("x" * 50_000)  # more than the socket takes
    bridge.send("a", np.zeros(4), 0)
    bridge.close()
    assert agent.wait(BridgeClosed).bridge_id == 0
    assert not any(isinstance(event, BridgeLost) for event in agent.events())


@pytest.mark.parametrize("action", ["send", "unwanted", "slot", "waiting"])
def test_an_agent_that_ends_tells_its_ranks_why(agent: Agent, action: str) -> None:
    (bridge,) = agent.bridges({"a": whole((4,)), "unwanted": whole((4,))}, slots={"a": 1})
    bridge.send("a", np.zeros(4), 0)
    late: Future[Any] | None = None
    if action == "waiting":
        late = agent.in_thread(bridge.send, "a", np.zeros(4), 1)
        agent.wait(SendersBlocked)
    else:
        agent.wait(StepComplete)
        agent.release(("a", 0))
    agent.server.close(AnalyticsLostError("the analytics has ended: tired"))
    with pytest.raises(AnalyticsLostError, match=r"^the analytics has ended: tired$"):
        if late is not None:
            late.result(PATIENCE_S)
        elif action == "slot":
            bridge.slot("a", 1)
        else:
            bridge.send("a" if action == "send" else "unwanted", np.zeros(4), 1)
    with pytest.raises(AnalyticsLostError, match="tired"):
        bridge.send("a", np.zeros(4), 2)
    bridge.close()


@pytest.mark.parametrize(
    ("if_lost", "end"), [("", ""), ("memory is low", ", or memory is low")], ids=["alone", "with a hint"]
)
@pytest.mark.parametrize("wanted", [True, False], ids=["wanted", "unwanted"])
def test_an_agent_that_dies_is_noticed(if_lost: str, end: str, wanted: bool) -> None:
    """The engine knows what else may have happened: Ray ends processes where memory is low."""
    with running(if_lost=if_lost) as agent:
        (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1} if wanted else {})
        agent.server.close()
        gone = r"^the agent of session .* on this host has gone; the analytics has ended or died"
        with pytest.raises(AnalyticsLostError, match=f"{gone}{end}$"):
            bridge.send("a", np.zeros(4), 0)


def test_an_agent_without_its_analytics_ends_by_itself() -> None:
    with running(driver_timeout_s=0.01) as agent:
        assert agent.server.closed.wait(PATIENCE_S)
        assert isinstance(agent.server.poll(0)[-1], AgentLost)


def test_an_agent_that_is_being_asked_does_not_end() -> None:
    with running() as agent:
        asking = agent.in_thread(agent.wait, BridgeJoined)
        wait_until(lambda: agent.server._subscriber.presence._polls, "the agent is being asked")
        agent.server._node.driver_timeout_s = 0.01
        agent.server._node.look_over(time.monotonic())
        (opening,) = [agent.open_bridge(0, 1, {})]
        asking.result(PATIENCE_S)
        assert agent.server.closed.wait(PATIENCE_S)
        assert isinstance(opening.exception(PATIENCE_S), AnalyticsLostError)


def test_a_rank_that_cannot_join_waits_until_it_has_told_so(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the others wait for it, for much longer."""
    settings = new_settings()
    with ThreadPoolExecutor() as pool:
        opening = pool.submit(
            client,
            bridge_id=1,
            arrays_metadata={"a": {"chunk_shape": (4,)}},
            system_metadata={"world_size": 2},
            settings=settings,
        )
        why = "DescriptionError: array 'a': say where the chunk lies"
        wait_until(lambda: f"bridge 1 cannot join: {why}" in caplog.text, "the rank says that it waits")
        with running(settings) as agent:
            lost = agent.wait(BridgeLost)
            assert lost.bridge_id == 1 and lost.reason.startswith(why)
            assert isinstance(opening.exception(PATIENCE_S), DescriptionError)
    assert caplog.text.count("cannot join") == 1


@pytest.mark.parametrize("metadata", [None, {"a": {"chunk_shape": (4,)}}])
def test_a_rank_that_refuses_its_own_description_only_says_why(
    agent: Agent, client: Client, metadata: Any
) -> None:
    """If it joined first, the others could start with it, or miss its chunks."""
    opening = agent.open_bridge(1, 2, metadata)
    lost = agent.wait(object)  # whatever comes first
    assert isinstance(lost, BridgeLost) and lost.bridge_id == 1
    error = opening.exception(PATIENCE_S)
    assert isinstance(error, DescriptionError)
    assert lost.reason == f"{type(error).__name__}: {error}"


# Peers that do not behave.


def frame(code: int, fields: bytes) -> bytes:
    return struct.pack("<IH", 2 + len(fields), code) + fields


HELLO = messages.encode(messages.Hello(messages.PROTOCOL_VERSION, SESSION, 9, 10, (), ()))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "exceeds the limit"),
        (b"\x05\0\0\0hello", "no message"),
        (struct.pack("<I", 2**32 - 1), "exceeds the limit"),
        (messages.encode(messages.Notify()), "a Notify is out of place here"),
        (messages.encode(messages.DeclareDtype("a", np.dtype("f8"), ())), "a DeclareDtype is out of place"),
        (messages.encode(messages.Progress("hi")), "a Progress is out of place"),
        (frame(2, b"\1\0\0\0a\5\0\0\0(,)f8\0\0\0\0"), "malformed DeclareDtype"),
        (
            messages.encode(messages.Hello(99, SESSION, 0, 1, (), ())),
            f"speaks protocol version 99, this agent {messages.PROTOCOL_VERSION}",
        ),
        (messages.encode(messages.Attach(99, 0)), "speaks protocol version 99"),
    ],
    ids=["http", "garbage", "huge", "notify", "declare dtype", "progress", "dtype", "version", "reader"],
)
def test_a_peer_that_does_not_behave_disturbs_nobody(agent: Agent, said: bytes, message: str) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 2})
    with raw(agent) as peer:
        peer.sendall(said)
        (fail,) = answers(peer)
    assert isinstance(fail, messages.Fail)
    assert message in fail.text
    bridge.send("a", np.ones(4), 0)
    assert agent.wait(StepComplete).timestep == 0
    assert agent.events() == []


def test_a_peer_that_says_half_a_message_and_leaves(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 2})
    with raw(agent) as peer:
        peer.sendall(HELLO[:7])
    bridge.send("a", np.ones(4), 0)
    assert agent.wait(StepComplete).timestep == 0


@pytest.mark.parametrize(
    "foul",
    [
        messages.DeclareDtype("a", np.dtype("f8"), ()),
        messages.DeclareDtype("no such array", np.dtype("f8"), ()),
        messages.AnalyticsUp(),
        messages.Hello(messages.PROTOCOL_VERSION, SESSION, 0, 2, (), ()),
    ],
    ids=lambda message: repr(message).replace(SESSION, ""),
)
def test_a_bridge_that_breaks_the_protocol_is_lost_and_the_others_go_on(
    agent: Agent, foul: messages.Message
) -> None:
    bad, good = open_one_after_the_other(agent, {"a": whole((4,))}, {"b": whole((4,))})
    bad._channel._send(foul)
    lost = agent.wait(BridgeLost)
    assert lost.bridge_id == 0
    with pytest.raises(ProtocolError):
        bad.send("a", np.zeros(4), 0)
    good.send("b", np.zeros(4), 0)
    assert agent.wait(StepComplete).array == "b"
    good.close()


def open_one_after_the_other(agent: Agent, *said: dict[str, Any]) -> list[Bridge]:
    """So that the numbers of the regions are known; the first bridge is the oracle, which can break the rules."""
    opening = []
    for number, metadata in enumerate(said):
        opening.append(
            agent.open_bridge(number, len(said), metadata, client=None if number else CLIENTS["oracle"])
        )
        agent.wait(BridgeJoined)
    agent.start({"a": 2, "b": 2})
    return [future.result(PATIENCE_S) for future in opening]


def submit_foreign_region(ring: RingWriter) -> None:
    ring.submit([2], 0)


def submit_what_nobody_asks_for(ring: RingWriter) -> None:
    ring.submit([1], 0)


def submit_unknown_region(ring: RingWriter) -> None:
    ring.submit([77], 0)


def submit_too_much(ring: RingWriter) -> None:
    for timestep in range(3):
        ring.submit([0], timestep)


def submit_twice(ring: RingWriter) -> None:
    for _ in range(2):
        ring.submit([0], 0)


def submit_older(ring: RingWriter) -> None:
    for timestep in (1, 0):
        ring.submit([0], timestep)


def take_back(ring: RingWriter) -> None:
    store(ring._words, SUBMITTED, -1)


def block_foreign_region(ring: RingWriter) -> None:
    ring.block(2)


def block_what_nobody_asks_for(ring: RingWriter) -> None:
    ring.block(1)


def block_unknown_region(ring: RingWriter) -> None:
    ring.block(77)


@pytest.mark.parametrize(
    "foul",
    [
        submit_foreign_region,
        submit_what_nobody_asks_for,
        submit_unknown_region,
        submit_too_much,
        submit_twice,
        submit_older,
        take_back,
        block_foreign_region,
        block_what_nobody_asks_for,
        block_unknown_region,
    ],
)
def test_a_bridge_that_spoils_its_ring_is_lost_and_the_others_go_on(
    agent: Agent, foul: Callable[[RingWriter], None]
) -> None:
    bad, good = open_one_after_the_other(
        agent, {"a": whole((4,)), "unwanted": whole((4,))}, {"b": whole((4,))}
    )
    foul(bad._channel.ring)
    assert agent.wait(BridgeLost).bridge_id == 0
    with pytest.raises(ProtocolError):
        bad.advance(9)
    good.send("b", np.zeros(4), 0)
    while agent.wait(StepComplete).array != "b":
        pass


@pytest.mark.parametrize("word", [0, -5, 2**62, -(2**63), 2**63 - 1])
def test_spoilt_counters_delay_and_lose_nothing(agent: Agent, word: int) -> None:
    said = [{"a": whole((2,)) | {"chunk_shape": (1,), "offset": (i,)}} for i in range(2)]
    one, two = open_one_after_the_other(agent, *said)
    counters = one._channel._counters
    for timestep in range(6):
        one.send("a", [1.0], timestep)
        for at in range(NOTIFIED, len(counters)):
            store(counters, at, word)
        two.send("a", [2.0], timestep)
        assert agent.wait(StepComplete).timestep == timestep
        agent.release(("a", timestep))


def test_chunks_may_overtake_the_messages_before_them(agent: Agent) -> None:
    """A ring is read as a whole: also what was handed over after the message that is being handled."""
    said = [{"a": whole((2,)) | {"chunk_shape": (1,), "offset": (i,)}} for i in range(2)]
    bridges = agent.bridges(*said, slots={"a": 3})
    with agent.server._lock:  # it handles nothing meanwhile
        for bridge in bridges:
            for timestep in range(3):
                slot = bridge.slot("a", timestep)  # says that it has advanced
                slot[...] = timestep
                bridge.send("a", slot, timestep)
    assert [agent.wait(StepComplete).timestep for _ in range(3)] == [0, 1, 2]
    assert not [event for event in agent.events() if isinstance(event, BridgeLost)]


def test_what_a_rank_handed_over_before_it_died_counts(agent: Agent) -> None:
    said = [{"a": whole((2,)) | {"chunk_shape": (1,), "offset": (i,)}} for i in range(2)]
    dying, other = agent.bridges(*said, slots={"a": 2})
    with agent.server._lock:  # it sees the chunk and the end of the connection at once
        dying.send("a", np.zeros(1), 7)
        dying.lose("")
    lost = agent.wait(BridgeLost)
    assert (lost.bridge_id, lost.last_timestep) == (dying.bridge_id, 7)
    other.send("a", np.ones(1), 7)
    assert sorted(float(chunk[0]) for chunk in agent.chunks(agent.wait(StepComplete))) == [0, 1]


def have_all_handled(agent: Agent) -> None:
    """Return when the agent has handled every message that was sent to it before."""
    probe(agent_address(agent.settings))  # it is served after all that came before


def test_only_the_last_rank_of_a_node_wakes_the_agent(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[messages.Message] = []
    handle = Exchange._handle

    def noting(exchange: Exchange, connection: Any, message: messages.Message) -> None:
        if not isinstance(message, messages.Attach):  # of `have_all_handled`
            woken.append(message)
        handle(exchange, connection, message)

    said = [{"a": whole((3,)) | {"chunk_shape": (1,), "offset": (i,)}} for i in range(3)]
    bridges = agent.bridges(*said, slots={"a": 3})
    monkeypatch.setattr(Exchange, "_handle", noting)
    for timestep, order in enumerate([(0, 1, 2), (1, 0, 2), (2, 1, 0)]):
        *others, last = order
        for number in others:
            bridges[number].send("a", np.zeros(1), timestep)
        have_all_handled(agent)
        assert woken == [messages.Notify()] * timestep
        bridges[last].send("a", np.zeros(1), timestep)
        have_all_handled(agent)
        assert woken == [messages.Notify()] * (timestep + 1)
        assert agent.wait(StepComplete).timestep == timestep


def test_only_the_same_user_may_talk(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert check_same_user(ours) > 0
        uid = os.getuid()
        monkeypatch.setattr("deisa.ray._transport.address.os.getuid", lambda: uid + 1)
        with pytest.raises(PeerIdentityError, match=f"belongs to user id {uid}, this one to {uid + 1}"):
            check_same_user(ours)


# Readers.


def test_a_process_maps_an_agent_once(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,)), "b": whole((4,))}, slots={"a": 1, "b": 1})
    address, agent_id = agent_address(agent.settings), agent.server.agent_id
    assert attach(address, agent_id, 0) is attach(address, agent_id, 1)
    bridge.close()


def test_a_process_maps_what_comes_late_and_nothing_twice(agent: Agent) -> None:
    (bridge,) = agent.bridges(
        {"a": whole((4,)), "late": whole((4,), dtype=None), "later": whole((4,), dtype=None)},
        slots={"a": 1, "late": 1, "later": 1},
        late=None,
        later=None,
    )
    address, agent_id = agent_address(agent.settings), agent.server.agent_id
    before = mappings(agent.settings.session)
    memory = attach(address, agent_id, agent.regions["a"][0])
    for number, name in enumerate(("late", "later"), start=1):
        bridge.send(name, np.full(4, float(number)), number)
        step = agent.wait(StepComplete)
        assert agent.chunks(step)[0].tolist() == [number] * 4
        assert attach(address, agent_id, agent.regions[name][0]) is memory
    assert (
        mappings(agent.settings.session) == before + 3 + 2
    )  # the reader's three, and the rank's two late ones


def test_a_reader_that_comes_late_is_told(agent: Agent) -> None:
    settings, agent_id = agent.settings, agent.server.agent_id
    with pytest.raises(SessionEndedError, match="replaced by another one; compute or persist"):
        attach(agent_address(settings), "another run:node", 0)
    agent.close()
    with pytest.raises(SessionEndedError, match="is not on this host or is gone: chunks can be read while"):
        attach(agent_address(settings), agent_id, 0)


def test_a_region_that_is_not_there(agent: Agent) -> None:
    agent.bridges({"a": whole((4,))}, slots={"a": 1})
    known = attach(agent_address(agent.settings), agent.server.agent_id, 0)
    assert not known.has(99)
    with pytest.raises(SessionEndedError, match="region 99 is not in the memory of agent"):
        known.chunk(99, 0)


def test_more_segments_than_go_into_one_message(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_store, "DESCRIPTORS_PER_MESSAGE", 2)
    said = [{"a": whole((5,)) | {"chunk_shape": (1,), "offset": (i,)}} for i in range(5)]
    for number, bridge in enumerate(agent.bridges(*said, slots={"a": 1})):
        bridge.send("a", [float(number)], 0)
    assert sorted(float(chunk[0]) for chunk in agent.chunks(agent.wait(StepComplete))) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ETOOMANYREFS])
def test_a_message_that_cannot_be_sent_at_once_is_not_lost(
    agent: Agent, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has no room for so many descriptors under way; nobody does anything until it has."""
    (opening,) = agent.connect({"a": whole((4,))})
    failures = iter([OSError(number, os.strerror(number))] * 3)
    send = socket.send_fds

    def send_fds(*arguments: Any) -> int:
        for failure in failures:
            raise failure
        return send(*arguments)

    monkeypatch.setattr(socket, "send_fds", send_fds)
    agent.start({"a": 1})
    bridge = opening.result(PATIENCE_S)
    assert next(failures, None) is None
    bridge.send("a", np.zeros(4), 0)
    assert agent.wait(StepComplete).timestep == 0


def test_a_dtype_is_told_once_though_the_answer_is_late(agent: Agent) -> None:
    impatient = settings_with(agent, start_timeout_s=2)
    opening = agent.open_bridge(0, 1, {"a": whole((4,), dtype=None)}, impatient)
    agent.wait(BridgeJoined)
    agent.start({"a": 1}, a=None)
    bridge = opening.result(PATIENCE_S)
    with (
        agent.server._lock,  # it cannot answer
        pytest.raises(WaitTimeoutError, match="waiting for the memory of array 'a'"),
    ):
        bridge.send("a", np.ones(4), 0)
    bridge.send("a", np.ones(4), 0)
    assert agent.chunks(agent.wait(StepComplete))[0].tolist() == [1.0] * 4
    bridge.close()
    assert agent.wait(BridgeClosed)


def test_nothing_is_left_open() -> None:
    with running():
        pass
    gc.collect()
    before = descriptors()
    with running() as agent:
        one, two = agent.bridges(
            {"a": whole((8,)) | {"chunk_shape": (4,)}},
            {"a": whole((8,)) | {"chunk_shape": (4,), "offset": (4,)}, "open": whole((4,), dtype=None)},
            slots={"a": 2, "open": 1},
            open=None,
        )
        for bridge in (one, two):
            bridge.send("a", np.zeros(4), 0)
        two.send("open", np.zeros(4), 0)
        steps = [agent.wait(StepComplete) for _ in range(2)]
        chunks = [agent.chunks(step) for step in steps]
        assert mappings(agent.settings.session) > 0
        with raw(agent) as peer:
            peer.sendall(b"garbage that is long enough")
            answers(peer)
        one.close()
        two.lose("")
        agent.wait(BridgeLost)
        del chunks
    assert agent.server.agent_id not in reader._attached
    del agent, one, two, bridge
    gc.collect()
    assert descriptors() == before


def test_no_mapping_is_left() -> None:
    with running() as agent:
        (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 2})
        bridge.send("a", np.zeros(4), 0)
        (chunk,) = agent.chunks(agent.wait(StepComplete))
        session = agent.settings.session
        assert mappings(session) == 2 + 2 * 5  # slots: the rank's and the reader's; five pages on either side
        bridge.close()
        agent.wait(BridgeClosed)
        gc.collect()
        assert mappings(session) == 1 + 5
    gc.collect()
    assert mappings(session) == 1
    assert chunk.tolist() == [0] * 4  # memory in use stays until it is dropped
    del chunk
    gc.collect()
    assert mappings(session) == 0
