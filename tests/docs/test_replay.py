"""The page on recordings: its script runs with a simulation, and without, and prints the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deisa.ray import Bridge
from tests.docs.pages import DOCS, python_blocks, replaced
from tests.docs.running import Communicator, output_of, ranks_in_threads, started

SCRIPT, EVENT, READ = python_blocks(DOCS / "replay.md")


def send_temperature(comm: Communicator) -> None:
    chunk = {"global_shape": (128, 128), "chunk_shape": (64, 64), "chunk_position": divmod(comm.rank, 2)}
    with Bridge(comm, {"temperature": chunk}) as bridge:
        for t in range(5):
            bridge.send("temperature", np.full((64, 64), float(t)), t)


def test_the_script_with_a_simulation_and_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("analytics.py").write_text(replaced(SCRIPT.code, "Deisa()", 'Deisa(engine="local")'))
    with ranks_in_threads(send_temperature), started("analytics.py") as analytics:
        assert output_of(analytics) == SCRIPT.output
    with started("-m", "deisa.ray.replay", "run.zarr", "analytics.py") as analytics:
        assert output_of(analytics) == SCRIPT.output
    exec(READ.code, {})
    assert capsys.readouterr().out == READ.output
    monkeypatch.setenv("DEISA_RAY_REPLAY_TIMESTEPS", "1:3")
    with started("-m", "deisa.ray.replay", "run.zarr") as command:
        said = output_of(command)
    assert said == (
        f"{tmp_path / 'run.zarr'}: a recording\n"
        "  temperature: (128, 128) float64, timesteps 1 to 2 (2), 4 blocks\n"
    )


def test_what_happens_around_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    begin = 'from deisa.ray import Deisa, WindowSpec\n\ndeisa = Deisa(engine="local")\n'
    with ranks_in_threads(send_temperature):
        exec(begin + EVENT.code + "deisa.execute_callbacks()\n", {})
    assert sorted(path.name for path in Path("event.zarr").iterdir()) == ["temperature", "zarr.json"]
