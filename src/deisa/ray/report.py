"""What a run did, as `Deisa.execute_callbacks` returns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from deisa.ray._transport.memory import human_bytes


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one run.

    Attributes
    ----------
    timesteps : mapping of str to int
        Complete timesteps of each array that a callback asked for.
    bytes_handed_over : mapping of str to int
        Bytes of those timesteps, by array.
    held_up_s : mapping of int to float
        Time each bridge spent in ``send`` waiting for a free slot (seconds), by bridge id.
    callbacks_run : int
        Calls of callbacks, failed ones included.
    callbacks_failed : int
        Calls that raised.
    callbacks_s : float
        Time spent in callbacks (seconds).
    bound_bytes : mapping of str to int
        Chunk memory reserved on each node.
    wall_s : float
        From the start of the simulation to the end of the last callback (seconds).
    """

    timesteps: Mapping[str, int]
    bytes_handed_over: Mapping[str, int]
    held_up_s: Mapping[int, float]
    callbacks_run: int
    callbacks_failed: int
    callbacks_s: float
    bound_bytes: Mapping[str, int]
    wall_s: float

    def __str__(self) -> str:
        lines = [
            f"{name}: {count} timesteps, {human_bytes(self.bytes_handed_over[name])}"
            for name, count in self.timesteps.items()
        ]
        longest = max(self.held_up_s.values(), default=0.0)
        lines += [
            f"callbacks: {self.callbacks_run} calls ({self.callbacks_failed} failed), {self.callbacks_s:.2f} s",
            f"simulation held up: {longest:.2f} s at most on one bridge, of {self.wall_s:.2f} s",
        ]
        return "\n".join(lines)
