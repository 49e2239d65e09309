"""The protocol is stated once: its document and the C header say what the code does."""

from __future__ import annotations

import dataclasses
import math
import re
import struct
import types
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import numpy as np
import pytest

from deisa.ray._state import values
from deisa.ray._state.feedback import MAX_ASKED_KEYS, MAX_KEYS
from deisa.ray._state.questions import MAX_KEY_BYTES
from deisa.ray._transport import feedback, messages, pages
from deisa.ray._transport.codec import MAX_ITEMS, Natural, Numbers, fields_of
from deisa.ray._transport.descriptors import MAX_DESCRIPTORS
from deisa.ray._transport.header import HEADER, header_text

DOCUMENT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
Row = tuple[str, ...]


def tables(*titles: str) -> list[Row]:
    """The rows of all tables of the document whose columns have these titles."""
    rows: list[Row] = []
    for table in re.findall(r"(?:^\|.*\|\n)+", DOCUMENT, re.MULTILINE):
        head, _, *body = (
            tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()
        )
        if head == titles:
            rows += body
    assert rows, f"no table has the columns {titles}"
    return rows


def section(title: str) -> str:
    """What stands below a heading, up to the next one."""
    match = re.search(rf"^#+ {title}\n(.*?)(?=^#|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert match, f"no section {title}"
    return match[1]


def name_of(kind: Any) -> str:
    """A field's type, as the document writes it."""
    plain = {
        int: "int", Natural: "natural", float: "float", str: "text", bytes: "bytes", np.dtype: "dtype", Any: "value",
        values.Encoded: "value",
    }  # fmt: skip
    origin, arguments = get_origin(kind), get_args(kind)
    if kind in plain:
        return plain[kind]
    if dataclasses.is_dataclass(kind):
        return kind.__name__
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return f"{name_of(inner)}?"
    if origin is tuple:
        return f"{name_of(arguments[0])}[]"
    if origin is dict:
        return f"{{{name_of(arguments[0])}: {name_of(arguments[1])}}}"
    assert origin is Annotated and isinstance(arguments[1], Numbers), kind
    return "Event"


def fields(kind: type) -> str:
    return ", ".join(f"{name}: {name_of(field)}" for name, field in fields_of(kind).items())


def structures(*kinds: type) -> set[type]:
    """The dataclasses that fields of these have, and their own."""
    found: set[type] = set()
    waiting: list[Any] = [field for kind in kinds for field in fields_of(kind).values()]
    while waiting:
        kind = waiting.pop()
        if dataclasses.is_dataclass(kind) and kind not in found:
            found.add(kind)  # type: ignore[arg-type]
            waiting += fields_of(kind).values()  # type: ignore[arg-type]
        waiting += [argument for argument in get_args(kind) if not isinstance(argument, Numbers)]
    return found


def numbered_events() -> dict[int, type]:
    return get_args(messages.NumberedEvent)[1].kinds


def test_messages_are_as_the_document_says() -> None:
    said = tables("code", "message", "fields")
    assert sorted(said, key=lambda row: int(row[0])) == [
        (str(code), f"`{cls.__name__}`", fields(cls)) for code, cls in sorted(messages.MESSAGES.items())
    ]


def test_structures_are_as_the_document_says() -> None:
    kinds = structures(*messages.MESSAGES.values()) - set(numbered_events().values())
    assert dict(tables("structure", "fields")) == {f"`{kind.__name__}`": fields(kind) for kind in kinds}
    assert len(tables("structure", "fields")) == len(kinds)


def test_events_are_as_the_document_says() -> None:
    assert tables("number", "event", "fields") == [
        (str(number), f"`{kind.__name__}`", fields(kind)) for number, kind in numbered_events().items()
    ]


def test_every_type_of_a_field_is_explained() -> None:
    explained = {row[0].strip("`").split("`")[0] for row in tables("type", "bytes")}
    assert explained == {
        "int", "natural", "float", "text", "bytes", "X?", "X[]", "{X: Y}", "Name", "dtype", "value",
    }  # fmt: skip


def test_values_have_the_tags_that_the_document_says() -> None:
    kinds = {
        "nothing (Python's `None`)": None,
        "truth value": True,
        "integer": 1,
        "real number": 1.0,
        "complex number": 1j,
        "text": "",
        "bytes": b"",
        "list": [],
        "dictionary": {},
        "array": np.arange(3),
    }
    said = tables("tag", "value", "bytes after the tag")
    assert [(int(tag), value) for tag, value, _ in said] == [
        (values.encode_value(value)[0], name) for name, value in kinds.items()
    ]


def test_limits_are_as_the_document_says() -> None:
    assert values.MAX_VALUE_DIMENSIONS == messages.MAX_DIMENSIONS
    assert tables("limit", "at most") == [
        ("length of a message, in bytes", f"{messages.MAX_MESSAGE_BYTES:,}"),
        ("items of an `X[]`, pairs of an `{X: Y}`", f"{MAX_ITEMS:,}"),
        ("descriptors of a message", f"{MAX_DESCRIPTORS:,}"),
        ("dimensions of a chunk, and of an array in a `value`", f"{messages.MAX_DIMENSIONS:,}"),
        ("depth of lists and dictionaries in a `value`", f"{values.MAX_VALUE_DEPTH:,}"),
        ("items and pairs of all lists and dictionaries in a `value`", f"{values.MAX_VALUE_ITEMS:,}"),
        ("memory limits of a process", f"{messages.MAX_LIMITS:,}"),
        ("characters of a `reason`, and of a `path`", f"{messages.MAX_TEXT:,}"),
        ("callbacks of an analytics", f"{messages.MAX_CALLBACKS:,}"),
    ]


def test_versions_are_as_the_document_says() -> None:
    assert f"The version is {messages.PROTOCOL_VERSION}." in " ".join(DOCUMENT.split())
    assert f"`version` is {messages.PROTOCOL_VERSION}." in DOCUMENT
    assert f"| {pages.VERSION} | version of the layout: {pages.LAYOUT_VERSION} |" in DOCUMENT


def test_no_time_is_written_as_the_document_says() -> None:
    assert f"0x{pages.NO_TIME:X} (a NaN) where none is given" in DOCUMENT
    assert math.isnan(struct.unpack("<d", pages.NO_TIME.to_bytes(8, "little"))[0])


def test_magic_is_as_the_document_says() -> None:
    assert [row[:2] for row in tables("page", "magic (bytes in memory)", "who writes")] == [
        ("slot table", f"`{pages.SLOT_TABLE_MAGIC.decode()}`"),
        ("arrival counters", f"`{pages.ARRIVAL_COUNTERS_MAGIC.decode()}`"),
        ("submission ring", f"`{pages.SUBMISSION_RING_MAGIC.decode()}`"),
        ("feedback page", f"`{feedback.FEEDBACK_MAGIC.decode()}`"),
        ("questions page", f"`{feedback.QUESTIONS_MAGIC.decode()}`"),
    ]


def words(title: str, column: str = "word") -> dict[str, str]:
    """The words of a table in a section, by name."""
    rows = re.findall(rf"^\| {column} \| what \|\n\|.*\n((?:\|.*\n)+)", section(title), re.MULTILINE)
    lines = "".join(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {what.split(":")[0].split(" of ")[0]: word for word, what in cells}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (
            words("Pages"),
            {
                "magic": pages.MAGIC,
                "version": pages.VERSION,
                "first": pages.FIRST,
                "in use": pages.IN_USE,
                "for each page, see below; else 0": f"{pages.IN_USE + 1} to {pages.HEADER_WORDS - 1}",
            },
        ),
        (
            words("The slot table", "word of the row"),
            {"granted": pages.GRANTED, "wake": pages.WAKE, "slot": f"{pages.FIRST_SLOT} + n % K"},
        ),
        (
            words("The submission ring"),
            {
                "capacity": pages.CAPACITY,
                "submitted": pages.SUBMITTED,
                "passed": pages.PASSED,
                "blocked": pages.BLOCKED,
                **{
                    f"entry n, {what}": f"{pages.HEADER_WORDS + word} + {pages.ENTRY_WORDS} * (n % capacity)"
                    for what, word in (
                        ("region", pages.ENTRY_REGION),
                        ("timestep", pages.ENTRY_TIMESTEP),
                        ("rows", pages.ENTRY_ROWS),
                        ("time", pages.ENTRY_TIME),
                    )
                },
            },
        ),
        (words("The arrival counters"), {"notified": pages.NOTIFIED}),
        (
            words("The arrival counters", "word of the entry"),
            {"whole": pages.COUNTER_WHOLE, "passed": pages.COUNTER_PASSED},
        ),
        (
            words("Steering"),
            {
                "changes": feedback.CHANGES,
                "wake": feedback.FEEDBACK_WAKE,
                "finished": feedback.FINISHED_WITH,
                "rows": feedback.ROWS,
                "closed key": feedback.CLOSED_KEY,
                "closed timestep": feedback.CLOSED_TIMESTEP,
                "queue size": feedback.QUEUE_SIZE,
                "values": feedback.VALUES,
                "first row": feedback.FIRST_ROW,
                "waited": feedback.WAITED,
            },
        ),
        (
            words("Steering", "word of the row"),
            {
                "hash": feedback.KEY_HASH,
                "dropped": feedback.KEY_DROPPED,
                "count": feedback.KEY_COUNT,
                "length": feedback.KEY_LENGTH,
                "bytes": feedback.KEY_BYTES,
                "entries": feedback.KEY_ENTRIES,
            },
        ),
        (
            words("Steering", "word of the value's entry"),
            {
                "timestep": feedback.VALUE_TIMESTEP,
                "first": feedback.VALUE_FIRST,
                "length": feedback.VALUE_LENGTH,
            },
        ),
        (
            words("Steering", "word of the question's entry"),
            {"hash": feedback.ASKED_HASH, "asked": feedback.ASKED_TIMESTEP},
        ),
    ],
    ids=[
        *("header", "slot table", "submission ring", "arrival counters", "entry of the arrival counters"),
        *("feedback and questions pages", "row of a key", "entry of a value", "entry of a question"),
    ],
)
def test_words_of_pages_are_as_the_document_says(said: dict[str, str], meant: dict[str, Any]) -> None:
    assert said == {name: str(word) for name, word in meant.items()}


def test_headers_and_entries_have_the_size_that_the_document_says() -> None:
    assert f"Each page starts with a header of {pages.HEADER_WORDS} words:" in DOCUMENT
    assert f"where the rows or entries start: {pages.HEADER_WORDS} |" in DOCUMENT
    numbers = {1: "one", 2: "two", 3: "three"}
    assert f"the number of rows, {MAX_KEYS} |" in DOCUMENT
    assert (
        f"takes {feedback.KEY_ENTRIES} words and {numbers[feedback.VALUE_WORDS]} for each entry" in DOCUMENT
    )
    assert f"A row has {MAX_ASKED_KEYS} entries of {numbers[feedback.ASKED_WORDS]} words" in DOCUMENT
    assert f"a key (1 to {MAX_KEY_BYTES} bytes" in DOCUMENT
    assert f"has an entry of {numbers[pages.COUNTER_WORDS]} words for each bridge" in DOCUMENT


def test_the_c_header_has_the_numbers_of_the_protocol() -> None:
    assert HEADER.read_text() == header_text(), "python -m deisa.ray._transport.header writes it anew"
