"""Which dtypes chunks may have, and how an array of another dtype becomes one that fits."""

from __future__ import annotations

import ast
from functools import lru_cache
from typing import Any

import numpy as np

from deisa.ray.errors import DescriptionError

MAX_DTYPE_TEXT = 20_000
MAX_DTYPE_DEPTH = 8


def shareable(name: str, dtype: np.dtype) -> np.dtype:
    """Return a dtype as the chunks of array `name` have it: without metadata, and with fields in their order.

    Fields that lie in another order than they are named, as in ``particles[["x", "id"]]``, or that overlap, are put
    one behind the other. Gaps between fields stay.

    Raises
    ------
    DescriptionError
        For dtypes whose elements are pointers, have no size, or are not NumPy's own.
    """
    if dtype.hasobject or dtype.kind == "T":
        advice = "; h5py's strings have one with h5py.string_dtype(length=n)" if dtype.metadata else ""
        raise _cannot_be_shared(name, dtype, advice)
    if dtype.subdtype is not None:
        raise _with_further_dimensions(name, dtype, *dtype.subdtype)
    if dtype.itemsize == 0:
        raise _cannot_be_shared(name, dtype)
    plain = _without_metadata(dtype)
    if plain != dtype:  # a dtype of another package, which NumPy cannot describe
        raise _cannot_be_shared(name, dtype)
    try:
        described = np.lib.format.dtype_to_descr(plain)
    except ValueError:  # overlapping, or out of order
        return packed(plain)
    if np.lib.format.descr_to_dtype(described) != plain:
        raise _cannot_be_shared(name, dtype)
    return plain


def _cannot_be_shared(name: str, dtype: np.dtype, advice: str = "") -> DescriptionError:
    return DescriptionError(
        f"array {name!r}: dtype {dtype!r} cannot be shared; use one of NumPy's own with a fixed size: numeric, "
        f"datetime, 'S<n>', 'U<n>' or structured{advice}"
    )


def _with_further_dimensions(
    name: str, dtype: np.dtype, base: np.dtype, shape: tuple[int, ...]
) -> DescriptionError:
    dimensions = "a further dimension" if len(shape) == 1 else f"{len(shape)} further dimensions"
    return DescriptionError(
        f"array {name!r}: dtype {dtype!r} cannot be shared: each element is an array; use dtype {base}, and describe "
        f"{dimensions}: 'chunk_shape' (..., {', '.join(map(str, shape))}), and one chunk along there"
    )


def _without_metadata(dtype: np.dtype) -> np.dtype:
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return np.dtype((_without_metadata(base), shape))
    if dtype.names is None or dtype.fields is None:
        return np.dtype(dtype.str)
    fields = [dtype.fields[name] for name in dtype.names]
    return np.dtype(
        {
            "names": list(dtype.names),
            "formats": [_without_metadata(field[0]) for field in fields],
            "offsets": [field[1] for field in fields],
            "titles": [field[2] if len(field) > 2 else None for field in fields],
            "itemsize": dtype.itemsize,
        }
    )


def packed(dtype: np.dtype) -> np.dtype:
    """Return a structured dtype with its fields one behind the other, and no titles; any other as it is."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return np.dtype((packed(base), shape))
    if dtype.names is None or dtype.fields is None:
        return dtype
    return np.dtype([(name, packed(dtype.fields[name][0])) for name in dtype.names])


def same_values(one: np.dtype, other: np.dtype) -> bool:
    """Whether elements of two dtypes have the same values, wherever the fields of structured ones lie."""
    return one == other or packed(one) == packed(other)


def conversion(chunk: Any, data: np.ndarray, wanted: np.dtype) -> str:
    """Write an expression that turns `chunk`, or `data` as an array, into one that fits; empty if there is none."""
    array = "chunk" if isinstance(chunk, np.ndarray) else "np.asarray(chunk)"
    if not isinstance(chunk, np.ndarray) and not hasattr(chunk, "__array__") and hasattr(chunk, "__dlpack__"):
        array = "np.from_dlpack(chunk)"
    if wanted.names is not None:
        if data.dtype.names is None or not set(wanted.names) <= set(data.dtype.names):
            return ""
        return f"numpy.lib.recfunctions.require_fields({array}, np.{wanted!r})"
    if data.dtype.names is not None:
        for name in sorted(data.dtype.names, key=lambda name: data.dtype[name] != wanted):
            cast = _cast(f"{array}[{name!r}]", data[name], wanted)
            if cast:
                return cast
        return ""
    if data.dtype.kind == "c" and wanted.kind in "fiu":
        return _cast(f"{array}.real", data.real, wanted)
    return _cast(array, data, wanted)


def _cast(array: str, data: np.ndarray, wanted: np.dtype) -> str:
    if data.dtype == wanted:
        return array
    try:
        data.reshape(-1)[:1].astype(wanted)
    except (TypeError, ValueError):
        return ""
    return f"{array}.astype({str(wanted)!r})"


def dtype_text(dtype: np.dtype) -> str:
    """Describe a dtype as the header of a ``.npy`` file does: ``<f8``, or ``[('x', '<f4'), ('n', '<i8', (2,))]``."""
    described = np.lib.format.dtype_to_descr(dtype)
    return described if isinstance(described, str) else repr(described)


@lru_cache(maxsize=128)  # messages repeat a few
def dtype_of(text: str) -> np.dtype:
    """Return the dtype that `dtype_text` has described.

    Raises
    ------
    ValueError, TypeError
    """
    if len(text) > MAX_DTYPE_TEXT:
        raise ValueError(f"a dtype is described by {len(text)} characters, {MAX_DTYPE_TEXT} at most are read")
    described: Any = text
    if text.startswith("["):
        try:
            described = ast.literal_eval(text)
        except ValueError as exc:  # whose text says where in memory the part lies that is no value
            raise ValueError("a dtype is described by something else than values") from exc
    _check_depth(described)
    return shareable("received", np.lib.format.descr_to_dtype(described))


def _check_depth(described: Any, depth: int = 0) -> None:
    if depth > 2 * MAX_DTYPE_DEPTH:
        raise ValueError("a dtype is nested too deeply")
    if isinstance(described, list | tuple):
        for item in described:
            _check_depth(item, depth + 1)
    elif not isinstance(described, str | int):
        raise TypeError(f"a dtype is described by texts and numbers, got {described!r:.60}")


def converts(own: np.dtype, wanted: np.dtype) -> bool:
    """Whether elements are converted to another dtype where they are sent: where no value changes beyond rounding."""
    for dtype in (own, wanted):
        if dtype.newbyteorder("=") != dtype or dtype.str[1:] not in CONVERTIBLE:
            return False
    kinds = own.kind + wanted.kind
    return np.can_cast(own, wanted, "safe") or wanted.kind == "c" or (wanted.kind == "f" and "c" not in kinds)


CONVERTIBLE = frozenset({"b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8", "c8", "c16"})
