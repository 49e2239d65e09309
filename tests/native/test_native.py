"""The C library's own tests: programs in C, compiled in several ways, that end with status 0.

`make test` runs them as the library is built for users. `make sanitize` also compiles them with sanitizers, which end a
program that misuses memory (address), does what C leaves undefined (undefined), or has threads that depend on luck
(thread); and for aarch64, whose programs QEMU runs here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deisa.ray._state.labels import Coordinate
from deisa.ray._state.values import decode_value
from deisa.ray._transport.codec import Reader, read_fields
from tests.conftest import skip_or_fail
from tests.fuzz import client as fuzz_client

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
LIBRARY = ROOT / "src/deisa/ray/_handoff"
PROGRAMS = sorted(path.stem for path in HERE.glob("test_*.c"))
TIMEOUT_S = 240.0  # a lost wake-up makes a program wait for longer
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Werror"]


@dataclass(frozen=True)
class Build:
    """One way to compile a program and run it."""

    name: str
    compiler: str
    flags: tuple[str, ...] = ("-O2",)
    run: tuple[str, ...] = ()
    needs: str = ""  # of Debian's packages

    def reason_unavailable(self, folder: Path) -> str | None:
        """Why this cannot be done here; None if it can."""
        for program in (self.compiler, *self.run[:1]):
            if shutil.which(program) is None:
                return f"{program} is not installed (Debian: {self.needs})"
        empty = folder / "empty.c"
        empty.write_text("int main(void) { return 0; }\n")
        if self.compile(empty, output=folder / "empty").returncode:
            return f"{self.compiler} does not compile with {' '.join(self.flags)} (Debian: {self.needs})"
        return None

    def compile(self, *sources: Path | str, output: Path) -> subprocess.CompletedProcess[str]:
        """Compile and, unless `sources` say otherwise, link a program."""
        includes = ["-iquote", LIBRARY, "-iquote", HERE]
        libraries = [] if {"-c", "-S"} & set(sources) else ["-pthread", "-lm"]
        return subprocess.run(
            [self.compiler, *WARNINGS, *self.flags, *includes, *sources, "-o", output, *libraries],
            capture_output=True,
            text=True,
            check=False,
        )


ADDRESS = (
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
)
THREAD = ("-O1", "-g", "-fsanitize=thread")
CLANG = "clang libclang-rt-dev"
CROSS = "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
AARCH64 = Build(
    "aarch64", "aarch64-linux-gnu-gcc", ("-O2", "-static", "-DEMULATED=1"), ("qemu-aarch64",), CROSS
)
FUZZER = ("-fsanitize=fuzzer-no-link,address,undefined",)
CLANG_FUZZER = Build("clang-fuzzer", "clang", FUZZER, needs=CLANG)
BUILDS = [
    Build("gcc", "gcc", needs="gcc libc6-dev"),
    Build("gcc-address", "gcc", ADDRESS, needs="gcc libc6-dev"),
    Build("gcc-thread", "gcc", THREAD, needs="gcc libc6-dev"),
    Build("clang-address", "clang", ADDRESS, needs=CLANG),
    Build("clang-thread", "clang", THREAD, needs=CLANG),
    AARCH64,
]


def run(*command: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(
    scope="module",
    params=[pytest.param(b, id=b.name, marks=[pytest.mark.slow] if i else []) for i, b in enumerate(BUILDS)],
)
def build(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Build, list[Path]]:
    """A way to compile, and what all programs of it are linked with: the library, and their agent."""
    build: Build = request.param
    folder = tmp_path_factory.mktemp(build.name)
    reason = build.reason_unavailable(folder)
    if reason is not None:
        skip_or_fail(reason)
    sources = [path for path in sorted(LIBRARY.glob("*.c")) if not path.name.startswith("_native")]
    objects = []
    for source in [*sources, HERE / "agent.c"]:
        objects.append(folder / f"{source.stem}.o")
        succeeded(build.compile("-c", source, output=objects[-1]))
    return build, objects


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str, build: tuple[Build, list[Path]], tmp_path: Path) -> None:
    how, objects = build
    succeeded(how.compile(HERE / f"{program}.c", *objects, output=tmp_path / program))
    succeeded(run(*how.run, tmp_path / program))


@dataclass(frozen=True)
class Written:
    """What `labels.c` prints."""

    coords: tuple[Coordinate, ...]
    dims: tuple[str, ...] | None
    attrs: dict[str, Any]


def test_labels_that_a_client_in_c_gives_are_read(build: tuple[Build, list[Path]], tmp_path: Path) -> None:
    how, objects = build
    succeeded(how.compile(HERE / "labels.c", *objects, output=tmp_path / "labels"))
    printed = bytes.fromhex(succeeded(run(*how.run, tmp_path / "labels")))
    written = read_fields(Written, Reader(printed))
    mask = written.attrs.pop("mask")
    assert mask.tolist() == [1.0, 0.0, 1.0]
    assert written.attrs == {
        "units": "K", "nothing": None, "true": True, "count": -3, "factor": 0.25, "list": [True],
    }  # fmt: skip
    y, level, x = written.coords
    assert written.dims == ("y", "x")
    assert (y.name, y.dimension, y.first, y.length) == ("y", 0, None, None)
    assert decode_value(y.values).tolist() == [0.5, 1.5] and decode_value(y.attrs["units"]) == "K"
    assert (level.first, level.length, level.values) == (4, 9, y.values)
    assert decode_value(x.values) == {"start": 10.0, "step": 0.5}


@pytest.mark.slow
def test_what_an_agent_sends_does_not_crash_the_client(tmp_path: Path) -> None:
    """A short `make fuzz`: the same inputs in each run."""
    reason = CLANG_FUZZER.reason_unavailable(tmp_path)
    if reason is not None:
        skip_or_fail(reason)
    fuzz_client.write_seeds(tmp_path / "corpus")
    program = fuzz_client.compiled(tmp_path)
    options = ["-runs=100000", "-seed=1", "-timeout=60", f"-artifact_prefix={tmp_path}/"]
    succeeded(run(program, *options, tmp_path / "corpus"))


ORDERS = """
#define _GNU_SOURCE
#include "pages.h"
int64_t loaded(const page_word *word) { return word_load(word); }
void stored(page_word *word) { word_store(word, 1); }
int64_t acquired(const page_word *word) { return word_acquire(word); }
void published(page_word *word) { word_publish(word, 1); }
"""


@pytest.mark.slow
def test_orders_are_instructions_of_aarch64_that_keep_them(tmp_path: Path) -> None:
    """An LDAR does not overtake an STLR; an LDAPR may, so it is enough for `word_acquire` only."""
    reason = AARCH64.reason_unavailable(tmp_path)
    if reason is not None:
        skip_or_fail(reason)
    source, assembly = tmp_path / "orders.c", tmp_path / "orders.s"
    source.write_text(ORDERS)
    succeeded(AARCH64.compile("-S", "-march=armv8.4-a", source, output=assembly))  # where there is an LDAPR
    functions = dict(re.findall(r"^(\w+):\n(.*?)\bret\b", assembly.read_text(), re.DOTALL | re.MULTILINE))
    used = {name: re.findall(r"\b(ldr|ldar|ldapr|str|stlr)\b", text) for name, text in functions.items()}
    assert used.pop("acquired") in (["ldar"], ["ldapr"])
    assert used == {"loaded": ["ldar"], "stored": ["stlr"], "published": ["stlr"]}
