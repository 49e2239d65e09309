"""Run the demo: the analytics, and the simulation under MPI, as two programs that know nothing of each other.

python -m examples.gray_scott
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
MPIEXEC = str(Path(sys.executable).parent / "mpiexec")  # the one that belongs to this environment's mpi4py
RANK = [sys.executable, "-m", "mpi4py"]  # runs a script so that a failing rank takes the others with it


def wait_both(programs: dict[str, subprocess.Popen[bytes]]) -> str | None:
    """Wait until all programs have ended well, or one has failed; return the name of the one that failed."""
    while True:
        codes = {name: program.poll() for name, program in programs.items()}
        for name, code in codes.items():
            if code not in (None, 0):
                return name
        if all(code == 0 for code in codes.values()):
            return None
        time.sleep(0.1)


def end(programs: dict[str, subprocess.Popen[bytes]]) -> None:
    """Ask the programs that still run to end, and make them if they don't."""
    for program in programs.values():
        program.terminate()
    for program in programs.values():
        try:
            program.wait(timeout=15)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()


def main() -> int:
    parser = argparse.ArgumentParser("python -m examples.gray_scott", description="Run the Gray-Scott demo.")
    parser.add_argument("--ranks", type=int, default=4, help="MPI ranks (default: %(default)s)")
    parser.add_argument("--size", type=int, default=512, help="cells along each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12_000, help="steps to simulate (default: %(default)s)")
    parser.add_argument("--every", type=int, default=100, help="send every so many (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo-results"), help="default: %(default)s")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)

    analytics = [
        *(sys.executable, str(HERE / "analytics.py")),
        *(f"--output={options.output}", f"--timesteps={options.steps // options.every}"),
    ]
    simulation = [
        *(MPIEXEC, "-n", str(options.ranks), *RANK, str(HERE / "simulation.py")),
        *(f"--size={options.size}", f"--steps={options.steps}", f"--every={options.every}"),
    ]

    logs = {name: options.output / f"{name}.log" for name in ("analytics", "simulation")}
    print(f"starting Ray, the analytics and {options.ranks} ranks; logs in {options.output}/", flush=True)
    programs: dict[str, subprocess.Popen[bytes]] = {}
    own = {"DEISA_RAY_SESSION": f"gray-scott-{os.getpid()}"} | dict(os.environ)
    if not {"RAY_ADDRESS", "DEISA_RAY_ADDRESS"} & own.keys():
        own["RAY_ADDRESS"] = "local"  # whatever else runs on this host
    with logs["analytics"].open("wb") as analytics_log, logs["simulation"].open("wb") as simulation_log:
        try:
            # The analytics keeps the terminal for its progress bar.
            programs["analytics"] = subprocess.Popen(analytics, stderr=analytics_log, env=own)
            programs["simulation"] = subprocess.Popen(
                simulation,
                stdin=subprocess.DEVNULL,
                stdout=simulation_log,
                stderr=subprocess.STDOUT,
                env=own | {"OMP_NUM_THREADS": "1"},
            )
            failed = wait_both(programs)
        except KeyboardInterrupt:
            return 130
        finally:
            end(programs)

    if failed is None:
        return 0
    tail = logs[failed].read_text(errors="replace").splitlines()[-30:]
    code = programs[failed].returncode
    print(f"\nthe {failed} failed with exit code {code}:", *tail, sep="\n", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
