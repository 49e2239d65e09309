"""Nodes that are lost or cut off, and a head that dies: each test has a cluster of its own."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail
from tests.e2e.parties import ROOT, Parties, Party
from tests.support.netns import NamespacedCluster, namespaced_cluster, reason_unavailable
from tests.support.ray_node import AUTHENTICATION, RayNode
from tests.support.ray_processes import running

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Ray notices a silent node within 15 to 30 s by default; tests need not wait that long.
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[NamespacedCluster]:
    reason = reason_unavailable()
    if reason is not None:
        skip_or_fail(reason)
    for name, value in QUICK_HEALTH_CHECKS.items():
        monkeypatch.setenv(name, value)
    with namespaced_cluster(2) as cluster:
        yield cluster


class OnNodes(Parties):
    """Parties on the nodes of a cluster: the analytics on node 0, ranks on node 1."""

    def __init__(self, folder: Path, session: str, cluster: NamespacedCluster) -> None:
        super().__init__(folder, session)
        self._cluster = cluster

    def start(self, program: str, name: str, arguments: list[object], settings: dict[str, object]) -> Party:  # type: ignore[override]
        log = self.folder / f"{len(self.started)}-{name}.log"
        variables = {f"DEISA_RAY_{key.upper()}": str(value) for key, value in settings.items()}
        node = 0 if "analytics" in name or name == "rank-0" else 1
        process = self._cluster.run(
            node,
            [sys.executable, "-m", f"tests.e2e.programs.{program}", f"--log={log}", *map(str, arguments)],
            {"DEISA_RAY_SESSION": self.session, "PYTHONPATH": str(ROOT), **variables},
        )
        self.started.append(Party(process, log))
        return self.started[-1]


@pytest.fixture
def parties(cluster: NamespacedCluster, tmp_path: Path, session_name: str) -> Iterator[OnNodes]:
    parties = OnNodes(tmp_path, session_name, cluster)
    yield parties
    parties.stop()


@pytest.mark.netns
def test_a_node_is_cut_off_and_comes_back(parties: OnNodes, cluster: NamespacedCluster) -> None:
    """Shorter than Ray takes to give it up: everything goes on."""
    analytics = parties.analytics("--ahead=3")
    ranks = parties.ranks(2, 200, "--pause=0.05")
    analytics.reached("done 10")
    cluster.cut(1)
    time.sleep(2)
    cluster.restore(1)
    assert analytics.ended() == "well"
    assert [rank.ended() for rank in ranks] == ["well", "well"]
    assert analytics.numbers("done") == list(range(200))
    assert not analytics.numbers("broken")


@pytest.mark.netns
def test_a_node_is_cut_off_for_good(parties: OnNodes, cluster: NamespacedCluster) -> None:
    analytics = parties.analytics(driver_timeout_s=10)
    ranks = parties.ranks(2, 100_000, "--pause=0.05", driver_timeout_s=10)
    analytics.reached("done 10")
    cut = time.monotonic()
    cluster.cut(1)
    error = analytics.ended()
    assert time.monotonic() - cut < 40
    assert error.startswith(("AgentLostError: the agent of node ", "ComputationLostError: "))
    assert ranks[0].ended().startswith(("AgentLostError: the agent of node ", "AnalyticsLostError: "))
    assert ranks[1].ended().startswith("AnalyticsLostError: ")
    assert time.monotonic() - cut < 60


@pytest.mark.netns
def test_a_node_is_lost(parties: OnNodes, cluster: NamespacedCluster) -> None:
    """Its Ray dies with everything that it had started, and others learn it from Ray."""
    analytics = parties.analytics()
    ranks = parties.ranks(2, 100_000, "--pause=0.02")
    analytics.reached("done 10")
    (raylet,) = (pid for pid in running("raylet/raylet") if cluster.namespaces[1].has(pid))
    os.kill(raylet, signal.SIGKILL)
    killed = time.monotonic()
    assert analytics.ended().startswith("AgentLostError: the agent of node ")
    assert ranks[0].ended() == analytics.ended()
    assert time.monotonic() - killed < 40


@pytest.mark.parametrize("callbacks", ["idle", "busy"])
def test_the_head_dies(
    tmp_path: Path, session_name: str, monkeypatch: pytest.MonkeyPatch, callbacks: str
) -> None:
    for name, value in QUICK_HEALTH_CHECKS.items():
        monkeypatch.setenv(name, value)
    folder = Path(f"/tmp/dr-head-{os.getpid()}")
    folder.mkdir()
    node = RayNode.start(folder)
    try:
        node.wait_started()
        for name, value in {**AUTHENTICATION, "RAY_ADDRESS": node.address}.items():
            monkeypatch.setenv(name, value)
        parties = Parties(tmp_path, session_name)
        try:
            analytics = parties.analytics("--slow=0.5" if callbacks == "busy" else "--slow=0")
            ranks = parties.ranks(2, 100_000, "--pause=0.2")
            analytics.reached("done 2")
        finally:
            node.stop()
        died = time.monotonic()
        try:
            for rank in ranks:
                assert rank.ended().startswith("AnalyticsLostError: ")
            analytics.process.wait(60)
            assert time.monotonic() - died < 60
            ended = [line for line in analytics.lines() if line.startswith("ended")]
            assert not ended or ended[0].startswith(("ended AgentLostError", "ended ComputationLostError"))
        finally:
            parties.stop()
    finally:
        node.stop()
        shutil.rmtree(folder, ignore_errors=True)
