"""The examples of the page on other systems, as they stand there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deisa.ray import Bridge
from tests.docs.pages import DOCS, Block, python_blocks, replaced
from tests.docs.running import RANKS, Communicator, output_of, ranks_in_threads, started
from tests.support.mpi import Mpi

BLOCKS = python_blocks(DOCS / "neighbours.md")
SIMULATIONS = {block.heading: block.code for block in BLOCKS if block.output is None}
ANALYTICS = [block for block in BLOCKS if block.output is not None]


def send_temperature(comm: Communicator) -> None:
    chunk = {"global_shape": (8, 8), "chunk_shape": (4, 4), "chunk_position": divmod(comm.rank, 2)}
    with Bridge(comm, {"temperature": chunk}) as bridge:
        for t in range(3):
            bridge.send("temperature", np.full((4, 4), float(t)), t)


def simulation_of(block: Block) -> Callable[[Communicator], None]:
    code = SIMULATIONS.get(block.heading)
    if code is None:
        return send_temperature
    code = code.replace("from mpi4py import MPI\n", "").replace("comm = MPI.COMM_WORLD\n", "")
    return lambda comm: exec(code, {"comm": comm})


def test_every_block_is_run() -> None:
    assert {block.heading for block in ANALYTICS} >= SIMULATIONS.keys()
    assert len(ANALYTICS) > 2


@pytest.mark.parametrize("block", ANALYTICS, ids=str)
def test_example(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    local = 'Deisa(engine="local", ' if "Deisa(max" in block.code else 'Deisa(engine="local"'
    with ranks_in_threads(simulation_of(block)):
        exec(replaced(block.code, "deisa = Deisa(", f"deisa = {local}"), {})
    assert capsys.readouterr().out == block.output


@pytest.mark.ray
@pytest.mark.mpi
@pytest.mark.slow
def test_a_pair_of_scripts_of_the_earlier_release(ray_cluster: str, mpi: Mpi, tmp_path: Path) -> None:
    """The bridges are never closed: they close when the processes end."""
    (block,) = [block for block in ANALYTICS if "0.1.8" in block.heading]
    (tmp_path / "simulation.py").write_text(SIMULATIONS[block.heading])
    (tmp_path / "analytics.py").write_text(block.code)
    with started(tmp_path / "analytics.py") as analytics:
        simulation = mpi.run(RANKS, str(tmp_path / "simulation.py"))
        assert output_of(analytics) == block.output
    assert simulation.returncode == 0, simulation.stderr
