"""Ray clusters that last as long as a case, and the environment variables that lead to them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.processes import kill_tree
from tests.support.ray_node import AUTHENTICATION, RayNode

ROOT = Path(__file__).parents[1]


@contextmanager
def ray_cluster(
    python: Path | None = None,
    cpus: int = 2,
    object_store_bytes: int = 2_000_000_000,
    wrapper: Sequence[str] = (),
) -> Iterator[Mapping[str, str]]:
    """Start a cluster of one node; yields the variables for processes that are to use it.

    Where `BENCHMARKS_RAY_ADDRESS` names a cluster that is up, and no other interpreter is asked for, that one is
    used instead: the suite's test saves the time of starting one for each case.

    Parameters
    ----------
    python : Path, optional
        The interpreter whose Ray it is to be; by default this one's, and then this process uses it too. Another one
        finds this checkout's programs, but not its package.
    wrapper : sequence of str
        A command to run ``ray start`` under, such as `nice`.
    """
    apart: dict[str, str] = {} if python is None else {"PYTHONPATH": str(ROOT)}
    if python is not None:
        wrapper = (
            "env",
            "--unset=RAY_ADDRESS",
            *(f"{name}={value}" for name, value in apart.items()),
            *wrapper,
        )
    if python is None and not wrapper and (address := os.environ.get("BENCHMARKS_RAY_ADDRESS")):
        os.environ["RAY_ADDRESS"] = address
        yield {name: os.environ[name] for name in ("RAY_ADDRESS", *AUTHENTICATION)}
        return
    with tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp") as folder:
        node = RayNode.start(
            Path(folder),
            cpus=cpus,
            object_store_bytes=object_store_bytes,
            python=python or sys.executable,
            wrapper=wrapper,
        )
        try:
            node.wait_started()
            variables = {**AUTHENTICATION, "RAY_ADDRESS": node.address, **apart}
            if python is None:
                os.environ |= variables  # and this process reaches it as well
            yield variables
        finally:
            if python is None and "ray" in sys.modules:
                sys.modules["ray"].shutdown()
            node.stop()


@contextmanager
def started(
    argv: Sequence[str | Path], variables: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a program beside this one, in the checkout; it is killed if it is still there at the end."""
    with subprocess.Popen(
        [str(a) for a in argv],
        cwd=ROOT,
        env={**os.environ, **(variables or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                kill_tree(process)


def output_of(process: subprocess.Popen[str], timeout_s: float) -> str:
    """Wait for a program and return what it printed.

    Raises
    ------
    RuntimeError
        With the end of its errors, when it failed.
    """
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        stdout, stderr = process.communicate()
        raise RuntimeError(f"still running after {timeout_s:g} s: {process.args}\n{stderr[-2000:]}") from None
    if process.returncode:
        raise RuntimeError(
            f"exit code {process.returncode}: {process.args}\n{stdout[-500:]}\n{stderr[-2000:]}"
        )
    return stdout
