"""Run the benchmarks: ``python -m benchmarks``, or ``make bench``."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from benchmarks import results
from benchmarks.clusters import ROOT
from benchmarks.peers import Peers
from benchmarks.suite import RUNS_THAT_COUNT, Outcome, Setting, all_cases

CASE_TIMEOUT_S = 1800


def main() -> int:
    """Run each case some times, each in a process of its own, and write the results; returns how many cases failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure deisa-ray beside its peers."
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases to run; all by default")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--quick", action="store_true", help="small and fast: shows that everything runs")
    parser.add_argument(
        "--runs",
        type=int,
        help=f"of each case; {RUNS_THAT_COUNT}, the least that a target needs, or 1 with --quick",
    )
    parser.add_argument(
        "--no-peers", action="store_true", help="leave out peers that must be installed first"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="where results go, beside those of other cases; benchmarks/results, or benchmarks/results-quick",
    )
    parser.add_argument("--only-process", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = all_cases()
    if unknown := set(options.cases) - set(cases):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(cases)}")
    if options.list:
        for name, one in cases.items():
            print(f"{name:24} {one.question}")
        return 0
    chosen = options.cases or list(cases)
    if options.only_process is not None:
        _run_here(chosen[0], options)
        return 0
    out = options.out or ROOT / ("benchmarks/results-quick" if options.quick else "benchmarks/results")
    try:
        results.read(out, options.quick)
    except ValueError as error:
        parser.error(str(error))
    outcomes: dict[str, Outcome] = {}
    failed: set[str] = set()
    runs = options.runs or (1 if options.quick else RUNS_THAT_COUNT)
    with tempfile.TemporaryDirectory(prefix="dr-bench-", dir="/tmp") as folder:
        for _, name in product(range(runs), chosen):  # the runs of a case lie apart, as runs on other days do
            if name in failed:
                continue
            outcome = _run_apart(name, options, Path(folder))
            if outcome is None:
                failed.add(name)
                continue
            outcomes.setdefault(name, Outcome(curves=outcome.curves, machine=outcome.machine)).add(outcome)
            results.add(out, name, outcomes[name], cases, options.quick)
    print(results.markdown(outcomes, cases, options.quick))
    if failed:
        print(f"failed: {', '.join(sorted(failed))}", file=sys.stderr)
    return len(failed)


def _run_here(name: str, options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp") as scratch:
        setting = Setting(options.quick, Peers(not options.no_peers), Path(scratch))
        outcome = all_cases()[name].run(setting)
        outcome.machine = results.machine()
    options.only_process.write_text(json.dumps(results.to_json(outcome)))


def _run_apart(name: str, options: argparse.Namespace, folder: Path) -> Outcome | None:
    """Run a case in a process of its own: Ray, Dask's settings and memory start afresh."""
    print(f"{name} ...", file=sys.stderr, end=" ", flush=True)
    written, log = folder / f"{name}.json", folder / f"{name}.log"
    flags = ["--quick"] * options.quick + ["--no-peers"] * options.no_peers
    began = time.monotonic()
    with log.open("w") as output:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks", name, *flags, "--only-process", str(written)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=CASE_TIMEOUT_S,
                # As for users, a module is compiled once: else importing this checkout would cost more than a package.
                env={**os.environ, "RAY_DEDUP_LOGS": "0", "PYTHONDONTWRITEBYTECODE": ""},
            ).returncode
        except subprocess.TimeoutExpired:
            done = -1
    print(f"{time.monotonic() - began:.0f} s{'' if done == 0 else ', failed'}", file=sys.stderr, flush=True)
    if done != 0:
        print("\n".join(log.read_text().splitlines()[-30:]), file=sys.stderr)
        return None
    return results.from_json(json.loads(written.read_text()))


if __name__ == "__main__":
    sys.exit(main())
