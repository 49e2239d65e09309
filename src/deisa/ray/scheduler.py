"""The Dask scheduler by itself: ``x.compute(scheduler=deisa_ray_get)`` on any Dask collection."""

from __future__ import annotations

from deisa.ray._engine.ray_executor import RayExecutor
from deisa.ray._graph.scheduler import BundleScheduler
from deisa.ray.config import Settings

deisa_ray_get = BundleScheduler(RayExecutor(Settings.from_environment()))
"""Runs a Dask graph as a few Ray tasks; connects to Ray, or starts a local one, at its first use."""
