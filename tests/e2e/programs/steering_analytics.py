"""An analytics that sets at each timestep what the simulation waits for; others kill it."""

import argparse

from deisa.ray import Deisa
from deisa.ray.errors import DeisaError
from deisa.ray.types import DeisaArray
from tests.e2e.programs.checked import Log

parser = argparse.ArgumentParser()
parser.add_argument("--log", required=True)
log = Log(parser.parse_args().log)

try:
    deisa = Deisa()

    @deisa.register("x")
    def steer(x: list[DeisaArray]) -> None:
        deisa.set("number", x[-1].t, timestep=x[-1].t)
        deisa.set("once", "first", timestep=0)

    deisa.execute_callbacks()
except DeisaError as error:
    log.write(f"ended {type(error).__name__}: {error}")
else:
    log.write("ended well")
