"""What a run's figures look like, printed and as data."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, replace
from html.parser import HTMLParser

import pytest

from deisa.ray._state.stats import BridgeStats
from deisa.ray.report import (
    ArrayFigures,
    CallbackFigures,
    ComputationFigures,
    FeedbackFigures,
    Report,
    TriggerFigures,
)

REPORT = Report(
    arrays={"temperature": ArrayFigures(5, 5, 655_360), "pressure": ArrayFigures(3, 1, 393_216)},
    bridges={0: BridgeStats(8, 524_288, 0.5), 1: BridgeStats(8, 524_288, 1.25)},
    callbacks=(
        CallbackFigures("summary", 5, 1, 2.5, 1.5),
        CallbackFigures("summary", 1, 0, 0.004, 0.004),
        CallbackFigures("<lambda>", 0, 0, 0.0, 0.0),
    ),
    computations=ComputationFigures(6, 4, 0.25, 1.75, 12, 3.5, 2048),
    bound_bytes={"a" * 56: 1_048_576, "b" * 56: 2_097_152},
    wall_s=4.0,
)
NOTHING = Report({}, {}, (), ComputationFigures(0, 0, 0.0, 0.0, 0, 0.0, 0), {}, 0.0)


class Cells(HTMLParser):
    """The cells of each table row, and the names of all elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.elements: set[str] = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.elements.add(tag)
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1].append(data)


def test_what_follows_from_the_figures() -> None:
    assert REPORT.timesteps == {"temperature": 5, "pressure": 3}
    assert REPORT.bytes_handed_over == {"temperature": 655_360, "pressure": 393_216}
    assert [array.skipped for array in REPORT.arrays.values()] == [0, 2]
    assert REPORT.held_up_s == {0: 0.5, 1: 1.25}
    assert (REPORT.callbacks_run, REPORT.callbacks_failed, REPORT.callbacks_s) == (6, 1, 2.504)
    assert [callback.mean_s for callback in REPORT.callbacks] == [0.5, 0.004, 0.0]


def test_a_report_is_final() -> None:
    with pytest.raises(FrozenInstanceError):
        REPORT.wall_s = 1.0  # type: ignore[misc]


def test_text() -> None:
    assert (
        str(REPORT)
        == """\
callback 'summary' failed 1 of 5 times; 4.00 s: 2.50 s in callbacks, 1.50 s outside of them

array        timesteps  delivered  skipped  handed over
temperature          5          5        0    640.0 KiB
pressure             3          1        2    384.0 KiB

callback  calls  failed   total      mean  longest
summary       5       1  2.50 s  500.0 ms   1.50 s
summary       1       0  4.0 ms    4.0 ms   4.0 ms
<lambda>      0       0  0.0 ms    0.0 ms   0.0 ms

graphs  plans reused  planning  waiting  bundles  running    moved
6                  4  250.0 ms   1.75 s       12   3.50 s  2.0 KiB

bridge  chunks  handed over   held up
1            8    512.0 KiB    1.25 s
0            8    512.0 KiB  500.0 ms

node          chunk memory
bbbbbbbbbbbb       2.0 MiB
aaaaaaaaaaaa       1.0 MiB"""
    )


def test_text_and_html_show_the_same() -> None:
    cells = [cell for row in Cells(REPORT._repr_html_()).rows for cell in row]
    tables = str(REPORT).split("\n\n", 1)[1]
    printed = [cell for line in tables.splitlines() if line for cell in re.split(r" {2,}", line)]
    assert cells == printed


def test_the_first_line_says_which_callbacks_failed() -> None:
    failed = (CallbackFigures("vorticity", 21, 21, 2.5, 1.5), CallbackFigures("energy", 21, 2, 2.5, 1.5))
    first = "callback 'vorticity' failed 21 of 21 times, callback 'energy' failed 2 of 21 times; 4.00 s: "
    report = replace(REPORT, callbacks=failed)
    assert str(report).startswith(first)
    assert first.replace("'", "&#x27;") in report._repr_html_()


def test_triggers_have_a_table_of_their_own() -> None:
    trigger = TriggerFigures("hot", 20, 3, 1, 0.5, 0.25)
    rare = CallbackFigures("rare", 3, 0, 2.5, 1.5, trigger)
    report = replace(REPORT, callbacks=(*REPORT.callbacks, rare))
    assert report.callbacks_s == 2.504 + 2.5 + 0.5
    assert report.to_dict()["callbacks"][-1]["trigger"]["fired"] == 3
    tables = [[line.split() for line in table.splitlines()] for table in str(report).split("\n\n")]
    assert [
        ["trigger", "of", "evaluated", "fired", "failed", "total", "mean", "longest"],
        ["rare", "20", "3", "1", "500.0", "ms", "25.0", "ms", "250.0", "ms"],
    ] in tables
    failed = "callback 'summary' failed 1 of 5 times, the trigger of callback 'rare' failed 1 of 20 times; "
    assert str(report).startswith(failed)
    assert TriggerFigures("hot", 0, 0, 0, 0.0, 0.0).mean_s == 0


def test_nothing_to_show() -> None:
    assert str(NOTHING) == "0.0 ms: 0.0 ms in callbacks, 0.0 ms outside of them"
    assert Cells(NOTHING._repr_html_()).rows == []


def test_names_are_escaped() -> None:
    name = "<script>alert('&')</script>"
    report = replace(
        REPORT,
        arrays={name: ArrayFigures(1, 1, 8)},
        callbacks=(CallbackFigures(name, 1, 0, 1.0, 1.0),),
        bound_bytes={"<b>": 1},
    )
    html = report._repr_html_()
    cells = Cells(html)
    assert "<script" not in html
    assert cells.elements == {"div", "p", "table", "thead", "tbody", "tr", "th", "td"}
    first = [row[0] for row in cells.rows]
    assert first.count(name) == 2 and "<b>" in first


def test_html_needs_nothing_else() -> None:
    assert not re.search(r"https?:|<script|<link|<style|src=|href=", REPORT._repr_html_())


def test_a_long_name_keeps_to_its_line() -> None:
    name = "functools.partial(<function f>, array([[0., 0.],\n       [0., 0.]]))"
    report = replace(REPORT, callbacks=(CallbackFigures(name, 1, 0, 1.0, 1.0),))
    assert "\nfunctools.partial(<function f>, arra ...      1       0  1.00 s" in str(report)
    assert report.to_dict()["callbacks"][0]["name"] == name


def test_many_bridges_and_nodes_are_a_few_lines() -> None:
    report = replace(
        REPORT,
        bridges={b: BridgeStats(10, 1024, float(b)) for b in range(4096)},
        bound_bytes={f"node {n}": (n + 1) * 2**20 for n in range(64)},
    )
    text = str(report)
    assert len(text.splitlines()) < 40
    assert "\n4095           10      1.0 KiB          4095.00 s\n" in text
    assert "\n4088 more   40880      4.0 MiB  at most 4087.00 s\n" in text
    assert text.endswith("\n56 more  at most 56.0 MiB")


@pytest.mark.parametrize("report", [REPORT, NOTHING], ids=["full", "empty"])
def test_json_is_the_dictionary(report: Report) -> None:
    assert json.loads(report.to_json()) == report.to_dict()


def test_dictionary() -> None:
    assert REPORT.to_dict() == {
        "wall_s": 4.0,
        "arrays": {
            "temperature": {"timesteps": 5, "delivered": 5, "skipped": 0, "bytes_handed_over": 655_360},
            "pressure": {"timesteps": 3, "delivered": 1, "skipped": 2, "bytes_handed_over": 393_216},
        },
        "callbacks": [
            {
                "name": "summary",
                "calls": 5,
                "failures": 1,
                "total_s": 2.5,
                "mean_s": 0.5,
                "longest_s": 1.5,
                "trigger": None,
            },
            {
                "name": "summary",
                "calls": 1,
                "failures": 0,
                "total_s": 0.004,
                "mean_s": 0.004,
                "longest_s": 0.004,
                "trigger": None,
            },
            {
                "name": "<lambda>",
                "calls": 0,
                "failures": 0,
                "total_s": 0.0,
                "mean_s": 0.0,
                "longest_s": 0.0,
                "trigger": None,
            },
        ],
        "computations": {
            "graphs": 6,
            "reused_plans": 4,
            "planning_s": 0.25,
            "waiting_s": 1.75,
            "bundles": 12,
            "run_s": 3.5,
            "moved_bytes": 2048,
        },
        "bridges": {
            "0": {"chunks": 8, "bytes_handed_over": 524_288, "held_up_s": 0.5, "bytes_left_out": 0},
            "1": {"chunks": 8, "bytes_handed_over": 524_288, "held_up_s": 1.25, "bytes_left_out": 0},
        },
        "bound_bytes": {"a" * 56: 1_048_576, "b" * 56: 2_097_152},
        "feedback": {"values": 0, "too_late": {}},
    }


def test_values_that_were_set_for_the_simulation() -> None:
    report = replace(NOTHING, feedback=FeedbackFigures(7, {"feed": 2, "stop": 1}))
    assert "values set  too late\n7                  3" in str(report)
    assert "too late" not in str(NOTHING)
    assert json.loads(report.to_json())["feedback"] == {"values": 7, "too_late": {"feed": 2, "stop": 1}}
