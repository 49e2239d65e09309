"""What a session starts with: slots for the windows asked for, and the plan for the agents."""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deisa.ray._session.tiling import PlacedArray
from deisa.ray._state.feedback import FeedbackPlan
from deisa.ray._state.plan import NodePlan, SharedBox, StartPlan
from deisa.ray._state.streams import Part
from deisa.ray._state.timeline import Subscription
from deisa.ray._transport.limits import human_bytes
from deisa.ray.errors import WindowError

CONSUMER = "analytics"
NO_FEEDBACK = FeedbackPlan()


@dataclass(frozen=True, slots=True)
class SlotCounts:
    """What each array that callbacks ask for needs.

    Attributes
    ----------
    windows : mapping of str to int
        The largest window of each, in timesteps.
    slots : mapping of str to int
        The slots of each of its chunks.
    """

    windows: Mapping[str, int]
    slots: Mapping[str, int]


def count_slots(
    subscriptions: Sequence[Subscription], max_simulation_ahead: int, plan: StartPlan | None
) -> SlotCounts:
    """Count the slots for the windows of all callbacks.

    Parameters
    ----------
    subscriptions : sequence of Subscription
    max_simulation_ahead : int
    plan : StartPlan or None
        Where the session has been started already: with this plan, whose slots are there.

    Raises
    ------
    WindowError
        When the slots that are there are too few.
    """
    windows: dict[str, int] = defaultdict(int)
    for subscription in subscriptions:
        for name, size in subscription.windows:
            windows[name] = max(windows[name], size)
    if plan is not None:
        _check_windows(windows, plan)
        return SlotCounts(dict(windows), dict(plan.slots))
    return SlotCounts(dict(windows), {name: size + max_simulation_ahead for name, size in windows.items()})


def _check_windows(windows: Mapping[str, int], plan: StartPlan) -> None:
    for name, size in windows.items():
        slots = plan.slots.get(name, 0)
        if size >= slots:
            raise WindowError(
                f"a window of {size} timesteps of array {name!r} is asked for, but the session was started with "
                f"{slots} slots for it, so that windows have {max(0, slots - 1)} at most; an analytics that takes over "
                "uses the windows of the one before"
            )


def make_plan(
    arrays: Mapping[str, PlacedArray], slots: Mapping[str, int], feedback: FeedbackPlan = NO_FEEDBACK
) -> StartPlan:
    """Say what all agents are to do for these streams."""
    return StartPlan(
        {name: array.stream for name, array in arrays.items()},
        slots,
        {name: array.layout.dtype for name, array in arrays.items()},
        (CONSUMER,),
        {name: array.tiling for name, array in arrays.items() if array.is_merged},
        feedback,
    )


def plan_nodes(arrays: Mapping[str, PlacedArray]) -> dict[str, NodePlan]:
    """Say what each agent is to do: the chunks of its node, and the boxes that several of them share."""
    parts: dict[str, dict[str, Sequence[Part]]] = defaultdict(dict)
    boxes: dict[str, dict[str, Sequence[SharedBox]]] = defaultdict(dict)
    for name, array in arrays.items():
        for node_id, of_node in array.parts().items():
            parts[node_id][name] = of_node
        for node_id, shared in array.shared_boxes().items():
            boxes[node_id][name] = shared
    return {node_id: NodePlan(of_node, boxes.get(node_id, {})) for node_id, of_node in parts.items()}


def announce(
    arrays: Mapping[str, PlacedArray], slots: Mapping[str, int], bound_bytes: Mapping[str, int]
) -> None:
    """Print what is reserved: for each array, and on the node that needs most."""
    for name, array in arrays.items():
        layout = array.layout
        size = (
            human_bytes(math.prod(layout.shape) * layout.dtype.itemsize)
            if layout.dtype is not None
            else "dtype not declared"
        )
        merged = f" merged into {len(array.tiling.boxes)}" if array.is_merged else ""
        print(
            f"deisa-ray: array {name!r} {layout.shape}, {size} a timestep, {len(layout.chunks)} chunks{merged}, "
            f"{slots[name]} slots each",
            file=sys.stderr,
        )
    reserved = [n for n in bound_bytes.values() if n]
    if reserved:
        print(
            f"deisa-ray: chunk memory reserved: {human_bytes(max(reserved))} at most on one node, "
            f"{len(reserved)} node{'s' if len(reserved) > 1 else ''}",
            file=sys.stderr,
        )
