"""Find the Ray cluster, or start a local one."""

from __future__ import annotations

import logging
import os

import ray

logger = logging.getLogger("deisa.ray")


def connect() -> None:
    """Connect this process to Ray: the one it is connected to, ``RAY_ADDRESS``, a running one, or a new one."""
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        return
    try:
        ray.init(address="auto", logging_level=logging.WARNING)
    except ConnectionError:
        logger.warning("no running Ray found: starting a local one (use `ray start --head` to have it stay)")
        ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)


def node_cpus() -> dict[str, int]:
    """Whole CPUs that Ray counts on each node that is alive."""
    return {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]}
