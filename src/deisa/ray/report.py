"""Where the time of a run went, as `Deisa.execute_callbacks` returns it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

from deisa.ray._state.stats import BridgeStats
from deisa.ray._transport.limits import human_bytes

SHOWN_ROWS = 8  # of the bridges, and of the nodes, in text and HTML
SHOWN_NODE_ID = 12  # characters of Ray's 56
SHOWN_NAME = 40  # characters; a callback may be an object that only has its repr for a name

Cells = tuple[str | int, ...]
Table = Sequence[Sequence[str]]  # rows of cells, the first one is the head


@dataclass(frozen=True, slots=True)
class ArrayFigures:
    """What became of one array.

    Attributes
    ----------
    timesteps : int
        Complete timesteps.
    delivered : int
        Those among them for which at least one callback on this array ran, or was asked for by its trigger.
    bytes_handed_over : int
        Bytes of the complete timesteps.
    """

    timesteps: int
    delivered: int
    bytes_handed_over: int

    @property
    def skipped(self) -> int:
        """Complete timesteps for which no callback ran."""
        return self.timesteps - self.delivered


@dataclass(frozen=True, slots=True)
class TriggerFigures:
    """What the trigger of one callback did.

    Attributes
    ----------
    name : str
    evaluated : int
        Evaluations, failed ones included.
    fired : int
        Those that were true.
    failures : int
        Those that raised.
    total_s, longest_s : float
        Time of all evaluations, and of the longest one (seconds).
    """

    name: str
    evaluated: int
    fired: int
    failures: int
    total_s: float
    longest_s: float

    @property
    def mean_s(self) -> float:
        """Time of an evaluation on average (seconds); 0 when there was none."""
        return self.total_s / self.evaluated if self.evaluated else 0.0


@dataclass(frozen=True, slots=True)
class CallbackFigures:
    """What one registered callback did.

    Attributes
    ----------
    name : str
        Not always unique: a function can be registered twice.
    calls : int
        Calls, failed ones included.
    failures : int
        Calls that raised.
    total_s, longest_s : float
        Time of all calls, and of the longest one (seconds), with what their exception handlers took.
    trigger : TriggerFigures or None
        What its trigger did, if it has one.
    """

    name: str
    calls: int
    failures: int
    total_s: float
    longest_s: float
    trigger: TriggerFigures | None = None

    @property
    def mean_s(self) -> float:
        """Time of a call on average (seconds); 0 when there was none."""
        return self.total_s / self.calls if self.calls else 0.0


def failures_of(callbacks: Iterable[CallbackFigures]) -> str:
    """Say in one line which callbacks and triggers failed how often; empty where none did."""
    said = []
    for callback in callbacks:
        what, trigger = f"callback {_name(callback.name)!r}", callback.trigger
        if callback.failures:
            said.append(f"{what} failed {callback.failures} of {callback.calls} times")
        if trigger is not None and trigger.failures:
            said.append(f"the trigger of {what} failed {trigger.failures} of {trigger.evaluated} times")
    return ", ".join(said)


@dataclass(frozen=True, slots=True)
class ComputationFigures:
    """What the callbacks computed with Dask.

    Attributes
    ----------
    graphs, reused_plans : int
        Graphs computed or persisted, and those among them for which a plan was there already.
    planning_s : float
        Time of the analytics from getting a graph to its last bundle being submitted (seconds). With
        ``engine="local"`` a bundle runs when it is submitted, so this contains `run_s`.
    waiting_s : float
        Time of the analytics spent waiting for results and fetching them (seconds).
    bundles : int
        Bundles submitted.
    run_s : float
        Time in which bundles ran (seconds), all nodes together. Bundles that raised, or are still running,
        count for nothing.
    moved_bytes : int
        Bytes of results that nodes, or the analytics, took from another node.
    """

    graphs: int
    reused_plans: int
    planning_s: float
    waiting_s: float
    bundles: int
    run_s: float
    moved_bytes: int


@dataclass(frozen=True, slots=True)
class FeedbackFigures:
    """What the analytics set for the simulation.

    Attributes
    ----------
    values : int
        Values that were set.
    too_late : mapping of str to int
        By key, those that were not, since a bridge had its answer already.
    """

    values: int = 0
    too_late: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of one run; one that ended in an error has those up to then.

    Prints as text, and as tables in a notebook. The first line says which callbacks failed how often, if any did.

    Attributes
    ----------
    arrays : mapping of str to ArrayFigures
        The arrays that a callback asked for.
    bridges : mapping of int to BridgeStats
        What each bridge handed over and how long ``send`` waited for slots, by bridge id; only bridges that
        closed in order, since they tell when they close.
    callbacks : tuple of CallbackFigures
        In the order of registration.
    computations : ComputationFigures
    bound_bytes : mapping of str to int
        Chunk memory reserved on each node.
    wall_s : float
        From the start of the simulation to the end of the run (seconds); 0 when it did not start.
    feedback : FeedbackFigures
        What ``Deisa.set`` has set, and what came too late.

    Examples
    --------
    >>> report = deisa.execute_callbacks()  # doctest: +SKIP
    >>> report.arrays["temperature"].skipped  # doctest: +SKIP
    0
    >>> max(stats.held_up_s for stats in report.bridges.values())  # doctest: +SKIP
    0.25
    """

    arrays: Mapping[str, ArrayFigures]
    bridges: Mapping[int, BridgeStats]
    callbacks: tuple[CallbackFigures, ...]
    computations: ComputationFigures
    bound_bytes: Mapping[str, int]
    wall_s: float
    feedback: FeedbackFigures = field(default_factory=FeedbackFigures)

    @property
    def timesteps(self) -> dict[str, int]:
        """Complete timesteps, by array."""
        return {name: array.timesteps for name, array in self.arrays.items()}

    @property
    def bytes_handed_over(self) -> dict[str, int]:
        """Bytes of the complete timesteps, by array."""
        return {name: array.bytes_handed_over for name, array in self.arrays.items()}

    @property
    def bytes_left_out(self) -> int:
        """Bytes that bridges sent and did not hand over, because no window asked for them."""
        return sum(stats.bytes_left_out for stats in self.bridges.values())

    @property
    def held_up_s(self) -> dict[int, float]:
        """Time each bridge spent in ``send`` waiting for a slot (seconds), by bridge id."""
        return {bridge_id: stats.held_up_s for bridge_id, stats in self.bridges.items()}

    @property
    def callbacks_run(self) -> int:
        """Calls of all callbacks, failed ones included."""
        return sum(callback.calls for callback in self.callbacks)

    @property
    def callbacks_failed(self) -> int:
        """Calls of all callbacks that raised."""
        return sum(callback.failures for callback in self.callbacks)

    @property
    def callbacks_s(self) -> float:
        """Time spent in callbacks and their triggers (seconds)."""
        return sum(c.total_s + (c.trigger.total_s if c.trigger is not None else 0.0) for c in self.callbacks)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as dictionaries with str keys, lists, str and numbers."""
        return {
            "wall_s": self.wall_s,
            "arrays": {
                name: asdict(array) | {"skipped": array.skipped} for name, array in self.arrays.items()
            },
            "callbacks": [asdict(callback) | {"mean_s": callback.mean_s} for callback in self.callbacks],
            "computations": asdict(self.computations),
            "bridges": {str(bridge_id): asdict(stats) for bridge_id, stats in self.bridges.items()},
            "bound_bytes": dict(self.bound_bytes),
            "feedback": asdict(self.feedback),
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return "\n\n".join([self._summary(), *(_as_text(rows) for rows in self._tables())])

    def _repr_html_(self) -> str:
        tables = "\n".join(map(_as_html, self._tables()))
        return f"<div>\n<p>{escape(self._summary())}</p>\n{tables}\n</div>"

    def _summary(self) -> str:
        inside = self.callbacks_s
        outside = max(0.0, self.wall_s - inside)
        times = (
            f"{_seconds(self.wall_s)}: {_seconds(inside)} in callbacks, {_seconds(outside)} outside of them"
        )
        if self.bytes_left_out:
            times += f"; {human_bytes(self.bytes_left_out)} that no window asked for were not copied"
        failures = failures_of(self.callbacks)
        return f"{failures}; {times}" if failures else times

    def _tables(self) -> Iterator[Table]:
        rows: list[Cells]
        if self.arrays:
            rows = [
                (_name(name), a.timesteps, a.delivered, a.skipped, human_bytes(a.bytes_handed_over))
                for name, a in self.arrays.items()
            ]
            yield _table(("array", "timesteps", "delivered", "skipped", "handed over"), rows)
        if self.callbacks:
            rows = [
                (_name(c.name), c.calls, c.failures, *map(_seconds, (c.total_s, c.mean_s, c.longest_s)))
                for c in self.callbacks
            ]
            yield _table(("callback", "calls", "failed", "total", "mean", "longest"), rows)
        if any(c.trigger is not None for c in self.callbacks):
            rows = [
                (
                    _name(c.name),
                    t.evaluated,
                    t.fired,
                    t.failures,
                    *map(_seconds, (t.total_s, t.mean_s, t.longest_s)),
                )
                for c in self.callbacks
                if (t := c.trigger) is not None
            ]
            yield _table(("trigger of", "evaluated", "fired", "failed", "total", "mean", "longest"), rows)
        done = self.computations
        if done.graphs:
            row = (
                done.graphs,
                done.reused_plans,
                _seconds(done.planning_s),
                _seconds(done.waiting_s),
                done.bundles,
                _seconds(done.run_s),
                human_bytes(done.moved_bytes),
            )
            head = ("graphs", "plans reused", "planning", "waiting", "bundles", "running", "moved")
            yield _table(head, [row])
        if self.bridges:
            yield _table(("bridge", "chunks", "handed over", "held up"), self._bridge_rows())
        if self.feedback.values or self.feedback.too_late:
            rows = [(self.feedback.values, sum(self.feedback.too_late.values()))]
            yield _table(("values set", "too late"), rows)
        if self.bound_bytes:
            yield _table(("node", "chunk memory"), self._node_rows())

    def _bridge_rows(self) -> Iterator[Cells]:
        """Those held up longest, and the others together."""
        ordered = sorted(self.bridges.items(), key=lambda item: -item[1].held_up_s)
        for bridge_id, stats in ordered[:SHOWN_ROWS]:
            yield bridge_id, stats.chunks, human_bytes(stats.bytes_handed_over), _seconds(stats.held_up_s)
        others = [stats for _, stats in ordered[SHOWN_ROWS:]]
        if others:
            yield (
                f"{len(others)} more",
                sum(stats.chunks for stats in others),
                human_bytes(sum(stats.bytes_handed_over for stats in others)),
                f"at most {_seconds(others[0].held_up_s)}",
            )

    def _node_rows(self) -> Iterator[Cells]:
        """Those with the most memory, and the others together."""
        ordered = sorted(self.bound_bytes.items(), key=lambda item: -item[1])
        for node_id, nbytes in ordered[:SHOWN_ROWS]:
            yield node_id[:SHOWN_NODE_ID], human_bytes(nbytes)
        others = [nbytes for _, nbytes in ordered[SHOWN_ROWS:]]
        if others:
            yield f"{len(others)} more", f"at most {human_bytes(others[0])}"


def _table(head: Cells, rows: Iterable[Cells]) -> Table:
    return [tuple(map(str, row)) for row in (head, *rows)]


def _name(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= SHOWN_NAME else f"{name[: SHOWN_NAME - 4]} ..."


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _as_text(rows: Table) -> str:
    """Columns next to each other, the first one flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _as_html(rows: Table) -> str:
    """One table, aligned as in the text."""

    def row(cells: Sequence[str], tag: str) -> str:
        sides = ["left"] + ["right"] * (len(cells) - 1)
        return "".join(
            f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )

    head, *body = rows
    lines = "\n".join(f"<tr>{row(cells, 'td')}</tr>" for cells in body)
    return f"<table>\n<thead><tr>{row(head, 'th')}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>"
