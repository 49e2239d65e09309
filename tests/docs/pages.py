"""Code blocks of documentation pages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@dataclass(frozen=True)
class Block:
    """A code block of a Markdown page, and the output printed below it, if any."""

    page: str
    heading: str
    number: int
    code: str
    output: str | None

    def __str__(self) -> str:
        return f"{self.page}-{self.number}-{re.sub('[^a-z]+', '-', self.heading.lower()).strip('-')}"


def python_blocks(path: Path) -> list[Block]:
    pattern = re.compile(r"^```(\w+)\n(.*?)^```$|^#+ ([^\n]+)$", re.MULTILINE | re.DOTALL)
    heading, fences = "", []
    for match in pattern.finditer(path.read_text()):
        if match[3]:
            heading = match[3]
        elif match[1] != "console":  # the command that runs the block above
            fences.append((heading, match[1], match[2]))
    blocks: list[Block] = []
    for number, (title, language, code) in enumerate(fences):
        if language == "python":
            below = fences[number + 1] if number + 1 < len(fences) else ("", "", "")
            output = below[2] if below[:2] == (title, "text") else None
            blocks.append(Block(path.stem, title, len(blocks), code, output))
    assert blocks, f"no Python in {path}"
    return blocks


def named_block(path: Path, name: str) -> str:
    """A code block of a reStructuredText page, by its name."""
    match = re.search(
        rf"^\.\. code-block:: \w+\n   :name: {name}\n\n((?:   .*\n|\n)+)", path.read_text(), re.M
    )
    assert match, f"no block {name} in {path}"
    return re.sub("^   ", "", match[1], flags=re.M).strip("\n") + "\n"


def replaced(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{text.count(old)} times, not once: {old!r}"
    return text.replace(old, new)


def patched(text: str, diff: str) -> str:
    """Apply a diff that has only removed lines, each group followed by those that take its place."""
    for group in re.finditer(r"((?:^-.*\n)+)((?:^\+.*\n)+)", diff, re.M):
        removed, added = (re.sub("^[-+]", "", lines, flags=re.M) for lines in group.groups())
        text = replaced(text, removed, added)
    return text
