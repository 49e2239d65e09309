"""What it brings that chunks of a node are merged, and what it costs the ranks."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import numpy as np

from benchmarks.cases.many_chunks import NEVER
from benchmarks.clusters import ROOT, output_of, ray_cluster, started
from benchmarks.grids import Grid
from benchmarks.suite import THIS, Outcome, Setting, case
from tests.support.netns import NamespacedCluster, namespaced_cluster, reason_unavailable
from tests.support.processes import kill_tree

NODES = 4
TIMEOUT_S = 300.0

Launch = Callable[[int, Sequence[str], Mapping[str, str]], AbstractContextManager[Popen[str]]]


@dataclass(frozen=True)
class Measured:
    """What one run took.

    Attributes
    ----------
    seconds, values : mapping of str to sequence of float
        Of building and computing each expression, and its value, by timestep.
    chunks : int
        How many chunks Dask saw.
    send, copy : float
        Medians of handing over one chunk, and of copying it into memory of the rank (seconds).
    """

    seconds: Mapping[str, Sequence[float]]
    values: Mapping[str, Sequence[float]]
    chunks: int
    send: float
    copy: float

    def later(self, expression: str) -> float:
        """Median time of an expression once its graph has been seen."""
        taken = self.seconds[expression]
        return float(np.median(taken[len(taken) // 2 :]))


@case("What do expressions over 10,000 rank chunks cost, with and without merging the chunks of a node?")
def merging(setting: Setting) -> Outcome:
    """Slices and halos over 10,000 chunks of 8 KiB on 4 nodes; `send` of those, and of chunks of 128 KiB."""
    outcome = Outcome()
    many = Grid(setting.pick((100, 100), (8, 8)))
    large = Grid(setting.pick((32, 32), (4, 4)), (128, 128))
    steps = setting.pick(4, 3)
    with ExitStack() as undo:
        launch = undo.enter_context(_nodes(outcome))

        def run(grid: Grid, steps: int, beyond: int) -> Measured:
            return _run(launch, grid, steps, beyond, setting.scratch)

        for grid, target in ((many, 20), (large, None)):
            apart = run(grid, steps, NEVER)
            merged = run(grid, 3 * steps, 0)
            size = "x".join(map(str, grid.shape))
            chunks = f"{grid.count} chunks of {size}"
            for name in apart.seconds:
                np.testing.assert_allclose(merged.values[name], apart.values[name][0])
                outcome.figure(f"{name}, {chunks} apart", THIS, apart.later(name), "s")
                outcome.figure(f"{name}, {chunks} merged into {merged.chunks}", THIS, merged.later(name), "s")
                outcome.compare(
                    f"{name}, {chunks}: apart / merged", apart.later(name) / merged.later(name), ">=", target
                )
            outcome.figure(f"send, chunk of {size}, apart", THIS, apart.send, "s")
            outcome.figure(f"send, chunk of {size}, into a merged box", THIS, merged.send, "s")
            outcome.figure(f"contiguous copy, chunk of {size}", "NumPy", merged.copy, "s")
            outcome.compare(
                f"chunk of {size}: send into a merged box / contiguous copy",
                merged.send / merged.copy,
                "<=",
                2.5,
            )
            outcome.compare(
                f"chunk of {size}: send into a merged box / send apart", merged.send / apart.send, "<=", None
            )
    outcome.notes.append(
        f"{NODES} ranks, each with as many whole rows of chunks as the others. The copies go into memory of the "
        "rank that is as large as its slots and that it has touched; they and `send` are timed one by one."
    )
    return outcome


@contextmanager
def _nodes(outcome: Outcome) -> Iterator[Launch]:
    """Make a cluster; yields what starts a program on one of its nodes."""
    if reason := reason_unavailable():
        outcome.notes.append(f"All ranks on one node, since there can be no others: {reason}.")
        with ray_cluster():
            yield lambda _, argv, variables: started(argv, variables)
        return
    with namespaced_cluster(nodes=NODES, cpus=1) as cluster:
        yield lambda node, argv, variables: _started_on(cluster, node, argv, variables)


@contextmanager
def _started_on(
    cluster: NamespacedCluster, node: int, argv: Sequence[str], variables: Mapping[str, str]
) -> Iterator[Popen[str]]:
    with cluster.run(node, argv, variables) as process:
        try:
            yield process
        finally:
            kill_tree(process)


def _run(launch: Launch, grid: Grid, steps: int, beyond: int, scratch: Path) -> Measured:
    """Run a rank on each node, and the analytics on the first."""
    folder = Path(tempfile.mkdtemp(dir=scratch))
    (folder / "step-0").touch()
    report = folder / "report.json"  # Ray, too, may print at the end
    variables = {
        "DEISA_RAY_SESSION": f"merging-{os.urandom(3).hex()}",
        "DEISA_RAY_MERGE_CHUNKS_BEYOND": str(beyond),
        "PYTHONPATH": str(ROOT),
    }
    with ExitStack() as undo:

        def start(node: int, program: str, **options: object) -> Popen[str]:
            argv = [sys.executable, "-m", f"benchmarks.programs.{program}", f"--folder={folder}"]
            for name, value in options.items():
                argv += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
            return undo.enter_context(launch(node, argv, variables))

        analytics = start(0, "grid_analytics", report=report)
        ranks = [
            start(n, "grid_node_rank", rank=n, ranks=NODES, grid=grid.chunks, chunk=grid.shape, steps=steps)
            for n in range(NODES)
        ]
        try:
            output_of(analytics, TIMEOUT_S)
        except RuntimeError as error:
            for rank in ranks:
                kill_tree(rank)
                error.add_note((rank.stderr and rank.stderr.read()[-1000:]) or "")
            raise
        printed = [json.loads(output_of(rank, TIMEOUT_S)) for rank in ranks]
    send, copy = (float(np.median([one[what] for one in printed])) for what in ("send", "copy"))
    return Measured(**json.loads(report.read_text()), send=send, copy=copy)
