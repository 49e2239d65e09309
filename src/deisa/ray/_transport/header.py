"""The numbers of the protocol as a C header: ``python -m deisa.ray._transport.header`` writes it."""

from __future__ import annotations

import re
from pathlib import Path

from deisa.ray._transport import messages, pages
from deisa.ray._transport.codec import MAX_ITEMS
from deisa.ray.errors import MEMORY_MONITOR

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
        "PAGE_LAYOUT_VERSION": pages.LAYOUT_VERSION,
        "PAGE_MAGIC_SLOT_TABLE": _quoted(pages.SLOT_TABLE_MAGIC),
        "PAGE_MAGIC_ARRIVAL_COUNTERS": _quoted(pages.ARRIVAL_COUNTERS_MAGIC),
        "PAGE_MAGIC_SUBMISSION_RING": _quoted(pages.SUBMISSION_RING_MAGIC),
        "TEXT_MEMORY_MONITOR": _quoted(MEMORY_MONITOR),
    }
    lines = [_FIRST_LINE, "", "#ifndef DEISA_HANDOFF_PROTOCOL_H", "#define DEISA_HANDOFF_PROTOCOL_H", ""]
    lines += [f"#define {name} {value}" for name, value in numbers.items()]
    lines += ["", "enum {"]
    lines += [f"    MESSAGE_{_constant(cls.__name__)} = {code}," for code, cls in messages.MESSAGES.items()]
    lines += ["};", "", "#endif", ""]
    return "\n".join(lines)


def _constant(name: str) -> str:
    """Turn ``AnalyticsDown`` into ``ANALYTICS_DOWN``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()


def _quoted(text: str | bytes) -> str:
    text = text if isinstance(text, str) else text.decode()
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


if __name__ == "__main__":
    HEADER.write_text(header_text(), encoding="utf-8")
