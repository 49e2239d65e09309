"""The fixtures themselves: what tests on clusters rely on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mpi import Mpi
from tests.support.netns import NamespacedCluster
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.processes import kill_tree

TASK_ON_EVERY_NODE = """
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

@ray.remote
def where():
    return ray.util.get_node_ip_address()

ray.init(log_to_driver=False)
nodes = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes()]
print(*sorted(ray.get([where.options(scheduling_strategy=node).remote() for node in nodes])))
print(ray.util.get_node_ip_address())
"""

ALLREDUCE = """
from mpi4py import MPI
print(MPI.COMM_WORLD.allreduce(MPI.COMM_WORLD.rank), MPI.get_vendor()[0], flush=True)
"""

CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 7000), timeout=1)"

LISTEN = """
import socket
server = socket.create_server(("", 7000))
print("listening", flush=True)
while True:
    server.accept()
"""


@pytest.mark.ray
def test_another_process_joins_the_ray_cluster(ray_cluster: str) -> None:
    driver = subprocess.run([sys.executable, "-c", TASK_ON_EVERY_NODE], capture_output=True, text=True)
    assert driver.returncode == 0, driver.stderr


@pytest.mark.ray
def test_this_process_joins_the_ray_cluster(ray_cluster: str) -> None:
    import ray

    ray.init(address=ray_cluster, log_to_driver=False, ignore_reinit_error=True)
    assert ray.get(ray.put("shared")) == "shared"


@pytest.mark.mpi
def test_ranks_reach_each_other(mpi: Mpi, tmp_path: Path) -> None:
    script = tmp_path / "allreduce.py"
    script.write_text(ALLREDUCE)
    done = mpi.run(4, script)
    vendor = {"mpich": "MPICH", "openmpi": "Open MPI"}[mpi.flavour]
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"6 {vendor}"] * 4), done.stderr


@pytest.mark.mpi
def test_ranks_that_hang_are_killed(mpi: Mpi, tmp_path: Path) -> None:
    script = tmp_path / "hang.py"
    script.write_text("import time\nprint('hanging', flush=True)\ntime.sleep(600)")
    with pytest.raises(TimeoutError, match="hanging\nhanging"):
        mpi.run(2, script, timeout_s=5)
    assert not [pid for pid in Path("/proc").glob("[0-9]*") if str(script) in _command(pid)]


@pytest.mark.netns
@pytest.mark.parametrize("node", [0, 1, 2])
def test_a_driver_on_any_node_reaches_all_nodes(netns_cluster: NamespacedCluster, node: int) -> None:
    received = netns_cluster.bytes_received(2)
    with netns_cluster.run(node, [sys.executable, "-c", TASK_ON_EVERY_NODE]) as driver:
        stdout, stderr = driver.communicate(timeout=PATIENCE_S)
    assert stdout.splitlines() == [" ".join(netns_cluster.ips), netns_cluster.ips[node]], stderr
    assert netns_cluster.bytes_received(2) > received


@pytest.mark.netns
def test_a_link_can_be_cut_and_restored(netns_cluster: NamespacedCluster) -> None:
    def connects() -> bool:
        with netns_cluster.run(0, [sys.executable, "-c", CONNECT, netns_cluster.ips[1]]) as client:
            client.communicate(timeout=PATIENCE_S)
        return client.returncode == 0

    with netns_cluster.run(1, [sys.executable, "-c", LISTEN]) as server:
        assert server.stdout is not None
        server.stdout.readline()
        assert connects()
        netns_cluster.cut(1)
        assert not connects()
        netns_cluster.restore(1)
        wait_until(connects, "the link works again")
        kill_tree(server)


@pytest.mark.netns
def test_nodes_do_not_share_abstract_sockets(netns_cluster: NamespacedCluster) -> None:
    name = f"\0deisa-harness-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(name)
        server.listen()
        client = f"import socket; socket.socket(socket.AF_UNIX).connect({name!r})"
        with netns_cluster.run(0, [sys.executable, "-c", client]) as process:
            assert "ConnectionRefusedError" in process.communicate(timeout=PATIENCE_S)[1]


def _command(proc: Path) -> str:
    try:
        return (proc / "cmdline").read_text()
    except OSError:
        return ""
