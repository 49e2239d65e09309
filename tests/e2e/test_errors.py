"""What goes wrong, and who learns of it: the same typed error on both sides, in time, naming who is at fault."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deisa.ray import Bridge, DeisaArray, Settings
from deisa.ray._session import registration
from deisa.ray.errors import (
    AnalyticsLostError,
    BridgeIdError,
    BridgeLostError,
    ContractError,
    DeisaError,
    DescriptionError,
    DescriptionMismatchError,
    HoleError,
    IncompleteTimestepError,
    LostError,
    MemoryBoundError,
    NoAnalyticsError,
    OverlapError,
    SessionInUseError,
    WaitTimeoutError,
    WorldSizeError,
)
from tests.e2e.simulation import QUICK_TO_GIVE_UP, Ranks, Site, ranks, rows, values
from tests.oracle.client import RankChannel
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.processes import kill_tree
from tests.support.ray_node import AUTHENTICATION

RANK = Path(__file__).parent / "programs/rank.py"


@pytest.fixture
def rank_process(session_name: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ranks as processes; see programs/rank.py."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **settings: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(RANK), *map(str, arguments)],
            env=os.environ
            | {"DEISA_RAY_SESSION": session_name}
            | {f"DEISA_RAY_{name.upper()}": str(value) for name, value in settings.items()},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        kill_tree(process)
        assert process.stderr is not None
        process.stderr.close()


@pytest.fixture
def nobody_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bridges have connected when one of them is refused: none need be waited for, to tell it too."""
    monkeypatch.setattr(registration, "LATECOMERS_S", 0.0)


def sums(site: Site, **settings: Any) -> tuple[Any, dict[int, float]]:
    """An analytics that computes the sum of `x` at each timestep."""
    deisa = site.deisa(**settings)
    seen: dict[int, float] = {}

    @deisa.register("x")
    def add_up(x: list[DeisaArray]) -> None:
        seen[x[-1].t] = x[-1].sum().compute()

    return deisa, seen


# Layouts that do not fit together.

IN_TEN = {"global_shape": (10,), "nb_chunks_per_dim": None, "chunk_position": None}


@pytest.mark.parametrize(
    ("first", "second", "expected", "text"),
    [
        (rows(0, 3), rows(1, 3), HoleError, "no bridge owns chunk position (2,) of grid (3,): 2 of 3 chunks"),
        (rows(0, 2), rows(0, 2), OverlapError, "position (0,) belongs to both bridge 0 and bridge 1"),
        (rows(0, 2), rows(1, 2, dtype="f4"), DescriptionMismatchError, "dtype differs between bridges"),
        (rows(0, 2), rows(1, 3), DescriptionMismatchError, "nb_chunks_per_dim differs between bridges"),
        (rows(0, 0, **IN_TEN, offset=(0,)), rows(0, 0, **IN_TEN, offset=(6,)), HoleError, "'x'"),
        (rows(0, 0, **IN_TEN, offset=(0,)), rows(0, 0, **IN_TEN, offset=(3,)), OverlapError, "'x'"),
    ],
    ids=["hole", "overlap", "dtype", "grid", "hole-offsets", "overlap-offsets"],
)
def test_everybody_learns_the_same_about_a_layout(
    site: Site, first: dict[str, Any], second: dict[str, Any], expected: type[DeisaError], text: str
) -> None:
    deisa, _ = sums(site)
    simulation = Ranks(
        [partial(site.bridge, rank, 2, {"x": one}) for rank, one in enumerate((first, second))]
    )
    with pytest.raises(expected, match=re.escape(text)) as caught:
        deisa.execute_callbacks()
    assert [(type(e), str(e)) for e in simulation.errors()] == [(expected, str(caught.value))] * 2


@pytest.mark.parametrize(
    ("identities", "expected", "text"),
    [
        (
            [(0, 2), (1, 3)],
            WorldSizeError,
            "bridges disagree on world_size: bridge 0 said 2; bridge 1 said 3",
        ),
        ([(0, 2), (0, 2)], BridgeIdError, "bridge_id 0 was registered 2 times"),
    ],
    ids=["world-size", "duplicate"],
)
def test_everybody_learns_the_same_about_identities(
    site: Site, nobody_is_late: None, identities: list[tuple[int, int]], expected: type[DeisaError], text: str
) -> None:
    deisa, _ = sums(site)
    simulation = Ranks([partial(site.bridge, *identity, {"x": rows(0, 1)}) for identity in identities])
    with pytest.raises(expected, match=re.escape(text)) as caught:
        deisa.execute_callbacks()
    assert [(type(e), str(e)) for e in simulation.errors()] == [(expected, str(caught.value))] * 2


def test_a_rank_that_comes_late_learns_it_too(site: Site) -> None:
    """Ranks 0 and 1 of 3 claim one id; rank 2 arrives when that is known."""
    deisa, _ = sums(site)
    simulation = Ranks([partial(site.bridge, 0, 3, {"x": rows(0, 3)})] * 2)
    analytics = Ranks([deisa.execute_callbacks])
    wait_until(lambda: len(deisa._session.bridges), "the analytics knows of a bridge")
    late = Ranks([partial(site.bridge, 2, 3, {"x": rows(2, 3)}, connect_timeout_s=1)])
    (failure,) = analytics.errors()
    errors = [*simulation.errors(), *late.errors()]
    assert [(type(e), str(e)) for e in errors] == [(BridgeIdError, str(failure))] * 3
    me = f"bridge 0 is pid {os.getpid()} on host {socket.gethostname()}"
    assert f"({me} and {me}). If both belong to one program, give each a bridge_id of its own" in str(failure)
    assert f"If not, two programs seem to share session '{site.settings.session}'" in str(failure)
    assert "or end the other one" in str(failure)


# Parties that do not come.


@pytest.mark.parametrize(
    ("present", "missing"), [([0, 1], "bridges 2 and 3 of 4"), ([1, 2, 3], "bridge 0 of 4")], ids=str
)
def test_missing_bridges_are_named_on_both_sides(
    site: Site, caplog: pytest.LogCaptureFixture, present: list[int], missing: str
) -> None:
    deisa, _ = sums(site, start_timeout_s=1.0)
    simulation = Ranks(
        [partial(site.bridge, rank, 4, {"x": rows(rank, 4)}, warn_every_s=0.1) for rank in present]
    )

    def all_have_come() -> bool:
        told = (r for r in caplog.records if "has not called execute_callbacks()" in r.getMessage())
        return len({record.threadName for record in told}) == len(present)

    wait_until(all_have_come, "those who are there wait for the analytics")
    with pytest.raises(WaitTimeoutError, match=f"waiting for {missing}; gave up after 1 s") as caught:
        deisa.execute_callbacks()
    assert [str(error) for error in simulation.errors()] == [str(caught.value)] * len(present)
    assert {type(error) for error in simulation.errors()} == {WaitTimeoutError}


def test_a_rank_that_waits_less_long_names_the_missing_too(site: Site) -> None:
    deisa, _ = sums(site)
    simulation = Ranks([partial(site.bridge, 0, 2, {"x": rows(0, 2)}, start_timeout_s=2.0)])
    with pytest.raises(BridgeLostError, match="bridge 0 left before the session started"):
        deisa.execute_callbacks()
    (error,) = simulation.errors()
    assert isinstance(error, WaitTimeoutError)
    assert "waiting for bridge 1 of 2; gave up after 2 s" in str(error)


def test_no_bridge_at_all(site: Site) -> None:
    deisa, _ = sums(site, start_timeout_s=0.3)
    with pytest.raises(WaitTimeoutError, match="waiting for the first bridge of session"):
        deisa.execute_callbacks()


def test_no_analytics(session_name: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(session=session_name, connect_timeout_s=0.2, warn_every_s=0.01)
    with pytest.raises(NoAnalyticsError) as caught:
        Bridge(
            bridge_id=0,
            arrays_metadata={"x": rows(0, 1)},
            system_metadata={"world_size": 1},
            settings=settings,
        )
    assert f"waiting for the analytics of session {session_name!r} (0 s so far)" in caplog.text
    assert f"no analytics on this host for session {session_name!r}" in str(caught.value)
    assert "DEISA_RAY_CONNECT_TIMEOUT_S" in str(caught.value)


def test_an_analytics_that_never_runs(site: Site) -> None:
    site.deisa()
    with pytest.raises(
        WaitTimeoutError, match=r"has not called execute_callbacks\(\) yet; gave up after 1 s"
    ):
        site.bridge(0, 1, {"x": rows(0, 1)}, start_timeout_s=1.0)


def test_ranks_may_come_first(site: Site) -> None:
    simulation = Ranks([partial(site.send_rows, rank, 2, range(3)) for rank in range(2)])
    deisa, seen = sums(site)
    deisa.execute_callbacks()
    simulation.check()
    assert seen == {t: values((8,), t).sum() for t in range(3)}


def test_a_session_in_use(site: Site) -> None:
    deisa = site.deisa()
    refused: list[str] = []

    @deisa.register("x")
    def begins_another(x: list[DeisaArray]) -> None:
        with pytest.raises(SessionInUseError) as caught:
            site.deisa()
        refused.append(str(caught.value))

    with ranks(partial(site.send_rows, 0, 1, range(2))):
        report = deisa.execute_callbacks()
    assert report.callbacks_failed == 0
    assert len(refused) == 2
    where = f"thread 'MainThread', pid {os.getpid()} on {socket.gethostname()}, since "
    assert f"in use by this very process, where a Deisa runs its callbacks: {where}" in refused[0]
    assert "choose another name: Deisa(session=...) and Bridge(session=...)" in refused[0]


def test_a_second_simulation_in_a_running_session(site: Site) -> None:
    deisa, seen = sums(site)
    intruded, intrusion = threading.Event(), []

    def rank() -> None:
        with site.bridge(0, 1, {"x": rows(0, 1)}) as bridge:
            bridge.send("x", values((4,), 0), 0)
            intruded.wait(PATIENCE_S)
            bridge.send("x", values((4,), 1), 1)

    def intruder() -> None:
        wait_until(lambda: seen, "the first timestep has been seen")
        try:
            site.bridge(0, 1, {"x": rows(0, 1)})
        except BridgeIdError as error:
            intrusion.append(str(error))
        finally:
            intruded.set()

    with ranks(rank, intruder):
        deisa.execute_callbacks()
    assert list(seen) == [0, 1]
    assert "is a second simulation using the same session name?" in intrusion[0]


# Ranks whose description is refused.

NO_SHAPE = {"x": {"nb_chunks_per_dim": (2,), "chunk_position": (1,), "dtype": float}}


@pytest.mark.parametrize(
    ("bridge_id", "metadata", "expected", "text"),
    [
        (1, NO_SHAPE, DescriptionError, "chunk_shape"),
        (1, None, DescriptionError, "arrays_metadata is missing"),
        (2, {"x": rows(0, 2)}, BridgeIdError, "bridge_id 2 lies outside 0..1"),
    ],
    ids=["array", "nothing", "id"],
)
def test_a_rank_that_is_refused_says_so_to_all(
    site: Site, bridge_id: int, metadata: Any, expected: type[DeisaError], text: str
) -> None:
    """Nobody waits for it: the timeout to start is a minute."""
    deisa, _ = sums(site, start_timeout_s=PATIENCE_S)
    waits = Ranks([partial(site.bridge, 0, 2, {"x": rows(0, 2)}, start_timeout_s=PATIENCE_S)])

    def refused() -> None:
        wait_until(lambda: len(deisa._session.bridges), "the other bridge has joined")
        site.bridge(bridge_id, 2, metadata)

    wrong = Ranks([refused])
    with pytest.raises(DeisaError) as caught:
        deisa.execute_callbacks()
    (error,) = wrong.errors()
    assert isinstance(error, expected) and text in str(error)
    assert text in str(caught.value)
    (heard,) = waits.errors()
    assert (type(heard), str(heard)) == (type(caught.value), str(caught.value))


# An analytics that never runs.

FORGETFUL = """
import sys, time
from deisa.ray import Deisa

deisa = Deisa(engine="local")

@deisa.register("x")
def callback(x): ...

while not deisa._engine.agents._server._node.bridges:
    time.sleep(0.01)
exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("last", "status", "reason"),
    [("", 0, ""), ("1 / 0", 1, ": ZeroDivisionError('division by zero')"), ("del deisa", 0, "")],
)
def test_a_script_that_forgets_to_run_its_callbacks(
    session_name: str, last: str, status: int, reason: str
) -> None:
    script = subprocess.Popen(
        [sys.executable, "-c", FORGETFUL, last],
        env=os.environ | {"DEISA_RAY_SESSION": session_name},
        stderr=subprocess.PIPE,
        text=True,
    )
    site = Site("local", Settings(session=session_name, **QUICK_TO_GIVE_UP))
    simulation = Ranks([partial(site.bridge, 0, 1, {"x": rows(0, 1)}, start_timeout_s=PATIENCE_S)])
    _, said = script.communicate(timeout=PATIENCE_S)
    assert script.returncode == status
    assert f"session {session_name!r} ends without execute_callbacks(): its 1 callbacks never ran" in said
    (error,) = simulation.errors()
    assert type(error) is AnalyticsLostError
    assert str(error) == f"the analytics ended without execute_callbacks(){reason}"


def test_leaving_the_context_without_running_is_told(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with site.deisa() as deisa:
        deisa.register_callback(lambda x: None, "x")
    assert "ends without execute_callbacks(): its 1 callbacks never ran" in caplog.text


# Parties that leave, and data that does not come.


def test_an_id_that_no_bridge_of_ours_would_send_is_refused(site: Site, nobody_is_late: None) -> None:
    """`Bridge` refuses it in the rank; a client of another make may not."""
    deisa, _ = sums(site)
    channel = RankChannel(site.settings)
    learned: list[str] = []

    def come_in() -> None:
        with pytest.raises(BridgeIdError) as refused:
            channel.start(-1, 1, [])
        channel.abort()
        learned.append(str(refused.value))

    stranger = threading.Thread(target=come_in)
    stranger.start()
    with pytest.raises(BridgeIdError, match=r"bridge_id -1 lies outside 0\.\.0"):
        deisa.execute_callbacks()
    stranger.join(PATIENCE_S)
    assert learned == ["bridge_id -1 lies outside 0..0 (world_size is 1)"]


def test_bridges_that_skip_a_timestep_are_named(site: Site) -> None:
    def rank(number: int) -> None:
        with site.bridge(number, 3, {"x": rows(number, 3)}) as bridge:
            for timestep in range(50):
                if (number, timestep) not in ((0, 2), (2, 2)):
                    bridge.send("x", values((12,), timestep)[4 * number : 4 * number + 4], timestep)

    deisa, seen = sums(site)
    simulation = Ranks([partial(rank, number) for number in range(3)])
    with pytest.raises(IncompleteTimestepError) as caught:
        deisa.execute_callbacks()
    text = str(caught.value)
    assert "'x'" in text and "timestep 2" in text and "bridges 0 and 2" in text
    assert seen == {t: values((12,), t).sum() for t in range(2)}
    assert {(type(e), str(e)) for e in simulation.errors()} == {(IncompleteTimestepError, text)}


def test_a_rank_that_fails_takes_all_others_with_it(site: Site) -> None:
    """All that was complete is delivered first; then everybody learns who was lost, and when."""
    sent = {0: 0, 2: 0}

    def lives(number: int) -> None:
        with site.bridge(number, 3, {"x": rows(number, 3)}) as bridge:
            for timestep in range(100):
                bridge.send("x", values((12,), timestep)[4 * number : 4 * number + 4], timestep)
                sent[number] += 1

    def fails() -> None:
        with site.bridge(1, 3, {"x": rows(1, 3)}) as bridge:
            for timestep in range(3):
                bridge.send("x", values((12,), timestep)[4:8], timestep)
            wait_until(lambda: min(sent.values()) >= 3, "the others have sent three timesteps")
            raise ZeroDivisionError("the solver diverged")

    deisa = site.deisa(max_simulation_ahead=3)
    seen: dict[int, float] = {}

    @deisa.register("x")
    def add_up(x: list[DeisaArray]) -> None:
        wait_until(lambda: failing.ended, "the rank has failed")  # with timesteps 1 and 2 yet to be seen
        seen[x[-1].t] = x[-1].sum().compute()

    living, failing = Ranks([partial(lives, 0), partial(lives, 2)]), Ranks([fails])
    with pytest.raises(BridgeLostError, match=r"bridge 1 .* was lost after timestep 2: ") as caught:
        deisa.execute_callbacks()
    assert seen == {t: values((12,), t).sum() for t in range(3)}
    assert isinstance(failing.errors()[0], ZeroDivisionError)
    assert [(type(e), str(e)) for e in living.errors()] == [(BridgeLostError, str(caught.value))] * 2


def test_a_process_that_dies_is_noticed(
    site: Site, rank_process: Callable[..., subprocess.Popen[str]]
) -> None:
    deisa = site.deisa(max_simulation_ahead=3)
    seen: dict[int, float] = {}

    @deisa.register("x")
    def add_up(x: list[DeisaArray]) -> None:
        wait_until(lambda: dying.poll() is not None, "the rank has died")
        seen[x[-1].t] = x[-1].sum().compute()

    dying = rank_process(0, 1, 3, 4, "die")
    with pytest.raises(BridgeLostError, match=r"bridge 0 .* after timestep 2: .* ended without close\(\)"):
        deisa.execute_callbacks()
    assert seen == {t: sum(range(4)) + 4 * t for t in range(3)}
    assert dying.wait() == 3


def test_a_rank_that_dies_before_the_start(site: Site) -> None:
    deisa, _ = sums(site)

    def leaves() -> None:
        site.bridge(0, 2, {"x": rows(0, 2)}, start_timeout_s=0.5)

    Ranks([leaves]).errors()
    with pytest.raises(BridgeLostError, match="bridge 0 left before the session started"):
        deisa.execute_callbacks()


def test_the_simulation_falls_silent(site: Site) -> None:
    enough = threading.Event()

    def silent() -> None:
        with site.bridge(0, 1, {"x": rows(0, 1)}) as bridge:
            bridge.send("x", values((4,), 0), 0)
            enough.wait(PATIENCE_S)

    deisa, seen = sums(site, data_timeout_s=2.0)
    simulation = Ranks([silent])
    with pytest.raises(WaitTimeoutError, match=r"nothing came from the simulation for 2 s"):
        deisa.execute_callbacks()
    enough.set()
    simulation.errors()
    assert list(seen) == [0]


def test_the_analytics_closes_while_ranks_wait_to_start(site: Site) -> None:
    deisa = site.deisa()
    simulation = Ranks([partial(site.bridge, rank, 3, {"x": rows(rank, 3)}) for rank in range(2)])
    joined = threading.Event()

    def report(text: str) -> None:
        if "bridge 2 of 3" in text:
            joined.set()

    agents = deisa._engine.agents
    wrapped = agents.report_progress
    agents.report_progress = lambda text: (wrapped(text), report(text))  # type: ignore[assignment]
    deisa.register_callback(lambda x: None, "x")
    analytics = Ranks([deisa.execute_callbacks])
    assert joined.wait(PATIENCE_S)
    deisa.close()
    for error in simulation.errors():
        assert isinstance(error, AnalyticsLostError)
        assert "by its own wish, with close()" in str(error)
    analytics.check()


def test_what_the_rank_sends_is_checked_before_it_leaves(site: Site) -> None:
    deisa, seen = sums(site)
    told: list[str] = []

    def rank() -> None:
        with site.bridge(0, 1, {"x": rows(0, 1)}) as bridge:
            for array, chunk, timestep in (
                ("y", np.zeros(4), 0),
                ("x", np.zeros((2, 2)), 0),
                ("x", np.zeros(4, "f4"), 0),
                ("x", np.zeros(4), 0.5),
                ("x", values((4,), 3), 3),  # the one that is right
                ("x", np.zeros(4), 3),
                ("x", np.zeros(4), 2),
            ):
                try:
                    bridge.send(array, chunk, timestep)
                except ContractError as error:
                    told.append(f"{type(error).__name__}: {error}")

    with ranks(rank):
        deisa.execute_callbacks()
    assert seen == {3: values((4,), 3).sum()}
    assert [text.split(":")[0] for text in told] == [
        "UnknownArrayError",
        "ChunkShapeError",
        "ChunkDtypeError",
        "TimestepError",
        "DuplicateChunkError",
        "TimestepError",
    ]
    assert "declared chunk shape (4,), got (2, 2)" in told[1]


# Memory.


def test_more_memory_than_the_node_has(site: Site) -> None:
    """2**50 bytes a slot: had anything been allocated, it would not have been this error."""
    deisa, _ = sums(site)
    huge = {"chunk_shape": (2**47,), "nb_chunks_per_dim": (1,), "chunk_position": (0,), "dtype": "f8"}
    simulation = Ranks([partial(site.bridge, 0, 1, {"x": huge})])
    with pytest.raises(MemoryBoundError, match=r"needs 2048.0 TiB of chunk memory") as caught:
        deisa.execute_callbacks()
    (error,) = simulation.errors()
    assert (type(error), str(error)) == (MemoryBoundError, str(caught.value))


def test_more_memory_than_the_node_has_with_a_dtype_declared_late(site: Site) -> None:
    described = {"chunk_shape": (2**47,), "nb_chunks_per_dim": (1,), "chunk_position": (0,)}

    def rank() -> None:
        with site.bridge(0, 1, {"x": described}) as bridge:
            bridge.send("x", np.broadcast_to(np.float64(0), (2**47,)), 0)

    deisa, _ = sums(site)
    simulation = Ranks([rank])
    with pytest.raises((MemoryBoundError, LostError), match=r"needs 2048\.0 TiB of chunk memory"):
        deisa.execute_callbacks()
    (error,) = simulation.errors()
    assert isinstance(error, MemoryBoundError)


# Ray itself.

CONNECT = """
import os
for name in os.environ["WITHOUT"].split():
    os.environ.pop(name, None)
from deisa.ray import Deisa
Deisa()
"""


def connect(**variables: str) -> list[str]:
    """Create a Deisa in a process of its own, without this one's token; returns the lines of its last error."""
    done = subprocess.run(
        [sys.executable, "-c", CONNECT],
        env=os.environ | {"WITHOUT": " ".join(AUTHENTICATION)} | variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    return done.stderr.splitlines()


@pytest.mark.ray
def test_a_cluster_that_wants_a_token(ray_cluster: str, session_name: str) -> None:
    last = connect(DEISA_RAY_SESSION=session_name, RAY_NUM_REDIS_GET_RETRIES="1")[-1]
    assert last.startswith("deisa.ray.errors.ClusterError: the Ray cluster at " + ray_cluster)
    assert "wants an authentication token" in last and "set RAY_AUTH_MODE=token here" in last


@pytest.mark.ray
def test_no_cluster_at_the_address() -> None:
    last = connect(RAY_ADDRESS="127.0.0.1:9", DEISA_RAY_CONNECT_TIMEOUT_S="0.5")[-1]
    assert last.startswith("deisa.ray.errors.ClusterError: nothing answers at 127.0.0.1:9 (RAY_ADDRESS)")
    assert "ray start --head" in last


@pytest.mark.ray
@pytest.mark.parametrize("given", ["variable", "file"])
def test_a_cluster_that_wants_another_token(
    ray_cluster: str, session_name: str, tmp_path: Path, given: str
) -> None:
    """The rest of this suite has the right one."""
    wrong = "0" * 64
    variables = {"WITHOUT": "", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": wrong}
    if given == "file":
        (tmp_path / "token").write_text(wrong)
        variables |= {"WITHOUT": "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    last = connect(DEISA_RAY_SESSION=session_name, RAY_NUM_REDIS_GET_RETRIES="1", **variables)[-1]
    assert last.startswith("deisa.ray.errors.ClusterError: the Ray cluster at " + ray_cluster)
    assert "this process has none or another one" in last
    assert "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as on the head node" in last
