"""One NodeAgent actor on each Ray node, and the analytics' line to them."""

from __future__ import annotations

import logging
import math
import os
import pickle
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deisa.ray._engine.ray_cluster import node_cpus
from deisa.ray._engine.ray_losses import explain_loss
from deisa.ray._graph.leaves import AgentAddress
from deisa.ray._state.events import AgentLost, Event
from deisa.ray._state.plan import Boxes, StartPlan
from deisa.ray._state.presence import State, in_use, judge_presence
from deisa.ray._state.takeover import NodeSnapshot, Wreck, find_wreck
from deisa.ray._transport.address import agent_address, this_process
from deisa.ray._transport.descriptor_limit import raise_descriptor_limit
from deisa.ray._transport.journal import JournalLine
from deisa.ray._transport.server import AgentServer
from deisa.ray.config import Settings
from deisa.ray.errors import AgentLostError, BridgeLostError, DeisaError, SessionError, SessionInUseError

logger = logging.getLogger("deisa.ray")

NAMESPACE = "deisa-ray"
AGENT_CALLS = 8  # calls an agent serves at once: a long poll, and the short ones beside it
POLL_S, POLL_S_PER_NODE = 2.0, 0.01  # how long an agent waits for something to say; also its sign of our life
CHECK_NODES_S = 2.0  # how often the listener looks for new nodes, and whether Ray is still there
CHECK_HOLDER_S = 0.25  # how often it is asked whether the analytics that has the session has gone
LINGER_S = 2.0  # that an agent which has ended stays for a last answer, if anyone asked
OPEN_TIMEOUT_S = 120.0
CLOSE_TIMEOUT_S = 15.0
ASK_WHY_S = 3.0
POSITIONS_TIMEOUT_S = 5.0


@ray.remote(num_cpus=0, max_restarts=0, max_concurrency=AGENT_CALLS)
class NodeAgent:
    """The actor around a node's `AgentServer`. It is detached, and ends itself when left alone."""

    def __init__(self, settings: Settings, run_id: str, node_id: str, driver_id: str, holder: str) -> None:
        self._identity = (settings, run_id, node_id, driver_id, holder)
        self._server: AgentServer | None = None
        self._opening = threading.Event()
        threading.Thread(target=self._end_unopened, daemon=True).start()

    def _end_unopened(self) -> None:
        """End where the analytics died in between: nobody else would ever call a detached actor."""
        if not self._opening.wait(OPEN_TIMEOUT_S):
            os._exit(0)

    def open(self) -> tuple[str, bool]:
        """Start serving; returns the agent's id, and whether ranks of this host come to it."""
        self._opening.set()
        raise_descriptor_limit()
        self._server = AgentServer(*self._identity)
        threading.Thread(target=self._end_with_server, args=(self._server,), daemon=True).start()
        return self._server.agent_id, self._server.serving

    @staticmethod
    def _end_with_server(server: AgentServer) -> None:
        server.closed.wait()
        time.sleep(LINGER_S)
        os._exit(0)

    def call(self, driver_id: str, method: str, *arguments: Any) -> Any:
        """Pass a call on to the server, if it comes from the analytics that the server serves."""
        return self._opened.call(driver_id, method, arguments)

    def poll(self, driver_id: str, timeout_s: float) -> bytes:
        """Wait for events; they are pickled here because Ray takes longer over anything but bytes."""
        return pickle.dumps(self.call(driver_id, "poll", timeout_s))

    def driver_presence(self) -> tuple[State, float, str]:
        """Say whether the analytics is there, for one that would take over."""
        return self._opened.driver_presence

    def take_over(self, driver_id: str, holder: str) -> NodeSnapshot:
        """Serve another analytics from now on."""
        return self._opened.take_over(driver_id, holder)

    @property
    def _opened(self) -> AgentServer:
        if self._server is None:
            raise SessionError("the agent has not been opened")
        return self._server


class RayAgents:
    """The agents of one session, and the thread that listens to them.

    Attributes
    ----------
    predecessor : mapping of str to NodeSnapshot
        By node, what the agents of an analytics that died still hold; empty where there was none.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._run_id = uuid.uuid4().hex
        self._driver_id = uuid.uuid4().hex
        self._holder = this_process()
        self.predecessor: Mapping[str, NodeSnapshot] = {}
        self._line: JournalLine | None = None
        self._actors: dict[str, Any] = {}
        self._addresses: dict[str, AgentAddress] = {}
        self._events: queue.SimpleQueue[list[tuple[str, Event]]] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # nodes to be polled again
        self._closing = threading.Event()
        self._adding = threading.Lock()
        self._started = False
        self._sign_of_life: Any = None
        self._listener = threading.Thread(target=self._listen, name="deisa-listener", daemon=True)

    def open(self) -> None:
        """Take over the agents of an analytics that has died, or start one on every node that is alive.

        Raises
        ------
        SessionInUseError
            When the analytics that has this session is still there.
        """
        self._take_over(self._find_predecessor())
        wreck = find_wreck(self.predecessor)
        if wreck is not None and self._settings.leftover == "drop":
            self._discard(wreck)
        try:
            if not self._started:
                self._add_nodes()
        except BaseException:
            if not self.predecessor:
                self._kill_all()
            raise
        # A journal is never made shorter here: this analytics may end before it has written its own.
        self.follow(max((len(node.handled) for node in self.predecessor.values()), default=0))
        self._sign_of_life = ray.put(None)
        self._listener.start()

    def clear_away(self, wreck: Wreck) -> None:
        """End the agents of an analytics that died, with what they hold, and start others."""
        self._discard(wreck)
        for node_id in self._add_nodes():
            self._answered.put(node_id)  # to be polled
        self.follow(0)

    def _discard(self, wreck: Wreck) -> None:
        """End the agents that have been taken over, with what they hold."""
        logger.warning(
            "session %r cannot go on: its analytics has gone, and %s. It is cleared away, and a new run starts; %d "
            "complete timesteps are dropped that no callback has handled (with DEISA_RAY_LEFTOVER=deliver an "
            "analytics gets them first)",
            self._settings.session,
            wreck.why,
            wreck.unhandled,
        )
        with self._adding:
            self._end_agents(
                BridgeLostError(f"{wreck.why}; then another analytics has cleared the session away")
            )
            if self._line is not None:
                self._line.close()
            self._line, self.predecessor, self._actors, self._addresses = None, {}, {}, {}
            self._run_id, self._started = uuid.uuid4().hex, False

    def _find_predecessor(self) -> dict[str, Any]:
        """The agents, by node, of an earlier analytics of this session that has gone; waits until that is certain."""
        started, said = time.monotonic(), -math.inf
        while True:
            named = self._agents_of_session()
            presence = _answers({name: actor.driver_presence.remote() for name, actor in named.items()})
            # Those that have just ended give no answer, nor do those whose analytics died before it had opened them.
            found = {_node_of(name): named[name] for name in presence}
            now = time.monotonic()
            verdict = judge_presence([(state, quiet) for state, quiet, _ in presence.values()], now - started)
            if verdict == "gone":
                return found
            holder = next(holder for _, _, holder in presence.values())
            if verdict == "here":
                raise SessionInUseError(in_use(self._settings.session, "on this cluster", holder))
            if now - said > self._settings.warn_every_s:
                said = now
                logger.warning(
                    "session %r belongs to %s: waiting until it is certain whether that has gone",
                    self._settings.session,
                    holder,
                )
            time.sleep(CHECK_HOLDER_S)

    def _agents_of_session(self) -> dict[str, Any]:
        """The agents by name; a node may have several, if an analytics died while it started."""
        found = {}
        for named in ray.util.list_named_actors(all_namespaces=True):
            session, _, _ = named["name"].partition(":")
            if named["namespace"] == NAMESPACE and session == self._settings.session:
                with suppress(ValueError):  # it has just ended
                    found[named["name"]] = ray.get_actor(named["name"], NAMESPACE)
        return found

    def _take_over(self, found: Mapping[str, Any]) -> None:
        self.predecessor = _answers(
            {node: actor.take_over.remote(self._driver_id, self._holder) for node, actor in found.items()}
        )
        for node_id, state in self.predecessor.items():
            self._run_id = state.agent_id.partition(":")[0]
            self._actors[node_id] = found[node_id]
            self._addresses[node_id] = self._address_of(node_id, state.agent_id)
            self._started |= state.plan is not None
            if state.joined and state.plan is None:
                self._events.put([(node_id, event) for event in state.joined])

    def _address_of(self, node_id: str, agent_id: str) -> AgentAddress:
        return AgentAddress(node_id, agent_id, agent_address(self._settings))

    def follow(self, callbacks: int) -> memoryview | None:
        """Stay connected to the agent of this host, and get words of memory that outlive this process.

        Returns
        -------
        memoryview or None
            None where this process and its node's agent do not reach each other.
        """
        try:
            if self._line is None:
                self._line = JournalLine(agent_address(self._settings), self._driver_id)
            return self._line.journal(callbacks)
        except (OSError, DeisaError) as error:
            if callbacks:
                logger.warning(
                    "this analytics does not reach the agent of its node (%s), which would remember what it has "
                    "handled. If it dies, one that takes over runs callbacks again for timesteps that are still held. "
                    "Start it in the network namespace of its Ray node, or set DEISA_RAY_SOCKET_PATH",
                    error,
                )
            return None

    def _add_nodes(self) -> list[str]:
        with self._adding:
            new = [node_id for node_id in self._nodes() if node_id not in self._actors]
            for node_id in new:
                self._actors[node_id] = self._start_agent(node_id)
            opened = self._ask(new, lambda _, actor: actor.open.remote(), OPEN_TIMEOUT_S)
            for node_id, (agent_id, serving) in opened.items():
                self._addresses[node_id] = self._address_of(node_id, agent_id)
                if not serving:
                    logger.info(
                        "node %s shares its host with another node, whose agent serves the ranks", node_id
                    )
            return new

    def _nodes(self) -> Mapping[str, int]:
        """The nodes that get an agent, and the CPUs of each."""
        return node_cpus()

    def _start_agent(self, node_id: str) -> Any:
        return NodeAgent.options(  # type: ignore[attr-defined]
            name=f"{self._settings.session}:{node_id}:{self._driver_id}",
            namespace=NAMESPACE,
            lifetime="detached",
            enable_task_events=False,  # Ray's head would keep a record of every call
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        ).remote(self._settings, self._run_id, node_id, self._driver_id, self._holder)

    def _ask(
        self, node_ids: Sequence[str], call: Callable[[str, Any], Any], timeout_s: float
    ) -> dict[str, Any]:
        """Call all agents at once and wait for the answers."""
        references = [call(node_id, self._actors[node_id]) for node_id in node_ids]
        try:
            return dict(zip(node_ids, ray.get(references, timeout=timeout_s), strict=True))
        except RayTaskError as exc:
            if isinstance(exc.cause, DeisaError):
                raise exc.cause from None
            raise
        except RayError as exc:
            raise AgentLostError(f"an agent did not answer: {explain_loss(exc)}") from exc

    def _listen(self) -> None:
        try:
            self._keep_polling()
        except (Exception, SystemExit) as error:  # Ray itself has gone
            if not self._closing.is_set():
                reason = f"the connection to Ray has gone ({error!r})"
                self._events.put([(node_id, AgentLost(reason)) for node_id in self._actors])

    def _keep_polling(self) -> None:
        """Have one call wait at every agent; its answer goes to `events` without passing through this thread."""
        for node_id in self._actors:
            self._poll(node_id)
        checked = time.monotonic()
        while not self._closing.is_set():
            with suppress(queue.Empty):
                answered = self._answered.get(timeout=CHECK_NODES_S)
                if answered is not None and not self._closing.is_set():
                    self._poll(answered)
            if time.monotonic() - checked > CHECK_NODES_S:
                checked = time.monotonic()
                ray.wait([self._sign_of_life], timeout=0)  # raises when Ray has gone
                if not self._started:
                    self._poll_new_nodes()

    def _poll_new_nodes(self) -> None:
        try:
            for node_id in self._add_nodes():
                self._poll(node_id)
        except (DeisaError, RayError) as exc:
            logger.error("a node that joined the cluster got no agent: %s", exc)

    def _poll(self, node_id: str) -> None:
        wait_s = POLL_S + POLL_S_PER_NODE * len(self._actors)
        actor = self._actors[node_id]
        reference = actor.poll.remote(self._driver_id, wait_s)
        reference.future().add_done_callback(partial(self._take_answer, node_id, actor))

    def _take_answer(self, node_id: str, actor: Any, answer: Future[bytes]) -> None:
        if self._actors.get(node_id) is not actor:
            return  # it has been cleared away
        try:
            events: list[Event] = pickle.loads(answer.result())
        except Exception as exc:
            if not self._closing.is_set():
                threading.Thread(target=self._report_loss, args=(node_id, actor, exc), daemon=True).start()
            return
        if events:
            self._events.put([(node_id, event) for event in events])
        self._answered.put(node_id)

    def _report_loss(self, node_id: str, actor: Any, error: Exception) -> None:
        """Say that an agent has gone; what a first call says is often that a connection has ended, a second one why."""
        if isinstance(error, RayActorError):
            try:
                ray.get(actor.driver_presence.remote(), timeout=ASK_WHY_S)
            except RayError as later:
                if not isinstance(later, GetTimeoutError):
                    error = later
        reason = f"its process died ({explain_loss(error)})" if isinstance(error, RayError) else str(error)
        self._events.put([(node_id, AgentLost(reason))])

    def events(self, timeout_s: float) -> list[tuple[str, Event]]:
        """Wait for events of any node; returns all that have come."""
        events: list[tuple[str, Event]] = []
        with suppress(queue.Empty):
            events += self._events.get(timeout=timeout_s)
            while True:
                events += self._events.get_nowait()
        return events

    def address(self, node_id: str) -> AgentAddress:
        """Where readers on a node find its agent."""
        return self._addresses[node_id]

    def report_progress(self, text: str) -> None:
        """Tell the waiting ranks what the analytics waits for."""
        self._tell_all("report_progress", text)

    def dismiss(self, error: DeisaError) -> None:
        """Tell the ranks that the run ends."""
        self._tell_all("dismiss", error)

    def _tell_all(self, method: str, argument: Any) -> None:
        for actor in list(self._actors.values()):
            actor.call.remote(self._driver_id, method, argument)

    def positions(self) -> Mapping[int, float]:
        """The timestep that each bridge is at which has not closed, as far as its agent answers soon."""
        calls = {
            n: actor.call.remote(self._driver_id, "positions") for n, actor in list(self._actors.items())
        }
        positions: dict[int, float] = {}
        for node_positions in _answers(calls, POSITIONS_TIMEOUT_S).values():
            positions |= node_positions
        return positions

    def cpus(self) -> Mapping[str, int]:
        """CPUs of every node that Ray may use, at least one."""
        return {node_id: max(1, cpus) for node_id, cpus in self._nodes().items()}

    def bound_bytes(self, plan: StartPlan, boxes: Mapping[str, Boxes]) -> Mapping[str, int]:
        """Chunk memory that each node needs."""
        return self._call_all("bound_bytes", plan, boxes)

    def start(self, plan: StartPlan, boxes: Mapping[str, Boxes]) -> None:
        """Create the slots and let the ranks go."""
        self._started = True
        self._call_all("start", plan, boxes)

    def _call_all(self, method: str, plan: StartPlan, boxes: Mapping[str, Boxes]) -> dict[str, Any]:
        kept = ray.put(plan)  # the same for all
        return self._ask(
            list(self._actors),
            lambda node_id, actor: actor.call.remote(self._driver_id, method, kept, boxes.get(node_id, {})),
            OPEN_TIMEOUT_S,
        )

    def release(self, consumer: str, steps: Mapping[str, Sequence[tuple[str, int]]]) -> None:
        """End leases; does not wait."""
        for node_id, node_steps in steps.items():
            self._actors[node_id].call.remote(self._driver_id, "release", consumer, list(node_steps))

    def close(self, error: DeisaError | None) -> None:
        """End the session on every node and remove the agents."""
        if self._stop_listening() and ray.is_initialized():
            self._end_agents(error)
        self._end_listener()

    def _end_agents(self, error: DeisaError | None) -> None:
        calls = {n: actor.call.remote(self._driver_id, "close", error) for n, actor in self._actors.items()}
        closed = _answers(calls, CLOSE_TIMEOUT_S)  # but for those that another analytics has taken over
        self._kill(node_id for node_id in self._actors if node_id in closed)

    def abandon(self, error: DeisaError) -> None:
        """Go, and leave the agents to another analytics."""
        if self._stop_listening() and ray.is_initialized():
            _answers(
                {n: a.call.remote(self._driver_id, "abandon", str(error)) for n, a in self._actors.items()},
                CLOSE_TIMEOUT_S,
            )
        self._end_listener()

    def _stop_listening(self) -> bool:
        """Returns whether that was not done before."""
        if self._closing.is_set():
            return False
        self._closing.set()
        self._answered.put(None)
        return True

    def _end_listener(self) -> None:
        if self._line is not None:
            self._line.close()
        if self._listener.is_alive() and self._listener is not threading.current_thread():
            self._listener.join(CLOSE_TIMEOUT_S)

    def _kill(self, node_ids: Iterable[str]) -> None:
        for node_id in node_ids:
            ray.kill(self._actors[node_id], no_restart=True)

    def _kill_all(self) -> None:
        self._kill(self._actors)


def _node_of(name: str) -> str:
    """The node that an agent of that name serves."""
    return name.split(":")[1]


def _answers(calls: Mapping[str, Any], timeout_s: float = OPEN_TIMEOUT_S) -> dict[str, Any]:
    """The answers to calls, by node, without those that failed or did not come in time."""
    answers = {}
    there, _ = (
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s) if calls else ([], [])
    )
    for node_id, call in calls.items():
        if call in there:
            try:
                answers[node_id] = ray.get(call)
            except (RayError, DeisaError) as error:
                logger.debug("the agent of node %s: %s", node_id, error)
    return answers
