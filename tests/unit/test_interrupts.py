"""Ctrl-C at any line of a hand-over leaves a chunk that has been handed over, or one that has not."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import numpy as np
import pytest

from deisa.ray import bridge as native
from deisa.ray._state.events import (
    BridgeClosed,
    BridgeJoined,
    BridgeLost,
    OwnersPassed,
    SendersBlocked,
    StepComplete,
)
from deisa.ray.errors import ClosedError, DuplicateChunkError
from tests.oracle import client as oracle
from tests.oracle import pages, writer
from tests.support.patience import PATIENCE_S
from tests.unit.agent import Agent, Client, running, whole

# Not where the oracle takes its lock: a trace function is called between bytecodes where no signal's handler is.
FILES = {native.__file__, oracle.__file__, pages.__file__, writer.__file__}

pytestmark = pytest.mark.usefixtures("client")


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running() as agent:
        yield agent


def interrupted(act: Callable[[], Any], line: int) -> bool:
    """Whether `KeyboardInterrupt` came at the line-th line that `act` runs of a client's Python code."""
    left = line

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in FILES:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("given", [False, True], ids=["copied", "in a slot"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_an_interrupt_at_any_line_of_a_hand_over(
    agent: Agent, client: Client, chunks: int, given: bool
) -> None:
    parts = [
        whole((4,)) | {"chunk_shape": (4 // chunks,), "offset": (i * 4 // chunks,)} for i in range(chunks)
    ]
    (bridge,) = agent.bridges({"a": parts}, slots={"a": 2})
    retried = duplicates = 0

    def send(index: int) -> None:
        chunk = np.full(4 // chunks, 10.0 * line + index)
        if given:
            slot = bridge.slot("a", line, chunk_index=index)
            slot[...] = chunk
            chunk = slot
        bridge.send("a", chunk, line, chunk_index=index)

    for line in range(1000):
        at_line = interrupted(lambda: send(chunks - 1), line)
        if at_line:
            try:
                send(chunks - 1)
                retried += 1
            except DuplicateChunkError:
                duplicates += 1
        for index in range(chunks - 1):
            send(index)
        step = agent.wait(StepComplete)
        assert step.timestep == line
        assert [chunk[0] for chunk in agent.chunks(step)] == [10.0 * line + index for index in range(chunks)]
        assert bridge.stats.chunks == chunks * (line + 1)
        assert bridge.stats.bytes_handed_over == 32 * (line + 1)
        agent.release(("a", line))
        if not at_line:
            break
    assert retried
    if client is not native.Bridge:  # where one call does it all, which nothing interrupts
        assert duplicates
    bridge.close()
    assert agent.wait(BridgeClosed).stats.chunks == chunks * (line + 1)


def test_an_interrupt_at_any_line_of_advance(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 2})
    for line in range(1000):
        at_line = interrupted(partial(bridge.advance, line), line)
        bridge.advance(line)
        assert agent.wait(OwnersPassed).timestep == line
        if not at_line:
            break
    assert line > 1
    bridge.close()
    assert agent.wait(BridgeClosed)


def test_a_signal_ends_a_wait_for_a_slot(agent: Agent) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    bridge.send("a", np.zeros(4), 0)

    def interrupt() -> None:
        agent.wait(SendersBlocked)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    interrupting = agent.in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        bridge.send("a", np.ones(4), 1)
    interrupting.result(PATIENCE_S)
    assert bridge.stats.chunks == 1
    agent.release(("a", 0))
    bridge.send("a", np.full(4, 2.0), 1)
    step = agent.wait(StepComplete)
    assert (step.timestep, agent.chunks(step)[0].tolist()) == (1, [2.0] * 4)


def test_an_error_in_the_block_ends_the_wait_of_another_thread(agent: Agent) -> None:
    """As Ctrl-C does, which comes to the main thread alone."""
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    bridge.send("a", np.zeros(4), 0)
    waiting = agent.in_thread(bridge.send, "a", np.zeros(4), 1)
    agent.wait(SendersBlocked)
    with pytest.raises(KeyboardInterrupt), bridge:
        raise KeyboardInterrupt
    with pytest.raises(ClosedError, match="another thread has ended the bridge: KeyboardInterrupt"):
        waiting.result(PATIENCE_S)
    assert agent.wait(BridgeLost).reason == "KeyboardInterrupt"
    assert "closed" in repr(bridge)


def get_slots(chunk: Any, started: threading.Barrier) -> None:
    started.wait(PATIENCE_S)
    while True:
        chunk.slot(0)


def test_threads_that_get_slots_while_another_one_closes() -> None:
    """What one of them has got is in use after the client has dropped it."""
    for _ in range(10):
        with running() as agent:
            bridge = agent.open_bridge(0, 1, {"a": whole((4,))}, client=native.Bridge)
            agent.wait(BridgeJoined)
            agent.start({"a": 1})
            chunk = bridge.result(PATIENCE_S)._own["a"][0].native
            started = threading.Barrier(4)
            getting = [agent.in_thread(get_slots, chunk, started) for _ in range(3)]
            started.wait(PATIENCE_S)
            bridge.result().close()
            for thread in getting:
                assert isinstance(thread.exception(PATIENCE_S), ClosedError)


def test_an_error_in_the_block_ends_a_thread_that_converts(agent: Agent, client: Client) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    copying, go_on = threading.Event(), threading.Event()

    class Exported:
        def __array__(self, *_: Any, **__: Any) -> Any:
            copying.set()
            assert go_on.wait(PATIENCE_S)
            return np.zeros(4)

    sending = agent.in_thread(bridge.send, "a", Exported(), 0)
    assert copying.wait(PATIENCE_S)

    def fail() -> None:
        with bridge:
            raise RuntimeError("diverges")

    failing = agent.in_thread(fail)
    assert agent.wait(BridgeLost).reason == "RuntimeError: diverges"
    if client is not native.Bridge:  # which converts before it takes its lock
        assert not failing.done()
    go_on.set()
    with pytest.raises(ClosedError):
        sending.result(PATIENCE_S)
    with pytest.raises(RuntimeError, match="diverges"):
        failing.result(PATIENCE_S)
