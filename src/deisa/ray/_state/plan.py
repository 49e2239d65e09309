"""What the analytics asks of the agents when it starts a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deisa.ray._state.boxes import Tiling
from deisa.ray._state.descriptions import Shape
from deisa.ray._state.feedback import FeedbackPlan
from deisa.ray._state.streams import Parts, Stream


@dataclass(frozen=True, slots=True)
class StartPlan:
    """What the analytics asks of all agents.

    Attributes
    ----------
    streams : mapping of str to Stream
        What is to be handed over, by the streams' names.
    slots : mapping of str to int
        For each stream, the slots of each chunk.
    dtypes : mapping of str to numpy.dtype or None
        For each stream, as which elements are handed over; None until bridges have declared it.
    consumers : tuple of str
        Who leases slots.
    merged : mapping of str to Tiling
        The streams whose chunks share memory.
    feedback : FeedbackPlan
    """

    streams: Mapping[str, Stream]
    slots: Mapping[str, int]
    dtypes: Mapping[str, np.dtype | None]
    consumers: tuple[str, ...]
    merged: Mapping[str, Tiling] = field(default_factory=dict)
    feedback: FeedbackPlan = field(default_factory=FeedbackPlan)

    def streams_of(self, array: str) -> list[Stream]:
        """The streams of an array."""
        return [stream for stream in self.streams.values() if stream.array == array]


@dataclass(frozen=True, slots=True)
class SharedBox:
    """A box of an array on one node, in whose slots several of the node's chunks lie side by side.

    Readers know it by the number of its first region.

    Attributes
    ----------
    shape : tuple of int
        Elements along each dimension.
    chunks : tuple of (int, tuple of int)
        Each chunk's region, and the offset of its corner from that of the box (elements).
    """

    shape: Shape
    chunks: tuple[tuple[int, Shape], ...]


Boxes = Mapping[str, Sequence[SharedBox]]  # by stream; of those whose chunks are merged


@dataclass(frozen=True, slots=True)
class NodePlan:
    """What the analytics asks of one agent: the chunks of its node, and the boxes that several of them share."""

    parts: Parts = field(default_factory=dict)
    boxes: Boxes = field(default_factory=dict)
