"""What a rank notes about its chunks, and where it hands them over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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
    """

    __slots__ = ("before", "chunks", "moving", "nbytes", "timestep")

    def __init__(self) -> None:
        self.timestep: int | None = None
        self.before: int | None = None
        self.moving = False
        self.chunks = 0
        self.nbytes = 0


class ArrayState:
    """What a bridge has handed over of an array.

    Attributes
    ----------
    chunks : int
        That this bridge has of the array.
    timestep : int or None
        The newest timestep that a chunk was handed over for.
    submitted : int
        Chunks handed over for that timestep.
    whole : int
        Timesteps handed over whole.
    """

    __slots__ = ("chunks", "entry", "submitted", "timestep", "whole")

    def __init__(self, chunks: int, entry: CountersEntry) -> None:
        self.chunks = chunks
        self.entry = entry
        self.timestep: int | None = None
        self.submitted = 0
        self.whole = 0

    def is_whole(self, timestep: int | None) -> bool:
        """Whether all chunks were handed over for a timestep."""
        return self.timestep == timestep and self.submitted == self.chunks


@dataclass(frozen=True, slots=True)
class HandOver:
    """What the states say once a chunk is handed over.

    Noted before, so that an exception between any two steps of `ChunkWriter.put`, such as Ctrl-C raises, leaves a
    chunk that is handed over or one that is not, and nothing in between.
    """

    submitted: int  # by the bridge, this chunk included
    writer: ChunkWriter
    sequence: int
    timestep: int
    of_timestep: int
    whole: int
    chunks: int
    nbytes: int

    def note(self, state: SendState) -> None:
        self.writer.sequence = self.sequence
        self.writer.newest = self.timestep
        array = self.writer.state
        array.timestep = self.timestep
        array.submitted = self.of_timestep
        array.whole = self.whole
        state.chunks = self.chunks
        state.nbytes = self.nbytes


class ChunkWriter:
    """Where one chunk of this rank is handed over, timestep after timestep.

    Attributes
    ----------
    region : int
    sequence : int
        The next sequence number, which is the number of timesteps handed over.
    newest : int or None
        The last timestep handed over.
    state : ArrayState
        Shared by the chunks of an array.
    memory : tuple of numpy.ndarray or None
        By slot; None until the dtype of the array is known.
    """

    def __init__(
        self, channel: RankChannel, array: str, region: int, row: SlotTableRow, state: ArrayState
    ) -> None:
        self._channel = channel
        self._array = array
        self._row = row
        self.region = region
        self.sequence = 0
        self.newest: int | None = None
        self.state = state
        self.memory: tuple[np.ndarray, ...] | None = None

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype of the slots; None before `RankChannel.declare` where no bridge has declared it."""
        return self.memory[0].dtype if self.memory is not None else None

    def has_sent(self, timestep: int) -> bool:
        """Whether this was the last timestep handed over."""
        return self.newest == timestep

    def free_slot(self, timestep: int) -> np.ndarray:
        """Return the memory for the next chunk, waiting for it if need be; the same until `put`.

        Raises
        ------
        WaitTimeoutError, AnalyticsLostError
        """
        assert self.memory is not None
        if not self._row.has_slot(self.sequence):
            self._channel.wait_for_slot(self.region, self._row, self.sequence, self._describe_wait(timestep))
        return self.memory[self._row.slot_of(self.sequence)]

    def _describe_wait(self, timestep: int) -> str:
        return (
            f"all {self._row.slots} slots of array {self._array!r} are in use: timestep {timestep} waits for"
        )

    def put(self, timestep: int, time: float | None, nbytes: int, *, must_notify: bool) -> None:
        """Hand the filled slot over; notifies the agent when every rank of its node has done so.

        Raises
        ------
        AnalyticsLostError, DeisaError
            When the agent has gone, or has said that the session is over.
        """
        channel, array = self._channel, self.state
        of_timestep = array.submitted + 1 if array.timestep == timestep else 1
        noted = channel.under_way = HandOver(
            submitted=channel.ring.submitted + 1,
            writer=self,
            sequence=self.sequence + 1,
            timestep=timestep,
            of_timestep=of_timestep,
            whole=array.whole + (of_timestep == array.chunks),
            chunks=channel.state.chunks + 1,
            nbytes=channel.state.nbytes + nbytes,
        )
        channel.ring.submit(self.region, timestep, time)  # from here on it is handed over
        noted.note(channel.state)
        is_last = array.is_whole(timestep) and array.entry.count_whole(array.whole)
        channel.under_way = None
        if is_last or must_notify:
            channel.notify()
        channel.hear()
