"""What a rank notes about its chunks, and where it hands them over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deisa.ray._state.descriptions import Shape
from deisa.ray._transport.messages import WantedPart
from tests.oracle.pages import CountersEntry, SlotTableRow

if TYPE_CHECKING:
    from tests.oracle.client import RankChannel


class SendState:
    """What a bridge has handed over.

    Attributes
    ----------
    timestep : int or None
        The newest timestep that anything was sent for, or that the rank has advanced to.
    before : int or None
        The timestep before that one.
    moving : bool
        Whether the agent has not been told yet that the rank has left `before`.
    chunks, nbytes : int
        Handed over.
    left_out : int
        Bytes that were sent and not handed over.
    """

    __slots__ = ("before", "chunks", "left_out", "moving", "nbytes", "timestep")

    def __init__(self) -> None:
        self.timestep: int | None = None
        self.before: int | None = None
        self.moving = False
        self.chunks = 0
        self.nbytes = 0
        self.left_out = 0


class StreamState:
    """What a bridge has handed over of a stream.

    Attributes
    ----------
    parts : int
        Of this bridge's chunks.
    every : int
        Only timesteps that are multiples of it are handed over.
    timestep : int or None
        The newest timestep that a part was handed over for.
    submitted : int
        Parts handed over for that timestep.
    whole : int
        Timesteps handed over whole.
    """

    __slots__ = ("entry", "every", "parts", "row", "submitted", "timestep", "whole")

    def __init__(self, parts: int, every: int, row: SlotTableRow, entry: CountersEntry) -> None:
        self.parts = parts
        self.every = every
        self.row = row
        self.entry = entry
        self.timestep: int | None = None
        self.submitted = 0
        self.whole = 0

    def is_whole(self, timestep: int | None) -> bool:
        """Whether all parts were handed over for a timestep."""
        return self.timestep == timestep and self.submitted == self.parts

    def is_due(self, timestep: int) -> bool:
        """Whether anything is handed over for a timestep."""
        return timestep % self.every == 0


class PartWriter:
    """What a stream takes of a chunk.

    Attributes
    ----------
    region : int
    stream : StreamState
    index : tuple of slice
        Which elements of the chunk.
    shape : tuple of int
    sequence : int
        The next sequence number, which is the number of timesteps handed over.
    memory : tuple of numpy.ndarray or None
        By slot; None until the dtype of the array is known.
    """

    __slots__ = ("index", "memory", "region", "sequence", "shape", "stream")

    def __init__(self, wanted: WantedPart, stream: StreamState) -> None:
        self.region = wanted.region
        self.stream = stream
        corners = zip(wanted.start, wanted.step, wanted.shape, strict=True)
        self.index = tuple(slice(start, start + (n - 1) * step + 1, step) for start, step, n in corners)
        self.shape = wanted.shape
        self.sequence = 0
        self.memory: tuple[np.ndarray, ...] | None = None

    @property
    def slot(self) -> np.ndarray:
        """The memory for the next timestep, which has a slot."""
        assert self.memory is not None
        return self.memory[self.stream.row.slot_of(self.sequence)]


@dataclass(frozen=True, slots=True)
class HandOver:
    """What the states say once a chunk is handed over.

    Noted before, so that an exception between any two steps of `ChunkWriter.put`, such as Ctrl-C raises, leaves a
    chunk that is handed over or one that is not, and nothing in between.
    """

    submitted: int  # by the bridge, this chunk included
    writer: ChunkWriter
    timestep: int
    parts: tuple[tuple[PartWriter, int, int, int], ...]  # sequence; of its stream: submitted, whole
    chunks: int
    nbytes: int
    left_out: int

    def note(self, state: SendState) -> None:
        self.writer.newest = self.timestep
        for part, sequence, submitted, whole in self.parts:
            part.sequence = sequence
            part.stream.timestep = self.timestep
            part.stream.submitted = submitted
            part.stream.whole = whole
        state.chunks = self.chunks
        state.nbytes = self.nbytes
        state.left_out = self.left_out

    def count(self) -> bool:
        """Tell the other ranks of the node; whether none of them is behind."""
        return any(
            [
                part.stream.entry.count_whole(part.stream.whole)
                for part, _, _, _ in self.parts
                if part.stream.is_whole(self.timestep)
            ]
        )


class ChunkWriter:
    """Where one chunk of this rank is handed over, timestep after timestep.

    Attributes
    ----------
    parts : tuple of PartWriter
        What streams take of it.
    newest : int or None
        The last timestep handed over.
    """

    def __init__(self, channel: RankChannel, array: str, parts: tuple[PartWriter, ...]) -> None:
        self._channel = channel
        self._array = array
        self.parts = parts
        self.newest: int | None = None

    def has_sent(self, timestep: int) -> bool:
        """Whether this was the last timestep handed over."""
        return self.newest == timestep

    def due(self, timestep: int) -> list[PartWriter]:
        """What is handed over at a timestep."""
        return [part for part in self.parts if part.stream.is_due(timestep)]

    def whole_part(self, shape: Shape, dtype: np.dtype, timestep: int) -> PartWriter | None:
        """The first part that takes the chunk as it is."""
        for part in self.due(timestep):
            if part.shape == shape and part.memory is not None and part.memory[0].dtype == dtype:
                return part
        return None

    def free_slots(self, parts: Sequence[PartWriter], timestep: int) -> None:
        """Wait until parts have slots.

        Raises
        ------
        WaitTimeoutError, AnalyticsLostError
        """
        for part in parts:
            row = part.stream.row
            if not row.has_slot(part.sequence):
                waiting = f"all {row.slots} slots of array {self._array!r} are in use: timestep {timestep} waits for"
                self._channel.wait_for_slot(part.region, row, part.sequence, waiting)

    def put(
        self,
        timestep: int,
        time: float | None,
        data: np.ndarray,
        filled: PartWriter | None,
        *,
        must_notify: bool,
    ) -> None:
        """Hand a chunk over; notifies the agent when every rank of its node has done so.

        Raises
        ------
        WaitTimeoutError, AnalyticsLostError, DeisaError
            When the agent has gone, or has said that the session is over.
        """
        channel, due = self._channel, self.due(timestep)
        self.free_slots(due, timestep)
        nbytes = 0
        for part in due:
            nbytes += part.slot.nbytes
            if part is not filled:
                part.slot[...] = data[part.index]
        after = []
        for part in due:
            stream = part.stream
            submitted = stream.submitted + 1 if stream.timestep == timestep else 1
            after.append((part, part.sequence + 1, submitted, stream.whole + (submitted == stream.parts)))
        state = channel.state
        noted = HandOver(
            submitted=channel.submitted + len(due),
            writer=self,
            timestep=timestep,
            parts=tuple(after),
            chunks=state.chunks + bool(due),
            nbytes=state.nbytes + nbytes,
            left_out=state.left_out + max(0, data.nbytes - nbytes),
        )
        channel.under_way = noted
        if due:
            channel.ring.submit(
                [part.region for part in due], timestep, time
            )  # from here on it is handed over
        noted.note(state)
        is_last = noted.count()
        channel.under_way = None
        if is_last or must_notify:
            channel.notify()
        channel.hear()
