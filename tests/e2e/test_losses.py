"""Who dies and what follows: docs/reliability.md, row by row, with real processes that are really killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from deisa.ray import DeisaArray, Settings, WindowSpec
from deisa.ray.errors import MEMORY_MONITOR, ComputationLostError
from tests.e2e.parties import Parties, Party
from tests.e2e.programs.checked import chunk, time_of
from tests.scheduler.simulation import run
from tests.support.mpi import Mpi
from tests.support.patience import wait_until
from tests.support.ray_processes import agent_of, chunk_memory, workers

pytestmark = pytest.mark.ray

SOON_S = 10.0
POLICIES = ("wait", "continue", "raise")


@pytest.fixture
def parties(ray_cluster: str, tmp_path: Path, session_name: str) -> Iterator[Parties]:
    """The processes of one session; what is left is killed."""
    parties = Parties(tmp_path, session_name)
    yield parties
    parties.stop()


def seconds_until(party: Party, since: float) -> float:
    """How long after a time a party ended."""
    party.ended()
    return time.monotonic() - since


def handled_in_order(*analytics: Party) -> list[int]:
    """The timesteps that one analytics after the other handled, which must be intact and in order."""
    for one in analytics:
        assert not one.numbers("broken"), one.lines()
    return [t for one in analytics for t in one.numbers("done")]


# Ranks.


def test_one_rank_of_three_is_killed(parties: Parties) -> None:
    analytics = parties.analytics("--ahead=4", "--slow=0.05")
    ranks = parties.ranks(3, 10_000)
    ranks[1].reached("sent 20")
    killed = ranks[1].kill()
    assert seconds_until(analytics, killed) < SOON_S
    error = analytics.ended()
    last = max(ranks[1].numbers("sent"))
    assert re.fullmatch(
        rf"BridgeLostError: bridge 1 on node \w+ was lost after timestep ({last}|{last + 1}): .*", error
    )
    complete = int(error.split("timestep ")[1].split(":")[0])
    assert handled_in_order(analytics) == list(range(complete + 1))
    for survivor in (ranks[0], ranks[2]):
        assert survivor.ended() == error
        assert seconds_until(survivor, killed) < SOON_S


def test_the_other_ranks_go_on_if_they_are_to(parties: Parties) -> None:
    analytics = parties.analytics()
    ranks = parties.ranks(2, 150, on_analytics_lost="continue")
    ranks[1].reached("sent 5")
    ranks[1].kill()
    assert ranks[0].ended() == "well"
    assert ranks[0].numbers("sent") == list(range(150))
    assert analytics.ended().startswith("BridgeLostError: bridge 1 ")


@pytest.mark.slow
def test_all_ranks_are_killed(parties: Parties) -> None:
    analytics = parties.analytics("--ahead=4")
    ranks = parties.ranks(2, 10_000)
    ranks[0].reached("sent 20")
    for rank in ranks:
        killed = rank.kill()
    assert seconds_until(analytics, killed) < SOON_S
    assert re.match(
        r"BridgeLostError: bridge [01] on node \w+ was lost after timestep \d+: ", analytics.ended()
    )
    handled = handled_in_order(analytics)
    assert handled == list(range(len(handled)))
    assert len(handled) >= min(max(rank.numbers("sent")) for rank in ranks)


@pytest.mark.slow
def test_a_rank_ends_with_a_bad_status(parties: Parties) -> None:
    analytics = parties.analytics("--ahead=8", "--slow=0.05")
    ranks = [parties.rank(0, 2, 10, "--leave=3"), parties.rank(1, 2, 10_000)]
    error = analytics.ended()
    assert error.startswith("BridgeLostError: bridge 0 on node ")
    assert (
        "was lost after timestep 9: its process ended without close(), and its exit status was not 0" in error
    )
    assert handled_in_order(analytics) == list(range(10))
    assert ranks[1].ended() == error


@pytest.mark.slow
def test_ranks_end_without_close_as_if_they_had_closed(parties: Parties) -> None:
    analytics = parties.analytics()
    for rank in parties.ranks(2, 10, "--leave=0"):
        assert rank.ended() == "well"
    assert analytics.ended() == "well"
    assert handled_in_order(analytics) == list(range(10))


@pytest.mark.slow
@pytest.mark.mpi
def test_mpiexec_is_interrupted(parties: Parties, mpi: Mpi) -> None:
    analytics = parties.analytics()
    simulation = parties.mpi(mpi, 2, 10_000)
    wait_until(lambda: len(analytics.numbers("done")) > 10, "ten timesteps are handled")
    interrupted = simulation.kill(signal.SIGINT)
    assert seconds_until(analytics, interrupted) < SOON_S
    assert re.match(
        r"BridgeLostError: bridge [01] on node \w+ was lost after timestep \d+: ", analytics.ended()
    )


# The analytics.


def end_by_kill(analytics: Party) -> None:
    analytics.kill()


def end_by_interrupt(analytics: Party) -> None:
    analytics.kill(signal.SIGINT)
    assert analytics.ended().startswith("KeyboardInterrupt")


def end_by_error(analytics: Party) -> None:
    assert analytics.ended() == "RuntimeError: the analytics fails"


SELDOM = [("killed", 1), ("interrupted", 3), ("fails", 1), ("fails", 3)]
ENDS = {"killed": end_by_kill, "interrupted": end_by_interrupt, "fails": end_by_error}


@pytest.mark.parametrize(
    ("end", "window"),
    [
        ("killed", 3),
        ("interrupted", 1),
        *(pytest.param(end, window, marks=pytest.mark.slow) for end, window in SELDOM),
    ],
)
def test_another_analytics_takes_over(parties: Parties, end: str, window: int) -> None:
    """Nothing is lost, nothing that was handled comes twice, and windows are whole."""
    options = [f"--window={window}", "--ahead=3", "--slow=0.02"]
    first = parties.analytics(*options, *(["--raise-at=12"] if end == "fails" else []))
    ranks = parties.ranks(2, 60)
    first.reached("began 12")
    ENDS[end](first)
    second = parties.analytics(*options)
    assert second.ended() == "well"
    assert [rank.ended() for rank in ranks] == ["well", "well"]
    assert handled_in_order(first, second) == list(range(60))


@pytest.mark.slow
def test_one_analytics_after_another(parties: Parties) -> None:
    """Each is killed in the middle of a callback, whose timestep comes again."""
    ranks = parties.ranks(2, 40)
    analytics = []
    for fatal in (5, 6, 20, None):
        analytics.append(parties.analytics("--window=2", "--ahead=2", "--slow=0.05"))
        if fatal is not None:
            analytics[-1].reached(f"began {fatal}")
            analytics[-1].kill()
    assert analytics[-1].ended() == "well"
    assert [rank.ended() for rank in ranks] == ["well", "well"]
    assert handled_in_order(*analytics) == list(range(40))


@pytest.mark.slow
def test_what_one_analytics_after_another_saves(parties: Parties, tmp_path: Path) -> None:
    """No timestep is doubled and none is missing, though each is killed while it saves."""
    steps, elements = 40, 1000
    paths = [tmp_path / "out.zarr", tmp_path / "out.nc"]
    ranks = parties.ranks(2, steps, f"--elements={elements}")
    for fatal in (5, 17, None):
        analytics = parties.analytics("--ahead=2", *(f"--save={path}" for path in paths))
        if fatal is not None:
            analytics.reached(f"done {fatal}")
            analytics.kill()
    assert analytics.ended() == "well"
    assert [rank.ended() for rank in ranks] == ["well", "well"]
    for found in (xr.open_zarr(paths[0]), xr.open_dataset(paths[1])):
        assert found.timestep.values.tolist() == list(range(steps))
        for t in range(steps):
            whole = np.concatenate([chunk(rank, t, elements) for rank in range(2)])
            np.testing.assert_array_equal(found.x[t], whole)
            np.testing.assert_equal(float(found.time[t]), time_of(t) or np.nan)
        found.close()


@pytest.mark.slow
def test_the_simulation_ends_between_two_analytics(parties: Parties) -> None:
    first = parties.analytics("--ahead=30", "--slow=0.2")
    ranks = parties.ranks(2, 20)
    assert [rank.ended() for rank in ranks] == ["well", "well"]
    first.reached("done 1")
    first.kill()
    assert max(first.numbers("done")) < 15
    second = parties.analytics("--ahead=30")
    assert second.ended() == "well"
    assert handled_in_order(first, second) == list(range(20))


@pytest.mark.slow
def test_a_rank_dies_between_two_analytics(parties: Parties) -> None:
    first = parties.analytics("--ahead=10", "--slow=0.1")
    ranks = parties.ranks(2, 10_000)
    first.reached("done 5")
    first.kill()
    wait_until(
        lambda: min(max(rank.numbers("sent")) for rank in ranks) >= max(first.numbers("done")) + 10,
        "the slots are full",
    )
    ranks[0].kill()
    second = parties.analytics("--ahead=10", leftover="deliver")
    assert second.ended().startswith("BridgeLostError: bridge 0 ")
    handled = handled_in_order(first, second)
    assert handled == list(range(len(handled)))
    assert len(handled) >= min(max(rank.numbers("sent")) for rank in ranks)
    assert ranks[1].ended() == second.ended()


@pytest.mark.slow
def test_the_analytics_dies_before_the_start(parties: Parties) -> None:
    ranks = parties.ranks(1, 5)
    first = parties.analytics()
    first.reached("ready")
    first.kill()
    second = parties.analytics()
    assert second.ended() == "well"
    assert [rank.ended() for rank in ranks] == ["well"]
    assert handled_in_order(first, second)[-1] == 4


@pytest.mark.slow
def test_a_second_analytics_beside_the_first_is_refused(parties: Parties) -> None:
    first = parties.analytics("--slow=0.05")
    ranks = parties.ranks(1, 100)
    first.reached("done 2")
    second = parties.analytics()
    assert re.match(
        rf"SessionInUseError: session '.*' is in use on this cluster by another analytics, pid {first.process.pid} on "
        rf"{re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d; end it, or choose another name",
        second.ended(),
    )
    assert first.ended() == "well"
    assert [rank.ended() for rank in ranks] == ["well"]


@pytest.mark.slow
def test_larger_windows_than_before_are_refused(parties: Parties) -> None:
    """And the simulation goes on to wait for one that asks for no more."""
    first = parties.analytics("--window=2", driver_timeout_s=60)
    (rank,) = parties.ranks(1, 10_000)
    first.reached("done 2")
    first.kill()
    second = parties.analytics("--window=5", driver_timeout_s=60)
    assert "a window of 5 timesteps of array 'x' is asked for" in second.ended()
    assert second.ended().startswith("WindowError: ")
    third = parties.analytics("--window=2", driver_timeout_s=60)
    last = max(first.numbers("done"))
    third.reached(f"done {last + 3}")
    assert third.numbers("done")[0] in (last, last + 1)  # the call for it may not have returned
    assert not rank.has_ended


@pytest.mark.parametrize("policy", [*POLICIES[:2], pytest.param("raise", marks=pytest.mark.slow)])
def test_no_other_analytics_comes(parties: Parties, policy: str) -> None:
    first = parties.analytics(driver_timeout_s=4 if policy == "wait" else 2 * SOON_S)
    ranks = parties.ranks(2, 200, on_analytics_lost=policy)
    first.reached("done 5")
    killed = first.kill()
    ended = [rank.ended() for rank in ranks]
    took = time.monotonic() - killed
    if policy == "continue":
        assert ended == ["well", "well"]
        assert [rank.numbers("sent") for rank in ranks] == [list(range(200))] * 2
        return
    assert all(e.startswith("AnalyticsLostError: the analytics of session ") for e in ended), ended
    assert took < SOON_S
    assert ("no other has taken over in 4 s" in ended[0]) == (policy == "wait")


@pytest.mark.slow
def test_an_analytics_that_was_stopped_goes_on(parties: Parties) -> None:
    analytics = parties.analytics()
    ranks = parties.ranks(2, 50)
    analytics.reached("done 5")
    analytics.kill(signal.SIGSTOP)
    time.sleep(8)
    analytics.kill(signal.SIGCONT)
    assert analytics.ended() == "well"
    assert [rank.ended() for rank in ranks] == ["well", "well"]
    assert handled_in_order(analytics) == list(range(50))


# What serves them.


def kill_agent(parties: Parties) -> None:
    agent = agent_of(parties.session)
    assert agent is not None
    os.kill(agent, signal.SIGKILL)


def test_the_agent_is_killed(parties: Parties) -> None:
    analytics = parties.analytics()
    ranks = parties.ranks(2, 10_000)
    analytics.reached("done 5")
    kill_agent(parties)
    killed = time.monotonic()
    assert seconds_until(analytics, killed) < SOON_S
    assert re.match(
        r"AgentLostError: the agent of node \w+, with bridges 0 and 1, has gone: ", analytics.ended()
    )
    for rank in ranks:
        assert rank.ended().startswith("AnalyticsLostError: the agent of session ")
        assert MEMORY_MONITOR in rank.ended()  # it ends agents in the same way
    assert MEMORY_MONITOR in analytics.ended()
    assert seconds_until(ranks[1], killed) < SOON_S


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_without_their_agent(parties: Parties, policy: str) -> None:
    analytics = parties.analytics()
    ranks = parties.ranks(2, 100, on_analytics_lost=policy)
    analytics.reached("done 5")
    kill_agent(parties)
    ended = {rank.ended().split(":")[0] for rank in ranks}
    assert ended == ({"well"} if policy == "continue" else {"AnalyticsLostError"})


def kill_worker(session: str) -> bool:
    """Kill a process that runs bundles; returns whether there was any."""
    for pid in workers(session):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def test_workers_are_killed_in_the_middle_of_bundles(parties: Parties) -> None:
    """They are run again, and their results are the same."""
    analytics = parties.analytics()
    ranks = parties.ranks(2, 100, "--pause=0.05")
    for timestep in (3, 20, 40, 60):
        analytics.reached(f"done {timestep}")
        wait_until(lambda: kill_worker(parties.session), "a worker is there and is killed")
    assert analytics.ended() == "well"
    assert [rank.ended() for rank in ranks] == ["well", "well"]
    assert handled_in_order(analytics) == list(range(100))


def die(block: np.ndarray) -> np.ndarray:
    os._exit(1)


def test_a_bundle_that_always_kills_its_worker_is_given_up(ray_cluster: str, session_name: str) -> None:
    """The callback learns it, and the run goes on."""
    means: list[float] = []

    def callback(arrays: list[DeisaArray]) -> None:
        x = arrays[-1].dask
        if arrays[-1].t == 0:
            with pytest.raises(ComputationLostError, match="has gone, after 3 retries"):
                x.map_blocks(die, meta=x).compute()
        means.append(float(x.mean().compute()))

    run("ray", Settings(session=session_name), callback, [WindowSpec("x")], timesteps=2)
    assert len(means) == 2


# Slow ones.


def test_everything_is_delivered_after_the_simulation_has_gone(parties: Parties) -> None:
    analytics = parties.analytics("--ahead=110", "--slow=0.02")
    ranks = parties.ranks(2, 100, "--pause=0")
    assert [rank.ended() for rank in ranks] == ["well", "well"]
    assert max(analytics.numbers("done"), default=0) < 50
    assert analytics.ended() == "well"
    assert handled_in_order(analytics) == list(range(100))


@pytest.mark.slow
def test_a_callback_that_raises_every_third_time(parties: Parties) -> None:
    analytics = parties.analytics("--fail-every=3")
    ranks = parties.ranks(2, 60, "--pause=0")
    assert analytics.ended() == "well"
    assert [rank.ended() for rank in ranks] == ["well", "well"]
    assert handled_in_order(analytics) == list(range(60))


@pytest.mark.slow
def test_the_analytics_is_slower_than_the_simulation_for_500_steps(parties: Parties) -> None:
    """Memory stays within the bound, nothing is lost, and the ranks say what they wait for."""
    analytics = parties.analytics("--slow=0.01", "--ahead=2")
    ranks = parties.ranks(2, 500, "--pause=0", warn_every_s=0.005)
    bound = (1 + 2) * 2 * 8192
    greatest = 0
    while not analytics.has_ended:
        agent = agent_of(parties.session)
        greatest = max(greatest, chunk_memory(agent, parties.session) if agent is not None else 0)
        time.sleep(0.1)
    assert [rank.ended() for rank in ranks] == ["well", "well"]
    assert handled_in_order(analytics) == list(range(500))
    assert greatest == bound
    complaints = said(ranks[0])
    assert "all 3 slots of array 'x' are in use" in complaints and "slower than the simulation" in complaints


def test_a_callback_that_does_not_return_is_named(parties: Parties) -> None:
    analytics = parties.analytics("--slow=3", callback_warn_s=1)
    parties.ranks(1, 2)
    assert analytics.ended() == "well"
    warning = re.search(
        r"callback 'check' has been running for \d s at timestep 0, since [\d:]+;.*", said(analytics)
    )
    assert warning is not None
    assert "time.sleep(options.slow)" in said(analytics)


def said(party: Party) -> str:
    """What it logged."""
    return party.log.with_suffix(".err").read_text()
