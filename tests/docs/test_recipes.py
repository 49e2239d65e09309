"""Recipes run as they stand on their page, on both engines, and print what it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deisa.ray import Bridge
from tests.docs.pages import DOCS, Block, python_blocks, replaced
from tests.docs.running import Communicator, ranks_in_threads

RECIPES = python_blocks(DOCS / "recipes.md")
BEGIN, END = (block.code for block in RECIPES[:2])
SIMULATIONS = {block.heading: block.code for block in RECIPES if "Bridge(" in block.code}
ANALYTICS = [block for block in RECIPES[2:] if "Bridge(" not in block.code]


def send_temperature(comm: Communicator) -> None:
    chunk = {"global_shape": (128, 128), "chunk_shape": (64, 64), "chunk_position": divmod(comm.rank, 2)}
    with Bridge(comm, {"temperature": chunk}) as bridge:
        for t in range(5):
            bridge.send("temperature", np.full((64, 64), float(t)), t)


def send_uneven(comm: Communicator) -> None:
    """100 rows on three ranks; the fourth one owns none."""
    rows = (34, 33, 33, 0)[comm.rank]
    chunk = {
        "global_shape": (100, 8),
        "chunk_shape": (rows, 8),
        "offset": (33 * comm.rank + (comm.rank > 0), 0),
    }
    with Bridge(comm, {"temperature": chunk} if rows else {}) as bridge:
        for t in range(2):
            if rows:
                bridge.send("temperature", np.full((rows, 8), float(t)), t)


def simulation_of(block: Block) -> Callable[[Communicator], None]:
    code = SIMULATIONS.get(block.heading)
    if code is not None:
        return lambda comm: exec("import numpy as np\n" + code, {"comm": comm})
    return send_uneven if "uneven chunks" in block.heading else send_temperature


def run(block: Block, begin: str) -> None:
    with ranks_in_threads(simulation_of(block)):
        exec(begin + block.code + ("" if END in block.code else END), {})


@pytest.mark.parametrize("block", ANALYTICS, ids=str)
def test_recipe(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(block, replaced(BEGIN, "Deisa()", 'Deisa(engine="local")'))
    assert block.output is not None
    assert capsys.readouterr().out == block.output
    assert not list(tmp_path.rglob("*.part"))
