"""Dask-Enabled In Situ Analytics with a Ray backend.

The rooms, from the simulation to the analytics:

- `deisa.ray.bridge`: what a simulation rank calls; needs NumPy only.
- `deisa.ray.window_handler`: the analytics, `Deisa`.
- `deisa.ray.types`: windows, and the arrays that callbacks get.
- `deisa.ray.labels`: arrays under their labels, as xarray has them.
- `deisa.ray.scheduler`: the Dask scheduler by itself.
- `deisa.ray.errors`, `deisa.ray.config`, `deisa.ray.report`: errors, settings, figures of a run.
- ``_state`` decides, ``_handoff`` is the rank's side of the hand-off and ``_transport`` the agent's, ``_graph`` cuts
  graphs, ``_session`` leads a run, ``_engine`` does. Imports go from ``_engine`` to ``_session`` to ``_graph`` to
  ``_transport`` to ``_handoff`` and ``_state``, never back; only ``_engine`` knows Ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deisa.ray.bridge import Bridge
    from deisa.ray.config import Settings
    from deisa.ray.labels import to_dataset
    from deisa.ray.report import Report
    from deisa.ray.scheduler import deisa_ray_get
    from deisa.ray.types import DeisaArray, Window, WindowSpec
    from deisa.ray.window_handler import Deisa

    __version__: str

Timestep = int

_HOMES = {
    "Bridge": "bridge",
    "Deisa": "window_handler",
    "DeisaArray": "types",
    "Report": "report",
    "Settings": "config",
    "Window": "types",
    "WindowSpec": "types",
    "deisa_ray_get": "scheduler",
    "to_dataset": "labels",
}

__all__ = [
    "Bridge",
    "Deisa",
    "DeisaArray",
    "Report",
    "Settings",
    "Timestep",
    "Window",
    "WindowSpec",
    "deisa_ray_get",
    "to_dataset",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that a rank never pays for Ray or Dask."""
    if name == "__version__":
        from importlib.metadata import version  # slow to import, and rarely asked for

        return version("deisa-ray")
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
