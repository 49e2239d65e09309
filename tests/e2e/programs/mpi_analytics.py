"""The analytics beside mpi_simulation.py: prints what it computes, at last from how many chunks."""

from deisa.ray.types import WindowSpec
from deisa.ray.window_handler import Deisa

deisa = Deisa()
chunks = set()


def summary(temperature):
    latest = temperature[-1]
    chunks.add(latest.dask.npartitions)
    corners = latest.dask[[0, -1]][:, [0, -1]].compute().astype(int).tolist()
    print(
        f"t={latest.t} of {[a.t for a in temperature]} mean={latest.dask.mean().compute()} corners={corners}"
    )


deisa.register_callback(summary, [WindowSpec("temperature", window_size=2)])
report = deisa.execute_callbacks()
print(f"{report.timesteps} {report.callbacks_failed} failed, {chunks} chunks")
