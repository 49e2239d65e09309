"""Who holds the CPUs of a node: bundles take what others leave, and say for whom they wait where nothing is left.

A bundle asks Ray for one CPU, and runs as many threads as CPUs are free when it is submitted. If it asked for all of
them, it would wait for ever where somebody else takes one in between: Ray starts no task on fewer than it asked for.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private import state

from deisa.ray.errors import NoFreeCpusError
from deisa.ray.report import SHOWN_NODE_ID

FRESH_S = 0.5  # what Ray said is believed for so long
LATE_S = 1.0  # so long after a bundle has ended, Ray may still count its CPU as taken
_SHOWN_HOLDERS = 8


def available_cpus() -> dict[str, float]:
    """CPUs that nothing holds, by node; Ray learns of changes up to a few hundred milliseconds late."""
    per_node = state.available_resources_per_node()
    return {node_id: resources.get("CPU", 0.0) for node_id, resources in per_node.items()}


class CpuShares:
    """What others leave of the CPUs of each node, from what Ray says is available now and then.

    A CPU that a bundle of ours has just given back, or not taken yet, may count as taken or as available. Between the
    bounds that this leaves, what was known before holds.

    Parameters
    ----------
    clock : callable
        Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._looked = -math.inf
        self._others: dict[str, float] = {}
        self._available: Mapping[str, float] = {}
        self._under_way: Counter[str] = Counter()
        self._ended: dict[str, list[float]] = defaultdict(list)

    @property
    def fresh(self) -> bool:
        """Whether Ray has been asked a short time ago."""
        return self._clock() - self._looked < FRESH_S

    def took(self, node_id: str) -> None:
        """Note that a bundle asks for a CPU."""
        with self._lock:
            self._under_way[node_id] += 1

    def gave_back(self, node_id: str) -> None:
        """Note that such a bundle has ended."""
        with self._lock:
            self._under_way[node_id] -= 1
            self._ended[node_id].append(self._clock())

    def look(self, cpus: Mapping[str, int], available: Mapping[str, float]) -> None:
        """Note how many CPUs each node has, and how many of them Ray says are available."""
        with self._lock:
            self._looked = self._clock()
            self._available = available
            for node_id, count in cpus.items():
                recent = [at for at in self._ended[node_id] if self._looked - at < LATE_S]
                self._ended[node_id] = recent
                taken = max(0.0, count - available.get(node_id, 0.0))
                least = max(0.0, taken - self._under_way[node_id] - len(recent))
                self._others[node_id] = min(taken, max(least, self._others.get(node_id, 0.0)))

    def remaining(self, node_id: str, cpus: int) -> int:
        """Whole CPUs of a node that others leave, at least one: a bundle waits until there is one."""
        return max(1, int(cpus - self._others.get(node_id, 0.0)))

    def exhausted(self, cpus: Mapping[str, int]) -> dict[str, int]:
        """The nodes, with their CPUs, on which bundles of ours are under way and no CPU is available."""
        with self._lock:
            return {
                node_id: count
                for node_id, count in cpus.items()
                if count and self._under_way[node_id] > 0 and self._available.get(node_id, 0.0) < 1
            }

    def held_by_others(self, cpus: Mapping[str, int], held: Sequence[Holder]) -> dict[str, int]:
        """The nodes, of those given, of which others hold every CPU, so that bundles of ours wait there."""
        named = {node_id: sum(h.cpus for h in held if h.node_id == node_id) for node_id in cpus}
        return {
            node_id: count
            for node_id, count in cpus.items()
            if max(named[node_id], self._others.get(node_id, 0.0)) > count - 1
        }


@dataclass(frozen=True, slots=True)
class Holder:
    """Something of others that holds CPUs of a node.

    Attributes
    ----------
    node_id : str
    cpus : float
    name : str
        What it is, for a message.
    """

    node_id: str
    cpus: float
    name: str

    def __str__(self) -> str:
        return f"{self.name}, {self.cpus:g} CPU{'s' if self.cpus > 1 else ''}"


def holders() -> list[Holder]:
    """Actors, tasks and placement groups that hold CPUs, as far as Ray's head knows; bundles are not among them."""
    return [*_actors(), *_tasks(), *_placement_groups()]


def _actors() -> Iterable[Holder]:
    from ray.core.generated import gcs_pb2

    for packed in state.state._connect_and_get_accessor().get_actor_table(None, None):
        actor = gcs_pb2.ActorTableData.FromString(packed)
        cpus = actor.required_resources.get("CPU", 0.0)
        if cpus and actor.state == gcs_pb2.ActorTableData.ALIVE:
            kind = f"of class {actor.class_name.rpartition('.')[2]} (pid {actor.pid})"
            name = f"actor {actor.name!r} {kind}" if actor.name else f"an actor {kind}"
            yield Holder(actor.address.node_id.hex(), cpus, name)


def _tasks() -> Iterable[Holder]:
    from ray.core.generated import common_pb2, gcs_pb2

    ended = {common_pb2.TaskStatus.FINISHED, common_pb2.TaskStatus.FAILED}
    for packed in state.state._connect_and_get_accessor().get_task_events():
        task = gcs_pb2.TaskEvents.FromString(packed)
        cpus = task.task_info.required_resources.get("CPU", 0.0)
        states = task.state_updates.state_ts_ns.keys()
        running = common_pb2.TaskStatus.RUNNING in states and not ended & states
        if cpus and running and task.task_info.type == common_pb2.TaskType.NORMAL_TASK:
            name = f"task {task.task_info.name} (pid {task.state_updates.worker_pid})"
            yield Holder(task.state_updates.node_id.hex(), cpus, name)


def _placement_groups() -> Iterable[Holder]:
    for group in ray.util.placement_group_table().values():
        for number, node_id in group["bundles_to_node_id"].items():
            cpus = group["bundles"][number].get("CPU", 0.0)
            if cpus and group["state"] == "CREATED":
                yield Holder(
                    node_id, cpus, f"placement group {group['name'] or group['placement_group_id']!r}"
                )


def describe_shortage(cpus: Mapping[str, int], held: Sequence[Holder]) -> str:
    """Say of nodes without a free CPU, given with the number that they have, who holds them."""
    said = []
    for node_id, count in cpus.items():
        names = [str(holder) for holder in held if holder.node_id == node_id]
        more = f" and {len(names) - _SHOWN_HOLDERS} more" if len(names) > _SHOWN_HOLDERS else ""
        said.append(
            f"{'the only CPU' if count == 1 else f'all {count} CPUs'} of node {node_id[:SHOWN_NODE_ID]} "
            f"{'is' if count == 1 else 'are'} held by "
            f"{'; '.join(names[:_SHOWN_HOLDERS]) or 'work that Ray has no name for'}{more}"
        )
    return "; ".join(said)


class CpuWait:
    """One wait for results, and for how long CPUs have been what it waits for.

    Parameters
    ----------
    timeout_s : float
        How long that may be.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s = timeout_s
        self._clock = clock
        self._last_enough = clock()

    def check(self, short: Mapping[str, int], held: Sequence[Holder]) -> str:
        """Say who holds the CPUs of nodes that are short of them; empty if none is.

        Raises
        ------
        NoFreeCpusError
            When that has been so for too long.
        """
        now = self._clock()
        if not short:
            self._last_enough = now
            return ""
        shortage = describe_shortage(short, held)
        if now - self._last_enough < self._timeout_s:
            return shortage
        raise NoFreeCpusError(
            f"no CPU for a computation within {self._timeout_s:g} s (DEISA_RAY_CPU_TIMEOUT_S sets how long): "
            f"{shortage}. End what holds them, have it ask for fewer (num_cpus=0 for ranks and for actors that only "
            "wait), or start Ray with more --num-cpus"
        )
