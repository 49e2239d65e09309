"""Write what the cases found out: ``results.json``, ``results.md`` and a plot for each curve."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.suite import Case, Comparison, Curve, Figure, Outcome

PACKAGES = ("deisa-ray", "ray", "dask", "numpy", "msgpack", "mpi4py")
_UNITS = {"s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")), "B": ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))}


def machine() -> dict[str, Any]:
    """Describe where the figures come from."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
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
        [Figure(**figure) for figure in data["figures"]],
        [Comparison(**comparison) for comparison in data["comparisons"]],
        [Curve(**curve) for curve in data["curves"]],
        list(data["notes"]),
    )


def write(folder: Path, outcomes: Mapping[str, Outcome], cases: Mapping[str, Case], quick: bool) -> None:
    """Write everything into a folder; cases from earlier runs that were not run again stay out."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "machine": machine(),
        "quick": quick,
        "cases": {name: to_json(outcome) for name, outcome in outcomes.items()},
    }
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    (folder / "results.md").write_text("\n".join(_markdown(outcomes, cases, quick)) + "\n")
    for name, outcome in outcomes.items():
        for number, curve in enumerate(outcome.curves):
            _plot(curve, folder / _plot_name(name, number))


def _plot_name(case: str, number: int) -> str:
    return f"{case}-{number + 1}.svg" if number else f"{case}.svg"


def _markdown(outcomes: Mapping[str, Outcome], cases: Mapping[str, Case], quick: bool) -> Iterator[str]:
    yield "# Results"
    yield ""
    if quick:
        yield "**Quick mode: sizes are small and repetitions few. These figures say that everything runs, no more.**"
        yield ""
    yield "; ".join(f"{key} {value}" for key, value in machine().items() if key != "memory_bytes") + "."
    yield ""
    yield from _table(
        ("what", "measured", "target", ""),
        [
            (c.what, shown(c.value, c.unit), _target(c), {True: "met", False: "**missed**", None: ""}[c.met])
            for outcome in outcomes.values()
            for c in outcome.comparisons
        ],
    )
    for name, outcome in outcomes.items():
        yield ""
        yield f"## {cases[name].question}"
        yield ""
        yield from _table(
            ("what", "system", "measured"),
            [(f.what, f.system, shown(f.value, f.unit)) for f in outcome.figures],
        )
        for number, curve in enumerate(outcome.curves):
            yield ""
            yield f"![{curve.title}]({_plot_name(name, number)})"
        for note in outcome.notes:
            yield ""
            yield note


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _target(comparison: Comparison) -> str:
    if comparison.target is None:
        return "reported"
    bound = {">=": "at least", "<=": "at most"}[comparison.relation]
    return f"{bound} {shown(comparison.target, comparison.unit)}"


def shown(value: float, unit: str) -> str:
    """Write a number with three digits, in a unit that suits its size."""
    for factor, name in _UNITS.get(unit, ()):
        if abs(value) >= factor:
            return f"{_digits(value / factor)} {name}"
    if unit in _UNITS and value:
        factor, name = _UNITS[unit][-1] if unit == "s" else (1, unit)
        return f"{_digits(value / factor)} {name}"
    return f"{_digits(value)}{'' if unit in ('x', '%') else ' '}{unit}"


def _digits(value: float) -> str:
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _plot(curve: Curve, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
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
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
