"""What a graph's tasks are made of: Dask's and NumPy's own functions, or code of the user.

A task is *pure* if everything in it is known to compute the same from the same inputs, and to touch nothing
else: functions of the libraries below that neither draw random numbers nor read or write files, plain values, and
arrays, which those functions only read. Two things may be done with pure tasks only:

- A worker process keeps them unpacked and runs them again. Objects with state (a random generator, a
  dictionary that a function closes over) would carry that state from timestep to timestep.
- They may run in the process of the analytics. User code would see other globals, variables and directories there.

Whatever is not known counts as user code. That costs time, never a wrong value.
"""

from __future__ import annotations

import copyreg
import functools
import io
import sys
import types
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np

from deisa.ray._graph._dask import STORE_FUNCTIONS, STORE_MODULE, GraphNode, TaskRef, methodcaller

_LIBRARIES = ("dask", "numpy", "scipy", "toolz", "cytoolz", "tlz", "xarray", "deisa.ray")
_STANDARD = (
    "_operator",
    "operator",
    "functools",
    "itertools",
    "math",
    "cmath",
    "datetime",
    "decimal",
    "fractions",
)
_EFFECTS = (  # modules of these libraries that draw random numbers, or read and write files
    "numpy.random",
    "numpy.lib.npyio",
    "numpy.lib._npyio_impl",
    "numpy.lib.format",
    "numpy.lib._datasource",
    "scipy.io",
    "scipy.stats",
    "xarray.backends",
    "dask.array.random",
    "dask.array.tiledb_io",
    "dask.bag",
    "dask.bytes",
    "dask.dataframe",
    "dask.diagnostics",
    "deisa.ray._files",
)
_EFFECT_NAMES = {  # functions and classes elsewhere in them that do
    "numpy": {
        "save", "savez", "savez_compressed", "savetxt", "load", "loadtxt", "genfromtxt", "fromfile", "fromregex",
        "memmap", "frompyfunc", "seterr", "seterrcall", "set_printoptions",
    },
    STORE_MODULE: {*STORE_FUNCTIONS},
}  # fmt: skip
_METHODS = {  # of arrays, which `methodcaller` may call
    "all", "any", "astype", "clip", "conj", "copy", "cumprod", "cumsum", "diagonal", "dot", "flatten", "max", "mean",
    "min", "nonzero", "prod", "ravel", "repeat", "reshape", "round", "squeeze", "std", "sum", "swapaxes", "take",
    "trace", "transpose", "var", "view",
}  # fmt: skip
_BUILTINS = {
    "abs", "all", "any", "bool", "bytes", "complex", "dict", "divmod", "ellipsis", "enumerate", "float", "frozenset",
    "int", "len", "list", "max", "min", "NoneType", "object", "pow", "range", "reversed", "round", "set", "slice",
    "sorted", "str", "sum", "tuple", "type", "zip",
}  # fmt: skip
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type(np.sum))
_VALUES = (slice, range, complex, np.generic, np.dtype, type(Ellipsis), type(NotImplemented))


def is_in(module: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of some packages, or lies in one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


@functools.lru_cache(maxsize=4096)
def _is_known(module: str | None, name: str) -> bool:
    """Whether the function or class of that name only computes."""
    if module == "builtins":
        return name in _BUILTINS
    if not module or name in _EFFECT_NAMES.get(module, ()):
        return False
    return is_in(module, _STANDARD) or (is_in(module, _LIBRARIES) and not is_in(module, _EFFECTS))


def is_pure(thing: Any) -> bool:
    """Whether one object, apart from what it refers to, is known to have no state and no effects."""
    if isinstance(thing, (GraphNode, TaskRef, functools.partial, *_VALUES)):
        return True
    if isinstance(thing, type):
        return _is_known(thing.__module__, thing.__qualname__)
    if isinstance(thing, _FUNCTIONS):
        owner = getattr(thing, "__self__", None)
        if owner is not None and not isinstance(owner, types.ModuleType):
            return False  # a method of something
        module = getattr(thing, "__module__", None)
        if not _is_known(module, thing.__qualname__):
            return False
        return _found_by_name(str(module), thing.__qualname__) is thing
    if isinstance(thing, np.ufunc):  # one made of a Python function has a name of its own
        return getattr(np, thing.__name__, None) is thing or _is_special(thing)
    if type(thing) is np.ndarray:
        return not thing.dtype.hasobject
    if isinstance(thing, methodcaller):
        return thing.method in _METHODS
    kind = type(thing)
    return _is_known(kind.__module__, kind.__qualname__)


def _found_by_name(module: str, name: str) -> Any:
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _is_special(function: np.ufunc) -> bool:
    special = sys.modules.get("scipy.special")
    return special is not None and getattr(special, function.__name__, None) is function


class WatchingPickler(cloudpickle.Pickler):
    """Pickles, and looks at everything on the way but plain containers, numbers and strings.

    Attributes
    ----------
    pure : bool
        Whether all of it is.
    modules : set of str
        Those that what is not pure comes from.
    """

    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=5)
        self.pure = True
        self.modules: set[str] = set()

    def reducer_override(self, obj: Any) -> Any:
        if not is_pure(obj):
            self.pure = False
            if isinstance(obj, types.ModuleType):
                self.modules.add(obj.__name__)
            elif isinstance(obj, (type, *_FUNCTIONS)):
                self.modules.add(str(obj.__module__))
        if type(obj) is np.vectorize:  # it keeps a ufunc of the last call, which cannot be pickled
            return copyreg.__newobj__, (np.vectorize,), vars(obj) | {"_ufunc": {}}  # type: ignore[attr-defined]
        return super().reducer_override(obj)


@dataclass(frozen=True, slots=True)
class Packed:
    """A pickled value, and what a `WatchingPickler` has seen."""

    data: bytes
    pure: bool
    modules: frozenset[str]


def pack(value: Any) -> Packed:
    """Pickle a value with everything it refers to.

    Raises
    ------
    Exception
        Whatever the pickling of some object raises.
    """
    buffer = io.BytesIO()
    pickler = WatchingPickler(buffer)
    pickler.dump(value)
    return Packed(buffer.getvalue(), pickler.pure, frozenset(pickler.modules))
