"""The demo, small: both programs as `make demo` starts them, and what they leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from PIL import Image

from tests.support.patience import PATIENCE_S
from tests.support.processes import kill_tree

pytestmark = [pytest.mark.mpi, pytest.mark.ray]

ROOT = Path(__file__).parents[2]
TIMESTEPS = 8
BRIGHTEST = 0.45  # of the frames, as in the demo


@pytest.mark.usefixtures("ray_cluster")
def test_the_demo_leaves_pictures_and_data(
    tmp_path: Path, session_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEISA_RAY_SESSION", session_name)
    command = [
        sys.executable,
        "-m",
        "examples.gray_scott",
        "--size=64",
        f"--steps={50 * TIMESTEPS}",
        "--every=50",
    ]
    with subprocess.Popen(
        [*command, f"--output={tmp_path}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as demo:
        try:
            output, _ = demo.communicate(timeout=2 * PATIENCE_S)
        finally:
            kill_tree(demo)
    assert demo.returncode == 0, output
    assert f"{TIMESTEPS} timesteps, 128.00 kiB handed over" in output
    assert "the simulation was held up for" in output

    field = np.asarray(zarr.open_group(tmp_path / "pattern.zarr", mode="r")["V"])
    assert field.shape == (TIMESTEPS, 64, 64)
    assert np.isfinite(field).all() and field.std(axis=(1, 2)).min() > 0
    assert len({step.tobytes() for step in field}) == TIMESTEPS

    frames = sorted((tmp_path / "frames").glob("*.png"))
    assert [int(frame.stem) for frame in frames] == [50 * (n + 1) for n in range(TIMESTEPS)]
    for frame, step in zip(frames, field, strict=True):
        expected = (step.clip(0, BRIGHTEST) * (255 / BRIGHTEST)).astype(np.uint8)
        assert np.array_equal(np.asarray(Image.open(frame)), expected)
    with Image.open(tmp_path / "pattern.gif") as animation:
        assert getattr(animation, "n_frames", 1) == TIMESTEPS
    with Image.open(tmp_path / "series.png") as plot:
        assert plot.size[0] > 500
