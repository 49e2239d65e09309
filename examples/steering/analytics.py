"""Steer the Gray-Scott simulation: feed it at another rate when asked to, and stop it when nothing changes any more.

    python -m examples.steering.analytics --feed 0.03 --at 2000

`slider.py` has the same, with a slider for the rate.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import dask

from deisa.ray.report import Report
from deisa.ray.types import DeisaArray, WindowSpec
from deisa.ray.window_handler import Deisa
from examples.gray_scott.simulation import FEED

STEADY = 1e-6  # mean |dV/dt| per step below which the simulation is told to stop


@dataclass(frozen=True)
class Seen:
    """What was seen at a timestep, and the rate from then on."""

    t: int
    mean: float
    rate_of_change: float
    feed: float


class Steerer:
    """Looks at each timestep once, and answers the simulation, which waits for that.

    Parameters
    ----------
    feed : float
        The rate at first. Whoever wants another one sets the attribute, from any thread.
    steady : float
        Stop when the mean of |dV/dt| is less than that.
    tell : callable
        Called with what has been seen.
    """

    def __init__(self, feed: float, steady: float, tell: Callable[[Seen], None]) -> None:
        self.feed = feed
        self.steady = steady
        self.tell = tell
        self.seen: list[Seen] = []

    def run(self, deisa: Deisa) -> Report:
        """Steer a simulation until it ends."""

        def observe(V: list[DeisaArray]) -> None:
            latest, before = V[-1], V[0]
            difference = abs(latest.dask - before.dask).mean()
            mean, difference = dask.compute(latest.dask.mean(), difference)
            rate = float(difference) / max(latest.t - before.t, 1)
            feed = self.feed  # the value at this moment, for all ranks
            deisa.set("feed", feed, timestep=latest.t)
            if len(V) == 2 and rate < self.steady:
                deisa.set("stop", True, timestep=latest.t)
            self.seen.append(Seen(latest.t, float(mean), rate, feed))
            self.tell(self.seen[-1])

        deisa.register_callback(observe, [WindowSpec("V", window_size=2)])
        return deisa.execute_callbacks()


def main() -> None:
    parser = argparse.ArgumentParser(description="Steer the Gray-Scott simulation.")
    parser.add_argument("--feed", type=float, default=FEED, help="another feed rate (default: the same)")
    parser.add_argument(
        "--at", type=int, default=0, help="the timestep from which on it holds (default: the first)"
    )
    parser.add_argument("--steady", type=float, default=STEADY, help="default: %(default)s")
    options = parser.parse_args()

    def tell(seen: Seen) -> None:
        if seen.t >= options.at:
            steerer.feed = options.feed
        print(
            f"t={seen.t}: mean V = {seen.mean:.4f}, |dV/dt| = {seen.rate_of_change:.2e}, feed = {seen.feed:.4f}"
        )

    steerer = Steerer(FEED, options.steady, tell)
    steerer.run(Deisa(on_error="raise"))


if __name__ == "__main__":
    main()
