"""What callbacks are registered on, and what they are given: windows, and the arrays in them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, SupportsIndex, TypeAlias, overload

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from deisa.ray._graph._dask import Array, ArrayView, array_at
from deisa.ray._state.agreement import Labels
from deisa.ray.display import array_html, array_text, window_html, window_text
from deisa.ray.errors import WindowError
from deisa.ray.files import to_hdf5
from deisa.ray.labels import About, data_array, stacked

if TYPE_CHECKING:
    from xarray import DataArray


@dataclass(frozen=True, slots=True)
class WindowSpec:
    """The last `window_size` timesteps of an array, or of a part of it.

    What no window asks for is not handed over: ranks copy only the elements and timesteps that are selected.

    Parameters
    ----------
    name : str
        The array's name in the bridges' ``arrays_metadata``.
    window_size : int or None, default 1
        Timesteps, at least 1. None is the latest one only, which is 1.
    every : int, default 1
        Take only timesteps that are multiples of it; the window holds the last of those.
    select : tuple, slice, int, Ellipsis or mapping, optional
        Which elements. As an index in the order of the dimensions: slices, whose steps are positive, and integers,
        which drop their dimension, count elements of the whole array. As a mapping from dimensions: as in
        ``xarray.DataArray.sel``, labels where the dimension has a coordinate, else positions.
    astype : dtype_like, optional
        Hand elements over as this dtype: a floating-point or complex one, or a wider integer.

    Raises
    ------
    WindowError

    Examples
    --------
    >>> WindowSpec("temperature", every=10, select=(0, slice(None, None, 4)), astype="f4")
    WindowSpec(name='temperature', window_size=1, every=10, select=(0, slice(None, None, 4)), astype=dtype('float32'))
    """

    name: str
    window_size: int = 1
    _: KW_ONLY
    every: int = 1
    select: Any = field(default=None, hash=False)
    astype: Any = field(default=None, compare=False)
    _astype: str = field(default="", init=False, repr=False)  # to NumPy, None is equal to double precision

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise WindowError(f"a window needs the name of an array, got {self.name!r}")
        size = 1 if self.window_size is None else self.window_size
        object.__setattr__(self, "window_size", self._at_least_one("size", size))
        object.__setattr__(self, "every", self._at_least_one("every", self.every))
        if self.astype is not None:
            try:
                object.__setattr__(self, "astype", np.dtype(self.astype))
                object.__setattr__(self, "_astype", self.astype.str)
            except TypeError as exc:
                raise WindowError(f"window of {self.name!r}: {self.astype!r} is not a NumPy dtype") from exc

    def _at_least_one(self, what: str, value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError as exc:
            raise WindowError(f"window of {self.name!r}: {what} must be an integer, got {value!r}") from exc
        if number < 1:
            raise WindowError(f"window of {self.name!r}: {what} is {number}, it must be at least 1")
        return number


class Window(NamedTuple):
    """The same as `WindowSpec`, as ``deisa-core`` spells it: ``Window("temperature", 3)``."""

    name: str
    size: int | None = 1


CallbackArgs: TypeAlias = (
    str | Window | WindowSpec
)  # what a callback is registered on; deisa-core's `Window`, too
Timestep: TypeAlias = int


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
    if isinstance(window, type) or not (hasattr(window, "name") and hasattr(window, "size")):
        raise WindowError(f"expected an array name, a Window or a WindowSpec, got {window!r}")
    return WindowSpec(window.name, window.size)


class _CountsAsArray(type):
    """A class that is one with Dask's own in a set of types: xarray refuses to mix arrays of several types."""

    def __eq__(cls, other: object) -> bool:
        return other is Array or isinstance(other, _CountsAsArray)

    def __hash__(cls) -> int:
        return hash(Array)


class FormattedArray(Array, metaclass=_CountsAsArray):
    """A Dask array that computes itself where it is formatted as a number."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        """Format the value; without `spec` say what the array is, computing nothing."""
        if not spec:
            return str(self)
        if self.ndim:
            raise TypeError(
                f"an array of shape {self.shape} cannot be formatted with {spec!r}: make a number of it first, as in "
                f"f'{{x.mean().compute():{spec}}}'"
            )
        return format(self.compute()[()], spec)


def can_be_formatted(array: Array) -> None:
    """Make a new array of no dimensions a `FormattedArray`: a plugin, which Dask calls for every array it makes."""
    if type(array) is Array and array.ndim == 0:
        array.__class__ = FormattedArray


class DeisaArray(FormattedArray, ArrayView):
    """A whole global array at one timestep.

    It is a Dask array that knows its timestep. What is computed from it (methods, operators, slices, functions of
    NumPy and of ``dask.array``) are ordinary Dask arrays.

    Attributes
    ----------
    dask : dask.array.Array
        The same as an ordinary Dask array; its chunks are those of the simulation. In Dask's own arrays this
        is the graph, which here is `__dask_graph__()`.
    t : int
        The timestep.
    about : About
        The array's name, the physical time, and the labels that the simulation has given.

    Examples
    --------
    >>> def rate_of_change(temperature):
    ...     latest, earlier = temperature[-1], temperature[0]
    ...     return abs(latest - earlier).max().compute() / max(1, latest.t - earlier.t)
    """

    __slots__ = ("about", "t")

    t: int
    about: About

    @overload
    def __new__(cls, dask: Array, t: int, *, about: About | None = None) -> DeisaArray: ...

    @overload
    def __new__(cls, t: int, dask: Any, name: str, chunks: Any, **more: Any) -> DeisaArray: ...

    @overload
    def __new__(cls, dask: Any, name: str, chunks: Any, t: int, **more: Any) -> DeisaArray: ...

    def __new__(cls, *given: Any, about: About | None = None, **named: Any) -> DeisaArray:
        """Hold a Dask array at a timestep, or one made of a graph, as deisa-core and deisa-ray 0.1.8 spell that."""
        dask, t = array_at(*given, **named)
        self = ArrayView.__new__(cls, dask)
        self.t = t
        self.about = About() if about is None else about
        return self

    def __dask_postpersist__(self) -> Any:
        rebuild, state = self._held.__dask_postpersist__()
        return _rebuild, (self.t, self.about, rebuild, state)

    @property
    def timestep(self) -> int:
        """The timestep, as ``deisa-core`` calls it."""
        return self.t

    @property
    def time(self) -> float | None:
        """The physical time, where the simulation gives one."""
        return self.about.time

    @property
    def labels(self) -> Labels:
        """The names of the dimensions, the coordinates and the attributes that the simulation has given."""
        return self.about.labels

    @property
    def xarray(self) -> DataArray:
        """The same as a lazy `xarray.DataArray` with its labels, timestep and physical time."""
        return data_array(self)

    def to_dask_array(self) -> Array:
        """Return `dask`."""
        return self._held

    def copy(self) -> DeisaArray:
        """Return a copy of the same timestep; what is assigned to one of the two does not show in the other."""
        return DeisaArray(self._held.copy(), self.t, about=self.about)

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self._held, self.t, self.about)

    def __getitem__(self, index: Any) -> Array:
        return self._held[index]

    def shuffle(self, *args: Any, **kwargs: Any) -> Array:
        """Reorder elements along one dimension, as `dask.array.shuffle` does."""
        return self._held.shuffle(*args, **kwargs)

    def to_hdf5(self, filename: Any, datapath: str, **encoding: Any) -> None:
        """Save it as a data set of an HDF5 file, each block by a task where it is: `deisa.ray.files.to_hdf5`."""
        to_hdf5(filename, {datapath: self}, **encoding)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a distributed array cannot become a NumPy array without a copy")
        return np.asarray(self._held.compute(), dtype=dtype)

    def __repr__(self) -> str:
        return array_text(self)

    def _repr_html_(self) -> str:
        return array_html(self)


def _again(dask: Array, t: int, about: About) -> DeisaArray:
    return DeisaArray(dask, t, about=about)


def _rebuild(
    graph: Any, t: int, about: About, rebuild: Callable[..., Array], state: Any, **kwargs: Any
) -> DeisaArray:
    return DeisaArray(rebuild(graph, *state, **kwargs), t, about=about)


@dataclass(init=False, repr=False, eq=False)
class Timesteps(NDArrayOperatorsMixin, list[DeisaArray]):
    """What a callback gets for a window: a list of arrays, oldest first.

    Used as if it were the newest of its arrays, it raises an error that says how to take that one.

    Parameters
    ----------
    arrays : sequence of DeisaArray
    name : str
        What the callback calls the window.
    """

    # Dask computes plain lists, and data classes, whose fields are these; no other lists.
    arrays: list[DeisaArray]
    name: str

    def __new__(cls, arrays: Sequence[DeisaArray], name: str) -> Any:
        """Make a window; or a plain list of what Dask has computed from one."""
        return list.__new__(cls) if all(isinstance(array, DeisaArray) for array in arrays) else list(arrays)

    def __init__(self, arrays: Sequence[DeisaArray], name: str) -> None:
        list.__init__(self, arrays)
        self.name = name

    @property  # type: ignore[no-redef]
    def arrays(self) -> list[DeisaArray]:
        """The same arrays in a plain list."""
        return list(self)

    @property
    def xarray(self) -> DataArray:
        """All timesteps as one lazy `xarray.DataArray`: the dimension ``time`` comes first.

        The coordinate ``timestep`` lies along it, and ``time`` if every timestep has a physical time.
        """
        return stacked(self)

    def __repr__(self) -> str:
        return window_text(self, self.name)

    def _repr_html_(self) -> str:
        return window_html(self, self.name)

    # As a list.

    __eq__ = list.__eq__
    __ne__ = list.__ne__
    __hash__ = None

    def __add__(self, other: Any) -> Any:
        return [*self, *other] if type(other) is list else super().__add__(other)

    def __radd__(self, other: Any) -> Any:
        return [*other, *self] if type(other) is list else super().__radd__(other)

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        if isinstance(index, slice):
            return Timesteps(list.__getitem__(self, index), self.name)
        if isinstance(index, SupportsIndex) and not isinstance(index, np.ndarray | Array):
            return list.__getitem__(self, index)
        raise TypeError(self._use("[...]"))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)

    # Not as an array.

    def _use(self, then: str = "") -> str:
        name = self.name
        return (
            f"{name} is a window: a list of timesteps, oldest first; use {name}[-1]{then} for the newest one, "
            f"or {name}.xarray or da.stack({name}) for all of them"
        )

    def __getattr__(self, attribute: str) -> NoReturn:
        raise AttributeError(self._use(f".{attribute}"), name=attribute, obj=self)

    def _refuse(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise TypeError(self._use())

    __array__ = __array_ufunc__ = __array_function__ = to_dask_array = _refuse
    __float__ = __int__ = __complex__ = __round__ = _refuse

    def __format__(self, spec: str) -> str:
        return self._refuse() if spec else str(self)
