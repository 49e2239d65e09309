"""The analytics of test_nodes.py: prints one JSON object for each timestep, and one at the end."""

import json
import sys

import dask.array as da
import numpy as np

from deisa.ray import Deisa

what, *where = sys.argv[1].split(":")
deisa = Deisa()
submitted = [0]


def bundles():
    """Bundles since the last question."""
    before, submitted[0] = submitted[0], deisa._engine.executor.stats.submitted
    return submitted[0] - before


if what == "save":
    deisa.save("x", f"{where[0]}/out.zarr")
    deisa.save("x", f"{where[0]}/out-{{timestep}}.h5", virtual=True)


@deisa.register("x")
def compute(x):
    if what == "save":
        print(json.dumps({"t": x[-1].t, "bundles": bundles()}), flush=True)
        return
    now = x[-1].dask
    if what == "steer":
        deisa.set("mean", now.mean().compute(), timestep=x[-1].t)
        for ahead in (1, 2):
            deisa.set("early", x[-1].t + ahead, timestep=x[-1].t + ahead)
        return
    if what == "mean":
        found = {"mean": now.mean().compute()}
        print(json.dumps({"t": x[-1].t, "bundles": bundles(), **found}), flush=True)
        return
    middle = now.shape[0] // 2
    field = x[-1].xarray
    found = {
        "mean": now.mean().compute(),
        "std": now.std().compute(),
        "across": now[middle - 3 : middle + 3].compute().tolist(),
        "steps": da.map_overlap(np.gradient, now, depth=1, boundary="none", meta=now._meta).sum().compute(),
        "chunks": now.npartitions,
        "labels": [field.dims, field.units, field.cell.units, field.timestep.item(), field.time.item()],
        "from_cell": field.sel(cell=slice(middle / 2, None)).mean().compute().item(),
        "at_cell": field.interp(cell=middle / 2 - 0.25).compute().item(),
        "persisted": x[-1].persist()[::100].sum().compute(),
    }
    print(json.dumps({"t": x[-1].t, "bundles": bundles(), **found}), flush=True)


report = deisa.execute_callbacks()
total = sum(report.bytes_handed_over.values())
print(json.dumps({"bytes": total, "failed": report.callbacks_failed, "nodes": len(report.bound_bytes)}))
