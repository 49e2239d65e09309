"""Start Ray nodes with `ray start`, and stop exactly the processes that came of it.

`ray start` returns once its node is up and leaves daemons behind. It is made the leader of an
operating-system session here: every daemon and worker stays in that session, so a node's processes can be
told from anybody else's without `ray stop`, which would stop every Ray node of the user.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from tests.support.patience import PATIENCE_S
from tests.support.processes import kill_session

# Set explicitly, since the default depends on the machine: without RAY_AUTH_MODE, `ray start --head` demands
# a token if ~/.ray/auth_token exists and starts an open cluster if not.
AUTHENTICATION = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
ROOT = Path(__file__).parents[2]


def search_path() -> str:
    """A PYTHONPATH with which workers find the modules of the tests, wherever the driver was when it connected."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


@dataclass
class RayNode:
    """One Ray node, from `start` until `stop`."""

    process: subprocess.Popen[str]
    output: IO[str]
    temp_dir: Path

    @classmethod
    def start(
        cls,
        temp_dir: Path,
        *,
        address: str | None = None,
        ip: str | None = None,
        port: int = 0,
        cpus: int = 2,
        object_store_bytes: int = 300_000_000,
        wrapper: Sequence[str] = (),
        python: str | Path = sys.executable,
    ) -> RayNode:
        """Begin to start a node: the head of a new cluster, unless `address` is that of one to join.

        Ray puts Unix sockets below `temp_dir`: its path has to stay far below 108 characters. `wrapper` is a
        command to run `ray start` under, such as `nsenter`; `python` the interpreter whose Ray it is. Follow with
        `wait_started`.
        """
        role = (
            ["--address", address]
            if address
            else ["--head", "--port", str(port), "--include-dashboard", "false"]
        )
        argv = [
            *wrapper,
            *(str(python), "-m", "ray.scripts.scripts", "start", *role),
            *(["--node-ip-address", ip] if ip else []),
            *("--num-cpus", str(cpus)),
            *("--object-store-memory", str(object_store_bytes)),
            *("--temp-dir", str(temp_dir)),
            *("--include-log-monitor", "false"),
            "--disable-usage-stats",
        ]
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `stop`)
        process = subprocess.Popen(
            argv,
            env=os.environ | AUTHENTICATION | {"PYTHONPATH": search_path()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        return cls(process, output, temp_dir)

    def wait_started(self, timeout_s: float = 2 * PATIENCE_S) -> None:
        """Wait until the node is up; `RuntimeError` with Ray's output if it does not come up."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        if status != 0:
            reason = f"not up after {timeout_s:g} s" if status is None else f"exit status {status}"
            self.output.seek(0)
            raise RuntimeError(f"`ray start`: {reason}\n{self.output.read()}")

    @property
    def address(self) -> str:
        """Address of the cluster's head; known to the head once it has started."""
        return (self.temp_dir / "ray_current_cluster").read_text().strip()

    def stop(self) -> None:
        """Kill the node, as a power cut would."""
        kill_session(self.process)
        self.output.close()
