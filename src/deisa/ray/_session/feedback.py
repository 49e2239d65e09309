"""What the analytics sets for the simulation: kept until the start, then proposed to the nodes.

`_state.feedback` says why there are two steps, and why every bridge gets the same answer.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from deisa.ray._session.engine import AgentGroup
from deisa.ray._state.feedback import (
    MAX_KEYS,
    FeedbackPlan,
    FeedbackState,
    Proposal,
    Setting,
    Verdict,
    accepted,
    settlement,
)
from deisa.ray._state.questions import FINISHED, check_key, check_timestep
from deisa.ray._state.values import encode_value
from deisa.ray._transport.limits import human_bytes
from deisa.ray.config import Settings
from deisa.ray.errors import ClosedError, FeedbackSizeError, UnsupportedValueError
from deisa.ray.report import FeedbackFigures

logger = logging.getLogger("deisa.ray")


class Feedback:
    """The values of one session. Any thread may set some.

    Parameters
    ----------
    agents : AgentGroup
    settings : Settings
    """

    def __init__(self, agents: AgentGroup, settings: Settings) -> None:
        self._agents = agents
        self._settings = settings
        self._most_bytes = int(settings.feedback_memory_mib * 2**20)
        self._proposing = threading.Lock()
        self._before: dict[tuple[str, int], Setting] | None = {}  # None from the start on
        self._ended = False
        self._nodes: Collection[str] = ()  # those with bridges
        self._number = self._last_accepted = 0
        self._told: dict[
            str, float
        ] = {}  # nodes whose bridges wait, with the timestep finished that they know of
        self._set = 0
        self._too_late: Counter[str] = Counter()

    def set(self, key: str, value: Any, timestep: int) -> None:
        """Set a value, on all nodes or on none.

        Raises
        ------
        FeedbackError, UnsupportedValueError
        ClosedError
            After the run.
        AgentLostError
        """
        who = "set()"
        step = check_timestep(timestep, who)
        setting = Setting(check_key(key, who), step, _encode(key, step, value))
        self._check_size(setting)
        with self._proposing:
            if self._ended:
                raise ClosedError(
                    f"set({key!r}, timestep={step}): the run has ended; no bridge asks for it any more"
                )
            if self._before is None:
                self._propose(setting)
            else:
                self._keep(setting, self._before)

    def _check_size(self, setting: Setting) -> None:
        most = self._most_bytes
        if len(setting.value) > most:
            raise FeedbackSizeError(
                f"{_call(setting)} takes {human_bytes(len(setting.value))}, and a node keeps {human_bytes(most)} of "
                "values: set a smaller one, or a larger DEISA_RAY_FEEDBACK_MEMORY_MIB"
            )

    def _keep(self, setting: Setting, before: dict[tuple[str, int], Setting]) -> None:
        keys = {key for key, _ in before}
        if setting.key not in keys and len(keys) >= MAX_KEYS:
            raise FeedbackSizeError(f"{_call(setting)}: values are set for {MAX_KEYS} keys at most")
        before.pop((setting.key, setting.timestep), None)
        before[setting.key, setting.timestep] = setting
        self._set += 1

    def _propose(self, setting: Setting) -> None:
        self._number += 1
        proposal = Proposal(self._number, setting, len(self._nodes) == 1, self._last_accepted)
        is_accepted = False
        try:
            verdicts = self._agents.propose(proposal, self._nodes)
            is_accepted = accepted(verdicts.values())
        finally:
            if is_accepted:
                self._last_accepted = proposal.number
            if not proposal.final:
                self._agents.settle(proposal.number, is_accepted, self._nodes)
        if is_accepted:
            self._set += 1
        else:
            self._refuse(setting, verdicts)

    def _refuse(self, setting: Setting, verdicts: Mapping[str, Verdict]) -> None:
        for verdict in verdicts.values():
            if verdict.refusal:
                raise FeedbackSizeError(f"{_call(setting)} {verdict.refusal}")
        key = setting.key
        self._too_late[key] += 1
        if self._too_late[key] > 1:
            return
        asked = max((v.asked for v in verdicts.values() if v.asked is not None), key=lambda a: a.timestep)
        logger.warning(
            "%s comes too late and changes nothing: bridge %d has asked for %r at timestep %d by now, and every bridge "
            "gets the answer that it got. Set it for a later timestep, or have the simulation wait for it: "
            "bridge.get(%r, timestep, wait=seconds). (Said once for a key; the report counts)",
            _call(setting),
            asked.bridge_id,
            key,
            asked.timestep,
            key,
        )

    # The course of the session.

    @contextmanager
    def starting(self, nodes: Collection[str]) -> Iterator[FeedbackPlan]:
        """What the session starts with; values that are set meanwhile come after that.

        Parameters
        ----------
        nodes : collection of str
            Those that have bridges.
        """
        with self._proposing:
            before = self._before or {}
            queue_size = self._settings.feedback_queue_size
            yield FeedbackPlan(queue_size, self._most_bytes, tuple(before.values()))
            self._before, self._nodes = None, nodes

    def resume(self, nodes: Collection[str], states: Collection[FeedbackState]) -> None:
        """Go on where another analytics has died: settle what it left behind, and set what was to come first."""
        with self._proposing:
            self._nodes = nodes
            self._number = max((state.last for state in states), default=0)
            self._last_accepted = max((state.last_accepted for state in states), default=0)
            left = settlement(states)
            if left is not None:
                number, is_accepted = left
                self._last_accepted = number if is_accepted else self._last_accepted
                self._agents.settle(number, is_accepted, nodes)
            before, self._before = self._before or {}, None
            for setting in before.values():
                self._set -= 1
                self._propose(setting)

    def await_on(self, node_id: str) -> None:
        """Bridges of a node wait, now and then: it is to hear of finished timesteps."""
        self._told.setdefault(node_id, -math.inf)

    @property
    def is_awaited(self) -> bool:
        """Whether any node is to hear of finished timesteps."""
        return bool(self._told)

    def finish(self, timestep: float) -> None:
        """No callback can run for a timestep, or one before, any more."""
        behind = [node_id for node_id, told in self._told.items() if told < timestep]
        if behind:
            self._told |= dict.fromkeys(behind, timestep)
            self._agents.finish(int(min(timestep, FINISHED)), behind)

    def end(self) -> None:
        """Nothing can be set any more."""
        self._ended = True

    @property
    def figures(self) -> FeedbackFigures:
        """What has come of the values."""
        return FeedbackFigures(self._set, dict(self._too_late))


def _call(setting: Setting) -> str:
    return f"set({setting.key!r}, timestep={setting.timestep})"


def _encode(key: str, timestep: int, value: Any) -> bytes:
    try:
        return encode_value(value)
    except UnsupportedValueError as exc:
        raise UnsupportedValueError(f"set({key!r}, timestep={timestep}): {exc}") from None
