"""The numbers of the protocol as a C header: ``python -m deisa.ray._transport.header`` writes it."""

from __future__ import annotations

import re
from pathlib import Path

from deisa.ray._state import values
from deisa.ray._state.descriptions import MAX_DIMENSIONS
from deisa.ray._state.feedback import MAX_ASKED_KEYS, MAX_KEYS
from deisa.ray._state.questions import MAX_KEY_BYTES
from deisa.ray._transport import feedback, messages, pages
from deisa.ray._transport.codec import MAX_ITEMS
from deisa.ray._transport.descriptors import MAX_DESCRIPTORS
from deisa.ray.config import MAX_QUEUE_SIZE

HEADER = Path(__file__).parent.parent / "_handoff" / "protocol.h"
_FIRST_LINE = (
    "/* Numbers of the protocol. Written by `python -m deisa.ray._transport.header`; do not edit. */"
)


def header_text() -> str:
    """Write the header."""
    numbers = {
        "PROTOCOL_VERSION": messages.PROTOCOL_VERSION,
        "PROTOCOL_MAX_MESSAGE_BYTES": messages.MAX_MESSAGE_BYTES,
        "PROTOCOL_MAX_ITEMS": MAX_ITEMS,
        "PROTOCOL_MAX_TEXT": messages.MAX_TEXT,
        "PROTOCOL_MAX_DIMENSIONS": MAX_DIMENSIONS,
        "PROTOCOL_MAX_LIMITS": messages.MAX_LIMITS,
        "PROTOCOL_MAX_DESCRIPTORS": MAX_DESCRIPTORS,
        "PAGE_LAYOUT_VERSION": pages.LAYOUT_VERSION,
        "PAGE_NO_TIME": f"INT64_C(0x{pages.NO_TIME:X})",
        "PAGE_MAGIC_SLOT_TABLE": _quoted(pages.SLOT_TABLE_MAGIC),
        "PAGE_MAGIC_ARRIVAL_COUNTERS": _quoted(pages.ARRIVAL_COUNTERS_MAGIC),
        "PAGE_MAGIC_SUBMISSION_RING": _quoted(pages.SUBMISSION_RING_MAGIC),
        "PAGE_MAGIC_FEEDBACK": _quoted(feedback.FEEDBACK_MAGIC),
        "PAGE_MAGIC_QUESTIONS": _quoted(feedback.QUESTIONS_MAGIC),
        "FEEDBACK_MAX_KEYS": MAX_KEYS,
        "FEEDBACK_MAX_ASKED_KEYS": MAX_ASKED_KEYS,
        "FEEDBACK_MAX_KEY_BYTES": MAX_KEY_BYTES,
        "FEEDBACK_MAX_QUEUE_SIZE": MAX_QUEUE_SIZE,
    }
    header = {
        "MAGIC": pages.MAGIC,
        "VERSION": pages.VERSION,
        "FIRST": pages.FIRST,
        "IN_USE": pages.IN_USE,
        "HEADER_WORDS": pages.HEADER_WORDS,
    }
    row = {"GRANTED": pages.GRANTED, "WAKE": pages.WAKE, "SLOTS": pages.FIRST_SLOT}
    entry = {"WHOLE": pages.COUNTER_WHOLE, "PASSED": pages.COUNTER_PASSED, "WORDS": pages.COUNTER_WORDS}
    ring = {
        "CAPACITY": pages.CAPACITY,
        "SUBMITTED": pages.SUBMITTED,
        "PASSED": pages.PASSED,
        "BLOCKED": pages.BLOCKED,
        "ENTRIES": pages.HEADER_WORDS,
    }
    ring_entry = {
        "REGION": pages.ENTRY_REGION,
        "TIMESTEP": pages.ENTRY_TIMESTEP,
        "ROWS": pages.ENTRY_ROWS,
        "TIME": pages.ENTRY_TIME,
        "WORDS": pages.ENTRY_WORDS,
    }
    feedback_page = {
        "CHANGES": feedback.CHANGES,
        "WAKE": feedback.FEEDBACK_WAKE,
        "FINISHED": feedback.FINISHED_WITH,
        "ROWS": feedback.ROWS,
        "CLOSED_KEY": feedback.CLOSED_KEY,
        "CLOSED_TIMESTEP": feedback.CLOSED_TIMESTEP,
        "QUEUE_SIZE": feedback.QUEUE_SIZE,
        "VALUES": feedback.VALUES,
        "FIRST_ROW": feedback.FIRST_ROW,
    }
    key = {
        "HASH": feedback.KEY_HASH,
        "DROPPED": feedback.KEY_DROPPED,
        "COUNT": feedback.KEY_COUNT,
        "LENGTH": feedback.KEY_LENGTH,
        "BYTES": feedback.KEY_BYTES,
        "ENTRIES": feedback.KEY_ENTRIES,
    }
    answer = {
        "TIMESTEP": feedback.VALUE_TIMESTEP,
        "FIRST": feedback.VALUE_FIRST,
        "LENGTH": feedback.VALUE_LENGTH,
        "WORDS": feedback.VALUE_WORDS,
    }
    asked = {
        "HASH": feedback.ASKED_HASH,
        "TIMESTEP": feedback.ASKED_TIMESTEP,
        "WORDS": feedback.ASKED_WORDS,
    }
    codes = {_constant(cls.__name__): code for code, cls in messages.MESSAGES.items()}
    lines = [_FIRST_LINE, "", "#ifndef DEISA_HANDOFF_PROTOCOL_H", "#define DEISA_HANDOFF_PROTOCOL_H", ""]
    lines += [f"#define {name} {value}" for name, value in numbers.items()]
    lines += _enum("Codes of messages.", "MESSAGE", codes)
    lines += _enum("Tags of values.", "VALUE", dict(values.TAGS))
    lines += _enum("Words of the header of every page.", "PAGE", header)
    lines += _enum("Words of a row of the slot table.", "TABLE", row)
    lines += _enum("Words of the header of the arrival counters.", "COUNTERS", {"NOTIFIED": pages.NOTIFIED})
    lines += _enum("Words of an entry of the arrival counters.", "ENTRY", entry)
    lines += _enum("Words of the submission ring.", "RING", ring)
    lines += _enum("Words of an entry of the submission ring.", "RING_ENTRY", ring_entry)
    lines += _enum("Words of the feedback page.", "FEEDBACK", feedback_page)
    lines += _enum("Words of a key's row there.", "KEY", key)
    lines += _enum("Words of a value's entry in such a row.", "ANSWER", answer)
    lines += _enum("Words of the header of the questions page.", "QUESTIONS", {"WAITED": feedback.WAITED})
    lines += _enum("Words of an entry of a bridge's row there.", "ASKED", asked)
    return "\n".join([*lines, "", "#endif", ""])


def _enum(what: str, prefix: str, numbers: dict[str, int]) -> list[str]:
    return [
        "",
        f"/* {what} */",
        "enum {",
        *(f"    {prefix}_{name} = {number}," for name, number in numbers.items()),
        "};",
    ]


def _constant(name: str) -> str:
    """Turn ``AnalyticsDown`` into ``ANALYTICS_DOWN``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()


def _quoted(text: str | bytes) -> str:
    text = text if isinstance(text, str) else text.decode()
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


if __name__ == "__main__":
    HEADER.write_text(header_text(), encoding="utf-8")
