"""Looks for bytes that crash a rank's client, the C library, when its agent sends them.

    python -m tests.fuzz.client [options of libFuzzer]
    python -m tests.fuzz.client build/crash-...

`client.c` is compiled with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer, for which this needs clang.
Inputs that crash it are written to ``build/``, and those that make it run new lines to ``build/fuzz-client/``, where
the next run finds them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from deisa.ray._transport.messages import RegionSpec, Slots, Start, WantedPart, WantedStream, encode
from tests.fuzz.seeds import SEEDS

HERE = Path(__file__).parent
LIBRARY = HERE.parents[1] / "src/deisa/ray/_handoff"
BUILD = Path("build")
CORPUS = BUILD / "fuzz-client"
FLAGS = ["-std=c11", "-O1", "-g", "-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all"]

# A session of the arrays that `client.c` describes, in the memory that comes along there.
MEMORY_BYTES = 16384
DOUBLE = np.dtype("<f8")
CHUNK = RegionSpec(3, 0, 0, 96, 2, (4, 3), (24, 8), DOUBLE, 8)
ROWS = tuple(RegionSpec(region, 1, 1024 * region, 32, 2, (4,), (8,), DOUBLE, 8) for region in (4, 5))
PART = WantedPart(0, 3, (0, 0), (1, 1), (4, 3))
PARTS = tuple(WantedPart(region - 4, region, (0,), (1,), (4,)) for region in (4, 5))
WANTED = (WantedStream("a", 1, (PART,), 2, 8, 8, 1, 8), WantedStream("b", 1, PARTS, 2, 8, 8, 1, 8))
SESSION = [Slots((MEMORY_BYTES,) * 2, (CHUNK, *ROWS)), Start((MEMORY_BYTES,) * 3, 6, WANTED)]


def compiled(folder: Path) -> Path:
    """Compile the fuzzer."""
    if shutil.which("clang") is None:
        sys.exit(
            "fuzzing the C library needs clang (Debian and Ubuntu: apt-get install clang libclang-rt-dev)"
        )
    library = [path for path in sorted(LIBRARY.glob("*.c")) if not path.name.startswith("_native")]
    program = folder / "fuzz_client"
    sources = [HERE / "client.c", *library]
    subprocess.run(
        ["clang", *FLAGS, "-iquote", LIBRARY, *sources, "-o", program, "-pthread", "-lm"], check=True
    )
    return program


def write_seeds(corpus: Path) -> None:
    """Write inputs to start from: how many segments come along, and then messages."""
    corpus.mkdir(parents=True, exist_ok=True)
    for number, message in enumerate(SEEDS):
        (corpus / f"{number}").write_bytes(b"\2" + encode(message))
    (corpus / "session").write_bytes(b"\2" + b"".join(map(encode, SESSION)))
    (corpus / "session-reversed").write_bytes(b"\0" + encode(Start((MEMORY_BYTES,) * 3, 6, WANTED)))


def main() -> None:
    """Fuzz, starting from one valid message of each kind and what earlier runs have found; or try the inputs named."""
    inputs = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    if not inputs:
        write_seeds(CORPUS)
        inputs = [str(CORPUS)]
    program = compiled(BUILD)
    failures = [f"-artifact_prefix={BUILD}/", "-timeout=10"]
    os.execv(program, [str(program), *failures, *options, *inputs])


if __name__ == "__main__":
    main()
