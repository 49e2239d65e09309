"""Each bundle is one Ray task on its node."""

from __future__ import annotations

import logging
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from dask._task_spec import GraphNode
from ray.exceptions import GetTimeoutError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deisa.ray._engine.ray_cluster import connect, node_cpus
from deisa.ray._graph.bundles import Bundle
from deisa.ray._graph.execute import run_bundle, threads_that_pay
from deisa.ray._graph.leaves import Handle
from deisa.ray._graph.scheduler import Input
from deisa.ray.config import Settings

logger = logging.getLogger("deisa.ray")

NODES_FRESH_S = 5.0
RETRIES = 3  # of a bundle whose worker process died


@ray.remote
def run_on_node(
    tasks: Sequence[GraphNode],
    picks: Sequence[Sequence[tuple[int, Hashable]]],
    outputs: Sequence[Sequence[Hashable]],
    threads: int,
    *groups: Sequence[Any],
) -> Any:
    """Run a bundle; returns its groups of values, and None to say that it has ended."""
    given = {key: group[i] for group, taken in zip(groups, picks, strict=True) for i, key in taken}
    return (*run_bundle(tasks, given, outputs, threads), None)


@dataclass(frozen=True, slots=True)
class RayGroup:
    """Values in Ray's object store."""

    reference: Any

    def fetch(self) -> Sequence[Any]:
        """Bring them here."""
        return ray.get(self.reference)


class RayExecutor:
    """Submits bundles as Ray tasks, pinned to their nodes and accounted for with their threads."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._cpus: dict[str, int] = {}
        self._looked = 0.0
        self.bundles_submitted = 0

    def nodes(self) -> Sequence[str | None]:
        """The nodes that have CPUs, this process's own first."""
        found = self._node_cpus()  # connects
        own = ray.get_runtime_context().get_node_id()
        return sorted((n for n, cpus in found.items() if cpus), key=lambda n: n != own) or [None]

    def _node_cpus(self) -> dict[str, int]:
        connect()
        if time.monotonic() - self._looked > NODES_FRESH_S:
            self._cpus = node_cpus()
            self._looked = time.monotonic()
        return self._cpus

    def warm_up(self) -> None:
        """Have every node start a worker process and import what bundles need; does not wait."""
        for node_id in self._node_cpus():
            self._options(node_id, 1, 1).remote((), (), (), 1)

    def _options(self, node_id: str | None, threads: int, returns: int) -> Any:
        cpus = self._cpus.get(node_id, 1) if node_id is not None else 1
        strategy = "DEFAULT" if node_id is None else NodeAffinitySchedulingStrategy(node_id, soft=False)
        return run_on_node.options(
            num_cpus=min(threads, cpus),
            num_returns=returns,
            max_retries=RETRIES,
            scheduling_strategy=strategy,
        )

    def submit(self, bundle: Bundle, inputs: Sequence[Input]) -> list[Handle]:
        """Start a bundle once its inputs are there; its leases are held until it has ended."""
        cpus = self._node_cpus().get(bundle.node_id, 1) if bundle.node_id is not None else 1
        limit = self._settings.threads_per_bundle or max(1, cpus)
        threads = threads_that_pay(bundle, min(limit, max(1, cpus)))
        references = self._options(bundle.node_id, threads, len(bundle.outputs) + 1).remote(
            bundle.tasks,
            [taken.picks for taken in inputs],
            bundle.outputs,
            threads,
            *(taken.handle.reference for taken in inputs),  # type: ignore[attr-defined]
        )
        self.bundles_submitted += 1
        *groups, ended = references
        leases = [bundle.leases]
        # Also where there is no lease: Ray logs the error of a reference that nobody has looked at.
        ended.future().add_done_callback(lambda _: leases.clear())
        return [RayGroup(reference) for reference in groups]

    def fetch(self, handles: Sequence[Handle]) -> list[Sequence[Any]]:
        """Wait for groups of values; says every few seconds that it still waits."""
        references = [handle.reference for handle in handles]  # type: ignore[attr-defined]
        started = time.monotonic()
        while True:
            try:
                return ray.get(references, timeout=self._settings.warn_every_s)
            except GetTimeoutError:
                logger.warning(
                    "a computation has been running for %.0f s (are CPUs of the cluster held by something else?)",
                    time.monotonic() - started,
                )
            except RayTaskError as exc:
                cause = exc.cause
                if isinstance(cause, Exception):
                    cause.add_note(str(exc))
                    raise cause from None
                raise
