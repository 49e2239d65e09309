"""The program that takes the place of a simulation: it reads, and calls `Bridge`.

``python -m deisa.ray._replay.simulation PART`` is one rank of it, with a `Part` in JSON. It ends when its standard
input ends, which its analytics holds, and prints why it could not go on.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from deisa.ray._replay.blocks import Block
from deisa.ray._replay.source import Source, open_source
from deisa.ray.bridge import Bridge
from deisa.ray.config import ReplaySettings, Settings
from deisa.ray.errors import AnalyticsLostError, DeisaError

FAILED = 3  # exit status; the reason is the last thing that is printed


@dataclass(frozen=True)
class Part:
    """What one rank sends.

    Attributes
    ----------
    settings : ReplaySettings
    wanted : tuple of str
        The arrays that callbacks ask for; no other one is read.
    rank, size : int
    """

    settings: ReplaySettings
    wanted: tuple[str, ...]
    rank: int
    size: int

    def to_json(self) -> str:
        """Write it for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Part:
        """Read what `to_json` has written."""
        plan = json.loads(text)
        settings = dict(plan["settings"])
        settings["arrays"] = tuple(map(tuple, settings["arrays"]))
        return cls(ReplaySettings(**settings), tuple(plan["wanted"]), plan["rank"], plan["size"])


def send_all(source: Source, part: Part, settings: Settings) -> None:
    """Be a rank: describe blocks, and send them for each timestep.

    Raises
    ------
    ReplayError
        When something cannot be read.
    DeisaError
        What `Bridge` raises.
    """
    own: dict[str, Sequence[Block]] = {
        name: array.blocks.blocks[part.rank :: part.size] for name, array in source.arrays.items()
    }
    described = {name: source.arrays[name].descriptions(blocks) for name, blocks in own.items()}
    world: Mapping[str, Any] = {"world_size": part.size}
    with Bridge(
        bridge_id=part.rank, arrays_metadata=described, system_metadata=world, settings=settings, enabled=True
    ) as bridge:
        for timestep in source.timesteps:
            bridge.advance(timestep)
            for name in part.wanted:
                array = source.arrays[name]
                if timestep not in array.steps:
                    continue
                time = array.time_at(timestep)
                for index, block in enumerate(own[name]):
                    slot = bridge.slot(name, timestep, chunk_index=index)
                    slot[...] = array.read(timestep, block)
                    bridge.send(name, slot, timestep, time=time, chunk_index=index)


def main(plan: str) -> int:
    """Run as a program; returns its exit status."""
    threading.Thread(target=_end_with_analytics, name="deisa-replay-end", daemon=True).start()
    part = Part.from_json(plan)
    try:
        send_all(open_source(part.settings), part, Settings.from_environment())
    except AnalyticsLostError:  # which has its own words for it
        return 0
    except DeisaError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return FAILED
    return 0


def _end_with_analytics() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(FAILED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
