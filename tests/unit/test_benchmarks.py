"""What benchmarks find out, and how it is written down; nothing is measured here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from benchmarks import results
from benchmarks.clusters import ROOT
from benchmarks.intervals import median_interval
from benchmarks.peers import PeerUnavailableError, check_out
from benchmarks.suite import MODULES, THIS, Case, Comparison, Outcome, Setting, all_cases
from tests.support.patience import PATIENCE_S


def outcome_of(*values: float) -> Outcome:
    """What as many runs found out."""
    first, *later = (one_run(value) for value in values or (3.0, 2.5, 4.0))
    for one in later:
        first.add(one)
    return first


def one_run(value: float) -> Outcome:
    outcome = Outcome(machine={"cores": "2"})
    outcome.figure("send of a[1:] | median", THIS, 1.5e-5, "s")
    outcome.compare("theirs / ours", value, ">=", 2)
    outcome.compare("only reported", 0.25, "<=", None)
    outcome.curve("Growth", "ranks", "seconds", {"median": [(1, 0.5), (100, 50.0)], "p99": [(1, 1), (2, 2)]})
    outcome.curve("More growth", "ranks", "seconds", {"median": [(1, 0.0), (2, 1.0)]})
    outcome.notes.append("A note.")
    return outcome


def not_run(setting: Setting) -> Outcome:
    raise AssertionError


CASES = {name: Case(name, f"What about {name}?", not_run) for name in ("one", "two")}


@pytest.mark.parametrize(
    ("values", "relation", "target", "met"),
    [
        ((2.0, 2.0, 2.0), ">=", 2.0, True),
        ((9.0, 1.9, 1.9), ">=", 2.0, False),  # the mean would do
        ((2.0, 9.0, 1.0), "<=", 2.0, True),
        ((1.0, 1.0, 2.1, 2.2), "<=", 1.5, False),  # the median of four is the middle of two
        ((2.1, 2.1, 2.1), "<=", None, None),
        ((2.0, 2.0), ">=", 2.0, None),
    ],
)
def test_the_median_of_three_runs_meets_a_target(
    values: tuple[float, ...], relation: Literal[">=", "<="], target: float | None, met: bool | None
) -> None:
    assert Comparison("ratio", values, relation, target).met is met


@pytest.mark.parametrize(("values", "met"), [((2.0, 3.0, 4.0), True), ((1.9, 3.0, 4.0), False)])
def test_every_run_meets_a_target_that_says_so(values: tuple[float, ...], met: bool) -> None:
    assert Comparison("ratio", values, ">=", 2.0, every_run=True).met is met


def test_runs_are_kept_apart() -> None:
    outcome = one_run(3.0)
    second = one_run(4.0)
    second.figure("only now", THIS, 1.0, "s")
    second.notes.append("Another note.")
    outcome.add(second)
    assert [c.values for c in outcome.comparisons] == [(3.0, 4.0), (0.25, 0.25)]
    assert {f.what: f.values for f in outcome.figures} == {
        "send of a[1:] | median": (1.5e-5, 1.5e-5),
        "only now": (1.0,),
    }
    assert len(outcome.curves) == 2
    assert outcome.notes == ["A note.", "Another note."]


def test_a_commit_that_is_not_here_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(
        PeerUnavailableError, match=r"commit fffffff of this repository is not here .* --unshallow"
    ):
        check_out("f" * 40, tmp_path)


@pytest.mark.parametrize(
    ("count", "interval"),
    # From tables of the binomial distribution: the second least of nine, the sixth of twenty, ...
    [(5, None), (6, (1, 6)), (9, (2, 8)), (20, (6, 15)), (25, (8, 18)), (50, (18, 33))],
)
def test_the_interval_of_a_median(count: int, interval: tuple[int, int] | None) -> None:
    values = list(range(1, count + 1))
    assert median_interval(values[::-1]) == interval


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    intervals = [median_interval(random.exponential(size=12).tolist()) for _ in range(2000)]
    held = sum(one is not None and one[0] <= np.log(2) <= one[1] for one in intervals)
    assert 0.95 <= held / 2000 <= 0.975  # the third of twelve: 96.1 %


def test_every_module_has_cases() -> None:
    cases = all_cases()
    modules = {case.run.__module__.rpartition(".")[2] for case in cases.values()}
    files = {path.stem for path in (ROOT / "benchmarks/cases").glob("*.py")} - {"__init__"}
    assert modules == files == set(MODULES)


def test_every_case_asks_a_question_and_is_called_like_its_function() -> None:
    for name, case in all_cases().items():
        assert case.name == name == case.run.__name__.replace("_", "-")
        assert case.question.endswith("?")
        assert case.run.__doc__
    questions = [case.question for case in all_cases().values()]
    assert len(set(questions)) == len(questions)


def test_every_case_is_in_the_readme() -> None:
    page = (ROOT / "benchmarks/README.md").read_text()
    rows = [line.split("|")[1].strip(" `") for line in page.splitlines() if line.startswith("| `")]
    assert rows == list(all_cases())


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.0, "s", "0 s"),
        (1.5, "s", "1.5 s"),
        (0.0123, "s", "12.3 ms"),
        (1.234e-5, "s", "12.3 µs"),
        (2e-9, "s", "0.002 µs"),
        (3 * 2**30, "B", "3 GiB"),
        (1.5 * 2**20, "B", "1.5 MiB"),
        (-(2**20), "B", "-1 MiB"),
        (12, "B", "12 B"),
        (0.6667, "x", "0.667x"),
        (12345.6, "x", "12,346x"),
        (1.5, "%", "1.5%"),
        (80, "", "80"),
        (5, "bundles", "5 bundles"),
    ],
)
def test_how_numbers_are_shown(value: float, unit: str, shown: str) -> None:
    assert results.shown(value, unit) == shown


def test_an_outcome_survives_json() -> None:
    outcome = outcome_of()
    assert results.from_json(json.loads(json.dumps(results.to_json(outcome)))) == outcome


def test_results_of_other_cases_stay(tmp_path: Path) -> None:
    results.add(tmp_path, "two", outcome_of(1.0), CASES, quick=False)
    results.add(tmp_path, "one", outcome_of(2.0), CASES, quick=False)
    results.add(tmp_path, "two", outcome_of(3.0), CASES, quick=False)
    found = results.read(tmp_path, quick=False)
    assert list(found) == ["one", "two"]  # as all cases are ordered
    assert found == {"one": outcome_of(2.0), "two": outcome_of(3.0)}
    assert (tmp_path / "results.md").read_text() == results.markdown(found, CASES, quick=False)


def test_modes_do_not_mix(tmp_path: Path) -> None:
    assert results.read(tmp_path, quick=True) == {}
    results.add(tmp_path, "one", outcome_of(), CASES, quick=False)
    with pytest.raises(ValueError, match="full runs: choose another folder with --out"):
        results.read(tmp_path, quick=True)


def test_the_page() -> None:
    outcomes = {"one": outcome_of(3.0, 1.5, 4.0), "two": outcome_of(1.0, 1.0, 5.0), "three": outcome_of(3.0)}
    cases = {name: Case(name, f"What about {name}?", not_run) for name in outcomes}
    assert results.markdown(outcomes, cases, quick=False).startswith(
        """\
# Results

<!-- targets: begin -->

1 of 3 targets met: by the median of at least 3 runs, or by every run where that is the target.

| case | what | runs | least | median | greatest | target |  |
|---|---|---|---|---|---|---|---|
| [one](#one) | theirs / ours | 3 | 1.5x | 3x | 4x | at least 2x | met |
| [two](#two) | theirs / ours | 3 | 1x | 1x | 5x | at least 2x | **missed** |
| [three](#three) | theirs / ours | 1 | 3x | 3x | 3x | at least 2x | too few runs |

Measured on: cores 2.

<!-- targets: end -->

## one

What about one?

| what | system | least | median | greatest |
|---|---|---|---|---|
| send of a\\[1:\\] \\| median | deisa-ray | 15 µs | 15 µs | 15 µs |

| only reported | least | median | greatest |
|---|---|---|---|
| only reported | 0.25x | 0.25x | 0.25x |

![Growth](one.svg)

![More growth](one-2.svg)

A note.

## two
"""
    )


def test_the_page_says_which_case_ran_where() -> None:
    outcomes = {"one": outcome_of(), "two": outcome_of()}
    outcomes["two"].machine = {"cores": "8"}
    page = results.markdown(outcomes, CASES, quick=True)
    assert "\none on: cores 2.\n\ntwo on: cores 8.\n" in page
    assert "**Quick mode" in page


def test_plots_are_the_same_each_time(tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        results.add(folder, "one", outcome_of(), CASES, quick=False)
    written = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert written == ["one-2.svg", "one.svg", "results.json", "results.md"]
    for name in written:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_command_lists_cases_and_refuses_unknown_ones() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "benchmarks", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)

    listed = run("--list")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(all_cases())
    assert "no such case: nothing; there are send-small" in run("nothing").stderr
