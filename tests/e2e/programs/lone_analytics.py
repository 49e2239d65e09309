"""Two analytics of one process, on a host whose only Ray belongs to somebody else; prints what they find.

Argument: the session's name.
"""

import json
import logging
import os
import subprocess
import sys
import threading

import ray

from deisa.ray import Deisa

NOBODY = 65534

logging.basicConfig(format="%(message)s", stream=sys.stderr)
foreign = subprocess.Popen(
    ["raylet", "-c", "read _", "--gcs-address=192.0.2.9:6379"],
    executable="/bin/sh",
    user=NOBODY,
    stdin=subprocess.PIPE,
)
found: dict[str, object] = {}
errors: list[str] = []


def open_and_close(session: str) -> None:
    try:
        Deisa(session=session).close()
    except Exception as error:
        errors.append(repr(error))


@ray.remote(num_cpus=0)
def seen_by_a_worker() -> list[str]:
    return sorted(name for name in os.environ if name.startswith(("PMI", "SLURM")))


threads = [threading.Thread(target=open_and_close, args=(f"{sys.argv[1]}-{n}",)) for n in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
found["errors"] = errors
found["nodes"] = len(ray.nodes())
found["worker"] = ray.get(seen_by_a_worker.remote(), timeout=60)
found["here"] = sorted(name for name in os.environ if name.startswith(("PMI", "SLURM")))
print(json.dumps(found))
foreign.communicate()
