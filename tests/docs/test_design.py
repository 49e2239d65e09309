"""The page about the design names the files that there are, and explains words that the code uses."""

from __future__ import annotations

import re

from tests.docs.pages import DOCS, ROOT

PAGE = (DOCS / "design.md").read_text()
SOURCES = ROOT / "src" / "deisa" / "ray"


def test_every_file_has_its_line() -> None:
    listing = PAGE[PAGE.index("src/deisa/ray/\n") :].split("```")[0]
    folder, named = "", []
    for line in listing.splitlines()[1:]:
        name = line.split("  ")[1 if line.startswith("  ") and not line.startswith("    ") else 2].strip()
        if name.endswith("/"):
            folder = name
        else:
            named += [(folder if line.startswith("    ") else "") + part for part in name.split()]
    there = {
        str(path.relative_to(SOURCES))
        for path in SOURCES.rglob("*")
        if path.suffix in (".py", ".pyi", ".c", ".h") and path.name != "__init__.py"
    }
    assert sorted(named) == sorted(there)


def test_the_glossary_has_the_words_of_the_code() -> None:
    words = [
        word.strip()
        for line in re.findall(r"^(.+)\n: ", PAGE[PAGE.index("## Glossary") :], re.MULTILINE)
        for word in line.split(",")
    ]
    assert len(words) == len(set(words)) > 30
    code = " ".join(path.read_text() for path in SOURCES.rglob("*.py")).lower()
    code = re.sub(r"\s+", " ", code)
    assert [word for word in words if word not in code] == []
