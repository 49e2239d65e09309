"""What the analytics would tell an agent at the start, for tests that have none: everything of every array."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from deisa.ray._state.descriptions import Shape
from deisa.ray._state.plan import StartPlan
from deisa.ray._state.streams import Part, Stream


def start_plan(
    slots: Mapping[str, int], dtypes: Mapping[str, np.dtype | None], consumers: tuple[str, ...]
) -> StartPlan:
    """A plan whose streams are the arrays themselves."""
    return StartPlan({name: Stream(name, name) for name in slots}, slots, dtypes, consumers)


def number_parts(
    bridges: Mapping[int, Mapping[str, Sequence[Shape]]], wanted: Mapping[str, object]
) -> dict[str, list[Part]]:
    """Number the chunks of bridges, array by array; those of arrays that nobody asks for take numbers, too."""
    numbers = itertools.count()
    parts: dict[str, list[Part]] = {name: [] for name in wanted}
    for bridge_id, arrays in bridges.items():
        for name, shapes in arrays.items():
            for index, shape in enumerate(shapes):
                part = Part(bridge_id, index, next(numbers), (0,) * len(shape), (1,) * len(shape), shape)
                if name in wanted:
                    parts[name].append(part)
    return parts


def number_counted(
    bridges: Mapping[int, Mapping[str, int]], wanted: Mapping[str, object]
) -> dict[str, list[Part]]:
    """The same for bridges that have so many chunks of each array, of one element."""
    shapes: dict[int, dict[str, list[Shape]]] = {
        bridge_id: {name: [(1,)] * count for name, count in counts.items()}
        for bridge_id, counts in bridges.items()
    }
    return number_parts(shapes, wanted)
