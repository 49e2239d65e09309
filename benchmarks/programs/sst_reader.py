"""The analytics of ADIOS2 SST: reads every rank's stream and takes the mean of each step; prints JSON."""

from __future__ import annotations

import argparse
import json
import os
import time

import adios2
import numpy as np


def main() -> None:
    """Read until the writers close."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--transport", default="WAN")
    options = parser.parse_args()
    os.chdir(options.folder)
    adios = adios2.Adios()
    streams, ios = [], []
    for rank in range(options.ranks):
        io = adios.declare_io(f"field-{rank}")
        io.set_engine("SST")
        io.set_parameters({"DataTransport": options.transport, "OpenTimeoutSecs": "120"})
        ios.append(io)
        streams.append(adios2.Stream(io, f"field-{rank}", "r"))
    there_at, means = [], []
    while True:
        if any(stream.begin_step() != adios2.bindings.StepStatus.OK for stream in streams):
            break
        total = count = 0.0
        for stream in streams:
            chunk = stream.read("field")
            total += float(np.sum(chunk))
            count += chunk.size
        for stream in streams:
            stream.end_step()
        means.append(total / count)
        there_at.append(time.monotonic())
    for stream in streams:
        stream.close()
    print(json.dumps({"there_at": there_at, "means": means}), flush=True)


if __name__ == "__main__":
    main()
