"""What the documentation shows is run as it stands there, and prints what it says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deisa.ray import Bridge, Deisa, Settings
from deisa.ray._state.stats import BridgeStats
from deisa.ray.report import ArrayFigures, CallbackFigures, ComputationFigures, Report
from tests.docs.pages import DOCS, ROOT, Block, named_block, patched, python_blocks, replaced
from tests.docs.running import RANKS, Communicator, output_of, ranks_in_threads, started
from tests.support.mpi import Mpi

# The quick start.


@pytest.mark.ray
def test_quick_start_twice_on_one_cluster(ray_cluster: str, tmp_path: Path) -> None:
    page = DOCS / "quick_start.rst"
    simulation, analytics = tmp_path / "simulation.py", tmp_path / "analytics.py"
    simulation.write_text(
        patched(named_block(page, "quick-simulation"), named_block(page, "quick-changes")),
    )
    analytics.write_text(named_block(page, "quick-analytics"))
    for _ in range(2):
        with (
            started(analytics) as driver,
            started(simulation, "0") as rank0,
            started(simulation, "1") as rank1,
            started(simulation, "2") as rank2,
            started(simulation, "3") as rank3,
        ):
            printed = output_of(driver)
            for rank in (rank0, rank1, rank2, rank3):
                assert output_of(rank) == ""
        assert printed == named_block(page, "quick-output")
        assert printed.splitlines() == [f"t={t} mean={float(t)}" for t in range(10)]


def test_quick_start_snippet_describes_one_bridge_of_a_larger_grid() -> None:
    """The user's own snippet, unchanged."""
    snippet = named_block(DOCS / "quick_start.rst", "quick-simulation")
    for line in (
        "from deisa.ray.bridge import Bridge",
        '"nb_chunks_per_dim": (4, 4),',
        '"chunk_position": (0, 0),',
        'bridge.send(array_name="temperature", chunk=chunk, timestep=t)',
        "bridge.close(timestep=10)",
    ):
        assert line in snippet


def test_quick_start_leads_with_the_pair_of_the_readme() -> None:
    page = DOCS / "quick_start.rst"
    _, simulation, analytics = python_blocks(ROOT / "README.md")
    assert named_block(page, "pair-simulation") == simulation.code
    assert named_block(page, "pair-analytics") == analytics.code
    assert named_block(page, "pair-output") == analytics.output


# The README.


def test_readme_without_mpi_and_ray(capsys: pytest.CaptureFixture[str]) -> None:
    first, *_ = python_blocks(ROOT / "README.md")
    exec(first.code, {})
    assert capsys.readouterr().out == first.output


@pytest.mark.ray
@pytest.mark.mpi
def test_readme(ray_cluster: str, mpi: Mpi, tmp_path: Path) -> None:
    _, simulation, analytics = python_blocks(ROOT / "README.md")
    (tmp_path / "simulation.py").write_text(simulation.code)
    (tmp_path / "analytics.py").write_text(analytics.code)
    with started(tmp_path / "analytics.py") as driver:
        ranks = mpi.run(RANKS, "-m", "mpi4py", str(tmp_path / "simulation.py"))
        printed = output_of(driver)
        assert ranks.returncode == 0, ranks.stderr
        assert printed == analytics.output


# The page on analytics: in one process, but for the last snippet.

ANALYTICS = python_blocks(DOCS / "analytics.md")
BEGIN, END = (block.code for block in ANALYTICS[:2])
ON_RAY = [block for block in ANALYTICS if "deisa_ray_get" in block.code]
IN_PROCESS = [block for block in ANALYTICS[2:] if block not in ON_RAY]


def send_both(comm: Communicator) -> None:
    chunk = {
        "chunk_shape": (64, 64),
        "nb_chunks_per_dim": (2, 2),
        "chunk_position": divmod(comm.rank, 2),
        "dtype": float,
        "dims": ("y", "x"),
        "coords": {dim: (dim, {"start": 0, "step": 0.1}, {"units": "m"}) for dim in "yx"},
    }
    arrays = {
        "temperature": chunk | {"attrs": {"units": "K"}},
        "pressure": chunk | {"attrs": {"units": "Pa"}},
    }
    with Bridge(comm, arrays) as bridge:
        for t in range(5):
            bridge.send("temperature", np.full((64, 64), float(t)), t, time=t / 2)
            if t % 2 == 0:
                bridge.send("pressure", np.full((64, 64), 10.0 * t), t, time=t / 2)


@pytest.mark.parametrize("block", IN_PROCESS, ids=str)
def test_analytics_snippet(
    block: Block,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    in_process = 'deisa = Deisa(engine="local")\n'
    begin = replaced(BEGIN, "deisa = Deisa()\n", "" if in_process in block.code else in_process)
    end = "" if "deisa.execute_callbacks()" in block.code else END
    with ranks_in_threads(send_both):
        exec(begin + block.code + end, {})
    assert block.output is not None
    assert capsys.readouterr().out == block.output


@pytest.mark.ray
@pytest.mark.parametrize("block", ON_RAY, ids=str)
def test_scheduler_snippet(block: Block, ray_cluster: str, tmp_path: Path) -> None:
    (tmp_path / "snippet.py").write_text(block.code)
    with started(tmp_path / "snippet.py") as process:
        assert output_of(process) == block.output


def test_the_printed_report() -> None:
    held_up_s = {0: 2.82, 1: 2.83, 2: 2.82, 3: 2.80}
    report = Report(
        arrays={
            "temperature": ArrayFigures(50, 50, 400 * 2**20),
            "pressure": ArrayFigures(25, 25, 200 * 2**20),
        },
        bridges={b: BridgeStats(75, 150 * 2**20, seconds) for b, seconds in held_up_s.items()},
        callbacks=(
            CallbackFigures("summary", 50, 0, 2.274, 1.09),
            CallbackFigures("both", 25, 0, 0.528, 0.0802),
        ),
        computations=ComputationFigures(75, 73, 0.1799, 2.13, 75, 0.7711, 0),
        bound_bytes={"aa46e8ba523c" + 44 * "0": 48 * 2**20},
        wall_s=2.8781,
    )
    assert f"```text\n{report}\n```" in (DOCS / "analytics.md").read_text()


def test_message_for_an_unknown_array(caplog: pytest.LogCaptureFixture) -> None:
    def summary_callback(temperatur: Any) -> None:
        raise AssertionError

    with Deisa(engine="local") as deisa:
        deisa.register_callback(summary_callback, "temperatur")
        with ranks_in_threads(lambda comm: send_only_temperature(comm)):
            deisa.execute_callbacks()
    message = caplog.records[0].getMessage()
    assert "did you mean" in message
    assert f"```text\n{message}\n```" in (DOCS / "analytics.md").read_text()


def send_only_temperature(comm: Communicator) -> None:
    chunk = {
        "chunk_shape": (4, 4),
        "nb_chunks_per_dim": (2, 2),
        "chunk_position": divmod(comm.rank, 2),
        "dtype": float,
    }
    with Bridge(comm, {"temperature": chunk}) as bridge:
        bridge.send("temperature", np.zeros((4, 4)), 0)


# The page on the simulation.

SIMULATION = python_blocks(DOCS / "simulation.md")
SEND = """
with Bridge(comm=comm, arrays_metadata=arrays_metadata) as bridge:
    for t in range(10):
        shape = arrays_metadata["temperature"]["chunk_shape"]
        bridge.send("temperature", np.full(shape, float(rank)), t)
"""


def rank_program(block: Block) -> str:
    """A snippet, with what it takes from the first one on its page."""
    first = SIMULATION[0].code
    first = replaced(first, "from mpi4py import MPI\n", "")
    first = replaced(first, "comm = MPI.COMM_WORLD\n", "")
    if block is SIMULATION[0]:
        return first
    begin, _, _ = first.partition("with Bridge(")
    return begin + block.code + ("" if "Bridge(" in block.code else SEND)


@pytest.mark.parametrize("block", SIMULATION, ids=str)
def test_simulation_snippet(block: Block) -> None:
    program = rank_program(block)
    seen: dict[int, np.ndarray] = {}
    with Deisa(engine="local") as deisa:

        @deisa.register("temperature")
        def keep(temperature: Any) -> None:
            seen[temperature[-1].t] = temperature[-1].dask.compute()

        with ranks_in_threads(lambda comm: exec(program, {"comm": comm})):
            deisa.execute_callbacks()
    assert list(seen) == list(range(10))
    assert all(values.shape == (128, 128) for values in seen.values())
    senders = {0.0, 1.0} if "if rank < 2" in program else {0.0, 1.0, 2.0, 3.0}
    assert set(np.unique(seen[9])) == senders


def test_every_setting_is_in_the_table() -> None:
    page = (DOCS / "simulation.md").read_text()
    table = dict(re.findall(r"^\* - `DEISA_RAY_(\w+)`\n  - `?([^`\n]+)`?$", page, re.M))
    defaults = {field.name.upper(): field.default for field in dataclasses.fields(Settings)}
    assert table.keys() == defaults.keys()
    for name, default in defaults.items():
        if default is not None:
            assert table[name] == (default if isinstance(default, str) else f"{default:g}")


# Every page.

WIDEST = 115  # columns of code that a window of 1,280 pixels shows


def test_code_fits_into_a_window() -> None:
    fence = re.compile(r"^```(?:python|console|bash)\n(.*?)^```$", re.M | re.S)
    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    code = {page.name: "".join(fence.findall(page.read_text())) for page in pages}
    code["quick_start.rst"] = "".join(re.findall("^   .*\n", (DOCS / "quick_start.rst").read_text(), re.M))
    wide = [(name, line) for name, text in code.items() for line in text.splitlines() if len(line) > WIDEST]
    assert wide == []


# The page on the design.


def test_every_file_is_on_the_map() -> None:
    page = (DOCS / "design.md").read_text()
    tree = page.partition("src/deisa/ray/\n")[2].partition("```")[0]
    folder, mapped = "", set()
    for indent, name in re.findall(r"^( +)(\w+(?:/|\.py)) ", tree, re.M):
        if name.endswith("/"):
            folder = name
        else:
            mapped.add((folder if len(indent) > 2 else "") + name)
    source = ROOT / "src/deisa/ray"
    assert mapped == {
        str(path.relative_to(source)) for path in source.rglob("*.py") if path.name != "__init__.py"
    }


def test_links_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    picture = "docs/_static/gray_scott.png"
    assert picture in links
    assert [link for link in links if not (ROOT / link).exists() and link != picture] == []
