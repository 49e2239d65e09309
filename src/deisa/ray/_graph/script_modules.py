"""The script's own modules, which a worker process imports for itself.

A function of a module beside the script travels by its name. The worker's module has the values that the
file gives its globals, not those that the script has set since (``params.ALPHA = 10``), and the code that the file had
when the worker imported it. So what the script's modules hold travels along, as far as it is plain data, and
a module whose file and code have changed is loaded again. Modules that are installed are left alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import pickle
import site
import sys
import sysconfig
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deisa.ray.errors import TaskError

MOST_BYTES = 2**20  # of an array that travels
MOST_ITEMS, MOST_LEVELS = 1000, 4  # of a list or dictionary that travels
_ATOMS = (bool, int, float, complex, str, bytes, type(None), np.generic, slice, range)

_file_when_loaded: dict[str, tuple[int, int]] = {}  # in a worker: modification time and size, by module


@dataclass(frozen=True, slots=True)
class ModuleState:
    """What the script holds of one of its modules.

    Attributes
    ----------
    name : str
    values : bytes
        Its globals that are plain data, pickled.
    code : bytes
        A digest of its functions.
    """

    name: str
    values: bytes
    code: bytes

    @property
    def globals(self) -> Mapping[str, Any]:
        """New copies of the values."""
        return pickle.loads(self.values)


def states_of(modules: Iterable[str]) -> tuple[ModuleState, ...]:
    """Take down the script's own modules among some, and those that they import."""
    found: dict[str, ModuleState] = {}
    names = list(modules)
    while names:
        name = names.pop()
        module = sys.modules.get(name)
        if name in found or module is None or not is_scripts_own(module):
            continue
        own = {key: value for key, value in vars(module).items() if not key.startswith("__")}
        values = {key: value for key, value in own.items() if _is_plain(value)}
        found[name] = ModuleState(name, pickle.dumps(values, protocol=5), _code_of(module))
        names += [value.__name__ for value in own.values() if isinstance(value, types.ModuleType)]
        names += [
            str(value.__module__) for value in own.values() if isinstance(value, types.FunctionType | type)
        ]
    return tuple(found[name] for name in sorted(found))


@functools.cache
def _installed() -> tuple[str, ...]:
    places = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    places += [*site.getsitepackages(), site.getusersitepackages()]
    return tuple(os.path.realpath(place) + os.sep for place in places)


def is_scripts_own(module: types.ModuleType) -> bool:
    """Whether a module is neither installed nor the script itself, whose functions travel with all they refer to."""
    file = getattr(module, "__file__", None)
    if not file or module.__name__ == "__main__" or module.__name__.split(".")[0] == "deisa":
        return False
    return not os.path.realpath(file).startswith(_installed())


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a value is plain data, and not much of it."""
    if isinstance(value, _ATOMS):
        return True
    if type(value) is np.ndarray:
        return not value.dtype.hasobject and value.nbytes <= MOST_BYTES
    if (
        type(value) in (list, tuple, set, frozenset, dict)
        and len(value) <= MOST_ITEMS
        and depth < MOST_LEVELS
    ):
        items = value if type(value) is not dict else (item for pair in value.items() for item in pair)
        return all(_is_plain(item, depth + 1) for item in items)
    return False


def _code_of(module: types.ModuleType) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(vars(module).items(), key=lambda item: item[0]):
        functions = vars(value).values() if isinstance(value, type) else (value,)
        for function in functions:
            if isinstance(function, types.FunctionType) and function.__module__ == module.__name__:
                digest.update(f"{name}.{function.__name__}".encode())
                _add_code(digest, function.__code__)
    return digest.digest()


def _add_code(digest: Any, code: types.CodeType) -> None:
    digest.update(code.co_code)
    digest.update(repr((code.co_names, code.co_varnames)).encode())
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _add_code(digest, constant)
        elif not isinstance(constant, frozenset):  # which have no order
            digest.update(repr(constant).encode())


def bring_up_to_date(states: Iterable[ModuleState]) -> bool:
    """Give the modules that this process has imported the script's values; returns whether code was loaded again.

    Raises
    ------
    TaskError
        When a module's file has changed, and the script has not loaded it again.
    """
    loaded = False
    for state in states:
        module = sys.modules.get(state.name)
        if module is None:
            continue
        if _has_changed(module) and _code_of(module) != state.code:
            module = importlib.reload(module)
            loaded = True
            if _code_of(module) != state.code:
                raise TaskError(
                    f"the file of module {state.name!r} has changed since the script imported it: load it again with "
                    f"importlib.reload({state.name}), or start the script anew"
                )
        vars(module).update(state.globals)
    return loaded


def _has_changed(module: types.ModuleType) -> bool:
    """Whether a module's file is another one than when it was looked at first."""
    try:
        now = os.stat(str(module.__file__))
    except OSError:
        return False
    stamp = now.st_mtime_ns, now.st_size
    before = _file_when_loaded.setdefault(module.__name__, stamp)
    _file_when_loaded[module.__name__] = stamp
    return stamp != before
