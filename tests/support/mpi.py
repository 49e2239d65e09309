"""Run a script under `mpiexec`, of MPICH or of OpenMPI, and never leave ranks behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tests.support.processes import kill_tree

Flavour = Literal["mpich", "openmpi"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)

RUN_TIMEOUT_S = 90.0

# Each package brings an `mpiexec`, so OpenMPI lives in a venv of its own (see the Makefile).
_PREFIXES = {
    "mpich": (Path(sys.prefix),),
    "openmpi": (Path(sys.prefix, "openmpi"), Path(__file__).parents[2] / ".venv/openmpi"),
}
_OPTIONS = {"mpich": [], "openmpi": ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]}
_ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@dataclass(frozen=True)
class Mpi:
    """One MPI implementation: its launcher, and the interpreter whose mpi4py belongs to it."""

    flavour: Flavour
    mpiexec: Path
    python: Path

    @classmethod
    def find(cls, flavour: Flavour) -> Mpi | None:
        """Look for an implementation in this project's environments."""
        for prefix in _PREFIXES[flavour]:
            mpiexec = prefix / "bin/mpiexec"
            if mpiexec.exists():
                return cls(flavour, mpiexec, prefix / "bin/python")
        return None

    def popen(
        self, ranks: int, script: Path | str, *args: str, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start `script` on a number of ranks, and return while it runs; stop it with `kill_tree`.

        Ranks print into one pipe. Output that a rank flushes at once, as `print(..., flush=True)` does,
        arrives in one piece; PYTHONUNBUFFERED would tear it to shreds, and is taken out of the environment.
        """
        return self._popen(["-n", str(ranks), self.python, script, *args], env)

    def popen_both(
        self, ranks: int, script: Path, other: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start `script` on a number of ranks and, as the last rank, `other` in the interpreter of this process."""
        theirs = {"PYTHONPATH": os.pathsep.join(self._import_paths), **self._library}
        with_theirs = ["env", *(f"{name}={value}" for name, value in theirs.items())]
        first: list[Path | str] = ["-n", str(ranks), self.python, script]
        return self._popen([*first, ":", "-n", "1", *with_theirs, sys.executable, other], env)

    def _popen(self, arguments: Sequence[Path | str], env: Mapping[str, str] | None) -> subprocess.Popen[str]:
        variables = {**os.environ, **_ENVIRONMENT, **(env or {})}
        variables.pop("PYTHONUNBUFFERED", None)
        return subprocess.Popen(
            [self.mpiexec, *_OPTIONS[self.flavour], *arguments],
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def _import_paths(self) -> Sequence[str]:
        """Where another interpreter finds the mpi4py that belongs to this MPI, and what it finds anyway."""
        prefix, version = self.python.parents[1], f"python{sys.version_info[0]}.{sys.version_info[1]}"
        own = [] if self.flavour == "mpich" else [str(prefix / "lib" / version / "site-packages")]
        return [*own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]

    @property
    def _library(self) -> Mapping[str, str]:
        """What tells mpi4py which library to load, where it would find another one."""
        if self.flavour == "mpich":
            return {}
        return {"MPI4PY_LIBMPI": str(self.python.parents[1] / "lib/libmpi.so.40")}

    def run(
        self,
        ranks: int,
        script: Path | str,
        *args: str,
        env: Mapping[str, str] | None = None,
        timeout_s: float = RUN_TIMEOUT_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run `script` on a number of ranks to its end.

        After `timeout_s`, kill the ranks and raise `TimeoutError` with what they had printed.
        """
        with self.popen(ranks, script, *args, env=env) as process:
            try:
                stdout, stderr = process.communicate(timeout=timeout_s)
            except BaseException as exc:
                kill_tree(process)
                if not isinstance(exc, subprocess.TimeoutExpired):
                    raise
                stdout, stderr = process.communicate()
                raise TimeoutError(
                    f"{ranks} ranks of {script} under {self.flavour} still ran after {timeout_s:g} s\n"
                    f"--- stdout\n{stdout}\n--- stderr\n{stderr}"
                ) from exc
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)
