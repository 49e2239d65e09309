"""What callbacks are registered on and what they are given: windows and arrays."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask._expr import Expr, HLGExpr
from numpy.lib.mixins import NDArrayOperatorsMixin

from deisa.ray.errors import WindowError


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """The last `window_size` timesteps of an array.

    Parameters
    ----------
    name : str
        The array's name in the bridges' ``arrays_metadata``.
    window_size : int, default 1
        Timesteps, at least 1.

    Raises
    ------
    WindowError
    """

    name: str
    window_size: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise WindowError(f"a window needs the name of an array, got {self.name!r}")
        try:
            size = operator.index(self.window_size)
        except TypeError as exc:
            raise WindowError(
                f"window of {self.name!r}: size must be an integer, got {self.window_size!r}"
            ) from exc
        if size < 1:
            raise WindowError(f"window of {self.name!r}: size is {size}, it must be at least 1")
        object.__setattr__(self, "window_size", size)


class Window(NamedTuple):
    """The same as `WindowSpec`, as ``deisa-core`` spells it: ``Window("temperature", 3)``."""

    name: str
    size: int = 1


def window_spec(window: object) -> WindowSpec:
    """Read a window in any of its spellings: `WindowSpec`, ``Window`` (also deisa-core's), or a plain name.

    Raises
    ------
    WindowError
    """
    if isinstance(window, WindowSpec):
        return window
    if isinstance(window, str):
        return WindowSpec(window)
    name, size = getattr(window, "name", None), getattr(window, "size", None)
    if name is None or size is None:
        raise WindowError(f"expected an array name, a Window or a WindowSpec, got {window!r}")
    return WindowSpec(name, size)


class DeisaArray(NDArrayOperatorsMixin):
    """A whole global array at one timestep.

    It can be used as the Dask array it holds: methods, operators, NumPy functions and slicing
    all give ordinary Dask arrays. Functions of ``dask.array`` that look for Dask arrays among their
    arguments (``da.map_blocks(f, x)``) want `dask` itself.

    Attributes
    ----------
    dask : dask.array.Array
        The array; its chunks are those of the simulation.
    t : int
        The timestep.

    Examples
    --------
    >>> def rate_of_change(temperature):
    ...     latest, earlier = temperature[-1], temperature[0]
    ...     return abs(latest - earlier).max().compute() / max(1, latest.t - earlier.t)
    """

    __slots__ = ("dask", "t")

    def __init__(self, dask: da.Array, t: int) -> None:
        self.dask = dask
        self.t = t

    @property
    def timestep(self) -> int:
        """The timestep, as ``deisa-core`` calls it."""
        return self.t

    def persist(self, **kwargs: Any) -> DeisaArray:
        """Copy the array out of the simulation's slots, into memory that lives as long as the result."""
        return DeisaArray(self.dask.persist(**kwargs), self.t)

    def to_dask_array(self) -> da.Array:
        """Return `dask`; functions of ``dask.array`` look for this."""
        return self.dask

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in DeisaArray.__slots__:
            raise AttributeError(name)
        return getattr(self.dask, name)

    def __dir__(self) -> list[str]:
        return sorted({*object.__dir__(self), *dir(self.dask)})

    def __getitem__(self, index: Any) -> da.Array:
        return self.dask[index]

    def __len__(self) -> int:
        return len(self.dask)

    def __iter__(self) -> Iterator[da.Array]:
        return iter(self.dask)

    def __bool__(self) -> bool:
        return bool(self.dask)

    def __float__(self) -> float:
        return float(self.dask)

    def __int__(self) -> int:
        return int(self.dask)

    def __complex__(self) -> complex:
        return complex(self.dask)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a distributed array cannot become a NumPy array without a copy")
        return np.asarray(self.dask.compute(), dtype=dtype)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **kwargs: Any) -> Any:
        given = [_unwrap(item) for item in inputs]
        return getattr(ufunc, method)(*given, **{name: _unwrap(item) for name, item in kwargs.items()})

    def __array_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return function(*_unwrap(args), **_unwrap(dict(kwargs)))

    @property
    def expr(self) -> Expr:
        """The array's graph, where Dask asks a collection for one."""
        return HLGExpr.from_collection(self.dask)

    def __dask_graph__(self) -> Any:
        return self.dask.__dask_graph__()

    def __dask_keys__(self) -> Any:
        return self.dask.__dask_keys__()

    def __dask_layers__(self) -> Any:
        return self.dask.__dask_layers__()

    def __dask_tokenize__(self) -> Any:
        return self.dask.__dask_tokenize__()

    def __dask_postcompute__(self) -> Any:
        return self.dask.__dask_postcompute__()

    def __dask_postpersist__(self) -> Any:
        rebuild, state = self.dask.__dask_postpersist__()
        return _rebuild, (self.t, rebuild, state)

    __dask_optimize__ = da.Array.__dask_optimize__
    __dask_scheduler__ = staticmethod(da.Array.__dask_scheduler__)

    def __repr__(self) -> str:
        return f"<DeisaArray t={self.t} {self.dask!r}>"


def _rebuild(graph: Any, t: int, rebuild: Callable[..., da.Array], state: Any, **kwargs: Any) -> DeisaArray:
    return DeisaArray(rebuild(graph, *state, **kwargs), t)


def _unwrap(item: Any) -> Any:
    if isinstance(item, DeisaArray):
        return item.dask
    if type(item) in (list, tuple):
        return type(item)(_unwrap(inner) for inner in item)
    if type(item) is dict:
        return {key: _unwrap(inner) for key, inner in item.items()}
    return item
