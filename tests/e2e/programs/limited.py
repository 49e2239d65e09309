"""A whole session in one process, which has little of something. Arguments: bridges, chunks of each, elements of each.

Prints the sums that the analytics saw, and the errors of both sides, as JSON.
"""

import json
import logging
import os
import sys
import threading

import numpy as np

from deisa.ray import Bridge, Deisa
from deisa.ray.errors import DeisaError

bridges, chunks, elements = map(int, sys.argv[1:4])
logging.disable()
deisa = Deisa(engine="local", session=f"limited-{os.getpid()}")
seen: list[float] = []
errors: dict[str, str] = {}


@deisa.register("x")
def add_up(x):  # type: ignore[no-untyped-def]
    """Take the sum of all chunks."""
    seen.append(float(x[-1].dask.sum().compute()))


def rank(number: int) -> None:
    """Send two timesteps."""
    described = [
        {
            "chunk_shape": (elements,),
            "nb_chunks_per_dim": (bridges * chunks,),
            "chunk_position": (number * chunks + i,),
            "dtype": float,
        }
        for i in range(chunks)
    ]
    try:
        with Bridge(
            bridge_id=number,
            arrays_metadata={"x": described},
            system_metadata={"world_size": bridges},
            session=f"limited-{os.getpid()}",
        ) as bridge:
            for t in range(2):
                for i in range(chunks):
                    bridge.send("x", np.full(elements, t + 1.0), t, chunk_index=i)
    except DeisaError as error:
        errors[f"bridge {number}"] = f"{type(error).__name__}: {error}"


threads = [threading.Thread(target=rank, args=(number,)) for number in range(bridges)]
for thread in threads:
    thread.start()
try:
    deisa.execute_callbacks()
except DeisaError as error:
    errors["analytics"] = f"{type(error).__name__}: {error}"
for thread in threads:
    thread.join()
print(json.dumps({"seen": seen, "errors": errors}))
