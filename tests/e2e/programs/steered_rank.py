"""A rank that waits at each timestep for what the analytics sets.

Writes ``got T: VALUE`` to a log, and at the end ``ended TYPE: TEXT`` or ``ended well``.
"""

import argparse
import time

import numpy as np

from deisa.ray import Bridge
from deisa.ray.errors import DeisaError
from tests.e2e.programs.checked import Log
from tests.support.patience import PATIENCE_S

parser = argparse.ArgumentParser()
parser.add_argument("--rank", type=int, required=True)
parser.add_argument("--size", type=int, required=True)
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--log", required=True)
options = parser.parse_args()

log = Log(options.log)
chunk = {"chunk_shape": (4,), "nb_chunks_per_dim": (options.size,), "chunk_position": (options.rank,)}
try:
    with Bridge(
        bridge_id=options.rank,
        arrays_metadata={"x": chunk | {"dtype": float}},
        system_metadata={"world_size": options.size},
    ) as bridge:
        for t in range(options.steps):
            time.sleep(0.01)
            bridge.send("x", np.full(4, float(t)), t)
            log.write(f"got {t}: {bridge.get('number', t, wait=PATIENCE_S)}")
        assert bridge.get("once", 0) == "first"
except DeisaError as error:
    log.write(f"ended {type(error).__name__}: {error}")
else:
    log.write("ended well")
