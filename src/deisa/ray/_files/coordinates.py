"""Coordinates as files have them: dates as numbers with units, as the CF conventions say it, and texts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from deisa.ray._files.fields import Field

_UNITS = {
    "D": "days",
    "h": "hours",
    "m": "minutes",
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
}


def encoded(coord: Field) -> Field:
    """Return a coordinate whose values are numbers or texts."""
    values = np.asarray(coord.data)
    if values.dtype.kind not in "mM":
        return replace(coord, data=values)
    unit = np.datetime_data(values.dtype)[0]
    if unit not in _UNITS:  # weeks, months and years have no fixed length, or no name there
        unit = "D" if unit in "YMW" else "ns"
    kind = values.dtype.kind
    since = " since 1970-01-01" if kind == "M" else ""
    attrs: dict[str, Any] = {**coord.attrs, "units": f"{_UNITS[unit]}{since}"}
    if kind == "M":
        attrs["calendar"] = "proleptic_gregorian"
    else:
        attrs["dtype"] = f"timedelta64[{unit if unit in ('s', 'ms', 'us', 'ns') else 'ns'}]"
    return replace(coord, data=values.astype(f"{kind}8[{unit}]").astype(np.int64), attrs=attrs)


def is_text(values: Any) -> bool:
    """Whether values are texts."""
    return values.dtype.kind in "OTU"


def as_read(values: Any) -> np.ndarray:
    """Values of a coordinate that was read: of texts, every library has its own kind."""
    values = np.asarray(values)
    if not is_text(values):
        return values
    flat = [text.decode() if isinstance(text, bytes) else str(text) for text in values.ravel().tolist()]
    return np.array(flat, dtype=str).reshape(values.shape)
