"""What a node wants done: the transport carries these out, in order.

`peer` is the number of a connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deisa.ray.errors import DeisaError


@dataclass(frozen=True, slots=True)
class TellProgress:
    """Tell a rank whom it waits for."""

    peer: int
    text: str


@dataclass(frozen=True, slots=True)
class TellAnalytics:
    """Tell a rank that the analytics has gone, and why; or, without a reason, that there is one again."""

    peer: int
    reason: str


@dataclass(frozen=True, slots=True)
class SendAway:
    """Have a rank look for another agent."""

    peer: int
    reason: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell a rank an error, and hang up."""

    peer: int
    error: DeisaError


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Hang up on a rank that has gone as good as: nobody reads there."""

    peer: int
    reason: str


@dataclass(frozen=True, slots=True)
class CreateMemory:
    """Create the slots of a bridge's chunks of some arrays, with their dtypes, and send them."""

    bridge_id: int
    dtypes: Mapping[str, np.dtype]


@dataclass(frozen=True, slots=True)
class GrantSlot:
    """Give sequence number `number` of an array a slot, and wake those who wait for it."""

    array: str
    number: int
    slot: int


@dataclass(frozen=True, slots=True)
class EndNode:
    """End the session on this node; ranks that are still there learn the error."""

    error: DeisaError | None


Effect = TellProgress | TellAnalytics | SendAway | Refuse | GiveUp | CreateMemory | GrantSlot | EndNode
