"""A Zarr group whose arrays grow by one timestep at a time.

Each array has a dimension ``time`` in front of its own. What changes at a timestep, in this order:

1. The values, by tasks where they are, behind the end that the arrays still have: nobody looks there.
2. The coordinates ``timestep`` and ``time``, likewise.
3. The length, in the documents of the arrays, and at last in that of the group (`zarr_documents`).

A store with transactions, such as Icechunk's, takes no values behind the end: there the length comes first, and the
user commits.

A process that is killed anywhere in between leaves the timesteps that were there before. The next one that opens the
series writes the same places again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np

from deisa.ray._files.chunking import chunk_shape, fits
from deisa.ray._files.continuing import Progress
from deisa.ray._files.coordinates import as_read, encoded, is_text
from deisa.ray._files.expected import Known, check_coords, check_step, growing, with_time
from deisa.ray._files.fields import TIME, TIMESTEP, Field, Step
from deisa.ray._files.packages import package
from deisa.ray._files.zarr_documents import (
    NAME,
    Document,
    Store,
    arrays_of,
    group_document,
    new_document,
    with_length,
)
from deisa.ray.errors import SaveConflictError, SaveFormatError

SMALL_BYTES = 4096  # of a field at a timestep: it comes here, and several timesteps share a chunk
SMALL_CHUNK_BYTES = 32768


class ZarrSeries:
    """The timesteps in a Zarr group.

    Parameters
    ----------
    target : str or zarr.abc.store.Store
        An absolute path, a URL, or a store of Zarr's own.
    where : str
        For errors.
    encoding : mapping of str to mapping
        For names of arrays, what `zarr.create_array` gets beside what follows from the data.

    Raises
    ------
    SaveFormatError
        When something else is there.
    """

    def __init__(self, target: Any, where: str, encoding: Mapping[str, Mapping[str, Any]]) -> None:
        self._where = where
        self._encoding = encoding
        self._store = Store(_opened(target), where)
        self._attributes: Document = {}
        self._arrays: dict[str, Document] = {}
        self._coords: dict[str, np.ndarray] = {}
        self._known: dict[str, Known] = {}
        self._root: bytes | None = None
        self.progress = Progress(where, [])
        self._read()

    def _read(self) -> None:
        self._root = self._store.get(NAME)
        if self._root is None:
            if not self._store.is_empty():
                raise SaveFormatError(
                    f"{self._where} is no Zarr group of format 3, and not empty; give another path"
                )
            return
        self._attributes, self._arrays = arrays_of(self._where, self._root)
        if TIMESTEP not in self._arrays:
            raise SaveFormatError(f"{self._where} holds a Zarr group without {TIMESTEP!r}; give another path")
        self.progress = Progress(self._where, self._store.array(TIMESTEP, self._arrays[TIMESTEP])[:].tolist())
        self._coords = {
            name: as_read(self._store.array(name, document)[...])
            for name, document in self._arrays.items()
            if not _grows(document)
        }
        self._know()
        self._repair()

    def _know(self) -> None:
        """Note what the arrays are, to compare it with what comes."""
        for name, document in self._arrays.items():
            if _grows(document):
                array = self._store.array(name, document)
                dims = tuple(document["dimension_names"][1:])
                self._known[name] = Known(dims, array.shape[1:], array.dtype, document["attributes"])

    def _repair(self) -> None:
        """Have the arrays' own documents say what the group's does: a process may have been killed in between."""
        for name, document in self._arrays.items():
            own = self._store.get(f"{name}/{NAME}")
            if own is None or _shape_in(own) != document["shape"]:
                self._store.put(f"{name}/{NAME}", document)

    def append(self, step: Step) -> None:
        """Add a timestep; those of earlier runs from there on go.

        Raises
        ------
        SaveMismatchError, SaveOrderError, SaveConflictError
        """
        index = self.progress.place(step.timestep)
        if self._root is None:
            self._create(step)
        step = with_time(self._known, step)
        check_step(self._where, self._known, step)
        check_coords(self._where, self._coords, step.coords)
        if index < len(self.progress.stored):
            self._shrink(index)
        if step.time is not None and TIME not in self._known:
            self._arrays[TIME] = self._new_document(step.time, step.time.attrs)
        if self._store.has_transactions:
            self._commit(index + 1)
            self._write(step, index)
        else:
            self._write(step, index)
            self._commit(index + 1)
        self.progress.note(index, step.timestep)
        if TIME in self._arrays and TIME not in self._known:
            self._know()

    # What there is.

    def _create(self, step: Step) -> None:
        for found in growing(step):
            self._arrays[found.name] = self._new_document(found, step.attributes(found))
        coords = [encoded(coord) for coord in step.coords]
        for coord in coords:
            self._arrays[coord.name] = new_document(
                shape=coord.shape,
                chunks=tuple(max(1, n) for n in coord.shape),
                dtype=str if is_text(coord.data) else coord.dtype,
                dimension_names=coord.dims,
                attributes=dict(coord.attrs),
            )
        self._attributes = dict(step.attrs)
        for coord in coords:
            self._store.array(coord.name, self._arrays[coord.name])[...] = coord.data
            self._coords[coord.name] = coord.data
        self._root = self._store.put(NAME, group_document(self._attributes, self._arrays))
        for name, document in self._arrays.items():
            self._store.put(f"{name}/{NAME}", document)
        self._know()

    def _new_document(self, found: Field, attrs: Mapping[str, Any]) -> Document:
        given = dict(self._encoding.get(found.name, {}))
        nbytes = math.prod(found.shape) * found.dtype.itemsize
        if nbytes <= SMALL_BYTES:
            chunks = (max(1, SMALL_CHUNK_BYTES // max(1, nbytes)), *(max(1, n) for n in found.shape))
        else:
            chunks = (1, *chunk_shape(found.blocks, found.dtype.itemsize))
        described: dict[str, Any] = {"chunks": chunks}
        if found.dtype.kind in "fc":
            described["fill_value"] = np.nan  # a chunk that is lost shows
        return new_document(
            shape=(0, *found.shape),
            dtype=found.dtype,
            dimension_names=(TIME, *found.dims),
            attributes=dict(attrs),
            **(described | given),
        )

    # How it changes.

    def _write(self, step: Step, index: int) -> None:
        writes: list[da.Array] = []
        small: list[Field] = []
        for found in growing(step):
            target = self._store.array(found.name, self._arrays[found.name], index + 1)
            whole = (getattr(target, "shards", None) or target.chunks)[1:]
            if target.chunks[0] > 1 or not isinstance(found.data, da.Array):
                small.append(found)
                continue
            data = found.data if fits(found.blocks, whole) else found.data.rechunk(whole)
            region = (slice(index, index + 1), *(slice(0, n) for n in found.shape))
            writes.append(da.store(data[np.newaxis], target, regions=region, lock=False, compute=False))
        values = dask.compute(*writes, *(found.data for found in small))[len(writes) :]
        for found, value in zip(small, values, strict=True):
            self._store.array(found.name, self._arrays[found.name], index + 1)[index] = value

    def _commit(self, length: int) -> None:
        grown = {
            name: with_length(document, length) if _grows(document) else document
            for name, document in self._arrays.items()
        }
        self._check_alone()
        for name, document in sorted(grown.items(), key=lambda item: item[0] in (TIME, TIMESTEP)):
            if _grows(document):
                self._store.put(f"{name}/{NAME}", document)
        self._root = self._store.put(NAME, group_document(self._attributes, grown))
        self._arrays = grown

    def _shrink(self, length: int) -> None:
        before = len(self.progress.stored)
        self.progress.warn(length)
        self._check_alone()
        if self._store.has_transactions:
            self._drop_values(length, before)
        shrunk = {
            name: with_length(document, length) if _grows(document) else document
            for name, document in self._arrays.items()
        }
        self._root = self._store.put(NAME, group_document(self._attributes, shrunk))
        for name, document in shrunk.items():
            if _grows(document):
                self._store.put(f"{name}/{NAME}", document)
        self._arrays = shrunk
        self.progress.drop(length)
        if not self._store.has_transactions:
            self._drop_values(length, before)

    def _drop_values(self, start: int, stop: int) -> None:
        """Remove the values of timesteps that are no longer told of."""
        for name, document in self._arrays.items():
            if _grows(document) and document["chunk_grid"]["configuration"]["chunk_shape"][0] == 1:
                for index in range(start, stop):
                    self._store.remove(f"{name}/c/{index}")

    def _check_alone(self) -> None:
        if self._store.get(NAME) != self._root:
            raise SaveConflictError(
                f"{self._where} was changed by another program while this one saves into it: let each save into a "
                "path of its own"
            )


def _opened(target: Any) -> Any:
    """A store of Zarr's for a path or a URL; a store stays as it is."""
    if not isinstance(target, str):
        return target
    storage = package("zarr.storage", "a Zarr store")
    if "://" in target:
        return storage.FsspecStore.from_url(target)
    return storage.LocalStore(Path(target))


def _grows(document: Document) -> bool:
    """Whether an array has the dimension that grows, in front."""
    return [*(document.get("dimension_names") or ())][:1] == [TIME]


def _shape_in(written: bytes) -> Any:
    try:
        return json.loads(written).get("shape")
    except ValueError:
        return None
