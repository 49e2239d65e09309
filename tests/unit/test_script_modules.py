"""What a worker's modules are given of the script's."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from deisa.ray._graph.script_modules import bring_up_to_date, is_scripts_own, states_of
from deisa.ray.errors import TaskError


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], ModuleType]:
    """Write a module, and import it."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(name: str, text: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return write


def change(module: ModuleType, text: str) -> None:
    """Write another text into a module's file, which shows although the clock may not have gone on."""
    path = Path(str(module.__file__))
    path.write_text(text)
    os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 10**9))


def test_values_and_those_of_imported_modules_travel(make: Callable[[str, str], ModuleType]) -> None:
    inner = make("inner_of_test", "FACTOR = 2\nSIZES = [1, 2]\nimport threading\nLOCK = threading.Lock()\n")
    outer = make("outer_of_test", "import inner_of_test, numpy as np\nNAME = 'x'\nTABLE = np.arange(3)\n")
    inner.FACTOR, outer.NAME = 3, "y"  # type: ignore[attr-defined]
    inner.SIZES.append(3)
    lock = inner.LOCK
    states = states_of(["outer_of_test"])
    inner.FACTOR, outer.NAME = 0, ""  # type: ignore[attr-defined]
    inner.SIZES.clear()
    assert not bring_up_to_date(states)
    assert (inner.FACTOR, inner.SIZES, outer.NAME) == (3, [1, 2, 3], "y")
    np.testing.assert_array_equal(outer.TABLE, np.arange(3))
    assert inner.LOCK is lock
    inner.SIZES.append(4)
    bring_up_to_date(states)
    assert inner.SIZES == [1, 2, 3]


def test_installed_modules_are_left_alone() -> None:
    assert not states_of(["numpy", "json", "pytest", "deisa.ray.types", "__main__", "sys", "not.there"])
    assert not is_scripts_own(np)


def test_a_module_that_was_loaded_again(make: Callable[[str, str], ModuleType]) -> None:
    module = make("edited_of_test", "def f():\n    return 1\n")
    bring_up_to_date(states_of(["edited_of_test"]))  # as a worker that has used it
    change(module, "def f():\n    return 1000\n")
    old = states_of(["edited_of_test"])
    importlib.reload(module)
    new = states_of(["edited_of_test"])
    module.f.__code__ = compile("def f():\n    return 1\n", "x", "exec").co_consts[0]  # as the worker has it
    assert bring_up_to_date(new)
    assert module.f() == 1000
    change(module, "def f():\n    return 2000\n")
    with pytest.raises(TaskError, match=r"edited_of_test.*has changed.*importlib\.reload"):
        bring_up_to_date(old)
