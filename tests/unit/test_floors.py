"""`make floors` tests the releases that pyproject.toml names as the oldest."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
UNTESTED_EXTRAS = {"dev", "docs", "bench", "slider", "wheel"}


def test_the_constraints_are_the_floors() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].items()
    required = [
        *project["dependencies"],
        *(r for name, rs in extras if name not in UNTESTED_EXTRAS for r in rs),
    ]
    floors = {
        match[1]: match[2]
        for r in required
        if (match := re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", r)) is not None
    }
    pinned = dict(
        line.split("==") for line in (ROOT / "tests/floors.txt").read_text().splitlines() if "==" in line
    )

    def release(version: str) -> tuple[int, ...]:
        numbers = tuple(map(int, version.split(".")))
        return numbers + (0,) * (3 - len(numbers))

    assert {name: release(v) for name, v in pinned.items()} == {
        name: release(v) for name, v in floors.items()
    }
