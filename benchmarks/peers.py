"""The systems to measure beside this one, each in a virtual environment of its own.

They share import names with this project or with each other's dependencies, and are installed when a run first
needs them, below ``.venv/peers``: from PyPI, or from the history of this repository.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

MPI = ("mpi4py>=4.1", "mpich>=4.3.1")
DEISA_RAY_018 = "deisa-ray 0.1.8"
ADIOS2_SST = "ADIOS2 SST"
ROOT = Path(__file__).parents[1]
# The last commit whose usual send is `_lane.c`; named by its hash, since a clone may lack tags.
EARLIER_COMMIT = "47d56a7da2b39152ded114ea7ac7536afc5983ac"
EARLIER = f"deisa-ray at {EARLIER_COMMIT[:7]}"
EARLIER_COMPILED = "deisa.ray._transport._lane"


@dataclass(frozen=True)
class _Recipe:
    folder: str
    packages: tuple[str, ...]
    oldest_python: tuple[int, int] = (3, 11)
    commit: str = (
        ""  # of this repository, to be installed as well, with the releases that this environment has
    )
    must_import: str = ""


_RECIPES = {
    DEISA_RAY_018: _Recipe("deisa-ray-0.1.8", ("deisa-ray==0.1.8", *MPI), oldest_python=(3, 12)),
    ADIOS2_SST: _Recipe("adios2", ("adios2==2.12.*", *MPI)),
    EARLIER: _Recipe(
        f"deisa-ray-{EARLIER_COMMIT[:7]}", (), commit=EARLIER_COMMIT, must_import=EARLIER_COMPILED
    ),
}
SAME_RELEASES = ("ray", "dask", "numpy", "cloudpickle", "mpi4py", "mpich")

RAY_DASK = "ray_dask_get"


class PeerUnavailableError(RuntimeError):
    """A peer can't be installed here, or was not asked for."""


@dataclass(frozen=True)
class Peers:
    """Installs peers when they are asked for.

    Attributes
    ----------
    wanted : bool
        False leaves those out that need an environment of their own.
    """

    wanted: bool = True

    @staticmethod
    def installs(system: str) -> bool:
        """Whether a system is one of those that get an environment of their own."""
        return system in _RECIPES

    def python(self, peer: str) -> Path:
        """Return the interpreter of a peer's environment.

        Raises
        ------
        PeerUnavailableError
            With the reason why it can't be measured here.
        """
        if not self.wanted:
            raise PeerUnavailableError(f"{peer} was left out (--no-peers)")
        return self._environments[peer]

    @cached_property
    def _environments(self) -> _Environments:
        return _Environments()


class _Environments(dict[str, Path]):
    def __missing__(self, peer: str) -> Path:
        recipe = _RECIPES[peer]
        folder = Path(sys.prefix, "peers", recipe.folder)
        python, installed = folder / "bin/python", folder / "installed"
        if not installed.exists():
            base = _interpreter(recipe.oldest_python)
            print(f"installing {peer} into {folder}", file=sys.stderr, flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            _run([base, "-m", "venv", str(folder)], peer)
            pip = [str(python), "-m", "pip", "install", "--quiet"]
            if recipe.packages:
                _run([*pip, *recipe.packages], peer)
            if recipe.commit:
                with tempfile.TemporaryDirectory() as source:
                    check_out(recipe.commit, Path(source))
                    _run([*pip, source, *(f"{name}=={version(name)}" for name in SAME_RELEASES)], peer)
            if recipe.must_import:
                _run([str(python), "-c", f"import {recipe.must_import}"], peer)
            installed.touch()
        self[peer] = python
        return python


def check_out(commit: str, folder: Path) -> None:
    """Write the files of a commit of this repository into a folder.

    Raises
    ------
    PeerUnavailableError
        When this checkout has no such commit, as a shallow clone.
    """
    archive = folder / "source.tar"
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "archive", f"--output={archive}", commit], capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise PeerUnavailableError("git was not found") from error
    if found.returncode:
        raise PeerUnavailableError(
            f"commit {commit[:7]} of this repository is not here ({found.stderr.strip()}); in a shallow clone, "
            "`git fetch --unshallow` brings it"
        )
    shutil.unpack_archive(archive, folder, filter="data")


def _interpreter(oldest: tuple[int, int]) -> str:
    """Find a Python of at least some version: this one, one on PATH, or one of pyenv's."""
    if sys.version_info[:2] >= oldest:
        return sys.executable
    candidates = [shutil.which(f"python3.{minor}") for minor in range(oldest[1], oldest[1] + 3)]
    candidates += [
        str(path)
        for minor in range(oldest[1], oldest[1] + 3)
        for path in sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
    ]
    for candidate in candidates:
        if candidate and subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    raise PeerUnavailableError(f"no Python {oldest[0]}.{oldest[1]} or newer was found")


def _run(argv: list[str], peer: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise PeerUnavailableError(f"{peer} could not be installed: {done.stderr.strip()[-500:]}")
