"""A rank without MPI, on a node of its own: sends when it is told to; prints when each chunk was sent, as JSON.

Files in a folder that all nodes see keep it in step with the others without a byte on the network:
``ready-<rank>`` is made when the session has started, ``step-<n>`` lets step n go, ``counted`` lets the rank end.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from deisa.ray.bridge import Bridge

LOOK_EVERY_S = 0.002


def wait_for(file: Path) -> None:
    """Return once a file is there; whoever started this program ends it when that takes too long."""
    while not file.exists():
        time.sleep(LOOK_EVERY_S)


def main() -> None:
    """Run the steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--bytes", type=int, required=True, help="of each rank's chunk")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()

    chunk = np.random.default_rng(options.rank).random(options.bytes // 8)
    described = {
        "chunk_shape": chunk.shape,
        "nb_chunks_per_dim": (options.ranks,),
        "chunk_position": (options.rank,),
        "dtype": chunk.dtype,
    }
    sent_at = []
    with Bridge(
        bridge_id=options.rank,
        arrays_metadata={"field": described},
        system_metadata={"world_size": options.ranks},
    ) as bridge:
        (options.folder / f"ready-{options.rank}").touch()
        for step in range(options.steps):
            wait_for(options.folder / f"step-{step}")
            bridge.send("field", chunk, step)
            sent_at.append(time.monotonic())
        wait_for(options.folder / "counted")
    print(json.dumps(sent_at), flush=True)


if __name__ == "__main__":
    main()
