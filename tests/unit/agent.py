"""An agent and its ranks in one process, for the tests of the hand-off."""

from __future__ import annotations

import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from deisa.ray._state.events import BridgeJoined, Event, StepComplete
from deisa.ray._state.plan import NodePlan, StartPlan
from deisa.ray._transport.address import agent_address
from deisa.ray._transport.line import AnalyticsLine
from deisa.ray._transport.reader import attach
from deisa.ray._transport.server import AgentServer
from deisa.ray.bridge import Bridge
from deisa.ray.config import Settings
from deisa.ray.errors import DeisaError
from tests.oracle.bridge import OracleBridge
from tests.support.patience import PATIENCE_S
from tests.unit.parts import number_parts, start_plan

Client = type[Bridge]
CLIENTS: dict[str, Client] = {"native": Bridge, "oracle": cast("Client", OracleBridge)}
_client: Client = Bridge
CONSUMER = "test"
ANALYTICS = "the analytics"
E = TypeVar("E")
T = TypeVar("T")


def new_settings(**change: Any) -> Settings:
    """Settings of a session of the test's own, which gives up soon."""
    patience = dict.fromkeys(("connect_timeout_s", "start_timeout_s", "send_timeout_s"), PATIENCE_S)
    return Settings(**{"session": f"unit-{os.getpid()}-{time.monotonic_ns()}", **patience, **change})


@contextmanager
def use_client(name: str) -> Iterator[Client]:
    """Have agents open bridges of one of the `CLIENTS`."""
    global _client
    before, _client = _client, CLIENTS[name]
    try:
        yield _client
    finally:
        _client = before


class Agent:
    """An `AgentServer`, with what the analytics would do with it."""

    def __init__(self, settings: Settings | None = None, if_lost: str = "") -> None:
        self.settings = settings or new_settings()
        self.run_id = os.urandom(8).hex()
        self.server = AgentServer(
            self.settings, self.run_id, "node", ANALYTICS, "pid 1 on host h", if_lost=if_lost
        )
        self.regions: dict[str, list[int]] = {}
        self._pending: list[Event] = []
        self._threads = ThreadPoolExecutor(16)
        self._opening: list[Future[Bridge]] = []
        self._readers: list[threading.Thread] = []

    def follow(self, *, listens: bool = False) -> AnalyticsLine:
        """Be there for certain, as an analytics on the agent's node is."""
        return AnalyticsLine(agent_address(self.settings), ANALYTICS, listens=listens)

    def in_thread(self, function: Callable[..., T], *arguments: Any, **named: Any) -> Future[T]:
        return self._threads.submit(function, *arguments, **named)

    def open_bridge(
        self,
        number: int,
        world_size: int,
        metadata: Mapping[str, Any],
        settings: Settings | None = None,
        client: Client | None = None,
    ) -> Future[Bridge]:
        """Create a bridge in a thread: it waits until `start`."""
        self._opening.append(
            self.in_thread(
                client or _client,
                bridge_id=number,
                arrays_metadata=metadata,
                system_metadata={"world_size": world_size},
                settings=settings or self.settings,
            )
        )
        return self._opening[-1]

    def connect(self, *metadata: Mapping[str, Any]) -> list[Future[Bridge]]:
        """Open one bridge for each metadata."""
        opening = [self.open_bridge(number, len(metadata), said) for number, said in enumerate(metadata)]
        for _ in metadata:
            self.wait(BridgeJoined)
        return opening

    def plan(
        self, slots: Mapping[str, int], consumers: tuple[str, ...] = (CONSUMER,), **dtypes: Any
    ) -> tuple[StartPlan, NodePlan]:
        """What asks for the arrays in `slots`, by default of double precision, of all bridges that have come."""
        known = {name: np.dtype(dtype) if dtype is not None else None for name, dtype in dtypes.items()}
        node = self.server._node
        shapes = {
            bridge_id: {
                described.name: [c.shape for c in described.chunks] for described in node.described(bridge_id)
            }
            for bridge_id in node.bridges
        }
        parts = number_parts(shapes, slots)
        self.regions.update((name, [part.region for part in own]) for name, own in parts.items())
        dtype_of = {**dict.fromkeys(slots, np.dtype("f8")), **known}
        return start_plan(slots, dtype_of, consumers), NodePlan(parts)

    def start(self, slots: Mapping[str, int], **dtypes: Any) -> None:
        self.server.start(*self.plan(slots, **dtypes))

    def bridges(self, *metadata: Mapping[str, Any], slots: Mapping[str, int], **dtypes: Any) -> list[Bridge]:
        """Connect bridges and start the session."""
        opening = self.connect(*metadata)
        self.start(slots, **dtypes)
        return [future.result(PATIENCE_S) for future in opening]

    def wait(self, kind: type[E]) -> E:
        """The next event of a kind; those before it are dropped."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            while self._pending:
                event = self._pending.pop(0)
                if isinstance(event, kind):
                    return event
            self._pending += self.server.poll(PATIENCE_S)
        raise AssertionError(f"no {kind.__name__} came")

    def events(self) -> list[Event]:
        """What has come and was not waited for."""
        events, self._pending = self._pending + self.server.poll(0), []
        return events

    def chunks(self, step: StepComplete) -> list[np.ndarray]:
        """The chunks of a step, as a task beside the agent reads them."""
        before = set(threading.enumerate())
        address, agent_id = agent_address(self.settings), self.server.agent_id
        chunks = [
            attach(address, agent_id, region).chunk(region, step.slot) for region in self.regions[step.array]
        ]
        self._readers += [t for t in threading.enumerate() if t.name == "deisa-reader" and t not in before]
        return chunks

    def forget(self) -> None:
        """Hold no bridge any more."""
        self._opening.clear()

    def release(self, *steps: tuple[str, int]) -> None:
        self.server.release(CONSUMER, steps)

    def close(self, error: DeisaError | None = None) -> None:
        self.server.close(error)
        for opening in self._opening:
            if opening.exception(PATIENCE_S) is None:
                opening.result().lose("")
        self._opening.clear()
        self._threads.shutdown()
        for thread in self._readers:
            thread.join(PATIENCE_S)
        self._readers.clear()


@contextmanager
def running(settings: Settings | None = None, *, if_lost: str = "", **change: Any) -> Iterator[Agent]:
    agent = Agent(settings or new_settings(**change), if_lost)
    try:
        yield agent
    finally:
        agent.close()


def whole(shape: tuple[int, ...], **more: Any) -> dict[str, Any]:
    """An array of one chunk."""
    return {"chunk_shape": shape, "global_shape": shape, "offset": (0,) * len(shape), "dtype": "f8", **more}


def settings_with(agent: Agent, **change: Any) -> Settings:
    return dataclasses.replace(agent.settings, **change)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def mappings(session: str) -> int:
    return Path("/proc/self/maps").read_text().count(f"memfd:deisa-{session}")
