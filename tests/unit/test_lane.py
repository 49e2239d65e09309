"""The compiled short cut of `Bridge.send`: what it takes, what it leaves to the rest, and what it is made of."""

from __future__ import annotations

import gc
import socket
import threading
from collections.abc import Iterator
from typing import Any

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._state.events import StepComplete
from deisa.ray._transport import client
from deisa.ray._transport.client import Account
from deisa.ray.bridge import Bridge
from deisa.ray.errors import ChunkIndexError
from tests.conftest import skip_or_fail
from tests.support.patience import PATIENCE_S
from tests.unit.agent import Agent, running, whole

LARGE = 256 * 1024 // 8 + 1  # elements of more than a lane copies


@pytest.fixture
def agent() -> Iterator[Agent]:
    if client.Lane is None:
        skip_or_fail("deisa.ray was installed without a C compiler")
    with running() as agent:
        yield agent


def lane_of(bridge: Bridge, array: str) -> client.Lane:
    outlet = bridge._own[array][0].outlet
    assert outlet is not None and outlet.lane is not None
    return outlet.lane


class Sub(np.ndarray):
    pass


@pytest.mark.parametrize(
    "chunk",
    [
        np.zeros((3, 2)).T,
        np.zeros((4, 3))[::2],
        np.zeros((3, 2)),
        np.zeros((2, 3), "f4"),
        np.zeros((2, 3), ">f8"),
        np.zeros((1, 2, 3)),
        np.zeros((2, 3)).view(Sub),
        [[0.0] * 3] * 2,
        None,
    ],
    ids=["transposed", "strided", "shape", "dtype", "byte order", "dimensions", "subclass", "list", "None"],
)
def test_an_unusual_chunk_is_left_to_the_rest(agent: Agent, chunk: Any) -> None:
    (bridge,) = agent.bridges({"a": whole((2, 3))}, slots={"a": 2})
    before = bridge._account.tolist()
    assert lane_of(bridge, "a").send(chunk, 0) is False
    assert bridge._account.tolist() == before
    assert bridge._channel.outbox.words[0] == 0


@pytest.mark.parametrize("timestep", [True, 1.0, None, "1", np.int64(1), 2**63, -(2**63), 4], ids=repr)
def test_an_unusual_timestep_is_left_to_the_rest(agent: Agent, timestep: Any) -> None:
    (bridge,) = agent.bridges({"a": whole((2,))}, slots={"a": 2})
    lane = lane_of(bridge, "a")
    assert lane.send(np.zeros(2), 5)
    assert lane.send(np.zeros(2), 5) is False  # twice
    assert lane.send(np.zeros(2), timestep) is False
    assert bridge.stats.chunks == 1


def test_a_lane_that_has_no_slot_does_not_wait(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((2,))}, slots={"a": 1})
    lane = lane_of(bridge, "a")
    assert lane.send(np.zeros(2), 0)
    assert lane.send(np.zeros(2), 1) is False
    agent.wait(StepComplete)
    agent.release(("a", 0))
    assert lane.send(np.ones(2), 1)
    assert agent.chunks(agent.wait(StepComplete))[0].tolist() == [1, 1]


def test_lanes_keep_out_while_a_thread_is_in_the_rest(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((2,))}, slots={"a": 2})
    with bridge._exclusively():
        assert lane_of(bridge, "a").send(np.zeros(2), 0) is False
    assert lane_of(bridge, "a").send(np.zeros(2), 0)
    lane = lane_of(bridge, "a")
    bridge.close()
    assert lane.send(np.zeros(2), 1) is False


def test_both_ways_keep_one_account(agent: Agent) -> None:
    """Timesteps may go by the lane and past it, in any order."""
    steps = 12
    (bridge,) = agent.bridges({"a": whole((4,)), "large": whole((LARGE,))}, slots={"a": 2, "large": 2})
    for timestep in range(steps):
        values = np.full(4, timestep, dtype=float)
        bridge.send("a", values if timestep % 3 else values.tolist(), timestep)
        bridge.send("large", np.full(LARGE, -1.0 * timestep), timestep)
        for _ in range(2):
            step = agent.wait(StepComplete)
            assert step.timestep == timestep
            (chunk,) = agent.chunks(step)
            assert np.all(chunk == (timestep if step.array == "a" else -timestep))
            agent.release((step.array, timestep))
    assert bridge.stats.chunks == 2 * steps
    assert bridge.stats.bytes_handed_over == steps * 8 * (4 + LARGE)


def test_lanes_of_several_chunks(agent: Agent) -> None:
    halves = [whole((4,)) | {"chunk_shape": (2,), "offset": (2 * i,)} for i in range(2)]
    (bridge,) = agent.bridges({"a": halves}, slots={"a": 2})
    for timestep in range(6):
        for index in (timestep % 2, (timestep + 1) % 2):
            values = np.full(2, 10.0 * timestep + index)
            bridge.send("a", values if timestep % 3 else values.tolist(), timestep, chunk_index=index)
        step = agent.wait(StepComplete)
        found = sorted(float(chunk[0]) for chunk in agent.chunks(step))
        assert (step.timestep, found) == (timestep, [10.0 * timestep, 10.0 * timestep + 1])
        agent.release(("a", timestep))
    with pytest.raises(ChunkIndexError):
        bridge.send("a", np.zeros(2), 6)


@given(npst.array_shapes(min_dims=0, max_dims=4, max_side=4), st.data())
def test_a_lane_copies_into_any_part_of_a_box(shape: tuple[int, ...], data: st.DataObject) -> None:
    """A slot may lie anywhere in a larger box; what lies around it is left alone."""
    assert client.Lane is not None
    margins = [data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2))) for _ in shape]
    box = np.full([before + n + after for n, (before, after) in zip(shape, margins, strict=True)], -1)
    part = tuple(slice(before, before + n) for n, (before, _) in zip(shape, margins, strict=True))
    slot = box[part] if shape else box
    chunk = np.arange(slot.size).reshape(shape)
    expected = box.copy()
    expected[part if shape else ()] = chunk
    account = Account([1])
    account.words[Account.OPEN] = 1
    board = memoryview(bytearray(24)).cast("q")
    board[0] = 1
    ours, theirs = socket.socketpair()
    with ours, theirs:
        lane = client.Lane(
            **places(account=account.words, board=board, memory=(slot, slot), fd=ours.fileno())
        )
        assert lane.send(chunk, 0)
        assert theirs.recv(100) == b"look"
    np.testing.assert_array_equal(box, expected)


def test_threads_that_send_different_arrays(agent: Agent) -> None:
    names = [f"a{i}" for i in range(4)]
    (bridge,) = agent.bridges({name: whole((8,)) for name in names}, slots=dict.fromkeys(names, 50))
    together = threading.Barrier(len(names))

    def send(number: int, name: str) -> None:
        for timestep in range(50):
            together.wait(PATIENCE_S)
            chunk = np.full(8, 100.0 * number + timestep)
            bridge.send(name, chunk if (timestep + number) % 4 else chunk.tolist(), timestep)

    threads = [threading.Thread(target=send, args=pair) for pair in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen: dict[str, list[int]] = {name: [] for name in names}
    for _ in range(50 * len(names)):
        step = agent.wait(StepComplete)
        seen[step.array].append(step.timestep)
        (chunk,) = agent.chunks(step)
        assert chunk.tolist() == [100.0 * names.index(step.array) + step.timestep] * 8
    assert all(timesteps == list(range(50)) for timesteps in seen.values())


def places(**change: Any) -> dict[str, Any]:
    """What a lane of one rank with two slots is made of."""
    fitting = {
        "account": Account([1]).words,
        "at": Account.FIRST_ARRAY + 1,
        "within": Account.FIRST_ARRAY,
        "chunks": 1,
        "board": memoryview(bytes(24)).cast("q"),
        "row": 0,
        "slots": 2,
        "outbox": memoryview(bytearray(40)).cast("q"),
        "capacity": 2,
        "region": 0,
        "tally": memoryview(bytearray(8)).cast("q"),
        "first": 0,
        "bridges": 1,
        "own": 0,
        "memory": (np.zeros(2), np.zeros(2)),
        "fd": -1,
        "look": b"look",
    }
    return fitting | change


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"at": 0}, ValueError),
        ({"row": 1}, ValueError),
        ({"slots": 0}, ValueError),
        ({"slots": 3}, ValueError),
        ({"capacity": 3}, ValueError),
        ({"bridges": 2}, ValueError),
        ({"own": 1}, ValueError),
        ({"outbox": bytes(40)}, BufferError),
        ({"within": 3}, ValueError),
        ({"within": 6}, ValueError),
        ({"chunks": 0}, ValueError),
        ({"memory": [np.zeros(2)] * 2}, TypeError),
        ({"memory": (b"12345678",) * 2}, TypeError),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_lane_made_of_nonsense_is_refused(
    agent: Agent, change: dict[str, Any], error: type[Exception]
) -> None:
    assert client.Lane is not None
    client.Lane(**places())
    with pytest.raises(error):
        client.Lane(**places(**change))


def test_a_lane_lets_go_of_all_it_holds(agent: Agent) -> None:
    assert client.Lane is not None
    outbox = bytearray(40)
    lane = client.Lane(**places(outbox=memoryview(outbox).cast("q")))
    lane.lent = np.zeros(2)
    with pytest.raises(BufferError):
        outbox.append(0)
    del lane
    gc.collect()
    outbox.append(0)
