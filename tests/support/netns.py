"""A Ray cluster of several nodes on one machine: each node in Linux namespaces of its own.

     node 0            node 1            node 2
    10.77.0.1         10.77.0.2         10.77.0.3       eth0, in the node's namespace
       |                 |                 |
     port0             port1             port2
    ===+=================+=================+===         bridge0, in a namespace as well

The nodes share the machine's files and memory, but no port, process id, abstract Unix socket or loopback
address; what passes between them passes over a link that counts bytes and can be cut. The machine's own
network is never touched, so addresses cannot collide with anything.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.ray_node import AUTHENTICATION, RayNode

HEAD_PORT = 6379


def reason_unavailable() -> str | None:
    """Say why this machine cannot make such a cluster, or None if it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "network namespaces need root"
    for tool, package in {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}.items():
        if shutil.which(tool) is None:
            return f"network namespaces need `{tool}` (package {package})"
    probe = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "true"]
    done = subprocess.run(probe, capture_output=True, text=True)
    if done.returncode != 0:
        return f"network namespaces are not permitted here: {done.stderr.strip()}"
    return None


@dataclass(frozen=True)
class NamespacedCluster:
    """A running cluster; nodes are numbered from 0, and node 0 is the head."""

    namespaces: tuple[Namespace, ...]
    ips: tuple[str, ...]
    switch: Namespace

    @property
    def address(self) -> str:
        """What RAY_ADDRESS should be; it is reachable from inside the namespaces only."""
        return f"{self.ips[0]}:{HEAD_PORT}"

    def run(
        self, node: int, argv: Sequence[str], env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on a node, with RAY_ADDRESS set.

        Stop it with `kill_tree`: what `Popen.kill` would reach is only its launcher.
        """
        return subprocess.Popen(
            [*self.namespaces[node].enter, *argv],
            env=os.environ | AUTHENTICATION | {"RAY_ADDRESS": self.address} | dict(env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def bytes_received(self, node: int) -> int:
        """Bytes that have come to a node over its link since the cluster was made."""
        return self._counter(node, "rx")

    def bytes_sent(self, node: int) -> int:
        """Bytes that have left a node over its link since the cluster was made."""
        return self._counter(node, "tx")

    def cut(self, node: int) -> None:
        """Cut a node's link: packets are lost in silence, as when a switch fails."""
        self.switch.ip(f"link set port{node} nomaster")

    def restore(self, node: int) -> None:
        """Mend a link that was cut."""
        self.switch.ip(f"link set port{node} master bridge0")

    def _counter(self, node: int, direction: str) -> int:
        (link,) = json.loads(self.namespaces[node].ip("-json -stats link show eth0"))
        return int(link["stats64"][direction]["bytes"])


@contextmanager
def namespaced_cluster(nodes: int = 3, cpus: int = 2) -> Iterator[NamespacedCluster]:
    """Make namespaces, a Ray node in each, and remove all of it at the end, whatever happened in between."""
    with ExitStack() as undo:
        cluster = NamespacedCluster(
            namespaces=tuple(undo.enter_context(Namespace.make()) for _ in range(nodes)),
            ips=tuple(f"10.77.0.{node + 1}" for node in range(nodes)),
            switch=undo.enter_context(Namespace.make()),
        )
        cluster.switch.ip("link add bridge0 type bridge")
        cluster.switch.ip("link set bridge0 up")
        for node in range(nodes):
            _plug_in(cluster, node)
        temp_dir = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp")))
        _start_ray(cluster, cpus, temp_dir, undo)
        yield cluster


@dataclass(frozen=True)
class Namespace:
    """A network and process namespace that lives as long as its first process, and that as long as we do.

    Processes get a namespace because a Ray driver looks for "its" node among all processes it can see.
    The first process waits for its standard input to close; when it ends, for whatever reason, Linux kills
    all the others.
    """

    init: subprocess.Popen[bytes]

    @classmethod
    @contextmanager
    def make(cls) -> Iterator[Namespace]:
        """Make a namespace; leaving the context kills everything inside."""
        # Ignoring SIGCHLD makes Linux reap the orphans that a first process inherits.
        shell = ["sh", "-c", "trap '' CHLD; echo ready; read _"]
        with subprocess.Popen(
            ["unshare", "--net", "--pid", "--fork", "--mount-proc", *shell],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        ) as init:
            assert init.stdout is not None
            init.stdout.readline()
            yield cls(init)  # Popen.__exit__ closes its input and waits for it

    @property
    def enter(self) -> tuple[str, ...]:
        """Command to run another command inside."""
        proc = f"/proc/{self.init.pid}/ns"
        return ("nsenter", f"--net={proc}/net", f"--mount={proc}/mnt", f"--pid={proc}/pid_for_children")

    def has(self, pid: int) -> bool:
        """Whether a process is inside."""
        own = os.readlink(f"/proc/{self.init.pid}/ns/net")
        with suppress(OSError):  # it has ended
            return os.readlink(f"/proc/{pid}/ns/net") == own
        return False

    def ip(self, command: str) -> str:
        """Run an `ip` command inside, and return what it prints."""
        return _output([*self.enter, "ip", *command.split()])

    def hide(self, directory: Path) -> None:
        """Mount an empty file system on a directory, for processes inside only."""
        _output([*self.enter, "mount", "-t", "tmpfs", "tmpfs", str(directory)])


def _plug_in(cluster: NamespacedCluster, node: int) -> None:
    namespace, switch, port = cluster.namespaces[node], cluster.switch, f"port{node}"
    ends = f"{port} netns {switch.init.pid} type veth peer eth0 netns {namespace.init.pid}"
    _output(["ip", "link", "add", *ends.split()])
    switch.ip(f"link set {port} master bridge0 up")
    namespace.ip("link set lo up")
    namespace.ip(f"address add {cluster.ips[node]}/24 dev eth0")
    namespace.ip("link set eth0 up")
    # Ray finds its own address by asking for the route to a public one.
    namespace.ip("route add default dev eth0")


def _start_ray(cluster: NamespacedCluster, cpus: int, temp_dir: Path, undo: ExitStack) -> None:
    def start(node: int, address: str | None) -> RayNode:
        # Older releases of Ray want one path on all nodes, and behind it a directory of each node's own.
        cluster.namespaces[node].hide(temp_dir)
        ray_node = RayNode.start(
            temp_dir,
            address=address,
            ip=cluster.ips[node],
            port=HEAD_PORT,
            cpus=cpus,
            wrapper=cluster.namespaces[node].enter,
        )
        undo.callback(ray_node.stop)
        return ray_node

    start(0, None).wait_started()
    for joining in [start(node, cluster.address) for node in range(1, len(cluster.ips))]:
        joining.wait_started()


def _output(argv: Sequence[str]) -> str:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(argv)}`: {done.stderr.strip()}")
    return done.stdout
