"""The engine that is the product: agents and bundles on a Ray cluster."""

from __future__ import annotations

from deisa.ray._engine.ray_agents import RayAgents
from deisa.ray._engine.ray_cluster import connect
from deisa.ray._engine.ray_executor import RayExecutor
from deisa.ray.config import Settings


class RayEngine:
    """Agents on every node of a Ray cluster, and bundles as Ray tasks."""

    def __init__(self, settings: Settings) -> None:
        connect(settings)
        self.agents = RayAgents(settings)
        self.executor = RayExecutor(settings)
        self.executor.warm_up()
