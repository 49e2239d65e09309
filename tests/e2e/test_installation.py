"""Installing: a wheel needs no compiler; a build without one says so in a line."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import skip_or_fail
from tests.docs.pages import ROOT, python_blocks

TIMEOUT_S = 240.0
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
MODULES = """
import sys
print(*(module.__file__ for name, module in sys.modules.items() if name.startswith("deisa.ray")))
"""


def run(
    *command: str | Path, at: Path, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        command,
        cwd=at,
        env={**variables, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a build reads, and nothing that an earlier one has left."""
    folder = tmp_path / "checkout"
    left = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", folder / "src", ignore=left)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def pip_wheel(checkout: Path, **env: str) -> subprocess.CompletedProcess[str]:
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", checkout / "dist"]
    return run(*PIP, "wheel", *options, checkout, at=checkout, env=env)


def empty_environment(folder: Path) -> tuple[Path, dict[str, str]]:
    """Return the interpreter of a new environment, and the variables of a user without a compiler.

    What deisa-ray depends on is found where it is installed already. The file that names this folder does not have
    the files of this kind in it read, so a deisa-ray that is installed there as editable stays out of sight.
    """
    succeeded(run(sys.executable, "-m", "venv", "--without-pip", folder, at=folder.parent))
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    installed = sysconfig.get_path("purelib")
    (folder / "lib" / version / "site-packages/dependencies.pth").write_text(f"{installed}\n")
    return folder / "bin/python", {"PATH": str(folder / "bin"), "CC": "/bin/false"}


def check_quick_start_where_nothing_can_be_compiled(wheel: Path, folder: Path) -> None:
    """Install a wheel into an empty environment, and run there what the README shows first."""
    python, env = empty_environment(folder / "empty")
    options = ["--no-deps", "--no-index"]
    succeeded(run(*PIP, "--python", python, "install", *options, wheel, at=folder, env=env))
    first, *_ = python_blocks(ROOT / "README.md")
    program = folder / "quick_start.py"
    program.write_text(first.code + MODULES)
    *printed, modules = succeeded(run(python, program, at=folder, env=env)).splitlines(keepends=True)
    assert "".join(printed) == first.output
    assert all(Path(module).is_relative_to(folder / "empty") for module in modules.split())
    assert any(module.endswith(".so") for module in modules.split())


def test_a_wheel_runs_the_quick_start_where_nothing_can_be_compiled(checkout: Path, tmp_path: Path) -> None:
    succeeded(pip_wheel(checkout))
    (wheel,) = (checkout / "dist").glob("*.whl")
    check_quick_start_where_nothing_can_be_compiled(wheel, tmp_path)


@pytest.mark.slow
def test_a_wheel_of_make_wheel_runs_the_quick_start(tmp_path: Path) -> None:
    if importlib.util.find_spec("ziglang") is None:
        skip_or_fail("what builds these wheels is not installed; `make wheel` installs it")
    built = run(sys.executable, ROOT / "tools/wheels.py", "--into", tmp_path / "dist", at=tmp_path)
    succeeded(built)
    wheels = list((tmp_path / "dist").glob("*.whl"))
    assert sorted(wheel.stem.rpartition("manylinux_2_17_")[2] for wheel in wheels) == ["aarch64", "x86_64"]
    (wheel,) = (wheel for wheel in wheels if wheel.stem.endswith(platform.machine()))
    check_quick_start_where_nothing_can_be_compiled(wheel, tmp_path)


def without(tmp_path: Path, header: str) -> str:
    """Return a compiler that does not find a header."""
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\ngrep -qsF "{header}" -- "$@" && exit 1\nexec cc "$@"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return str(compiler)


def test_without_a_compiler_the_installation_says_so_in_one_line(checkout: Path) -> None:
    done = pip_wheel(checkout, CC="no-such-compiler")
    assert done.returncode != 0
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines()]
    assert [line for line in said if "deisa-ray has" in line] == [
        "error: deisa-ray has a part in C, and there is no C compiler: `no-such-compiler` is not found. "
        "Install one (Debian and Ubuntu: apt-get install gcc libc6-dev), or name one in CC; "
        "or install a wheel of deisa-ray, which is compiled already."
    ]
    assert not any("Traceback" in line or "copying" in line for line in said)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("stdlib.h", "there is no C compiler: `{}` does not compile `#include <stdlib.h>`. Install one"),
        ("Python.h", "the headers of Python are missing: Python.h is not found. Install them"),
    ],
)
def test_what_is_missing_has_its_own_line(checkout: Path, tmp_path: Path, header: str, said: str) -> None:
    compiler = without(tmp_path, header)
    done = run(sys.executable, "setup.py", "--quiet", "build", at=checkout, env={"CC": compiler})
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert f"error: deisa-ray has a part in C, and {said.format(compiler)}" in done.stderr
