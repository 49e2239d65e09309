"""What a benchmark case is, and what its runs find out: figures, comparisons with a target, and curves."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Literal, TypeVar

from benchmarks.peers import Peers

T = TypeVar("T")
M = TypeVar("M", bound="_Measured")

THIS = "deisa-ray"
MODULES = (
    "handing_over",
    "earlier",
    "starting",
    "answering",
    "steering",
    "many_chunks",
    "merging",
    "gradients",
    "labelling",
    "saving",
    "traffic",
    "slowdown",
    "memory",
    "scale",
)
RUNS_THAT_COUNT = 3  # with fewer, a target is neither met nor missed
_FULFILS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class _Measured:
    """A number of every run of a case, in the order of the runs.

    Attributes
    ----------
    what : str
        What was measured, with the quantile if there is one; of a ratio, the numerator first.
    values : tuple of float
    """

    what: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the runs."""
        return median(self.values)


@dataclass(frozen=True)
class Figure(_Measured):
    """A measured number.

    Attributes
    ----------
    system : str
        Which system it was measured on.
    unit : str
    """

    system: str
    unit: str


@dataclass(frozen=True)
class Comparison(_Measured):
    """A ratio, each measured within one run, and the target that it is held against.

    Attributes
    ----------
    relation : {">=", "<="}
    target : float or None
        None where the ratio is only reported.
    unit : str
        ``"x"`` for a ratio; some targets are amounts.
    every_run : bool
        Whether each run has to meet the target; otherwise their median has to.
    """

    relation: Literal[">=", "<="]
    target: float | None
    unit: str = "x"
    every_run: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target, or with fewer runs than count."""
        if self.target is None or len(self.values) < RUNS_THAT_COUNT:
            return None
        judged = self.values if self.every_run else (self.median,)
        return all(_FULFILS[self.relation](value, self.target) for value in judged)


@dataclass(frozen=True)
class Curve:
    """How something grows.

    Attributes
    ----------
    title, x, y : str
        Of the plot and its axes, with units.
    lines : mapping of str to sequence of (float, float)
        Points by line.
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


@dataclass
class Outcome:
    """What the runs of a case found out, and the machine that they did on."""

    figures: list[Figure] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)

    def figure(self, what: str, system: str, value: float, unit: str) -> float:
        """Record a number, and return it."""
        self.figures.append(Figure(what, (float(value),), system, unit))
        return value

    def compare(
        self,
        what: str,
        value: float,
        relation: Literal[">=", "<="],
        target: float | None,
        unit: str = "x",
        *,
        every_run: bool = False,
    ) -> None:
        """Record a ratio and its target, which the median of the runs has to meet, or every run."""
        self.comparisons.append(Comparison(what, (float(value),), relation, target, unit, every_run))

    def not_measured(self, system: str, reason: Exception) -> None:
        """Record why a system could not be measured, once."""
        note = f"{system} was not measured: {reason}."
        if note not in self.notes:
            self.notes.append(note)

    def curve(self, title: str, x: str, y: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
        """Record how something grows."""
        self.curves.append(Curve(title, x, y, lines))

    def add(self, later: Outcome) -> None:
        """Add what a later run of the same case found out; curves stay those of the first run."""
        self.figures = _joined(self.figures, later.figures)
        self.comparisons = _joined(self.comparisons, later.comparisons)
        self.notes += [note for note in later.notes if note not in self.notes]


def _joined(earlier: Sequence[M], later: Sequence[M]) -> list[M]:
    """Join the values of what is the same but for its values."""
    joined = {replace(one, values=()): one.values for one in earlier}
    for one in later:
        key = replace(one, values=())
        joined[key] = joined.get(key, ()) + one.values
    return [replace(key, values=values) for key, values in joined.items()]


@dataclass(frozen=True)
class Setting:
    """How a case is to run.

    Attributes
    ----------
    quick : bool
        Small sizes and few repetitions: the figures mean nothing, but everything is run.
    peers : Peers
        The systems to measure beside this one, as far as they can be installed.
    scratch : Path
        A folder of the run's own.
    """

    quick: bool
    peers: Peers
    scratch: Path

    def pick(self, full: T, quick: T) -> T:
        """Choose a size."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Case:
    """A question, and the function that answers it by measuring."""

    name: str
    question: str
    run: Callable[[Setting], Outcome]


_cases: dict[str, Case] = {}


def case(question: str) -> Callable[[Callable[[Setting], Outcome]], Callable[[Setting], Outcome]]:
    """Make a case of a function; it is called like the function, with dashes."""

    def register(run: Callable[[Setting], Outcome]) -> Callable[[Setting], Outcome]:
        name = run.__name__.replace("_", "-")
        _cases[name] = Case(name, question, run)
        return run

    return register


def all_cases() -> Mapping[str, Case]:
    """Every case, by name, in the order of the table of results."""
    for module in MODULES:
        import_module(f"benchmarks.cases.{module}")
    return _cases
