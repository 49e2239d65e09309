"""Simulated nodes that speak the real protocol to a real driver, many of them in one process.

A node's arrivals are those of its `NodeArrivals`, as its ranks join and put their chunks; a poll is a Ray actor
call that waits for them, and bundles are Ray tasks. What is left out is what a driver never sees: sockets, chunk
memory, and reading it. A few actors host all nodes, and all bundles run on the one node there is.

::

    Deisa -- SimulatedAgents --- AgentHandle ---> NodeHost (an actor): SimulatedNode, SimulatedNode ...
          -- SimulatedExecutor -----------------> answer (a task), in place of run_on_node
"""

from __future__ import annotations

import asyncio
import inspect
import math
import pickle
import threading
import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deisa.ray._engine.ray_actor import AGENT_CALLS
from deisa.ray._engine.ray_agents import RayAgents
from deisa.ray._engine.ray_cluster import connect
from deisa.ray._engine.ray_executor import RETRIES, PreparedBundle, RayExecutor
from deisa.ray._graph.execute import pick, run_bundle
from deisa.ray._graph.leaves import Handle, StepSlots, chunk_of
from deisa.ray._graph.work import Ended, PackedWork, Work, pack_work
from deisa.ray._state.arrivals import NodeArrivals
from deisa.ray._state.descriptions import ArrayDescription, describe_arrays
from deisa.ray._state.events import BridgeJoined, Event
from deisa.ray._state.plan import NodePlan, StartPlan
from deisa.ray._state.stats import BridgeStats
from deisa.ray._state.streams import Part
from deisa.ray._transport.memory import slot_size
from deisa.ray.config import Settings
from deisa.ray.errors import DeisaError

ARRAY = "x"
CHUNK_SHAPE = (512, 512)
DTYPE = np.dtype("float64")
HOSTS = 4


@dataclass(frozen=True)
class Machine:
    """What is simulated: a 2-D array on nodes that each own a rectangle of its chunks.

    Attributes
    ----------
    nodes, chunks, cpus : int
        Nodes; on each of them chunks, one for each rank, and CPUs for the analytics.
    """

    nodes: int
    chunks: int = 50
    cpus: int = 4

    @property
    def ranks(self) -> int:
        """On all nodes."""
        return self.nodes * self.chunks

    def node_id(self, number: int) -> str:
        """As long as Ray's."""
        return f"{number:056x}"

    def describe(self, number: int, rank: int) -> tuple[ArrayDescription, ...]:
        """What a rank of a node says of its chunk."""
        (rows, columns), (high, wide) = _near_square(self.nodes), _near_square(self.chunks)
        (row, column), (down, along) = divmod(number, columns), divmod(rank, wide)
        chunk = {
            "chunk_shape": CHUNK_SHAPE,
            "chunk_position": (row * high + down, column * wide + along),
            "nb_chunks_per_dim": (rows * high, columns * wide),
            "dtype": DTYPE,
        }
        return describe_arrays({ARRAY: chunk})


def _near_square(count: int) -> tuple[int, int]:
    high = next(n for n in range(math.isqrt(count), 0, -1) if count % n == 0)
    return high, count // high


class SimulatedNode:
    """The agent of a node, and its ranks."""

    def __init__(self, machine: Machine, number: int) -> None:
        self._machine = machine
        self._number = number
        self._arrivals = NodeArrivals()
        self._bridges: list[int] = []
        self._parts: Sequence[Part] = ()  # of their chunks, once it is started
        self._joined: list[Event] = []
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self.slots = 0
        self.released: dict[int, float] = {}  # timestep -> when

    def join(self, rank: int) -> None:
        """Let a rank say hello."""
        machine = self._machine
        bridge_id = self._number * machine.chunks + rank
        arrays = machine.describe(self._number, rank)
        self._arrivals.join(bridge_id)
        self._bridges.append(bridge_id)
        self._events.append(BridgeJoined(bridge_id, machine.ranks, arrays))
        self._news.set()

    def put(self, timestep: int) -> None:
        """Let every rank put its chunk; nobody hears of it before `show`."""
        for part in self._parts:
            self._arrivals.put(part.bridge_id, part.region, timestep)

    def end(self) -> None:
        """Let every rank close."""
        for bridge_id in self._bridges:
            self._arrivals.close(bridge_id, BridgeStats())
        self.show()

    def show(self) -> None:
        """Let a poll see what has happened."""
        self._events += self._arrivals.take_events()
        self._news.set()

    # What the driver calls, as `AgentServer` has it.

    async def poll(self, timeout_s: float) -> list[Event]:
        """Wait for events."""
        try:
            await asyncio.wait_for(self._news.wait(), timeout_s)
        except TimeoutError:
            return []
        self._news.clear()
        events, self._events = self._events, []
        return events

    def report_progress(self, text: str) -> None:
        """There is no rank to tell it."""

    def bound_bytes(self, plan: StartPlan, here: NodePlan) -> int:
        """Chunk memory that this node would need."""
        return slot_size(CHUNK_SHAPE, DTYPE) * len(self._bridges) * plan.slots[ARRAY]

    def start(self, plan: StartPlan, here: NodePlan) -> None:
        """Let the ranks go."""
        self._parts = here.parts[ARRAY]
        self._arrivals.subscribe(plan.slots, here.parts, plan.consumers)

    def release(self, consumer: str, steps: Sequence[tuple[str, int]]) -> None:
        """End leases."""
        for array, timestep in steps:
            self._arrivals.release(consumer, array, timestep)
            self.released[timestep] = time.monotonic()

    def close(self, error: DeisaError | None) -> None:
        """Nothing is to be freed."""


@ray.remote(num_cpus=0)
class NodeHost:
    """An actor that hosts some nodes; what all their ranks do is told by the benchmark."""

    def __init__(self, machine: Machine, numbers: Sequence[int]) -> None:
        self._ranks = range(machine.chunks)
        self._nodes = {machine.node_id(number): SimulatedNode(machine, number) for number in numbers}

    async def open(self, node_id: str) -> tuple[str, bool]:
        """Stand for `NodeAgent.open`."""
        return f"simulated:{node_id}", True

    async def call(self, node_id: str, driver_id: str, method: str, *arguments: Any) -> Any:
        """Stand for `NodeAgent.call`."""
        answer = getattr(self._nodes[node_id], method)(*arguments)
        return await answer if inspect.isawaitable(answer) else answer

    async def poll(
        self,
        node_id: str,
        driver_id: str,
        timeout_s: float,
        consumer: str = "",
        steps: Sequence[tuple[str, int]] = (),
    ) -> bytes:
        """Stand for `NodeAgent.poll`."""
        self._nodes[node_id].release(consumer, steps)
        return pickle.dumps(await self.call(node_id, driver_id, "poll", timeout_s))

    async def join(self, over_s: float) -> float:
        """Let all ranks join, spread over some time; returns when the last one has (monotonic seconds)."""
        began = time.monotonic()
        for rank in self._ranks:
            await asyncio.sleep(max(0.0, began + over_s * rank / len(self._ranks) - time.monotonic()))
            for node in self._nodes.values():
                node.join(rank)
        return time.monotonic()

    async def put(self, timestep: int) -> None:
        """Let all ranks put their chunks of a timestep."""
        for node in self._nodes.values():
            node.put(timestep)

    async def show(self) -> float:
        """Let all nodes report what has happened; returns when they began to (monotonic seconds)."""
        now = time.monotonic()
        for node in self._nodes.values():
            node.show()
        return now

    async def end(self) -> None:
        """Let all ranks close."""
        for node in self._nodes.values():
            node.end()

    async def wait_released(self, timestep: int) -> float:
        """Wait until no node leases a timestep any more; returns since when (monotonic seconds)."""
        while not all(timestep in node.released for node in self._nodes.values()):
            await asyncio.sleep(0.005)
        return max(node.released[timestep] for node in self._nodes.values())


@dataclass(frozen=True, slots=True)
class _Method:
    method: Any
    node_id: str

    def remote(self, *arguments: Any) -> Any:
        return self.method.remote(self.node_id, *arguments)


@dataclass(frozen=True, slots=True)
class AgentHandle:
    """Looks to the driver like the handle of a `NodeAgent`."""

    open: _Method
    call: _Method
    poll: _Method


class SimulatedAgents(RayAgents):
    """The agents of simulated nodes; it notes when the driver did what (monotonic seconds)."""

    def __init__(self, settings: Settings, machine: Machine) -> None:
        super().__init__(settings)
        self._machine = machine
        count = min(HOSTS, machine.nodes)
        shares = [range(machine.nodes)[host::count] for host in range(count)]
        calls = AGENT_CALLS * len(shares[0])
        hosted = NodeHost.options(max_concurrency=calls)  # type: ignore[attr-defined]
        self.hosts = [hosted.remote(machine, share) for share in shares]
        self._host_of = {
            machine.node_id(number): host
            for host, share in zip(self.hosts, shares, strict=True)
            for number in share
        }
        self.first_joined = 0.0
        self.laid_out = 0.0
        self.running = threading.Event()
        self.started = 0.0
        self.progress_calls = 0
        self.release_s = 0.0

    def _nodes(self) -> Mapping[str, int]:
        return dict.fromkeys(self._host_of, self._machine.cpus)

    def _start_agent(self, node_id: str) -> AgentHandle:
        host = self._host_of[node_id]
        return AgentHandle(*(_Method(method, node_id) for method in (host.open, host.call, host.poll)))

    def _find_predecessor(self) -> dict[str, Any]:
        return {}

    def follow(self, callbacks: int) -> memoryview | None:
        """There is nobody to follow."""
        return None

    def _kill(self, node_ids: Iterable[str]) -> None:
        for host in self.hosts:
            ray.kill(host)

    def events(self, timeout_s: float) -> list[tuple[str, Event]]:
        """Wait for events."""
        arrived = super().events(timeout_s)
        if arrived and not self.first_joined:
            self.first_joined = time.monotonic()
        return arrived

    def report_progress(self, text: str) -> None:
        """Tell the waiting ranks."""
        self.progress_calls += self._machine.nodes
        super().report_progress(text)

    def bound_bytes(self, plan: StartPlan, nodes: Mapping[str, NodePlan]) -> Mapping[str, int]:
        """Chunk memory of each node."""
        self.laid_out = time.monotonic()
        return super().bound_bytes(plan, nodes)

    def start(self, plan: StartPlan, nodes: Mapping[str, NodePlan]) -> None:
        """Let the ranks go."""
        super().start(plan, nodes)
        self.started = time.monotonic()
        self.running.set()

    def release(self, consumer: str, steps: Mapping[str, Sequence[tuple[str, int]]]) -> None:
        """End leases."""
        began = time.perf_counter()
        super().release(consumer, steps)
        self.release_s += time.perf_counter() - began


@ray.remote
def answer(
    directory: str,
    packed: PackedWork,
    returns: int,
    most_threads: int,
    steps: Mapping[Hashable, StepSlots],
    *groups: Sequence[Any],
) -> Any:
    """Return what `run_on_node` would, were every chunk a single 1; the same work is done once only."""
    values = _answers.get(packed.uid)
    if values is None:
        work = packed.unpack(ray.get)
        chunks = {task.key: np.ones((1, 1)) for task in work.tasks if chunk_of(task) is not None}
        tasks = [task for task in work.tasks if task.key not in chunks]
        values = run_bundle(tasks, {**pick(groups, work.picks), **chunks}, work.outputs, threads=1)
        _answers[packed.uid] = values
    return (*values, Ended(math.inf, (0,) * len(values), 0))


_answers: dict[str, list[list[Any]]] = {}


class SimulatedExecutor(RayExecutor):
    """Submits bundles for simulated nodes to the node that there is."""

    def __init__(self, settings: Settings, machine: Machine) -> None:
        super().__init__(settings)
        self._machine = machine
        self.submit_s = 0.0
        self.fetch_s = 0.0

    def _node_cpus(self) -> dict[str, int]:
        if not self._cpus:
            connect(self._settings)
            self._own_node = ray.get_runtime_context().get_node_id()
            nodes = range(self._machine.nodes)
            self._cpus = {self._machine.node_id(number): self._machine.cpus for number in nodes}
        return self._cpus

    def _options(self, node_id: str | None, threads: int, returns: int) -> Any:
        return answer.options(
            num_cpus=1,
            num_returns=returns,
            max_retries=RETRIES,
            scheduling_strategy=NodeAffinitySchedulingStrategy(self._own_node, soft=False),
        )

    def warm_up(self) -> None:
        """Start the one worker."""
        self._node_cpus()
        self._options(None, 1, 1).remote(self._directory, pack_work(Work((), (), (), 1)), 1, 1, {})

    def submit(
        self, prepared: PreparedBundle, groups: Sequence[Handle], steps: Mapping[Hashable, StepSlots]
    ) -> list[Handle]:
        """Start a bundle."""
        began = time.perf_counter()
        handles = super().submit(prepared, groups, steps)
        self.submit_s += time.perf_counter() - began
        return handles

    def fetch(self, handles: Sequence[Handle]) -> list[Sequence[Any]]:
        """Wait for values."""
        began = time.perf_counter()
        values = super().fetch(handles)
        self.fetch_s += time.perf_counter() - began
        return values


class SimulatedEngine:
    """A machine of simulated nodes, in place of a cluster."""

    def __init__(self, settings: Settings, machine: Machine) -> None:
        connect(settings)
        self.agents = SimulatedAgents(settings, machine)
        self.executor = SimulatedExecutor(settings, machine)
        self.executor.warm_up()
