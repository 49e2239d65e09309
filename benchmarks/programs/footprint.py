"""What importing the bridge costs a process that has NumPy: prints seconds and bytes, as JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path


def private_bytes() -> int:
    """Memory resident in this process alone, shared memory left out."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return sum(1024 * int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))


def main() -> None:
    """Import once: a process can't do it twice."""
    import numpy  # noqa: F401

    before = private_bytes()
    began = time.perf_counter()
    import deisa.ray.bridge

    seconds = time.perf_counter() - began
    print(
        json.dumps({"seconds": seconds, "bytes": private_bytes() - before, "file": deisa.ray.bridge.__file__})
    )


if __name__ == "__main__":
    main()
