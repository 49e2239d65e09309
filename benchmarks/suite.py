"""What a benchmark case is, and what it finds out: figures, comparisons with a target, and curves."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Literal, TypeVar

from benchmarks.peers import Peers

T = TypeVar("T")

THIS = "deisa-ray"
MODULES = (
    "handing_over",
    "starting",
    "answering",
    "many_chunks",
    "merging",
    "gradients",
    "traffic",
    "slowdown",
    "memory",
    "scale",
)
_FULFILS = {">=": operator.ge, "<=": operator.le}


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes
    ----------
    what : str
        What was measured, with the quantile if there is one.
    system : str
        Which system it was measured on.
    value : float
    unit : str
    """

    what: str
    system: str
    value: float
    unit: str


@dataclass(frozen=True)
class Comparison:
    """A ratio measured in one run, and the target it was held against.

    Attributes
    ----------
    what : str
        The ratio in words, numerator first.
    value : float
    relation : {">=", "<="}
    target : float or None
        None where the ratio is only reported.
    unit : str
        ``"x"`` for a ratio; some targets are amounts.
    """

    what: str
    value: float
    relation: Literal[">=", "<="]
    target: float | None
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        return None if self.target is None else _FULFILS[self.relation](self.value, self.target)


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
    """What a case found out, and the machine that it did on."""

    figures: list[Figure] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, str] = field(default_factory=dict)

    def figure(self, what: str, system: str, value: float, unit: str) -> float:
        """Record a number, and return it."""
        self.figures.append(Figure(what, system, float(value), unit))
        return value

    def compare(
        self,
        what: str,
        value: float,
        relation: Literal[">=", "<="],
        target: float | None,
        unit: str = "x",
    ) -> None:
        """Record a ratio and its target."""
        self.comparisons.append(Comparison(what, float(value), relation, target, unit))

    def not_measured(self, system: str, reason: Exception) -> None:
        """Record why a system could not be measured, once."""
        note = f"{system} was not measured: {reason}."
        if note not in self.notes:
            self.notes.append(note)

    def curve(self, title: str, x: str, y: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
        """Record how something grows."""
        self.curves.append(Curve(title, x, y, lines))


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
