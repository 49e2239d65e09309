"""One valid message of each kind, from which the fuzzers start."""

from __future__ import annotations

import numpy as np

from deisa.ray._state import events
from deisa.ray._state.descriptions import describe_arrays
from deisa.ray._state.stats import BridgeStats
from deisa.ray._transport import messages
from deisa.ray._transport.limits import MemoryLimit
from deisa.ray._transport.messages import Message

DTYPES: list[np.dtype] = [
    np.dtype("<f8"),
    np.dtype(">i2"),
    np.dtype("M8[25ns]"),
    np.dtype("U3"),
    np.dtype("V6"),
    np.dtype([("x", "<f4"), ("y", ">i2", (2, 3))]),
    np.dtype([("p", [("x", "f8"), ("when", "M8[ns]")], (2,)), ("name", "S7")]),
    np.dtype({"names": ["a", "b"], "formats": ["i1", "f4"], "offsets": [3, 8], "itemsize": 20}),
    np.dtype([(("a title", "a"), "f8")]),
]
ARRAYS = describe_arrays(
    {
        "by position": {
            "chunk_shape": (4, 3),
            "nb_chunks_per_dim": (2, 2),
            "chunk_position": (1, 0),
            "dtype": "f8",
        },
        "by offset": [{"chunk_shape": (2,), "global_shape": (4,), "offset": (2 * i,)} for i in range(2)],
        "with labels": {
            "chunk_shape": (2, 3),
            "global_shape": (4, 3),
            "offset": (2, 0),
            "dims": ("y", "x"),
            "coords": {
                "y": ("y", np.arange(4.0), {"units": "m"}),
                "x": {"start": 0.5, "step": 2},
                "name": ("x", ["a", "b", "c"]),
            },
            "attrs": {"a": [None, True, 1, 2.5, 1j], "b": {"c": b"bytes", "d": np.datetime64("2020", "s")}},
        },
        "scalar": {"chunk_shape": (), "global_shape": (), "offset": (), "dtype": "i4"},
        "of nobody": [],
    }
)
REGION = messages.RegionSpec(3, 0, 4096, 8192, 2, (4, 3), (24, 8), DTYPES[5], DTYPES[5].itemsize)
PARTS = tuple(messages.WantedPart(i, 3 + i, (0, 1), (1, 2), (4, 3)) for i in range(2))
WANTED = messages.WantedStream("a", 2, PARTS, 3, 8, 8, 1, 8)
SEEDS: list[Message] = [
    messages.Hello(messages.PROTOCOL_VERSION, "s", 0, 4, ARRAYS, ()),
    messages.CannotJoin(messages.PROTOCOL_VERSION, "s", 3, "DescriptionError: ..."),
    *(messages.DeclareDtype("a", dtype, (MemoryLimit(1, "/", 2, 3),)) for dtype in DTYPES),
    messages.Notify(),
    messages.Ending(),
    messages.Close(BridgeStats(3, 96, 0.5)),
    messages.Abort("ZeroDivisionError"),
    messages.Attach(messages.PROTOCOL_VERSION, 0),
    messages.Follow(messages.PROTOCOL_VERSION, "an id", 2, 1),
    messages.Release("analytics", (messages.ReleasedStep("a", -1), messages.ReleasedStep("b", 2))),
    messages.Progress("waiting for bridge 3 of 4"),
    messages.Slots((16384, 4096), (REGION, REGION)),
    messages.Start((4096, 4096, 4096), 6, (WANTED,)),
    messages.Start((), 0, ()),
    messages.Fail("HoleError", "array 'a': no chunk covers ..."),
    messages.AnalyticsDown("the analytics has died"),
    messages.AnalyticsUp(),
    messages.Later("an earlier run is still there"),
    messages.Journal(4096, "run:node"),
    messages.Attached("run:node", "quiet", 0.5, "pid 1 on host h"),
    messages.Events(
        (
            events.BridgeJoined(0, 4, ARRAYS, 7, "h"),
            events.DtypeDeclared(0, "a", DTYPES[5]),
            events.StepComplete("a", 3, 1, 0.5),
            events.TimesDiffer("a", 3, (0, 1), (0.5, None)),
            events.OwnersPassed("a", None),
            events.StepTorn("a", 3, (0, 2)),
            events.SendersBlocked("a", {0: 3}),
            events.BridgeClosed(0, BridgeStats(3, 96, 0.5)),
            events.BridgeLost(0, None, "killed"),
            events.AgentLost("it has died"),
        )
    ),
]
