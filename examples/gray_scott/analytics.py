"""Watch the Gray-Scott simulation while it runs: statistics, pictures and a Zarr store of every timestep.

`Deisa` connects to the Ray cluster of this machine, or starts one. The simulation may start before or after.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import dask
import dask.array as da
import matplotlib
import numpy as np
import zarr
from dask.utils import format_bytes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from deisa.ray.types import DeisaArray, WindowSpec
from deisa.ray.window_handler import Deisa

BRIGHTEST = 0.45  # the value of V with the brightest colour, and the end of the histogram
BINS = 45
PALETTE = (matplotlib.colormaps["magma"](range(256))[:, :3] * 255).astype(np.uint8).tobytes()


@dataclass(frozen=True)
class Observation:
    """What is kept in memory of one timestep."""

    t: int
    mean: float
    variance: float
    rate: float  # mean |dV/dt| over the window
    histogram: NDArray[np.int64]


class Observer:
    """Looks at each timestep of V once, as soon as it is complete."""

    def __init__(self, output: Path, progress: Progress, timesteps: int | None) -> None:
        self.frames = output / "frames"
        self.frames.mkdir(parents=True, exist_ok=True)
        for old in self.frames.glob("*.png"):
            old.unlink()
        self.group = zarr.open_group(output / "pattern.zarr", mode="w")
        self.stored: zarr.Array | None = None
        self.observations: list[Observation] = []
        self.pictures: list[Image.Image] = []
        self.progress = progress
        self.task = progress.add_task("waiting for the simulation", total=timesteps)

    def observe(self, V: list[DeisaArray]) -> None:
        """The callback: its parameter has the name of the array, and is its window, oldest first."""
        oldest, latest = V[0], V[-1]
        v = latest.dask
        histogram, _ = da.histogram(v, bins=BINS, range=(0, BRIGHTEST))
        stride = max(1, v.shape[0] // 256)  # pictures of 256 x 256, or a little more

        # One compute for everything: V is read once, where it is, and only small results come back here.
        mean, variance, rate, histogram, picture, _ = dask.compute(
            v.mean(),
            v.var(),
            abs(v - oldest.dask).mean() / max(latest.t - oldest.t, 1),  # the first window has one timestep
            histogram,
            v[::stride, ::stride],
            self.store(v),
        )
        self.observations.append(Observation(latest.t, mean, variance, rate, histogram))
        self.draw(picture, latest.t)
        self.progress.update(self.task, advance=1, description=f"t = {latest.t:6d}   mean V = {mean:.3f}")

    def store(self, v: da.Array) -> da.Array:
        """Make room for a timestep in the Zarr store; the returned array writes it when it is computed."""
        if self.stored is None:
            self.stored = self.group.create_array(
                "V",
                shape=(0, *v.shape),
                chunks=(1, *v.chunksize),  # those of Dask: no two tasks write to the same chunk
                dtype=v.dtype,
                dimension_names=("time", "y", "x"),
            )
        n = self.stored.shape[0]
        self.stored.resize((n + 1, *v.shape))
        return da.store(v[np.newaxis], self.stored, regions=np.s_[n : n + 1, :, :], lock=False, compute=False)

    def draw(self, v: NDArray[np.float32], t: int) -> None:
        picture = Image.fromarray((v.clip(0, BRIGHTEST) * (255 / BRIGHTEST)).astype(np.uint8))
        picture.putpalette(PALETTE)
        picture.save(self.frames / f"{t:07d}.png")
        self.pictures.append(picture)

    def finish(self, output: Path) -> None:
        """Write what can be written only once the last timestep is known."""
        t = np.array([seen.t for seen in self.observations])
        self.group.create_array("time", data=t, dimension_names=("time",))
        plot(self.observations, output / "series.png")
        first, *others = self.pictures
        first.save(output / "pattern.gif", save_all=True, append_images=others, duration=60, loop=0)


def plot(observations: list[Observation], path: Path) -> None:
    t = np.array([seen.t for seen in observations])
    mean = np.array([seen.mean for seen in observations])
    deviation = np.sqrt([seen.variance for seen in observations])
    counts = np.array([seen.histogram for seen in observations])
    figure = Figure(figsize=(8, 8), layout="constrained")
    top, middle, bottom = figure.subplots(3, sharex=True)
    top.plot(t, mean)
    top.fill_between(t, mean - deviation, mean + deviation, alpha=0.2)
    top.set(ylabel="V: mean ± deviation", title="Gray-Scott, while it was running")
    middle.plot(t[1:], [seen.rate for seen in observations[1:]])
    middle.set(ylabel="mean |dV/dt|")
    bin_centres = (np.arange(BINS) + 0.5) * BRIGHTEST / BINS
    bottom.pcolormesh(t, bin_centres, np.log10(1 + counts.T), cmap="magma")
    bottom.set(ylabel="histogram of V", xlabel="timestep")
    figure.savefig(path, dpi=120)


def stop(exception: BaseException) -> None:
    """A failing callback ends the run; by default it would be logged, and the run go on."""
    raise exception


def main() -> None:
    parser = argparse.ArgumentParser(description="Watch the Gray-Scott simulation while it runs.")
    parser.add_argument("--output", type=Path, default=Path("demo-results"), help="default: %(default)s")
    parser.add_argument("--timesteps", type=int, help="how many are expected, for the progress bar")
    options = parser.parse_args()
    output = options.output.resolve()  # the tasks that write the Zarr store run in another directory

    deisa = Deisa()
    with Progress() as progress:
        observer = Observer(output, progress, options.timesteps)
        deisa.register_callback(observer.observe, [WindowSpec("V", window_size=5)], exception_handler=stop)
        report = deisa.execute_callbacks()
    if not observer.observations:
        raise SystemExit("the simulation ended without sending anything")
    observer.finish(output)

    print(f"{report.timesteps['V']} timesteps, {format_bytes(report.bytes_handed_over['V'])} handed over")
    print(f"the simulation was held up for {max(report.held_up_s.values()):.1f} s of {report.wall_s:.1f} s")
    print(f"results in {options.output}/: pattern.gif, series.png, frames/, pattern.zarr")


if __name__ == "__main__":
    main()
