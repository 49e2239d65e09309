"""What a bridge hears that comes to an agent where its place is taken."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deisa.ray._state.events import BridgeJoined
from deisa.ray._state.newcomers import Answer, Run, answer_newcomer
from deisa.ray._state.presence import HOLD_S, QUIET_HOLD_S
from deisa.ray._transport.address import agent_address
from deisa.ray._transport.reader import probe
from tests.support.patience import PATIENCE_S
from tests.unit.agent import running, whole

LIVING = Run("s", owner="pid 1 on this host (h)")


@pytest.mark.parametrize(
    ("run", "waited_s", "expected"),
    [
        (replace(LIVING, started=False, owner=""), 0.0, ("join", "")),
        (replace(LIVING, started=False), HOLD_S, ("hold", "")),  # the other one may just be dying
        (replace(LIVING, started=False), HOLD_S + 1, ("join", "")),  # the analytics finds the id twice
        (replace(LIVING, started=False, ends=True), 0.0, ("later", "is just ending its run")),
        (replace(LIVING, lost=True), 0.0, ("later", "one of its ranks was lost")),
        (
            replace(LIVING, closed=True, gone="it died"),
            0.0,
            ("later", "still handles what the last simulation sent"),
        ),
        (replace(LIVING, gone="it died", analytics="gone"), 0.0, ("later", "is still there, but it died")),
        (LIVING, HOLD_S, ("hold", "")),
        (
            LIVING,
            HOLD_S + 1,
            ("refuse", "bridge 3 (pid 7) came after session 's' had started with all its bridges"),
        ),
        (
            LIVING,
            HOLD_S + 1,
            ("refuse", "bridge 3 being pid 1 on this host (h); is a second simulation using the"),
        ),
        (LIVING, HOLD_S + 1, ("refuse", "Here two programs seem to share session 's': give one of them")),
        (replace(LIVING, analytics="quiet"), QUIET_HOLD_S, ("hold", "")),
        (
            replace(LIVING, analytics="quiet", owner=""),
            QUIET_HOLD_S + 1,
            ("refuse", "all its bridges; is a second"),
        ),
    ],
)
def test_newcomers(run: Run, waited_s: float, expected: tuple[Answer, str]) -> None:
    answer, text = answer_newcomer(3, 7, waited_s, run)
    assert answer == expected[0]
    assert expected[1] in text


def test_an_agent_without_analytics_or_data_steps_aside_and_its_ranks_follow() -> None:
    """As when an analytics on Ray is interrupted before the start, and one on the local engine comes next."""
    with running() as first:
        (opening,) = first.connect({"x": whole((3,))})
        first.server.abandon("the analytics was interrupted")
        with running(first.settings) as second:
            assert second.server.serving
            assert first.server.closed.wait(PATIENCE_S)
            second.wait(BridgeJoined)
            second.start({"x": 1})
            opening.result(PATIENCE_S).close()


@pytest.mark.parametrize("started", [True, False])
def test_an_agent_with_data_or_analytics_keeps_its_address(started: bool) -> None:
    with running(driver_timeout_s=PATIENCE_S) as first:
        opening = first.connect({"x": whole((3,))})
        if started:
            first.start({"x": 1})
            opening[0].result(PATIENCE_S)
            first.server.abandon("the analytics was interrupted")
        probe(agent_address(first.settings))
        assert not first.server.closed.is_set()
        if not started:
            first.start({"x": 1})
        opening[0].result(PATIENCE_S).close()
