"""Wheels that carry the compiled part, for x86_64 and aarch64, whichever of them this machine is.

    python tools/wheels.py [--machine MACHINE] [--into FOLDER] [PYTHON ...]

A wheel is built from the source distribution, so it holds nothing that an earlier build has left in the checkout.
`zig cc` compiles for both machines, with glibc as it was in `GLIBC`. A PYTHON lends its headers and NumPy's, which are
the same on both: they agree in the sizes of types and in the byte order. What a PYTHON says about compiling is true for
this machine only, so the compiler, its flags and the name of an extension are given from here. At last auditwheel looks
what a wheel needs of the machine, and puts that into its name: manylinux with a number no larger than that of `GLIBC`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
MACHINES = ("x86_64", "aarch64")
GLIBC = "2.28"  # of 2018, as in RHEL 8
FLAGS = "-O3 -DNDEBUG -g0 -fno-sanitize=undefined"  # zig's own are for debugging


def run(*command: str | Path, **variables: str) -> str:
    """Run a command, with the programs of this environment found first, and return what it printed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    done = subprocess.run(
        command, env={**os.environ, "PATH": path, **variables}, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{shlex.join(map(str, command))} failed")
    return done.stdout


def zig() -> str:
    """Return the program itself; `python -m ziglang` is hidden from the environments in which wheels are built."""
    package = importlib.util.find_spec("ziglang")
    if package is None or package.origin is None:
        sys.exit("ziglang is not installed; `make wheel` installs it")
    return str(Path(package.origin).with_name("zig"))


def compiling_for(machine: str, python: str, folder: Path) -> dict[str, str]:
    """Return the variables that have setuptools compile extensions of a PYTHON for a machine."""
    suffix = run(python, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))").strip()
    compiler = shlex.join([zig(), "cc", "-target", f"{machine}-linux-gnu.{GLIBC}"])
    # Debian keeps one header apart for each machine, where only its own compilers look.
    (folder / f"{machine}-linux-gnu").symlink_to(f"/usr/include/{platform.machine()}-linux-gnu")
    return {
        "CC": compiler,
        "LDSHARED": f"{compiler} -shared -s",
        "CFLAGS": f"{FLAGS} -I{folder}",
        "SETUPTOOLS_EXT_SUFFIX": suffix.replace(platform.machine(), machine),
    }


def build(machine: str, python: str, source: Path, into: Path) -> Path:
    """Build a wheel from a source distribution."""
    with TemporaryDirectory() as folder:
        run(
            *(sys.executable, "-m", "pip", "--python", shutil.which(python) or python, "wheel", "--quiet"),
            *("--no-deps", "--wheel-dir", folder),
            f"--config-settings=--build-option=--plat-name=linux_{machine}",
            source,
            **compiling_for(machine, python, Path(folder)),
        )
        (wheel,) = Path(folder).glob("*.whl")
        named = Path(folder, "named")
        run("auditwheel", "repair", "--wheel-dir", named, wheel)
        (wheel,) = named.glob("*manylinux*.whl")
        return Path(shutil.move(wheel, into / wheel.name))


def main() -> None:
    """Build a wheel for each PYTHON and machine that was named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", action="append", choices=MACHINES, help="by default both")
    parser.add_argument("--into", type=Path, default=ROOT / "dist")
    parser.add_argument("python", nargs="*", default=[sys.executable], metavar="PYTHON")
    chosen = parser.parse_args()
    chosen.into.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
        (source,) = Path(folder).glob("*.tar.gz")
        for python in chosen.python:
            for machine in chosen.machine or MACHINES:
                print(build(machine, python, source, chosen.into), flush=True)


if __name__ == "__main__":
    main()
