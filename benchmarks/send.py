"""Time `Bridge()` and `Bridge.send` against a bare copy of the same bytes, in MPI ranks that compute between sends.

    python -m benchmarks.send                       4 ranks, 32 KiB and 8 MiB chunks, on Ray
    python -m benchmarks.send --engine local        the same without Ray

Every rank alternates 20 ms of computing, one `send`, and one copy into warm memory; the analytics takes
the mean of every timestep. Figures are over all ranks and steps, the first ten steps left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

WARM_UP_STEPS = 10
MPIEXEC = Path(sys.executable).parent / "mpiexec"


def rank(chunk_bytes: int, steps: int, compute_s: float, session: str, cores_free: bool) -> None:
    """One rank: announce a row of chunks, then compute, send and copy; rank 0 prints the times."""
    from mpi4py import MPI

    from deisa.ray.bridge import Bridge

    comm = MPI.COMM_WORLD
    chunk = np.random.default_rng(comm.rank).random(chunk_bytes // 8)
    target = np.zeros_like(chunk)
    layout = {
        "field": {
            "global_shape": (comm.size * chunk.size,),
            "chunk_shape": chunk.shape,
            "chunk_position": (comm.rank,),
            "dtype": chunk.dtype,
        }
    }
    comm.Barrier()
    started = time.perf_counter()
    bridge = Bridge(comm=comm, arrays_metadata=layout, session=session)
    times = {"bridge": [time.perf_counter() - started], "send": [], "copy": []}
    for step in range(steps):
        if cores_free:
            time.sleep(compute_s)
        until = time.perf_counter() + (0 if cores_free else compute_s)
        while time.perf_counter() < until:
            np.sqrt(chunk[:4096])
        started = time.perf_counter()
        bridge.send("field", chunk, step)
        sent = time.perf_counter()
        target[:] = chunk
        copied = time.perf_counter()
        if step >= WARM_UP_STEPS:
            times["send"].append(sent - started)
            times["copy"].append(copied - sent)
    bridge.close(steps)
    gathered = comm.gather(times)
    if gathered is not None:
        print(json.dumps({key: [t for one in gathered for t in one[key]] for key in times}), flush=True)


def measure(
    chunk_bytes: int, steps: int, ranks: int, compute_s: float, engine: str, *extra: str
) -> dict[str, list[float]]:
    """Run the analytics here and the ranks under ``mpiexec``; returns seconds by what was timed."""
    from deisa.ray.types import WindowSpec
    from deisa.ray.window_handler import Deisa

    session = f"bench-send-{chunk_bytes}"
    deisa = Deisa(session=session, engine=engine)
    deisa.register_callback(lambda window: window[-1].dask.mean().compute(), [WindowSpec("field")])
    arguments = ["--rank", f"--bytes={chunk_bytes}", f"--steps={steps}", f"--compute={compute_s}"]
    command = [MPIEXEC, "-n", str(ranks), sys.executable, "-m", "benchmarks.send", *arguments, *extra]
    with subprocess.Popen(
        [*command, f"--session={session}"], stdout=subprocess.PIPE, text=True
    ) as simulation:
        deisa.execute_callbacks()
        output, _ = simulation.communicate()
    if simulation.returncode:
        raise RuntimeError(f"the ranks failed with exit code {simulation.returncode}")
    return json.loads(output)


def main() -> None:
    """Print a table of medians and 99th percentiles."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--session", default="bench", help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, action="append", help="chunk size; may be repeated")
    parser.add_argument("--steps", type=int, default=210)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--compute", type=float, default=0.02, help="seconds of computing per step")
    parser.add_argument(
        "--sleep", action="store_true", help="sleep instead of computing: ranks beyond the cores"
    )
    parser.add_argument("--engine", choices=["ray", "local"], default="ray")
    options = parser.parse_args()
    sizes = options.bytes or [32 * 1024, 8 * 2**20]
    if options.rank:
        rank(sizes[0], options.steps, options.compute, options.session, options.sleep)
        return
    print(f"{'chunk':>10} {'':>8} {'median':>12} {'p99':>12}   (microseconds; {options.ranks} ranks)")
    for size in sizes:
        times = measure(
            size,
            options.steps,
            options.ranks,
            options.compute,
            options.engine,
            *(["--sleep"] if options.sleep else []),
        )
        for what, seconds in times.items():
            median, p99 = np.percentile(seconds, [50, 99]) * 1e6
            print(f"{size:>10} {what:>8} {median:>12.1f} {p99:>12.1f}")
        print(
            f"{size:>10} send/copy at the median: {np.median(times['send']) / np.median(times['copy']):.2f}"
        )


if __name__ == "__main__":
    main()
