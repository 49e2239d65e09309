"""The client in C does what the oracle does, whatever a simulation calls and whatever happens to its analytics."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._state.events import BridgeClosed, BridgeLost, StepComplete, StepTorn
from deisa.ray._state.feedback import Proposal, Setting
from deisa.ray._state.values import encode_value
from deisa.ray.bridge import Bridge
from deisa.ray.errors import AnalyticsLostError, DeisaError, TimestepError
from tests.unit.agent import Agent, new_settings, running, use_client, whole

METADATA = {
    "a": whole((2, 3)),
    "halves": [whole((4,)) | {"chunk_shape": (2,), "offset": (2 * i,)} for i in range(2)],
    "late": whole((2,), dtype=None),
    "ghosts": whole((2, 3), halo=((1, 0), (0, 2))),
    "unwanted": whole((2,), dtype="i4", halo=1),
    "none": [],
}
CHUNKS: dict[str, Any] = {
    "right for a": np.arange(6.0).reshape(2, 3),
    "transposed": np.arange(6.0).reshape(3, 2),
    "Fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "part of a larger one": np.arange(20.0).reshape(4, 5)[1:3, 1:4],
    "with ghosts": np.arange(15.0).reshape(3, 5),
    "with ghosts, in Fortran order": np.asfortranarray(np.arange(15.0).reshape(3, 5)),
    "with ghosts, backwards": np.arange(15.0).reshape(3, 5)[::-1, ::-1],
    "with ghosts, in a list": np.arange(15.0).reshape(3, 5).tolist(),
    "list": [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]],
    "f4": np.arange(6, dtype="f4").reshape(2, 3),
    "other byte order": np.arange(6, dtype=">f8").reshape(2, 3),
    "pair": np.array([7.0, 8.0]),
    "pair of i4": np.array([7, 8], "i4"),
    "pair of i4 with ghosts": np.array([0, 7, 8, 0], "i4"),
    "backwards": np.array([7.0, 8.0])[::-1],
    "masked": np.ma.masked_array([7.0, 8.0]),
    "text": "text",
    "None": None,
}
FITTING = {
    "a": "right for a",
    "halves": "pair",
    "late": "pair",
    "ghosts": "with ghosts",
    "unwanted": "pair of i4 with ghosts",
}
SLOTS = {"a": 2, "halves": 2, "late": 1, "ghosts": 2}

ARRAYS = st.sampled_from([*SLOTS, *SLOTS, "unwanted", "none", "unknown", 7])
STEPS = st.sampled_from([0, 0, 0, 1, 1, 1, 2, -1])  # from the newest timestep
ODD_STEPS = st.sampled_from([1.5, None, "1", True, np.True_, np.int64(3), 2**63 - 1, 2**63, -(2**63) - 1])
INDICES = st.sampled_from([None, None, 0, 0, 1, 1, 2, -1, np.int8(1), "0", 0.0, False, (0,), 2**70])
KEYS = st.sampled_from(["stop", "feed", "Größe"])
ODD_KEYS = st.sampled_from(["", "never set", "0\0", 7, "x" * 256])
VALUES = st.sampled_from(
    [0, 1.5, "text", b"bytes", [1, {"two": 2}], np.arange(6.0).reshape(2, 3), b"x" * 3000]
)
FEW_INDICES = st.sampled_from([None, 0, 1])
TIMES = st.sampled_from([None, None, 0.5, -1.0, 3, np.float32(2.5), np.nan, -np.inf, "1"])
USUAL = st.one_of(
    st.tuples(st.just("send"), st.sampled_from(list(SLOTS)), st.just("fitting"), STEPS, FEW_INDICES, TIMES),
    st.tuples(st.just("fill"), st.sampled_from(list(SLOTS)), STEPS, FEW_INDICES),
    st.tuples(st.just("release")),
    st.tuples(st.just("release")),
    st.tuples(st.just("advance"), STEPS),
    st.tuples(st.just("get"), KEYS, STEPS, st.just(None)),
    st.tuples(st.just("set"), KEYS, VALUES, STEPS),
    st.tuples(st.just("finish"), STEPS),
)
UNUSUAL = st.one_of(
    st.tuples(st.just("send"), ARRAYS, st.sampled_from(list(CHUNKS)), STEPS, INDICES, TIMES),
    st.tuples(st.just("send"), ARRAYS, st.just("fitting"), ODD_STEPS, INDICES, TIMES),
    st.tuples(st.just("slot"), ARRAYS, STEPS | ODD_STEPS, INDICES),
    st.tuples(st.just("send_slot"), ARRAYS, STEPS, INDICES, TIMES),
    st.tuples(st.just("advance"), ODD_STEPS),
    st.tuples(st.just("get"), KEYS | ODD_KEYS, STEPS | ODD_STEPS, st.sampled_from([None, 0, 1e-3, -1, "1"])),
    st.tuples(st.just("settle"), st.booleans()),
)
ENDS = st.one_of(
    st.tuples(st.just("close"), st.none() | st.integers(-3, 9)),
    st.tuples(st.just("lose")),
    st.tuples(st.just("down")),
    st.tuples(st.just("up")),
    st.tuples(st.just("end")),
)
HISTORIES = st.tuples(
    st.lists(USUAL | USUAL | UNUSUAL, max_size=15), ENDS, st.lists(USUAL | UNUSUAL | ENDS, max_size=6)
).map(lambda parts: [*parts[0], parts[1], *parts[2]])


class Simulation:
    """A bridge and its agent, and what came of every call.

    What the agent learns by itself is waited for before the next call, so that all is the same every time.
    """

    def __init__(self, agent: Agent, bridge: Bridge, said: list[str]) -> None:
        self.agent = agent
        self.bridge = bridge
        self.said = said
        self.outcomes: list[Any] = []
        self._newest = 0
        self._proposals = 0
        self._halves: set[int] = set()  # chunks handed over for that timestep, as long as one is missing
        self._is_torn = False
        self._complete: list[tuple[str, int]] = []  # and not released yet
        self._slots: dict[str, np.ndarray] = {}  # given out last
        self._handed_over: tuple[str, int, int] | None = (
            None  # array, timestep and chunk, by the present call
        )
        self._has_analytics = True
        self._has_agent = True
        self.call("advance", 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Make a call, and note everything that can be seen of it."""
        try:
            outcome = getattr(self, f"_{name}")(*arguments)
        except DeisaError as error:
            outcome = f"{type(error).__name__}: {error}"
        stats = self.bridge.stats
        seen = (stats.chunks, stats.bytes_handed_over, stats.held_up_s > 0, repr(self.bridge))
        self.outcomes.append((name, *arguments, outcome, *self._wait_for_agent(), *seen, *self.said))
        self.said.clear()

    def end(self) -> None:
        """Close the bridge, and note what the analytics hears of that."""
        self.call("close", None)
        if self._has_analytics:
            event: Any = self.agent.wait(BridgeClosed | BridgeLost)  # type: ignore[arg-type]
            if isinstance(event, BridgeClosed):
                event = replace(event, stats=replace(event.stats, held_up_s=event.stats.held_up_s > 0))
            self.outcomes.append(event)

    def _send(self, array: str, kind: str, step: Any, index: Any, time: Any) -> None:
        chunk = CHUNKS[FITTING.get(array, "None") if kind == "fitting" else kind]
        self._hand_over(array, chunk, step, index, time)

    def _slot(self, array: str, step: Any, index: Any) -> Any:
        before = self._slots.get(array)
        slot = self._slots[array] = self.bridge.slot(array, self._timestep(step), chunk_index=index)
        is_ours = array == "unwanted" or not self._has_analytics  # what it holds may be anything
        return slot is before, slot.shape, slot.dtype, slot.flags.writeable, is_ours or slot.tolist()

    def _send_slot(self, array: str, step: Any, index: Any, time: Any) -> bool | None:
        slot = self._slots.get(array)
        self._hand_over(array, slot, step, index, time)
        return None if slot is None else slot.flags.writeable

    def _fill(self, array: str, step: Any, index: Any) -> Any:
        outcome = self._slot(array, step, index)
        self._slots[array][...] = 3
        return outcome, self._send_slot(array, step, index, 0.25)

    def _advance(self, step: Any) -> None:
        self.bridge.advance(self._timestep(step))

    def _get(self, key: Any, step: Any, wait: Any) -> Any:
        value = self.bridge.get(key, self._timestep(step), "default", wait=wait)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def _set(self, key: str, value: Any, step: int) -> Any:
        """Set a value in one step, or leave the question closed."""
        if self._has_agent:
            self._proposals += 1
            setting = Setting(key, min(self._newest + step, 2**63 - 1), encode_value(value))
            return self.agent.server.propose(Proposal(self._proposals, setting, self._proposals % 3 > 0, 0))
        return None

    def _settle(self, is_accepted: bool) -> None:
        if self._has_agent:
            self.agent.server.settle(self._proposals, is_accepted)

    def _finish(self, step: int) -> None:
        if self._has_agent:
            self.agent.server.finish(min(self._newest + step, 2**63 - 1))

    def _close(self, timestep: int | None) -> None:
        self.bridge.close(timestep)

    def _lose(self) -> None:
        self.bridge.lose("RuntimeError: the solver diverges")

    def _release(self) -> None:
        if self._complete and self._has_analytics:
            self.agent.release(self._complete.pop(0))

    def _down(self) -> None:
        if self._has_analytics:
            self._has_analytics = False
            self.agent.server.abandon("the analytics has died")

    def _up(self) -> None:
        if self._has_agent and not self._has_analytics:
            self.agent.server.take_over("another")

    def _end(self) -> None:
        self._has_analytics = self._has_agent = False
        self.agent.server.close(AnalyticsLostError("the analytics has ended: tired"))

    def _timestep(self, step: Any) -> Any:
        return self._newest + step if type(step) is int and abs(step) < 3 else step

    def _hand_over(self, array: str, chunk: Any, step: Any, index: Any, time: Any) -> None:
        before, timestep = self.bridge.stats.chunks, self._timestep(step)
        try:
            time = None if array == "halves" else time  # its chunks must have the same
            self.bridge.send(array, chunk, timestep, time=time, chunk_index=index)
        finally:
            if self.bridge.stats.chunks > before:
                self._handed_over = array, int(timestep), int(index or 0)

    def _wait_for_agent(self) -> Iterator[Any]:
        """Wait until the agent knows what it should, and say what the analytics has heard."""
        handed_over, self._handed_over = self._handed_over, None
        before, self._newest = self._newest, self._where()
        if not self._has_analytics:
            return
        if self._newest > before and self._halves:
            self._halves.clear()
            self._is_torn = True  # which ends a session: chunks of "halves" are no longer in step
            yield self.agent.wait(StepTorn)
        if handed_over is None or (self._is_torn and handed_over[0] == "halves"):
            return
        array, timestep, index = handed_over
        if array == "halves":
            self._halves.add(index)
            if len(self._halves) < 2:
                return
            self._halves.clear()
        step = self.agent.wait(StepComplete)
        self._complete.append((step.array, step.timestep))
        yield step.array == array, step.timestep == timestep, step.slot, step.time
        yield [(chunk.dtype, chunk.tolist()) for chunk in self.agent.chunks(step)]

    def _where(self) -> int:
        """The newest timestep, which only the refusal of an older one tells."""
        try:
            self.bridge.advance(1 - 2**63)
        except TimestepError as error:
            return int(str(error).split("comes after timestep ")[1].split(" of ")[0])
        except DeisaError:
            pass
        return self._newest


@contextmanager
def listening() -> Iterator[list[str]]:
    """What bridges log."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("deisa.ray.bridge")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def play(client: str, policy: str, history: list[Any]) -> list[Any]:
    """Have a bridge go through a history, and return what came of it."""
    settings = new_settings(
        session=f"unit-{os.getpid()}-oracle", send_timeout_s=0.03, on_analytics_lost=policy, warn_every_s=1e3
    )
    with listening() as said, running(settings) as agent, use_client(client):
        (bridge,) = agent.bridges(METADATA, slots=SLOTS, late=None)
        simulation = Simulation(agent, bridge, said)
        for call in history:
            simulation.call(*call)
        simulation.end()
        return simulation.outcomes


@given(st.sampled_from(["wait", "continue", "raise"]), HISTORIES)
def test_the_same_comes_of_every_history(policy: str, history: list[Any]) -> None:
    outcomes = zip(play("native", policy, history), play("oracle", policy, history), strict=True)
    assert [(native, oracle) for native, oracle in outcomes if native != oracle] == []
