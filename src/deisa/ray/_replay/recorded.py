"""The document of a recording: a Zarr group that says what its arrays are and how they lay in memory.

::

    recording.zarr/            this document
        temperature/           a series of timesteps: temperature, timestep, time, coordinates
        pressure/              another one, which may have other timesteps
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from deisa.ray._replay.blocks import Blocks
from deisa.ray.errors import ReplayError

KEY = "deisa_ray_recording"
VERSION = 1


@dataclass
class RecordedArrays:
    """The arrays of a recording, by name."""

    arrays: dict[str, Blocks] = field(default_factory=dict)

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], path: str) -> RecordedArrays | None:
        """Read the attributes of a group; None where it is no recording.

        Raises
        ------
        ReplayError
            When another release has written it.
        """
        document = attributes.get(KEY)
        if document is None:
            return None
        try:
            if document["version"] != VERSION:
                raise ReplayError(
                    f"{path} is a recording of version {document['version']}, this release reads version {VERSION}"
                )
            return cls({name: Blocks.from_json(blocks) for name, blocks in document["arrays"].items()})
        except (TypeError, KeyError, ValueError) as exc:
            raise ReplayError(f"{path} is a recording whose attributes make no sense: {exc!r}") from exc

    def to_attributes(self) -> dict[str, Any]:
        """Write them as attributes of a group."""
        arrays = {name: blocks.to_json() for name, blocks in self.arrays.items()}
        return {KEY: {"version": VERSION, "arrays": arrays}}


def group_of(name: str) -> str:
    """The group in which an array is: its name, in characters that a group may have."""
    quoted = quote(name, safe=" ")
    return (
        quoted
        if quoted.strip(".") and not quoted.startswith("__")
        else "".join(f"%{ord(c):02X}" for c in name)
    )
