"""The agents of a session, one on each Ray node, and how the analytics hears from them.

The agent of its own node is heard over a line to it, the others by long polls::

    RayAgents -- AnalyticsLine ---- agent of this node
              -- Polls ------------ agents of all others
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from deisa.ray._engine.ray_actor import OPEN_TIMEOUT_S, agents_of_session, answers, node_of, start_agent
from deisa.ray._engine.ray_cluster import node_cpus
from deisa.ray._engine.ray_losses import explain_loss, why_hung_up
from deisa.ray._engine.ray_polls import Polls
from deisa.ray._graph.leaves import AgentAddress
from deisa.ray._state.events import AgentLost, Event
from deisa.ray._state.feedback import Proposal, Verdict
from deisa.ray._state.journal import Journal
from deisa.ray._state.plan import NodePlan, StartPlan
from deisa.ray._state.presence import in_use, judge_presence
from deisa.ray._state.takeover import NodeSnapshot, Wreck, find_wreck
from deisa.ray._transport.address import agent_address, this_process
from deisa.ray._transport.line import AnalyticsLine
from deisa.ray.config import Settings
from deisa.ray.errors import AgentLostError, BridgeLostError, DeisaError, ProtocolError, SessionInUseError

logger = logging.getLogger("deisa.ray")

FEW_AGENTS = 8  # that each get a plan of their own

CHECK_HOLDER_S = 0.25  # how often it is asked whether the analytics that has the session has gone
CLOSE_TIMEOUT_S = 15.0
POSITIONS_TIMEOUT_S = 5.0
VERDICT_TIMEOUT_S = 60.0
MOST_ON_LINE = 2**20  # bytes of a value; a larger one would hold up events


class RayAgents:
    """The agents of one session.

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
        self._line: AnalyticsLine | None = None
        self._line_node = ""
        self._actors: dict[str, Any] = {}
        self._addresses: dict[str, AgentAddress] = {}
        self._events: queue.SimpleQueue[list[tuple[str, Event]]] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._adding = threading.Lock()
        self._started = False
        self._sign_of_life: Any = None
        self._polls = Polls(self._driver_id, self._hear, self._lose, self._look, self._lose_ray)

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
        self._listen()
        self._sign_of_life = ray.put(None)
        self._polls.start()

    def clear_away(self, wreck: Wreck) -> None:
        """End the agents of an analytics that died, with what they hold, and start others."""
        self._discard(wreck)
        self._add_nodes()
        self._listen()

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
            self._polls.clear()
            line, self._line = self._line, None
            self._end_agents(
                BridgeLostError(f"{wreck.why}; then another analytics has cleared the session away")
            )
            if line is not None:
                line.close()
            self.predecessor, self._actors, self._addresses = {}, {}, {}
            self._run_id, self._started = uuid.uuid4().hex, False

    def _find_predecessor(self) -> dict[str, Any]:
        """The agents, by node, of an earlier analytics of this session that has gone; waits until that is certain."""
        started, said = time.monotonic(), -math.inf
        while True:
            named = agents_of_session(self._settings.session)
            presence = answers({name: actor.driver_presence.remote() for name, actor in named.items()})
            # Those that have just ended give no answer, nor do those whose analytics died before it had opened them.
            found = {node_of(name): named[name] for name in presence}
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

    def _take_over(self, found: Mapping[str, Any]) -> None:
        self.predecessor = answers(
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

    def _listen(self) -> None:
        """Hear from all agents from now on: from that of this host over a line, if it can be reached."""
        try:
            # A journal is never made shorter here: this analytics may end before it has written its own.
            noted = max((len(node.handled) for node in self.predecessor.values()), default=0)
            self._open_line(noted, listens=True)
        except (OSError, DeisaError) as error:
            logger.debug("no line to the agent of this host: %s", error)
        for node_id, actor in self._actors.items():
            if self._line is None or node_id != self._line_node:
                self._polls.add(node_id, actor)

    def _open_line(self, callbacks: int, *, listens: bool) -> AnalyticsLine:
        line = AnalyticsLine(agent_address(self._settings), self._driver_id, callbacks, listens=listens)
        node_id = next((n for n, a in self._addresses.items() if a.agent_id == line.agent_id), None)
        if node_id is None:
            line.close()
            raise ProtocolError(f"agent {line.agent_id} has another run")
        self._line, self._line_node = line, node_id
        line.start(partial(self._hear, node_id), partial(self._lose_line, line, self._actors[node_id]))
        return line

    def follow(self, callbacks: int) -> Journal | None:
        """Get a journal in memory of the agent of this host, which outlives this process.

        Returns
        -------
        Journal or None
            None where this process and its node's agent do not reach each other.
        """
        try:
            # Events of an agent that is polled stay there: an answer with some may be under way.
            line = self._line or self._open_line(callbacks, listens=False)
            return line.journal(callbacks)
        except (OSError, DeisaError) as error:
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
        return start_agent(self._settings, self._run_id, node_id, self._driver_id, self._holder)

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

    def _look(self) -> None:
        """See whether Ray is still there, and whether nodes have joined."""
        ray.wait([self._sign_of_life], timeout=0)  # raises when Ray has gone
        if self._started:
            return
        try:
            for node_id in self._add_nodes():
                self._polls.add(node_id, self._actors[node_id])
        except (DeisaError, RayError) as exc:
            logger.error("a node that joined the cluster got no agent: %s", exc)

    def _hear(self, node_id: str, events: Sequence[Event]) -> None:
        self._events.put([(node_id, event) for event in events])

    def _lose(self, node_id: str, reason: str) -> None:
        self._hear(node_id, [AgentLost(reason)])

    def _lose_line(self, line: AnalyticsLine, actor: Any, reason: str) -> None:
        if self._line is line and not self._closing.is_set():
            why = why_hung_up(actor, self._driver_id, reason)
            if not self._closing.is_set():
                self._lose(self._line_node, why)

    def _lose_ray(self, error: BaseException) -> None:
        for node_id in self._actors:
            self._lose(node_id, f"the connection to Ray has gone ({error!r})")

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
        for node_positions in answers(calls, POSITIONS_TIMEOUT_S).values():
            positions |= node_positions
        return positions

    def cpus(self) -> Mapping[str, int]:
        """CPUs of every node that Ray may use, at least one."""
        return {node_id: max(1, cpus) for node_id, cpus in self._nodes().items()}

    def bound_bytes(self, plan: StartPlan, nodes: Mapping[str, NodePlan]) -> Mapping[str, int]:
        """Chunk memory that each node needs."""
        return self._call_all("bound_bytes", plan, nodes)

    def start(self, plan: StartPlan, nodes: Mapping[str, NodePlan]) -> None:
        """Create the slots and let the ranks go."""
        self._started = True
        self._polls.expect_releases(plan.slots)
        self._call_all("start", plan, nodes)

    def _call_all(self, method: str, plan: StartPlan, nodes: Mapping[str, NodePlan]) -> dict[str, Any]:
        # An object of Ray's store takes milliseconds to come; what is sent to many agents is one.
        kept = ray.put(plan) if len(self._actors) > FEW_AGENTS else plan
        return self._ask(
            list(self._actors),
            lambda node_id, actor: actor.call.remote(
                self._driver_id, method, kept, nodes.get(node_id, NodePlan())
            ),
            OPEN_TIMEOUT_S,
        )

    def release(self, consumer: str, steps: Mapping[str, Sequence[tuple[str, int]]]) -> None:
        """End leases; does not wait."""
        line = self._line
        for node_id, node_steps in steps.items():
            if line is not None and node_id == self._line_node:
                line.release(consumer, node_steps)
            else:
                self._polls.release(node_id, consumer, node_steps)

    def propose(self, proposal: Proposal, nodes: Collection[str]) -> Mapping[str, Verdict]:
        """Ask nodes whether a value can be set for the simulation."""
        line = self._line if self._line_node in nodes else None
        if len(proposal.setting.value) > MOST_ON_LINE:
            line = None
        others = [node_id for node_id in nodes if line is None or node_id != self._line_node]
        try:
            if line is not None:
                line.propose(proposal)
            verdicts: dict[str, Verdict] = self._ask(
                others,
                lambda _, actor: actor.call.remote(self._driver_id, "propose", proposal),
                VERDICT_TIMEOUT_S,
            )
            own = line.verdict(proposal.number, VERDICT_TIMEOUT_S) if line is not None else None
        except OSError as error:
            if isinstance(error, DeisaError):
                raise
            raise AgentLostError(f"the agent of this host has gone: {error}") from error
        if line is not None:
            if own is None:
                raise AgentLostError("the agent of this host did not answer")
            verdicts[self._line_node] = own
        return verdicts

    def settle(self, number: int, is_accepted: bool, nodes: Collection[str]) -> None:
        """Tell nodes what has become of a proposal."""
        line = self._line if self._line_node in nodes else None
        if line is not None:
            line.settle(number, is_accepted)
        self._ask(
            [node_id for node_id in nodes if line is None or node_id != self._line_node],
            lambda _, actor: actor.call.remote(self._driver_id, "settle", number, is_accepted),
            VERDICT_TIMEOUT_S,
        )

    def finish(self, timestep: int, nodes: Collection[str]) -> None:
        """Tell nodes that a timestep is finished; does not wait."""
        for node_id in nodes:
            if self._line is not None and node_id == self._line_node:
                self._line.finish(timestep)
            else:
                self._actors[node_id].call.remote(self._driver_id, "finish", timestep)

    def close(self, error: DeisaError | None) -> None:
        """End the session on every node and remove the agents."""
        if self._stop_listening() and ray.is_initialized():
            self._end_agents(error)
        self._end_listening()

    def _end_agents(self, error: DeisaError | None) -> None:
        calls = {n: actor.call.remote(self._driver_id, "close", error) for n, actor in self._actors.items()}
        closed = answers(calls, CLOSE_TIMEOUT_S)  # but for those that another analytics has taken over
        self._kill(node_id for node_id in self._actors if node_id in closed)

    def abandon(self, error: DeisaError) -> None:
        """Go, and leave the agents to another analytics."""
        if self._stop_listening() and ray.is_initialized():
            answers(
                {n: a.call.remote(self._driver_id, "abandon", str(error)) for n, a in self._actors.items()},
                CLOSE_TIMEOUT_S,
            )
        self._end_listening()

    def _stop_listening(self) -> bool:
        """Returns whether that was not done before."""
        if self._closing.is_set():
            return False
        self._closing.set()
        self._polls.stop()
        return True

    def _end_listening(self) -> None:
        if self._line is not None:
            self._line.close()
        self._polls.join(CLOSE_TIMEOUT_S)

    def _kill(self, node_ids: Iterable[str]) -> None:
        for node_id in node_ids:
            ray.kill(self._actors[node_id], no_restart=True)

    def _kill_all(self) -> None:
        self._kill(self._actors)
