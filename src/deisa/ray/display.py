"""How arrays and windows are shown, as text and in a notebook. Nothing is computed for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deisa.ray._state.agreement import LabelledCoordinate
    from deisa.ray.types import DeisaArray

SHOWN_TIMESTEPS = 10  # of a window
SHOWN_CHARACTERS = 80  # of an attribute


def array_text(array: DeisaArray) -> str:
    """Describe an array in one line."""
    return (
        f"<DeisaArray {_named(array)}t={array.t}{_at(array)} {_shape(array)} {array.dtype}, {_chunks(array)}>"
    )


def window_text(window: Sequence[DeisaArray], name: str) -> str:
    """Describe a window: a line for it, and one for each timestep."""
    if not window:
        return f"<window {name!r}: no timesteps>"
    newest = window[-1]
    head = (
        f"<window {newest.about.array or name!r}: {_counted(len(window), 'timestep')}, oldest first; "
        f"{_shape(newest)} {newest.dtype}, {_chunks(newest)}>"
    )
    skipped = len(window) - SHOWN_TIMESTEPS
    lines = [f"  [{n}] t={array.t}{_at(array)}" for n, array in enumerate(window)]
    if skipped > 0:
        half = SHOWN_TIMESTEPS // 2
        lines[half:-half] = [f"  ... {_counted(skipped, 'more timestep')} ..."]
    return "\n".join([head, *lines])


def array_html(array: DeisaArray) -> str:
    """Describe an array in HTML: a table, and Dask's own picture of the chunks."""
    rows = [("timestep", str(array.t))]
    if array.about.time is not None:
        rows.append(("time", f"{array.about.time:.12g}"))
    rows += _rows(array)
    return _page(f"DeisaArray {array.about.array or ''}".strip(), _table(rows), _picture(array))


def window_html(window: Sequence[DeisaArray], name: str) -> str:
    """Describe a window in HTML: its timesteps, and what they have in common."""
    title = f"window {name}"
    if not window:
        return _page(title, "<p>no timesteps</p>", "")
    newest = window[-1]
    has_times = any(array.about.time is not None for array in window)
    heads = ["index", "timestep", *(["time"] if has_times else [])]
    lines = [
        [f"[{n}]", str(array.t), *([_time(array)] if has_times else [])] for n, array in enumerate(window)
    ]
    skipped = len(lines) - SHOWN_TIMESTEPS
    if skipped > 0:
        half = SHOWN_TIMESTEPS // 2
        lines[half:-half] = [["...", f"{skipped} more", *([""] if has_times else [])]]
    steps = "".join(f"<tr>{_cells(line)}</tr>" for line in lines)
    titles = "".join(f'<th style="text-align:left">{head}</th>' for head in heads)
    table = f"<table><thead><tr>{titles}</tr></thead><tbody>{steps}</tbody></table>"
    of_each = _table([("timesteps", f"{len(window)}, oldest first"), *_rows(newest)])
    return _page(title, of_each + table, _picture(newest))


def _picture(array: DeisaArray) -> str:
    """Dask's picture of the chunks, with its table where jinja2, which that needs, is installed."""
    page: str = array.dask._repr_html_()
    if "<svg" in page:
        return page
    try:
        picture: str = array.dask.to_svg()
    except NotImplementedError:  # it draws no array of no dimensions, or without a size
        return ""
    return picture


def _named(array: DeisaArray) -> str:
    return f"{array.about.array!r} " if array.about.array is not None else ""


def _at(array: DeisaArray) -> str:
    return f" time={array.about.time:.12g}" if array.about.time is not None else ""


def _time(array: DeisaArray) -> str:
    return f"{array.about.time:.12g}" if array.about.time is not None else "none"


def _shape(array: DeisaArray) -> str:
    """Write ``(y: 64, x: 128)``, or ``(64, 128)`` where the dimensions have no names."""
    dims = array.about.labels.dims
    if dims is None:
        return str(array.shape)
    return f"({', '.join(f'{dim}: {n}' for dim, n in zip(dims, array.shape, strict=True))})"


def _chunks(array: DeisaArray) -> str:
    largest = array.dask.chunksize
    equal = all(len(set(sizes)) <= 1 for sizes in array.chunks)
    return f"{_counted(array.npartitions, 'chunk')} of {'' if equal else 'at most '}{largest}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _rows(array: DeisaArray) -> Iterator[tuple[str, str]]:
    labels = array.about.labels
    yield "shape", f"{_shape(array)} {array.dtype}"
    yield "chunks", _chunks(array)
    for coordinate in labels.coords:
        along = f" along {coordinate.dim}" if coordinate.dim not in (coordinate.name, None) else ""
        yield f"coordinate {coordinate.name}{along}", _range(coordinate)
    for name, value in labels.attrs.items():
        yield name, _short(value)


def _range(coordinate: LabelledCoordinate) -> str:
    values = coordinate.values.reshape(-1)  # one position, where its dimension was dropped
    shown = str(values[0]) if len(values) == 1 else f"{values[0]} ... {values[-1]}"
    units = coordinate.attrs.get("units")
    return f"{shown} {units}" if isinstance(units, str) else shown


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."


def _table(rows: Sequence[tuple[str, str]]) -> str:
    lines = (
        f'<tr><th style="text-align:left">{escape(name)}</th><td style="text-align:left">{escape(value)}</td></tr>'
        for name, value in rows
    )
    return f"<table><tbody>{''.join(lines)}</tbody></table>"


def _cells(line: Sequence[str]) -> str:
    return "".join(f'<td style="text-align:left">{escape(cell)}</td>' for cell in line)


def _page(title: str, left: str, right: str) -> str:
    beside = f"<div>{right}</div>" if right else ""
    return (
        f'<div><strong>{escape(title)}</strong><div style="display:flex; gap:2em; align-items:flex-start">'
        f"<div>{left}</div>{beside}</div></div>"
    )
