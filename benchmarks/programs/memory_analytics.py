"""Analytics for a long run: a window of three timesteps, their mean, and now and then an array kept for a while.

Prints ``timestep <t>`` when the callback of every so-many-th timestep is done, and at the end ``bound <bytes>``,
the chunk memory reserved.
"""

from __future__ import annotations

import argparse

from deisa.ray.types import DeisaArray, WindowSpec
from deisa.ray.window_handler import Deisa

WINDOW = 3
KEEP_EVERY = 50


def stop(exception: Exception) -> None:
    """End the run: figures of callbacks that failed would mean nothing."""
    raise exception


def main() -> None:
    """Run until the simulation ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--print-every", type=int, required=True)
    parser.add_argument("--session", required=True)
    options = parser.parse_args()
    kept: list[DeisaArray] = []

    def watch(field: list[DeisaArray]) -> None:
        latest = field[-1]
        latest.dask.mean().compute()
        if latest.t % KEEP_EVERY == 0:
            kept[:] = [latest.persist()]
        elif latest.t % KEEP_EVERY == KEEP_EVERY // 2:
            (latest.dask - kept[0].dask).mean().compute()
        if latest.t % options.print_every == 0:
            print("timestep", latest.t, flush=True)

    deisa = Deisa(session=options.session)
    deisa.register_callback(watch, [WindowSpec("field", window_size=WINDOW)], exception_handler=stop)
    report = deisa.execute_callbacks()
    print("bound", sum(report.bound_bytes.values()), flush=True)


if __name__ == "__main__":
    main()
