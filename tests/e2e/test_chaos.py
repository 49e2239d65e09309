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


class Unlucky(Storm):
    """The agent is killed after the analytics has been interrupted, and before the next one finds it."""

    def _disturb(self) -> None:
        self._analytics[-1].reached("done 3")
        self._interrupt_analytics()
        self._kill_agent()


@pytest.mark.slow
def test_a_storm_that_leaves_nothing_to_take_over(
    ray_cluster: str, tmp_path: Path, session_name: str
) -> None:
    """The last analytics can't know of it, and waits for a simulation until it is interrupted."""
    figures = Unlucky(tmp_path, session_name, 14).run()
    assert figures.outcomes == {"KeyboardInterrupt": 1}
