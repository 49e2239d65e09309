"""Long polls: how the analytics hears from the nodes to which it has no line of its own, and what it tells them.

A lease that has ended rides on the next poll of its node where ranks do not miss the slot (`WaitingReleases`), and for
`RIDE_S` at most: ranks of a node may need the slot which are ahead of the others.
"""

from __future__ import annotations

import math
import pickle
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from deisa.ray._engine.ray_losses import why_lost
from deisa.ray._state.events import Event, StepComplete
from deisa.ray._state.riding import WaitingReleases

POLL_S, POLL_S_PER_NODE = 2.0, 0.01  # how long an agent waits for something to say; also its sign of our life
CHECK_NODES_S = 2.0  # how often `look` is called
RIDE_S = 0.1  # that releases wait for a poll; less than blocked ranks wait before the analytics hears of it


class Polls:
    """Has one call wait at each agent; what it answers does not pass through the thread that makes the next call.

    Parameters
    ----------
    driver_id : str
    hear : callable
        Takes (node, events).
    lose : callable
        Takes (node, reason) when an agent does not answer any more.
    look : callable
        Called now and then.
    fail : callable
        Takes what `look`, or Ray, has raised: then nothing is polled any more.
    """

    def __init__(
        self,
        driver_id: str,
        hear: Callable[[str, Sequence[Event]], None],
        lose: Callable[[str, str], None],
        look: Callable[[], None],
        fail: Callable[[BaseException], None],
    ) -> None:
        self._driver_id = driver_id
        self._hear = hear
        self._lose = lose
        self._look = look
        self._fail = fail
        self._actors: dict[str, Any] = {}
        self._due: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # nodes to be polled now
        self._consumer = ""
        self._releases = WaitingReleases()
        self._releases_due = math.inf  # when those that wait have waited for long enough
        self._releasing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="deisa-listener", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def add(self, node_id: str, actor: Any) -> None:
        """Poll an agent from now on."""
        self._actors[node_id] = actor
        self._due.put(node_id)

    def clear(self) -> None:
        """Poll none of those agents any more."""
        self._actors = {}

    def expect_releases(self, slots: Mapping[str, int]) -> None:
        """Let releases ride on polls, of arrays with so many slots."""
        with self._releasing:
            self._releases.slots = slots

    def release(self, node_id: str, consumer: str, steps: Sequence[tuple[str, int]]) -> None:
        """End leases of the one consumer on (array, timestep) pairs: now, or with the next poll."""
        with self._releasing:
            self._consumer = consumer
            now = self._releases.add(node_id, steps)
            must_wake = not now and self._releases_due == math.inf
            if must_wake:
                self._releases_due = time.monotonic() + RIDE_S
        if must_wake:
            self._due.put(None)
        self._call_release(node_id, now)

    def _call_release(self, node_id: str, steps: Sequence[tuple[str, int]]) -> None:
        actor = self._actors.get(node_id)
        if steps and actor is not None:
            actor.call.remote(self._driver_id, "release", self._consumer, list(steps))

    def _release_overdue(self) -> None:
        if time.monotonic() < self._releases_due:
            return
        with self._releasing:
            overdue, self._releases_due = self._releases.take_all(), math.inf
        for node_id, steps in overdue.items():
            self._call_release(node_id, steps)

    def stop(self) -> None:
        """Make no more calls, and take no more answers."""
        self._ended.set()
        self._due.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._keep_polling()
        except (Exception, SystemExit) as error:
            if not self._ended.is_set():
                self._fail(error)

    def _keep_polling(self) -> None:
        looked = time.monotonic()
        while not self._ended.is_set():
            with suppress(queue.Empty):
                wait_s = min(CHECK_NODES_S, max(0.0, self._releases_due - time.monotonic()))
                node_id = self._due.get(timeout=wait_s)
                if node_id is not None and not self._ended.is_set():
                    self._poll(node_id)
            self._release_overdue()
            if time.monotonic() - looked > CHECK_NODES_S:
                looked = time.monotonic()
                self._look()

    def _poll(self, node_id: str) -> None:
        actor = self._actors.get(node_id)
        if actor is not None:
            wait_s = POLL_S + POLL_S_PER_NODE * len(self._actors)
            with self._releasing:
                steps = self._releases.poll(node_id)
                if not self._releases:
                    self._releases_due = math.inf
            riding = (self._consumer, list(steps)) if steps else ()
            reference = actor.poll.remote(self._driver_id, wait_s, *riding)
            reference.future().add_done_callback(partial(self._take, node_id, actor))

    def _take(self, node_id: str, actor: Any, answer: Future[bytes]) -> None:
        if self._actors.get(node_id) is not actor:
            return  # it has been cleared away
        try:
            events: Sequence[Event] = pickle.loads(answer.result())
        except Exception as error:
            if not self._ended.is_set():
                threading.Thread(target=self._report, args=(node_id, actor, error), daemon=True).start()
            return
        with self._releasing:
            complete = [event.array for event in events if isinstance(event, StepComplete)]
            self._releases.answer(node_id, complete)
        self._due.put(node_id)
        if events:
            self._hear(node_id, events)

    def _report(self, node_id: str, actor: Any, error: Exception) -> None:
        reason = why_lost(actor, error)
        if self._actors.get(node_id) is actor:
            self._lose(node_id, reason)
