"""A rank of a simulation that others try to disturb: every chunk carries its own checksum.

Writes what it does to a log, a line at a time: ``sent T``, and at the end ``ended TYPE: TEXT`` or ``ended well``.
"""

import argparse
import sys
import time

from deisa.ray import Bridge
from deisa.ray.errors import DeisaError
from tests.e2e.programs.checked import Log, chunk, description, time_of

parser = argparse.ArgumentParser()
parser.add_argument("--rank", type=int)
parser.add_argument("--size", type=int)
parser.add_argument("--mpi", action="store_true", help="ask MPI for rank and size")
parser.add_argument("--steps", type=int, required=True)
parser.add_argument("--elements", type=int, default=1000)
parser.add_argument("--pause", type=float, default=0.01, help="seconds for each step")
parser.add_argument("--log", required=True)
parser.add_argument("--leave", type=int, help="end with this exit status, without close()")
options = parser.parse_args()

if options.mpi:
    from mpi4py import MPI

    options.rank, options.size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
log = Log(f"{options.log}-{options.rank}" if options.mpi else options.log)
try:
    bridge = Bridge(
        bridge_id=options.rank,
        arrays_metadata={"x": description(options.rank, options.size, options.elements)},
        system_metadata={"world_size": options.size},
    )
    log.write("started")
    for t in range(options.steps):
        time.sleep(options.pause)
        bridge.send("x", chunk(options.rank, t, options.elements), t, time=time_of(t))
        log.write(f"sent {t}")
    if options.leave is None:
        bridge.close(options.steps)
except DeisaError as error:
    log.write(f"ended {type(error).__name__}: {error}")
else:
    log.write("ended well")
    sys.exit(options.leave)
