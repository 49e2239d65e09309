"""A computation, and an analytics with a rank, on a Ray whose memory monitor ends everything; prints what each is told.

Argument: the session's name.
"""

import sys
import threading

import dask.array as da
import numpy as np

from deisa.ray import Bridge, Deisa, deisa_ray_get
from deisa.ray.errors import DeisaError

ROWS = {"chunk_shape": (4,), "nb_chunks_per_dim": (1,), "chunk_position": (0,), "dtype": float}


def tell(who, action):
    try:
        action()
        print(who, "was told nothing", flush=True)
    except DeisaError as error:
        print(who, type(error).__name__, str(error).replace("\n", " "), flush=True)


def wait_long(block):
    threading.Event().wait(60)
    return block


def compute():
    da.zeros(4, chunks=4).map_blocks(wait_long, meta=np.array(())).sum().compute(scheduler=deisa_ray_get)


def send():
    with Bridge(
        bridge_id=0, arrays_metadata={"x": ROWS}, system_metadata={"world_size": 1}, session=sys.argv[1]
    ) as bridge:
        for timestep in range(10_000):
            bridge.send("x", np.zeros(4), timestep)


def analyse():
    deisa = Deisa(session=sys.argv[1])
    rank.start()
    deisa.register_callback(lambda x: threading.Event().wait(0.1), "x")
    deisa.execute_callbacks()


rank = threading.Thread(target=tell, args=("rank", send))
tell("computation", compute)
tell("analytics", analyse)
if rank.ident is not None:
    rank.join()
