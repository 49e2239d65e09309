"""Run one bundle: its tasks in order, or in threads where that pays."""

from __future__ import annotations

import queue
import threading
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deisa.ray._graph._dask import GraphNode
from deisa.ray._graph.bundles import Bundle

THREADS_PAY_BYTES = 256 * 1024  # chunk bytes read by each task, from which on threads beat one
THREADS_PAY_TASKS = 8  # tasks in a bundle that reads no chunks, likewise
MOST_HELPERS = 1024

Picks = Sequence[
    tuple[int, Hashable]
]  # what a bundle takes from a group of values: position in the group, key

# Threads that stay. A new one for each bundle would now and then get another of malloc's arenas, each of
# which keeps room for the largest block that it has ever given out.
_helpers = ThreadPoolExecutor(MOST_HELPERS, thread_name_prefix="deisa-bundle")


def threads_that_pay(bundle: Bundle, limit: int) -> int:
    """How many threads a bundle is worth, at most `limit`: NumPy frees the interpreter on large arrays only."""
    if bundle.leaves:
        return min(limit, bundle.leaves) if bundle.leaf_bytes >= bundle.leaves * THREADS_PAY_BYTES else 1
    return limit if len(bundle.tasks) >= THREADS_PAY_TASKS else 1


def pick(groups: Sequence[Sequence[Any]], picks: Sequence[Picks]) -> dict[Hashable, Any]:
    """Name the values that a bundle takes from groups, given as ``(position in the group, key)`` pairs."""
    return {key: group[i] for group, taken in zip(groups, picks, strict=True) for i, key in taken}


def run_bundle(
    tasks: Sequence[GraphNode],
    given: Mapping[Hashable, Any],
    outputs: Sequence[Sequence[Hashable]],
    threads: int,
) -> list[list[Any]]:
    """Run tasks (in topological order) and return the groups of values asked for.

    A value is dropped as soon as the last task of the bundle that needs it has run.
    """
    wanted = {key for group in outputs for key in group}
    pending = Counter(key for task in tasks for key in task.dependencies)
    values = dict(given)
    try:
        if threads > 1:
            _run_in_threads(tasks, values, pending, wanted, threads)
        else:
            for task in tasks:
                values[task.key] = task({key: values[key] for key in task.dependencies})
                _drop_used(task, values, pending, wanted)
    except ValueError as error:
        if "read-only" in str(error):
            error.add_note(
                "blocks of a DeisaArray are read-only; let the function begin with block = block.copy()"
            )
        raise
    return [[values[key] for key in group] for group in outputs]


def _drop_used(
    task: GraphNode, values: dict[Hashable, Any], pending: Counter[Hashable], wanted: set[Hashable]
) -> None:
    for key in task.dependencies:
        pending[key] -= 1
        if not pending[key] and key not in wanted:
            del values[key]


def _run_in_threads(
    tasks: Sequence[GraphNode],
    values: dict[Hashable, Any],
    pending: Counter[Hashable],
    wanted: set[Hashable],
    threads: int,
) -> None:
    """Run tasks as their inputs become ready, the caller being one of the threads."""
    users: dict[Hashable, list[GraphNode]] = defaultdict(list)
    lacking: dict[Hashable, int] = {}
    ready: queue.LifoQueue[GraphNode | None] = (
        queue.LifoQueue()
    )  # newest first: use values while they are warm
    for task in reversed(tasks):
        absent = [key for key in task.dependencies if key not in values]
        lacking[task.key] = len(absent)
        for key in absent:
            users[key].append(task)
        if not absent:
            ready.put(task)
    lock = threading.Lock()
    remaining = len(tasks)
    errors: list[BaseException] = []

    def work() -> None:
        nonlocal remaining
        while (task := ready.get()) is not None:
            try:
                with lock:
                    inputs = {key: values[key] for key in task.dependencies}
                value = task(inputs)
                del inputs
            except BaseException as error:
                errors.append(error)
                for _ in range(threads):
                    ready.put(None)
                return
            with lock:
                values[task.key] = value
                _drop_used(task, values, pending, wanted)
                remaining -= 1
                finished = remaining == 0
                for user in users.pop(task.key, ()):
                    lacking[user.key] -= 1
                    if not lacking[user.key]:
                        ready.put(user)
            if finished:
                for _ in range(threads):
                    ready.put(None)
                return

    helpers = [_helpers.submit(work) for _ in range(threads - 1)]
    work()
    for helper in helpers:
        helper.result()
    if errors:
        raise errors[0]
