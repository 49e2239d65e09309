"""Recipes run as they stand on their page, on both engines, and print what it says."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deisa.ray import Bridge
from tests.docs.pages import DOCS, ROOT, Block, python_blocks, replaced
from tests.docs.running import RUN_TIMEOUT_S, Communicator, output_of, ranks_in_threads, started
from tests.support.processes import kill_session

RECIPES = python_blocks(DOCS / "recipes.md")
BEGIN, END = (block.code for block in RECIPES[:2])
SIMULATIONS = {block.heading: block.code for block in RECIPES if "Bridge(" in block.code}
ANALYTICS = [block for block in RECIPES[2:] if "Bridge(" not in block.code]
GOOD_TO_KNOW = [block for block in python_blocks(DOCS / "good_to_know.md") if block.output is not None]
FILES = python_blocks(DOCS / "files.md")
FILES_BEGIN = next(block.code for block in FILES if "import Writer" in block.code)
ON_FILES = [
    dataclasses.replace(block, code=FILES_BEGIN + block.code) for block in FILES if block.output is not None
]


def send_temperature(comm: Communicator) -> None:
    chunk = {"global_shape": (128, 128), "chunk_shape": (64, 64), "chunk_position": divmod(comm.rank, 2)}
    with Bridge(comm, {"temperature": chunk}) as bridge:
        for t in range(5):
            bridge.send("temperature", np.full((64, 64), float(t)), t)


def simulation_of(block: Block) -> Callable[[Communicator], None]:
    code = SIMULATIONS.get(block.heading)
    if code is not None:
        return lambda comm: exec("import numpy as np\n" + code, {"comm": comm})
    return send_temperature


def run(block: Block, begin: str) -> None:
    if "deisa." not in block.code.replace("deisa.ray", ""):  # it needs no simulation
        exec(begin + block.code, {})
        return
    with ranks_in_threads(simulation_of(block)):
        exec(begin + block.code + ("" if END in block.code else END), {})


@pytest.mark.parametrize("block", ANALYTICS + GOOD_TO_KNOW + ON_FILES, ids=str)
def test_recipe(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(block, replaced(BEGIN, "Deisa()", 'Deisa(engine="local")'))
    assert block.output is not None
    assert capsys.readouterr().out == block.output
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.ray
def test_recipes_on_ray(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All callbacks that look at the same simulation, in one run; then what recipes do after it."""
    monkeypatch.chdir(tmp_path)
    together = [
        block for block in ANALYTICS + GOOD_TO_KNOW + ON_FILES if simulation_of(block) is send_temperature
    ]
    parts = [block.code.partition(END) for block in together]
    before, after = ("\n".join(part[n] for part in parts) for n in (0, 2))
    with ranks_in_threads(send_temperature):
        exec(BEGIN + before + END + after, {})
    printed = capsys.readouterr().out
    assert sorted(printed.splitlines()) == sorted(
        "".join(block.output or "" for block in together).splitlines()
    )
    assert not list(tmp_path.rglob("*.part"))


INTERRUPT = """
    if latest.t == 2 and n == 3:
        import signal

        signal.raise_signal(signal.SIGINT)


"""


@pytest.mark.ray
@pytest.mark.slow
def test_an_interrupted_mean_goes_on(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = [block for block in ANALYTICS if "interrupted" in block.heading]
    Path("first.py").write_text(BEGIN + block.code + INTERRUPT + END)
    Path("second.py").write_text(BEGIN + block.code + END)
    assert block.output is not None
    lines = block.output.splitlines(keepends=True)
    with ranks_in_threads(send_temperature):
        with started("first.py") as first:
            printed, _ = first.communicate(timeout=RUN_TIMEOUT_S)
        assert printed == "".join(lines[:3])
        with started("second.py") as second:
            assert output_of(second) == "".join(lines[3:])


# Puts the tasks of a job step on this machine.
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do
    case $1 in --ntasks=*) tasks=${1#--ntasks=} ;; esac
    shift
done
if [ -n "$tasks" ]; then SLURM_PROCID=0 exec "$@"; else exec mpiexec -n 4 "$@"; fi
"""


@pytest.mark.ray
@pytest.mark.mpi
@pytest.mark.slow
def test_batch_script(tmp_path: Path) -> None:
    page = (DOCS / "recipes.md").read_text()
    (script,) = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```$", page, re.M | re.S)
    _, simulation, analytics = python_blocks(ROOT / "README.md")
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "simulation.py").write_text(simulation.code)
    (tmp_path / "analytics.py").write_text(analytics.code)
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    with (
        tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp") as ray_dir,
        (tmp_path / "out").open("w") as out,
    ):
        variables = {
            "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_TMPDIR": ray_dir,
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_NNODES": "1",
        }
        job = subprocess.Popen(
            ["bash", "job.sh"],
            cwd=tmp_path,
            env=os.environ | variables,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        try:
            status = job.wait(RUN_TIMEOUT_S)
        finally:
            kill_session(job)
    printed = (tmp_path / "out").read_text()
    assert status == 0, printed
    assert "".join(re.findall("^t=.*\n", printed, re.M)) == analytics.output, printed
