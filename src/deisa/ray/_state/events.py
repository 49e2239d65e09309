"""What an agent tells the analytics; one event for a node and a timestep, never one for a chunk."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deisa.ray._state.descriptions import ArrayDescription
from deisa.ray._state.stats import BridgeStats


@dataclass(frozen=True, slots=True)
class BridgeJoined:
    """A bridge has connected."""

    bridge_id: int
    world_size: int
    arrays: tuple[ArrayDescription, ...]
    pid: int = 0
    host: str = ""


@dataclass(frozen=True, slots=True)
class DtypeDeclared:
    """A bridge that announced no dtype for an array has sent its first chunk."""

    bridge_id: int
    array: str
    dtype: np.dtype


@dataclass(frozen=True, slots=True)
class StepComplete:
    """Every chunk that this node owns of `array` has arrived for `timestep`; all lie in the same `slot`.

    `time` is the physical time that all have given; None where none has.
    """

    array: str
    timestep: int
    slot: int
    time: float | None = None


@dataclass(frozen=True, slots=True)
class OwnersPassed:
    """Nothing older than `timestep` (None: nothing at all) will come of `array` from this node."""

    array: str
    timestep: int | None


@dataclass(frozen=True, slots=True)
class StepTorn:
    """Bridges `missing` moved past `timestep` without `array`, which others on this node sent."""

    array: str
    timestep: int
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TimesDiffer:
    """Two `bridges` of this node gave different physical `times` for `array` at `timestep`."""

    array: str
    timestep: int
    bridges: tuple[int, ...]
    times: tuple[float | None, ...]


@dataclass(frozen=True, slots=True)
class SendersBlocked:
    """Bridges of this node wait for a free slot of `array`: all that do now, each with the timestep that waits."""

    array: str
    timesteps: dict[int, int]


@dataclass(frozen=True, slots=True)
class BridgeClosed:
    """A bridge has closed in order."""

    bridge_id: int
    stats: BridgeStats


@dataclass(frozen=True, slots=True)
class BridgeLost:
    """A bridge's connection ended without ``close``, or broke the protocol."""

    bridge_id: int
    last_timestep: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class FeedbackAwaited:
    """A bridge of this node has waited for what the analytics sets: it wants to hear of finished timesteps."""


@dataclass(frozen=True, slots=True)
class AgentLost:
    """The node's agent itself no longer answers."""

    reason: str


Event = (
    BridgeJoined
    | DtypeDeclared
    | StepComplete
    | OwnersPassed
    | StepTorn
    | TimesDiffer
    | SendersBlocked
    | BridgeClosed
    | BridgeLost
    | AgentLost
    | FeedbackAwaited
)

LASTING = (
    StepTorn,
    TimesDiffer,
    BridgeClosed,
    BridgeLost,
)  # what an analytics that takes over has to hear again
