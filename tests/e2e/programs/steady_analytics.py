"""An analytics that checks every chunk of every window, and that others try to disturb.

Writes to a log: ``ready``, ``began T`` and ``done T`` for each call, ``broken T ...`` if anything is not as it should
be, and at the end ``ended TYPE: TEXT`` or ``ended well``.
"""

import argparse
import logging
import os
import signal
import time

import cloudpickle

from deisa.ray import Deisa, WindowSpec
from deisa.ray.errors import DeisaError
from deisa.ray.types import DeisaArray
from tests.e2e.programs import checked
from tests.e2e.programs.checked import Log, count_broken, wrong_labels

parser = argparse.ArgumentParser()
parser.add_argument("--log", required=True)
parser.add_argument("--engine", default="ray")
parser.add_argument("--window", type=int, default=1)
parser.add_argument("--ahead", type=int, default=1)
parser.add_argument("--slow", type=float, default=0.0, help="seconds for each call")
parser.add_argument("--raise-at", type=int, help="a timestep at which the analytics fails")
parser.add_argument("--interrupt-at", type=int, help="a timestep at which it is interrupted, as by Ctrl-C")
parser.add_argument("--fail-every", type=int, help="the callback raises at every so many timesteps")
parser.add_argument("--save", action="append", default=[], help="a path to save to")
options = parser.parse_args()

cloudpickle.register_pickle_by_value(checked)  # workers on other nodes cannot import it
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # ignored in what a shell has put into the background
log = Log(options.log)
logging.basicConfig()


def fail(error: Exception) -> None:
    """Pass on what is to end the analytics; a timestep at which anything else fails will be missed."""
    if "the analytics fails" in str(error):
        raise error
    logging.warning("%s: %s", type(error).__name__, error)


try:
    deisa = Deisa(engine=options.engine, max_simulation_ahead=options.ahead)

    @deisa.register(WindowSpec("x", options.window), exception_handler=fail)
    def check(x: list[DeisaArray]) -> None:
        """Compute the checksums where the data is."""
        t = x[-1].t
        log.write(f"began {t}")
        if [a.t for a in x] != list(range(max(0, t - options.window + 1), t + 1)):
            log.write(f"broken {t}: the window is {[a.t for a in x]}")
        for array in x:
            if wrong_labels(array):
                log.write(f"broken {t}: {wrong_labels(array)}")
            broken = array.dask.map_blocks(count_broken, array.t, dtype=int, chunks=(1,)).sum().compute()
            if broken:
                log.write(f"broken {t}: {broken} chunks of timestep {array.t}")
        time.sleep(options.slow)
        if t == options.raise_at:
            raise RuntimeError("the analytics fails")
        if t == options.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        if options.fail_every and t % options.fail_every == 0:
            log.write(f"done {t}")
            raise ValueError("on purpose")
        log.write(f"done {t}")

    for path in options.save:
        deisa.save("x", path)
    log.write("ready")
    deisa.execute_callbacks()
except DeisaError as error:
    log.write(f"ended {type(error).__name__}: {error}")
except (RuntimeError, KeyboardInterrupt) as error:
    log.write(f"ended {type(error).__name__}: {error}")
    raise
else:
    log.write("ended well")
