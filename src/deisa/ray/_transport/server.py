"""The agent's end: serves the ranks, the readers and the subscribers of one node.

One thread waits on all sockets. The analytics calls from other threads; one lock guards the node and the
connections. `Node` decides, `Exchange` carries between its decisions and the connections, `Store` has the memory.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from deisa.ray._state.events import AgentLost, Event
from deisa.ray._state.feedback import Proposal, Verdict
from deisa.ray._state.node import Node
from deisa.ray._state.plan import NodePlan, StartPlan
from deisa.ray._state.presence import Presence, State
from deisa.ray._state.subscriber import Subscriber
from deisa.ray._state.takeover import NodeSnapshot
from deisa.ray._transport import messages
from deisa.ray._transport.connections import Connections
from deisa.ray._transport.exchange import Exchange
from deisa.ray._transport.listening import listen
from deisa.ray._transport.pages import RING_SCAN_S
from deisa.ray._transport.store import Store
from deisa.ray.config import Settings
from deisa.ray.errors import (
    DeisaError,
    SessionEndedError,
    SessionInUseError,
)

logger = logging.getLogger("deisa.ray.agent")

CONSUMER = "analytics"
TICK_S = 0.5
NO_PAGES = "cannot be set: the session has not been started on this node, or has ended"


def yield_to_ranks() -> None:
    """Have the calling thread never interrupt another one when it wakes up.

    A rank wakes its agent by the very message it sends: on a busy node the kernel would let the agent run
    in the rank's place, in the middle of ``send``. As a batch thread the agent waits for a free core, or
    until the rank waits itself.
    """
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


class AgentServer:
    """The memory, the sockets and the decisions of one node.

    Parameters
    ----------
    settings : Settings
    run_id, node_id : str
        Which run this agent belongs to, and which node it serves.
    driver_id : str
        The analytics that may `call`, until another one takes over.
    holder : str
        The process of that analytics, in words.
    ends_alone : bool
        Whether it ends when it no longer hears from its analytics; not where both are one process.
    if_lost : str
        What ranks are told that may have happened if it goes without a word.
    """

    def __init__(
        self,
        settings: Settings,
        run_id: str,
        node_id: str,
        driver_id: str = "",
        holder: str = "another analytics",
        *,
        ends_alone: bool = True,
        if_lost: str = "",
    ) -> None:
        self._settings = settings
        self.agent_id = f"{run_id}:{node_id}"
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        presence = Presence(driver_id, holder, time.monotonic(), ends_alone=ends_alone)
        self._subscriber = Subscriber(CONSUMER, presence)  # of those who call without saying who they are
        self._node = Node(
            settings.session, socket.gethostname(), [self._subscriber], settings.driver_timeout_s
        )
        self._store = Store(settings.session, settings.memory_fraction, if_lost)
        self._calls: Mapping[str, Callable[..., Any]] = {
            "poll": self.poll,
            "abandon": self.abandon,
            "report_progress": self.report_progress,
            "positions": self.positions,
            "dismiss": self.dismiss,
            "bound_bytes": self.bound_bytes,
            "start": self.start,
            "release": self.release,
            "propose": self.propose,
            "settle": self.settle,
            "finish": self.finish,
            "close": self.close,
        }
        self.closed = threading.Event()
        listener = listen(settings, run_id)
        self.serving = listener is not None
        self._connections = Connections(listener)
        self._exchange = Exchange(
            settings,
            self.agent_id,
            self._node,
            self._store,
            self._connections,
            self.close,
            self._changed.notify_all,
        )
        self._thread = threading.Thread(target=self._serve, name="deisa-agent", daemon=True)
        self._thread.start()

    # What an analytics calls.

    def call(self, driver_id: str, method: str, arguments: Sequence[Any]) -> Any:
        """Call a method for an analytics.

        Raises
        ------
        SessionInUseError
            When another one has taken over in the meantime: this one had been given up.
        """
        with self._lock:
            if self._node.subscriber_of(driver_id) is None:
                raise SessionInUseError(
                    f"session {self._settings.session!r} has been taken over by {self._subscriber.presence.holder}, "
                    "because this analytics did not answer"
                )
            if method != "close":
                return self._calls[method](*arguments)
        self.close(*arguments)  # it waits for a thread that needs the lock
        return None

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """Wait for events for at most `timeout_s`; also the analytics' sign of life.

        Events that go to a connection do not come here.
        """
        subscriber = self._subscriber
        presence = subscriber.presence
        with self._changed:
            self._node.begin_poll(subscriber)
            self._exchange.carry_out()
            driver_id = presence.driver_id
            deadline = time.monotonic() + timeout_s
            events: Sequence[Event] = []
            try:
                while presence.driver_id == driver_id and not presence.reason:
                    if not subscriber.listens:
                        events = self._node.hear(subscriber)
                    remaining = deadline - time.monotonic()
                    if events or self.closed.is_set() or remaining <= 0:
                        break
                    self._changed.wait(remaining)
            finally:
                presence.end_poll(driver_id, time.monotonic())
            return events

    @property
    def driver_presence(self) -> tuple[State, float, str]:
        """What `Presence.state` says of the analytics, and which process it is.

        Raises
        ------
        SessionEndedError
        """
        with self._lock:
            self._check_open()
            presence = self._subscriber.presence
            return (*presence.state(time.monotonic()), presence.holder)

    def _check_open(self) -> None:
        if self.closed.is_set():
            raise SessionEndedError(f"agent {self.agent_id} has ended")

    def abandon(self, reason: str) -> None:
        """The analytics goes, and another one may take over."""
        with self._lock:
            self._node.leave(self._subscriber, messages.shorten(reason), time.monotonic())
            self._exchange.carry_out()
            self._changed.notify_all()

    def take_over(self, driver_id: str, holder: str = "another analytics") -> NodeSnapshot:
        """Serve another analytics from now on, and tell it where the last one was.

        Raises
        ------
        SessionEndedError
            When the agent was just ending.
        """
        with self._lock:
            self._check_open()
            line = self._subscriber.disconnect()
            last = self._connections.get(line) if line is not None else None
            if last is not None:
                self._exchange.drop(last, "")
            self._node.take_over(self._subscriber, driver_id, holder, time.monotonic())
            self._exchange.carry_out()
            for connection in self._connections:  # a rank that has died is to be known as lost
                self._exchange.receive(connection)
            self._exchange.look()
            self._exchange.report_losses()
            self._changed.notify_all()
            handled = self._store.handled(self._subscriber.name)
            return self._node.state_for(self._subscriber, self.agent_id, handled, self._store.feedback_state)

    def report_progress(self, text: str) -> None:
        """Pass on what the analytics waits for: to all ranks before the start, then to those that have no slot."""
        with self._lock:
            self._node.report_progress(messages.shorten(text), time.monotonic())
            self._exchange.carry_out()

    def positions(self) -> dict[int, float]:
        """The timestep that each bridge is at which has not closed."""
        with self._lock:
            return self._node.positions()

    def dismiss(self, error: DeisaError) -> None:
        """The analytics ends the run: tell the ranks; what has arrived stays until `close`."""
        with self._lock:
            self._node.dismiss(error)
            self._exchange.carry_out()

    def bound_bytes(self, plan: StartPlan, here: NodePlan) -> int:
        """Chunk memory this node needs for `plan`; raises as `Store.bound_bytes` does."""
        with self._lock:
            owners = self._exchange.owners(here.parts)
        return self._store.bound_bytes(owners, plan, here.boxes)

    def start(self, plan: StartPlan, here: NodePlan) -> None:
        """Create the slots and let the ranks go."""
        with self._lock:
            self._exchange.start(plan, here)
            self._connections.wake()  # from now on the thread looks into the rings

    def release(self, consumer: str, steps: Sequence[tuple[str, int]]) -> None:
        """End a consumer's leases on (array, timestep) pairs, and give free slots back to the ranks."""
        with self._lock:
            if not self.closed.is_set() and self._store.table is not None:  # else the memory has gone
                self._node.release(consumer, steps)
                self._exchange.carry_out()

    def propose(self, proposal: Proposal) -> Verdict:
        """Say whether a value can be set for the simulation; nobody gets an answer to its question until `settle`."""
        with self._lock:
            self._check_open()
            feedback = self._store.feedback
            return feedback.propose(proposal) if feedback is not None else Verdict(refusal=NO_PAGES)

    def settle(self, number: int, is_accepted: bool) -> None:
        """Keep the value of a proposal, or drop it."""
        with self._lock:
            if self._store.feedback is not None:
                self._store.feedback.settle(number, is_accepted=is_accepted)

    def finish(self, timestep: int) -> None:
        """The analytics has finished with a timestep."""
        with self._lock:
            if self._store.feedback is not None:
                self._store.feedback.finish(timestep)

    def close(self, error: DeisaError | None = None) -> None:
        """End the session on this node: tell the ranks why, close every socket, free the memory."""
        with self._lock:
            if self.closed.is_set():
                return
            if error is not None:
                for connection in self._connections:
                    if self._node.bridge_of(connection.number) is not None:
                        self._exchange.refuse(connection, error)
            self.closed.set()
            self._connections.wake()
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The thread that serves the sockets.

    def _serve(self) -> None:
        yield_to_ranks()
        try:
            while not self.closed.is_set():
                ready = self._connections.wait(TICK_S if self._node.plan is None else RING_SCAN_S)
                with self._lock:
                    if not self.closed.is_set():
                        self._exchange.serve(ready)
        except Exception as error:
            logger.exception("the agent has failed")
            with self._lock:
                self._node.report(AgentLost(f"{type(error).__name__}: {error}"))
                self._exchange.tell_subscribers()
            raise
        finally:
            self._shut()

    def _shut(self) -> None:
        with self._lock:
            self._connections.close()
            self._store.close()
            self.closed.set()
            self._changed.notify_all()
