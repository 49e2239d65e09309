"""The same commands again: a run starts where another one of its session has been killed, in whatever order."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.parties import Parties, Party
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.ray_processes import agent_of

STEPS = 20


@pytest.fixture
def parties(engine: str, tmp_path: Path, session_name: str) -> Iterator[Parties]:
    """The processes of one session; what is left is killed."""
    parties = Parties(tmp_path, session_name)
    yield parties
    parties.stop()


def said(party: Party) -> str:
    """What it logged."""
    return party.log.with_suffix(".err").read_text()


def kill_all(analytics: Party, ranks: Sequence[Party]) -> None:
    for party in (analytics, *ranks):
        party.kill()


def interrupt_and_terminate(analytics: Party, ranks: Sequence[Party]) -> None:
    analytics.kill(signal.SIGINT)
    for rank in ranks:
        rank.kill(signal.SIGTERM)
    for party in (analytics, *ranks):
        party.process.wait(PATIENCE_S)


def a_run_that_is_ended(parties: Parties, engine: str, end: object = kill_all) -> None:
    """It leaves a few complete timesteps that no callback has handled."""
    analytics = parties.analytics(f"--engine={engine}", "--ahead=4", "--slow=0.2")
    ranks = parties.ranks(2, 10_000)
    analytics.reached("done 3")
    assert callable(end)
    end(analytics, ranks)


def assert_whole(analytics: Party, ranks: Sequence[Party]) -> None:
    assert analytics.ended() == "well", said(analytics)
    assert [rank.ended() for rank in ranks] == ["well"] * len(ranks)
    assert not analytics.numbers("broken")
    assert analytics.numbers("done") == list(range(STEPS))


@pytest.mark.parametrize(
    ("first", "end"),
    [
        ("ranks", kill_all),
        pytest.param("analytics", kill_all, marks=pytest.mark.slow),
        pytest.param("ranks", interrupt_and_terminate, marks=pytest.mark.slow),
        pytest.param("analytics", interrupt_and_terminate, marks=pytest.mark.slow),
    ],
)
def test_the_second_run_works(parties: Parties, engine: str, end: object, first: str) -> None:
    """Also with a larger window than the first one's; nothing of the first run is seen."""
    a_run_that_is_ended(parties, engine, end)
    again = [f"--engine={engine}", "--window=7"]
    if first == "analytics":
        analytics = parties.analytics(*again)
        ranks = parties.ranks(2, STEPS)
    else:
        ranks = parties.ranks(2, STEPS, warn_every_s=0.5)
        wait_until(lambda: all("waiting for the" in said(rank) for rank in ranks), "the ranks wait")
        analytics = parties.analytics(*again)
    assert_whole(analytics, ranks)
    if engine == "ray":
        warned = said(analytics)
        assert warned.count("It is cleared away, and a new run starts") == 1
        assert "its analytics has gone, and bridge 0 was lost after timestep" in warned
        assert "and 1 more" in warned
        assert "complete timesteps are dropped that no callback has handled" in warned
        assert " 0 complete timesteps are dropped" not in warned
        assert "DEISA_RAY_LEFTOVER=deliver" in warned


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray"], indirect=True)
def test_the_survivors_of_what_is_cleared_away_learn_why(parties: Parties, engine: str) -> None:
    analytics = parties.analytics("--ahead=4", "--slow=0.2")
    ranks = parties.ranks(2, 10_000)
    analytics.reached("done 3")
    kill_all(analytics, ranks[1:])
    second = parties.analytics()
    error = ranks[0].ended()
    assert error.startswith("BridgeLostError: bridge 1 was lost after timestep "), error
    assert error.endswith("then another analytics has cleared the session away")
    assert_whole(second, parties.ranks(2, STEPS))


@pytest.mark.ray
@pytest.mark.parametrize("engine", ["ray"], indirect=True)
def test_the_agent_was_killed_between_two_analytics(parties: Parties, engine: str) -> None:
    """Nothing is left that tells of the first run: the next analytics says that it waits for a simulation."""
    first = parties.analytics("--slow=0.05")
    ranks = parties.ranks(2, 10_000)
    first.reached("done 3")
    first.kill(signal.SIGINT)
    assert first.ended().startswith("KeyboardInterrupt")
    agent = agent_of(parties.session)
    assert agent is not None
    os.kill(agent, signal.SIGKILL)
    assert {rank.ended().split(":")[0] for rank in ranks} == {"AnalyticsLostError"}
    second = parties.analytics(warn_every_s=0.5)
    wait_until(lambda: "waiting for the first bridge of session" in said(second), "it waits")
    assert_whole(second, parties.ranks(2, STEPS))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray"], indirect=True)
def test_a_new_simulation_waits_until_the_last_one_is_handled(parties: Parties, engine: str) -> None:
    """The last one had closed in order: nothing of it is lost, and nothing is mixed."""
    first = parties.analytics("--ahead=30", "--slow=0.3")
    old = parties.ranks(2, STEPS)
    assert [rank.ended() for rank in old] == ["well", "well"]
    first.reached("done 1")
    first.kill()
    new = parties.ranks(2, STEPS, warn_every_s=0.5)
    wait_until(lambda: all("still handles what the last" in said(rank) for rank in new), "the ranks wait")
    second = parties.analytics("--ahead=30")
    assert second.ended() == "well"
    assert sorted({*first.numbers("done"), *second.numbers("done")}) == list(range(STEPS))
    assert_whole(parties.analytics(), new)
