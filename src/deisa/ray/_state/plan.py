"""What the analytics asks of all agents when it starts a session."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from deisa.ray._state.boxes import Tiling
from deisa.ray._state.feedback import FeedbackPlan
from deisa.ray._state.layout import Shape


@dataclass(frozen=True, slots=True)
class StartPlan:
    """What the analytics asks of all agents: how many slots each chunk of an array gets."""

    slots: Mapping[str, int]
    dtypes: Mapping[str, np.dtype | None]
    consumers: tuple[str, ...]
    merged: Mapping[str, Tiling] = field(
        default_factory=dict
    )  # how arrays are tiled whose chunks share memory
    feedback: FeedbackPlan = field(default_factory=FeedbackPlan)


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


Boxes = Mapping[str, Sequence[SharedBox]]  # by array; of those arrays whose chunks are merged
