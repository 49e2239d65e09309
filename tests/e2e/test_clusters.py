"""Which Ray an analytics joins, where several could be meant."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail
from tests.support.netns import reason_unavailable
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.processes import kill_tree
from tests.support.ray_node import RayNode

pytestmark = pytest.mark.ray

PROGRAM = Path(__file__).parent / "programs/lone_analytics.py"
NOBODY = 65534


TWO_AT_ONCE = """
import sys, threading
import dask.array as da
import deisa.ray._engine.ray_engine  # else the first one is alone while the second one imports
from deisa.ray import Deisa, deisa_ray_get

together = threading.Barrier(2)

def compute():
    together.wait()
    assert da.ones(4, chunks=4).sum().compute(scheduler=deisa_ray_get) == 4
    print("well", flush=True)

computing = threading.Thread(target=compute)
computing.start()
together.wait()
Deisa(session=sys.argv[1]).close()
print("well", flush=True)
computing.join()
"""


def test_two_threads_connect_at_once(ray_cluster: str, session_name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWO_AT_ONCE, session_name],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
    )
    assert (done.returncode, done.stdout) == (0, "well\nwell\n"), done.stderr


@pytest.mark.netns
@pytest.mark.slow
def test_a_cluster_of_somebody_else_is_let_be(short_dir: Path, session_name: str) -> None:
    """A local one is started instead, once for two threads, and its workers are no ranks of an MPI job."""
    reason = reason_unavailable()
    if reason is not None:
        skip_or_fail(reason)
    (short_dir / "ray").mkdir()
    note = short_dir / "ray/ray_current_cluster"
    note.write_text("192.0.2.9:6379")
    os.chown(note, NOBODY, NOBODY)
    variables = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_TMPDIR")
    }
    with subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, str(PROGRAM), session_name],
        env=variables
        | {"RAY_TMPDIR": str(short_dir), "SLURM_JOB_ID": "7", "SLURM_PROCID": "2"}
        | {"PMI_RANK": "2", "PMI_SIZE": "3", "PMI_FD": "9"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as analytics:
        try:
            stdout, stderr = analytics.communicate(timeout=2 * PATIENCE_S)
        finally:
            kill_tree(analytics)
    assert analytics.returncode == 0, stderr
    found = json.loads(stdout.splitlines()[-1])
    assert found["errors"] == []
    assert found["nodes"] == 1
    assert found["worker"] == ["SLURM_JOB_ID"]
    assert found["here"] == ["PMI_FD", "PMI_RANK", "PMI_SIZE", "SLURM_JOB_ID", "SLURM_PROCID"]
    assert f"{note} belongs to " in stderr
    assert "the Ray cluster at 192.0.2.9:6379 belongs to " in stderr
    assert stderr.count("no running Ray of yours found: starting a local one") == 1


@pytest.mark.slow
def test_a_cluster_that_comes_up_later_is_waited_for(short_dir: Path, session_name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    log = short_dir / "stderr"
    program = "from deisa.ray import Deisa; import ray; Deisa().close(); print(len(ray.nodes()))"
    with log.open("w") as errors:
        analytics = subprocess.Popen(
            [sys.executable, "-c", program],
            env=os.environ
            | {"DEISA_RAY_ADDRESS": f"127.0.0.1:{port}", "RAY_ADDRESS": "192.0.2.9:6379"}
            | {"DEISA_RAY_SESSION": session_name, "DEISA_RAY_WARN_EVERY_S": "0.2"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    node = None
    try:
        waiting = f"waiting for Ray at 127.0.0.1:{port} (DEISA_RAY_ADDRESS): "
        wait_until(lambda: waiting in log.read_text(), "the analytics waits", 2 * PATIENCE_S)
        node = RayNode.start(short_dir / "ray", port=port)
        stdout, _ = analytics.communicate(timeout=2 * PATIENCE_S)
        assert (analytics.returncode, stdout) == (0, "1\n"), log.read_text()
    finally:
        kill_tree(analytics)
        if node is not None:
            node.stop()
