"""The documents (``zarr.json``) of a Zarr group of format 3, and the order in which they change.

The document of a group may contain those of its arrays ("consolidated metadata"), lengths included. Storing it is one
step: in a file system it takes the place of the one before by a rename. So this document decides how many timesteps a
series has, for everybody who reads the group as a whole, as xarray and `zarr.open_group` do.

The documents of the arrays themselves are for those who open a single array. When a series grows they are written
before the group's, and when it shrinks after it; in either case the values that they tell of are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deisa.ray._files.packages import package
from deisa.ray.errors import SaveFormatError

Document = dict[str, Any]
NAME = "zarr.json"


class Store:
    """Reads and writes documents.

    Parameters
    ----------
    store : zarr.abc.store.Store
    where : str
        For errors.
    """

    def __init__(self, store: Any, where: str) -> None:
        self.store = store
        self.where = where
        self._sync = package("zarr.core.sync", "a Zarr store").sync
        self._buffer = package("zarr.core.buffer", "a Zarr store").default_buffer_prototype()

    @property
    def has_transactions(self) -> bool:
        """Whether nobody sees what is written until it is committed: such stores want no consolidated metadata."""
        return not getattr(self.store, "supports_consolidated_metadata", True)

    def get(self, key: str) -> bytes | None:
        """Return what is stored under a key."""
        found = self._sync(self.store.get(key, self._buffer))
        return None if found is None else found.to_bytes()

    def put(self, key: str, document: Mapping[str, Any]) -> bytes:
        """Store a document, and return its bytes."""
        written = json.dumps(document, indent=2).encode()
        self._sync(self.store.set(key, self._buffer.buffer.from_bytes(written)))
        return written

    def remove(self, prefix: str) -> None:
        """Remove all that is stored below a prefix."""
        self._sync(self.store.delete_dir(prefix))

    def is_empty(self) -> bool:
        """Whether nothing is stored at all."""

        async def first() -> bool:
            async for _ in self.store.list_dir(""):
                return False
            return True

        return self._sync(first())

    def array(self, name: str, document: Document, length: int | None = None) -> Any:
        """An array as its document has it, or as it would be with another length, without reading anything."""
        zarr = package("zarr", "a Zarr store")
        path = package("zarr.storage", "a Zarr store").StorePath(self.store, name)
        return zarr.Array.from_dict(path, json.loads(json.dumps(with_length(document, length))))


def new_document(**described: Any) -> Document:
    """The document of an array that `zarr.create_array` would make."""
    zarr = package("zarr", "a Zarr store")
    memory = package("zarr.storage", "a Zarr store").MemoryStore()
    zarr.create_array(memory, zarr_format=3, **described)
    written = Store(memory, "memory").get(NAME)
    assert written is not None
    return json.loads(written)


def with_length(document: Document, length: int | None) -> Document:
    """A document whose array has another length along its first dimension."""
    if length is None:
        return document
    return document | {"shape": [length, *document["shape"][1:]]}


def group_document(attributes: Mapping[str, Any], arrays: Mapping[str, Document]) -> Document:
    """The document of a group that contains those of its arrays."""
    return {
        "attributes": dict(attributes),
        "zarr_format": 3,
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": dict(arrays)},
        "node_type": "group",
    }


def arrays_of(where: str, written: bytes) -> tuple[Document, dict[str, Document]]:
    """The attributes and arrays that the document of a group has.

    Raises
    ------
    SaveFormatError
        When it is no group of format 3, or has no arrays in it.
    """
    try:
        document = json.loads(written)
        consolidated = document.get("consolidated_metadata") or {}
        return document.get("attributes", {}), dict(consolidated["metadata"])
    except (ValueError, KeyError, AttributeError) as exc:
        raise SaveFormatError(
            f"{where} holds Zarr data that is no series of timesteps saved by deisa-ray (its {NAME} has no arrays in "
            "it); give another path"
        ) from exc
