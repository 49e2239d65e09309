"""Ghost cells: how many lie around a chunk in the array that a rank computes on, and which shape that array has."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from deisa.ray.errors import DescriptionError

Shape = tuple[int, ...]
Pair = tuple[int, int]

_MOST_ELEMENTS = 2**63 - 1  # along one dimension
_WAYS = (
    "give one width for all sides, one pair (before, after) for all dimensions, or a width or a pair for each of "
    "them"
)


@dataclass(frozen=True, slots=True)
class Halo:
    """Ghost cells around a chunk: the widths before and after it, one pair for each dimension."""

    widths: tuple[Pair, ...]

    def around(self, shape: Shape) -> Shape:
        """Return the shape of the local array: a chunk of `shape` with its ghost cells."""
        return tuple(before + n + after for (before, after), n in zip(self.widths, shape, strict=True))

    def inside(self, shape: Shape) -> tuple[slice, ...]:
        """Return where a chunk of `shape` lies in the local array."""
        return tuple(slice(before, before + n) for (before, _), n in zip(self.widths, shape, strict=True))

    @property
    def flat(self) -> Shape:
        """The widths one behind the other."""
        return tuple(width for pair in self.widths for width in pair)

    def __str__(self) -> str:
        return str(self.widths)


def read_halo(name: str, value: Any, shape: Shape) -> Halo | None:
    """Check the ``halo`` of a chunk of array `name`; None stands for no ghost cells.

    Parameters
    ----------
    name : str
    value : int or sequence or None
        As `numpy.pad` takes it: one width for all sides, one pair ``(before, after)`` for all dimensions, or one
        pair for each dimension. A dimension may also have one width for its two sides. So two different widths for
        two dimensions may mean two things, and are refused.
    shape : tuple of int
        Of the chunk, without ghost cells.

    Raises
    ------
    DescriptionError
    """
    if value is None:
        return None
    halo = Halo(tuple(_both(name, value, sides) for sides in _by_dimension(name, value, len(shape))))
    if any(n > _MOST_ELEMENTS for n in halo.around(shape)):
        raise DescriptionError(
            f"array {name!r}: a chunk of shape {shape} with 'halo' {value!r} has more than {_MOST_ELEMENTS} elements "
            "along a dimension"
        )
    return halo if any(map(any, halo.widths)) else None


def _by_dimension(name: str, value: Any, ndim: int) -> list[Any]:
    """Return a width or a pair for each dimension."""
    if not _is_sequence(value):
        return [_width(name, value, value)] * ndim
    entries = list(value)
    if len(entries) == 2 and not any(map(_is_sequence, entries)):
        before, after = _both(name, value, entries)
        if ndim == 2 and before != after:
            raise DescriptionError(
                f"array {name!r}: 'halo' {value!r} may mean two things in two dimensions; write "
                f"{((before, after),) * 2} for {before} before and {after} after the chunk in both dimensions, or "
                f"{((before, before), (after, after))} for {before} on both sides in the first and {after} in the "
                "second"
            )
        return [(before, after)] * ndim
    if len(entries) != ndim:
        raise DescriptionError(
            f"array {name!r}: 'halo' {value!r} lists {len(entries)}, but the chunk has {ndim} dimensions; {_WAYS}"
        )
    return entries


def _both(name: str, value: Any, sides: Any) -> Pair:
    """Return the widths before and after the chunk in one dimension, for which `sides` stand in `value`."""
    if not _is_sequence(sides):
        width = _width(name, value, sides)
        return width, width
    widths = [_width(name, value, side) for side in sides]
    if len(widths) != 2:
        raise DescriptionError(f"array {name!r}: 'halo' {value!r} has {sides!r} for one dimension; {_WAYS}")
    return widths[0], widths[1]


def _is_sequence(value: Any) -> bool:
    if hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0:  # also an array of no dimensions
        return False
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping | Set)


def _width(name: str, value: Any, width: Any) -> int:
    try:
        number = int(operator.index(width))
    except TypeError as exc:
        raise DescriptionError(f"array {name!r}: 'halo' must hold integers, got {value!r}; {_WAYS}") from exc
    if isinstance(width, bool):
        raise DescriptionError(f"array {name!r}: 'halo' holds {width}; {_WAYS}")
    if number < 0:
        raise DescriptionError(
            f"array {name!r}: 'halo' holds {number}; ghost cells cannot be fewer than none"
        )
    return number


def local_shape(shape: Shape, halo: Halo | None) -> Shape:
    """Return the shape of what a rank sends for a chunk of `shape`."""
    return shape if halo is None else halo.around(shape)


def wrong_shape(shape: Shape, halo: Halo | None, got: Shape) -> str:
    """Say what is wrong with an array of shape `got` for a chunk of `shape`, and what to do."""
    if halo is None:
        return f"declared chunk shape {shape}, got {got}{_on_size(got, shape)}"
    local = halo.around(shape)
    declared = (
        f"declared chunk shape {shape} with halo {halo}, so the local array has shape {local}; got {got}"
    )
    if got == shape:
        return (
            f"{declared}, the chunk without its halo: send the whole local array, or leave 'halo' out of the "
            "description and send a view of the interior"
        )
    return f"{declared}{_on_size(got, local)}"


def _on_size(got: Shape, declared: Shape) -> str:
    """Say what can be done where a chunk has changed its size."""
    if math.prod(got) == math.prod(declared):
        return ""
    return (
        "; an array keeps its size for the whole run: where it changes, describe the largest one, fill up what is not "
        "used (with NaN, say) and send the number of elements as an array of its own"
    )
