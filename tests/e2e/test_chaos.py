"""A short storm; `make chaos` runs long ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.storm import Storm

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("seed", [11, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (12, 13))])
def test_promises_are_kept_in_a_storm(ray_cluster: str, tmp_path: Path, session_name: str, seed: int) -> None:
    figures = Storm(tmp_path, session_name, seed).run()
    assert figures.timesteps
