"""Run an analytics script on a recording or a data set: ``python -m deisa.ray.replay run.zarr analytics.py``."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from deisa.ray._replay.source import open_source
from deisa.ray.config import REPLAY, ReplaySettings
from deisa.ray.errors import ConfigurationError, ReplayError


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a script as if ``DEISA_RAY_REPLAY`` was set; without a script, say what there is to replay."""
    parser = argparse.ArgumentParser(
        "python -m deisa.ray.replay",
        description="Run an analytics script on a recording, or on a Zarr or NetCDF data set, without a simulation. "
        "Without a script: say what is in it.",
    )
    parser.add_argument(
        "--arrays", metavar="T=temperature,p", help="the arrays, and from which variable each is read"
    )
    parser.add_argument(
        "--timesteps", metavar="100:200", help="from the first timestep up to before the second"
    )
    parser.add_argument("--ranks", metavar="N", help="how many processes read (1)")
    parser.add_argument("path", help="a recording, or a data set with a time dimension")
    parser.add_argument("script", nargs="?", help="the analytics")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of the script")
    options = parser.parse_args(arguments)
    if not options.path:
        parser.error("PATH is empty")
    os.environ[REPLAY] = options.path
    for name in ("arrays", "timesteps", "ranks"):
        if getattr(options, name) is not None:
            os.environ[f"{REPLAY}_{name.upper()}"] = getattr(options, name)
    try:
        settings = ReplaySettings.from_environment()
        if options.script is None and settings is not None:
            print(_contents(settings))
            return
    except (ConfigurationError, ReplayError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    sys.argv = [options.script, *options.arguments]
    sys.path[0] = str(Path(options.script).resolve().parent)
    runpy.run_path(options.script, run_name="__main__")


def _contents(settings: ReplaySettings) -> str:
    source = open_source(settings)
    kind = "a recording" if source.is_recording else "a data set"
    lines = [f"{source.path}: {kind}"]
    for name, array in source.arrays.items():
        steps = list(array.steps)
        when = f"timesteps {steps[0]} to {steps[-1]} ({len(steps)})" if steps else "no timestep"
        lines.append(
            f"  {name}: {array.shape} {array.variable.dtype}, {when}, {len(array.blocks.blocks)} blocks"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
