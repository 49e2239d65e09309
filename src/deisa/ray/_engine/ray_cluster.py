"""Find the Ray cluster, or start a local one."""

from __future__ import annotations

import logging
import os
import socket

import ray
from ray.exceptions import AuthenticationError

from deisa.ray.errors import ClusterError, cause_chain

logger = logging.getLogger("deisa.ray")

REACH_TIMEOUT_S = 10.0


def connect() -> None:
    """Connect this process to Ray: the one it is connected to, ``RAY_ADDRESS``, a running one, or a new one.

    Raises
    ------
    ClusterError
        When there is no cluster at ``RAY_ADDRESS``, or the running one refuses this process.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _check_reachable(address)
        _join(address)
        return
    try:
        _join("auto")
    except ConnectionError as exc:
        if isinstance(exc, ClusterError):
            raise
        logger.warning("no running Ray found: starting a local one (use `ray start --head` to have it stay)")
        ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)


def _join(address: str) -> None:
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except Exception as exc:
        at = "" if address == "auto" else f" at {address} (RAY_ADDRESS)"
        if _is_about_tokens(exc):
            raise ClusterError(
                f"the Ray cluster{at} wants an authentication token, and this process has none or another one: "
                "set RAY_AUTH_MODE=token here, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as on the head node "
                "(a token in ~/.ray/auth_token is used without them only where RAY_AUTH_MODE=token is set)"
            ) from exc
        if at and isinstance(exc, ConnectionError):
            raise ClusterError(f"cannot connect to the Ray cluster{at}: {exc}") from exc
        raise


def _check_reachable(address: str) -> None:
    """Fail at once where Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local", "ray://..." and what Ray may come up with
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACH_TIMEOUT_S).close()
    except OSError as exc:
        raise ClusterError(
            f"nothing answers at {address} (RAY_ADDRESS): {exc}. Is the head node still up? Start it with "
            "`ray start --head`, or unset RAY_ADDRESS to use the cluster that runs on this host"
        ) from exc


def _is_about_tokens(error: BaseException) -> bool:
    return any(
        isinstance(link, AuthenticationError) or "InvalidAuthToken" in str(link)
        for link in cause_chain(error)
    )


def node_cpus() -> dict[str, int]:
    """Whole CPUs that Ray counts on each node that is alive."""
    return {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]}
