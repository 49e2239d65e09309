"""Write what cases found out into a folder: ``results.json``, ``results.md`` and a plot for each curve."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.suite import RUNS_THAT_COUNT, Case, Comparison, Curve, Figure, Outcome

PACKAGES = ("deisa-ray", "ray", "dask", "numpy", "mpi4py")
TARGETS_BEGIN, TARGETS_END = (
    "<!-- targets: begin -->",
    "<!-- targets: end -->",
)  # docs/performance.md includes it
LINES_WITHIN = 4  # that a plot has with its legend inside
SPREAD = ("least", "median", "greatest")  # of the runs
_BOUNDS = {">=": "at least", "<=": "at most"}
_MET = {True: "met", False: "**missed**", None: "too few runs"}
_UNITS = {"s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")), "B": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))}


def machine() -> dict[str, str]:
    """Describe where the figures come from."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kernel = re.match(r"[\d.]*\d", platform.release())
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": shown(memory_bytes, "B"),
        "kernel": kernel[0] if kernel else platform.release(),
        "huge pages of shared memory": _chosen(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _chosen(setting: Path) -> str:
    try:
        found = re.search(r"\[(\w+)\]", setting.read_text())
    except OSError:
        return "unknown"
    return found[1] if found else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def to_json(outcome: Outcome) -> dict[str, Any]:
    """Turn an outcome into what JSON can hold."""
    return asdict(outcome)


def from_json(data: Mapping[str, Any]) -> Outcome:
    """Turn it back."""
    return Outcome(
        [Figure(**{**figure, "values": tuple(figure["values"])}) for figure in data["figures"]],
        [Comparison(**{**one, "values": tuple(one["values"])}) for one in data["comparisons"]],
        [Curve(**{**curve, "lines": _points(curve["lines"])}) for curve in data["curves"]],
        list(data["notes"]),
        dict(data["machine"]),
    )


def _points(lines: Mapping[str, Any]) -> dict[str, list[tuple[float, float]]]:
    return {label: [(x, y) for x, y in points] for label, points in lines.items()}


def read(folder: Path, quick: bool) -> dict[str, Outcome]:
    """Read what a folder holds, by case.

    Raises
    ------
    ValueError
        When that is from a run in the other mode.
    """
    try:
        content = json.loads((folder / "results.json").read_text())
    except FileNotFoundError:
        return {}
    if content["quick"] != quick:
        mode = "quick mode" if content["quick"] else "full runs"
        raise ValueError(f"{folder} holds results of {mode}: choose another folder with --out")
    return {name: from_json(outcome) for name, outcome in content["cases"].items()}


def add(folder: Path, name: str, outcome: Outcome, cases: Mapping[str, Case], quick: bool) -> None:
    """Write what a case found out into a folder; results of other cases that are there already stay."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {**read(folder, quick), name: outcome}
    outcomes = {case: found[case] for case in cases if case in found}
    content = {"quick": quick, "cases": {case: to_json(outcome) for case, outcome in outcomes.items()}}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(outcomes, cases, quick))
    for number, curve in enumerate(outcome.curves):
        _plot(curve, folder / _plot_name(name, number))


def _plot_name(case: str, number: int) -> str:
    return f"{case}-{number + 1}.svg" if number else f"{case}.svg"


def markdown(outcomes: Mapping[str, Outcome], cases: Mapping[str, Case], quick: bool) -> str:
    """Write a page: the targets, then a section for each case."""
    return "\n".join(_lines(outcomes, cases, quick)) + "\n"


def _lines(outcomes: Mapping[str, Outcome], cases: Mapping[str, Case], quick: bool) -> Iterator[str]:
    yield "# Results"
    yield ""
    if quick:
        yield "**Quick mode: sizes are small and repetitions few. These figures say that everything runs, no more.**"
        yield ""
    yield TARGETS_BEGIN
    yield ""
    yield from _targets(outcomes)
    yield ""
    yield TARGETS_END
    for name, outcome in outcomes.items():
        yield ""
        yield f"## {name}"
        yield ""
        yield cases[name].question
        if outcome.figures:
            yield ""
            yield from _table(
                ("what", "system", *SPREAD),
                [(_plain(f.what), _plain(f.system), *_spread(f.values, f.unit)) for f in outcome.figures],
            )
        if ratios := [c for c in outcome.comparisons if c.target is None]:
            yield ""
            yield from _table(
                ("only reported", *SPREAD), [(_plain(c.what), *_spread(c.values, c.unit)) for c in ratios]
            )
        for number, curve in enumerate(outcome.curves):
            yield ""
            yield f"![{curve.title}]({_plot_name(name, number)})"
        for note in outcome.notes:
            yield ""
            yield note


def _targets(outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    rows = [
        (name, c) for name, outcome in outcomes.items() for c in outcome.comparisons if c.target is not None
    ]
    yield (
        f"{sum(bool(c.met) for _, c in rows)} of {len(rows)} targets met: by the median of at least "
        f"{RUNS_THAT_COUNT} runs, or by every run where that is the target."
    )
    if rows:
        yield ""
        yield from _table(
            ("case", "what", "runs", *SPREAD, "target", ""),
            [
                (
                    f"[{name}](#{name})",
                    _plain(c.what),
                    str(len(c.values)),
                    *_spread(c.values, c.unit),
                    f"{_BOUNDS[c.relation]} {shown(c.target, c.unit)}{' in each run' if c.every_run else ''}",
                    _MET[c.met],
                )
                for name, c in rows
                if c.target is not None
            ],
        )
    by_machine: dict[str, list[str]] = {}
    for name, outcome in outcomes.items():
        described = ", ".join(f"{key} {value}" for key, value in outcome.machine.items())
        by_machine.setdefault(described, []).append(name)
    for described, names in by_machine.items():
        yield ""
        yield f"{'Measured' if len(by_machine) == 1 else ', '.join(names)} on: {described}."


def _spread(values: Sequence[float], unit: str) -> tuple[str, ...]:
    """Least, median and greatest of the runs."""
    return tuple(shown(value, unit) for value in (min(values), median(values), max(values)))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _plain(text: str) -> str:
    """Keep what Markdown would take for markup."""
    return re.sub(r"([|*\[\]])", r"\\\1", text)


def shown(value: float, unit: str) -> str:
    """Write a number with three digits, in a unit that suits its size."""
    for factor, name in _UNITS.get(unit, ()):
        if abs(value) >= factor:
            return f"{_digits(value / factor)} {name}"
    if unit in _UNITS and value:
        factor, name = _UNITS[unit][-1] if unit == "s" else (1, unit)
        return f"{_digits(value / factor)} {name}"
    return f"{_digits(value)}{'' if unit in ('x', '%', '') else ' '}{unit}"


def _digits(value: float) -> str:
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _plot(curve: Curve, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same curve gives the same file
    from matplotlib import pyplot

    many = len(curve.lines) > LINES_WITHIN
    figure, axes = pyplot.subplots(figsize=(8.4 if many else 6.4, 4.0), layout="constrained")
    for label, points in curve.lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label)
    axes.set(title=curve.title, xlabel=curve.x, ylabel=curve.y)
    xs = [x for points in curve.lines.values() for x, _ in points]
    ys = [y for points in curve.lines.values() for _, y in points]
    if min(xs) > 0 and max(xs) >= 20 * min(xs):
        axes.set_xscale("log")
    if min(ys) > 0 and max(ys) >= 20 * min(ys):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper") if many else axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
