"""The memory of a node: segments with the chunks' slots, pages, and whether all that fits."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from deisa.ray._state.descriptions import Shape
from deisa.ray._state.feedback import FeedbackState
from deisa.ray._state.journal import WORDS_EACH, Handled, Journal
from deisa.ray._state.plan import Boxes, StartPlan
from deisa.ray._state.streams import Parts, by_bridge
from deisa.ray._transport import messages
from deisa.ray._transport.descriptor_limit import check_descriptors
from deisa.ray._transport.feedback import FeedbackPages
from deisa.ray._transport.limits import MemoryLimit, check_limits
from deisa.ray._transport.memory import check_fits, create_segment, lay_out, within
from deisa.ray._transport.messages import Message, RegionSpec
from deisa.ray._transport.pages import (
    DESCRIPTORS_PER_PAGE,
    ArrivalCounters,
    Page,
    RingReader,
    SlotTable,
)

DESCRIPTORS_PER_MESSAGE = 64

Post = tuple[Message, list[int]]  # a message, and the descriptors that go with it


@dataclass(slots=True)
class Segment:
    """Shared memory with the slots of some chunks, `regions` as readers see them."""

    descriptor: int
    nbytes: int
    regions: list[RegionSpec]


@dataclass(frozen=True, slots=True)
class Owner:
    """A bridge, as far as memory is concerned: what arrays (streams) take of its chunks, and its memory limits."""

    bridge_id: int
    parts: Parts
    limits: tuple[MemoryLimit, ...]

    def sized(
        self, dtypes: Mapping[str, np.dtype], slots: Mapping[str, int]
    ) -> list[tuple[int, Shape, np.dtype, int]]:
        """Its chunks of some arrays, as `lay_out` wants them."""
        return [
            (part.region, part.shape, dtype, slots[name])
            for name, dtype in dtypes.items()
            for part in self.parts.get(name, ())
        ]


class Store:
    """Segments and pages of one node, from the start to the end of its session.

    Parameters
    ----------
    session : str
    memory_fraction : float
        The part of what is available that chunks may take.
    if_lost : str
        What ranks are told that may have happened if the agent goes without a word.

    Attributes
    ----------
    table, counters : SlotTable, ArrivalCounters or None
        None before `create_pages`.
    rings : dict of int to RingReader
        By bridge.
    feedback : FeedbackPages or None
        None before `create_pages`.
    """

    def __init__(self, session: str, memory_fraction: float, if_lost: str = "") -> None:
        self._session = session
        self._prefix = f"deisa-{session}"
        self._fraction = memory_fraction
        self._if_lost = if_lost
        self.segments: list[Segment] = []
        self.table: SlotTable | None = None
        self.counters: ArrivalCounters | None = None
        self.rings: dict[int, RingReader] = {}
        self.feedback: FeedbackPages | None = None
        self._journals: dict[str, tuple[Page, int]] = {}  # by consumer, with the number of callbacks

    # Bounds.

    def bound_bytes(self, owners: Collection[Owner], plan: StartPlan, boxes: Boxes) -> int:
        """Chunk memory that is needed.

        Raises
        ------
        MemoryBoundError
            When that is more than the node may give.
        DescriptorLimitError
            When the memory of so many bridges takes more descriptors than this process may have.
        """
        separate = known_dtypes(plan, without=boxes)
        merged = {name: dtype for name in boxes if (dtype := plan.dtypes[name]) is not None}
        own = {o.bridge_id: lay_out(o.sized(separate, plan.slots))[1] for o in owners}
        needed = sum(own.values()) + sum(_lay_out_boxes(name, boxes, plan)[1] for name in boxes)
        touched = [
            (
                o.bridge_id,
                own[o.bridge_id]
                + sum(math.prod(s) * d.itemsize * n for _, s, d, n in o.sized(merged, plan.slots)),
                o.limits,
            )
            for o in owners
        ]
        what = f"session {self._session!r}"
        check_fits(needed, self._fraction, what)
        check_limits(touched, self._fraction, f"{what}: ")
        check_descriptors(len(boxes) + sum(_descriptors_of(o, plan, boxes) for o in owners), len(touched))
        return needed

    def check_declared(
        self,
        owner: Owner,
        others: Collection[Owner],
        array: str,
        dtypes: Mapping[str, np.dtype],
        slots: Mapping[str, int],
    ) -> None:
        """Check that memory for an array can be had whose dtype has come late.

        Parameters
        ----------
        owner : Owner
            The bridge that declares it.
        others : collection of Owner
            Those that have it still to do, with this one.
        array : str
        dtypes : mapping of str to numpy.dtype
            That of each of its streams.
        slots : mapping of str to int

        Raises
        ------
        MemoryBoundError
        """

        def needed(bridge: Owner) -> int:
            return lay_out(bridge.sized(dtypes, slots))[1]

        check_fits(needed(owner), self._fraction, f"array {array!r} of bridge {owner.bridge_id}")
        groups = {limit.group for limit in owner.limits}
        touched = [
            (o.bridge_id, needed(o), owner.limits)
            for o in others
            if groups & {limit.group for limit in o.limits}
        ]
        check_limits(touched, self._fraction, f"array {array!r}: ")

    # Segments.

    def provide(
        self, owner: Owner, dtypes: Mapping[str, np.dtype], slots: Mapping[str, int]
    ) -> Iterator[Post]:
        """Create one segment with the slots of a bridge's chunks of some arrays."""
        chunks = owner.sized(dtypes, slots)
        if chunks:
            segment = self._add(*lay_out(chunks))
            yield messages.Slots((segment.nbytes,), tuple(segment.regions)), [segment.descriptor]

    def provide_boxes(
        self, owners: Collection[Owner], array: str, boxes: Boxes, plan: StartPlan
    ) -> Iterator[tuple[int, Post]]:
        """Create one segment with the slots of all boxes of an array; yields what each bridge has to be sent."""
        segment = self._add(*_lay_out_boxes(array, boxes, plan))
        places = {
            region: (whole, offset)
            for whole, box in zip(segment.regions, boxes[array], strict=True)
            for region, offset in box.chunks
        }
        for owner in owners:
            parts = owner.parts.get(array, ())
            own = tuple(within(places[p.region][0], p.region, places[p.region][1], p.shape) for p in parts)
            if own:
                yield owner.bridge_id, (messages.Slots((segment.nbytes,), own), [segment.descriptor])

    def _add(self, regions: list[RegionSpec], nbytes: int) -> Segment:
        segment = Segment(create_segment(self._prefix, nbytes), nbytes, regions)
        self.segments.append(segment)
        return segment

    def for_readers(self, mapped: int) -> Iterator[Post]:
        """All segments but the first so many."""
        for start in range(mapped, len(self.segments), DESCRIPTORS_PER_MESSAGE):
            batch = self.segments[start : start + DESCRIPTORS_PER_MESSAGE]
            regions = [replace(r, segment=i) for i, segment in enumerate(batch) for r in segment.regions]
            sizes = tuple(segment.nbytes for segment in batch)
            yield messages.Slots(sizes, tuple(regions)), [segment.descriptor for segment in batch]

    # Pages.

    def create_pages(
        self, parts: Parts, bridges: Sequence[int], plan: StartPlan
    ) -> Iterator[tuple[int, Post]]:
        """Create all pages; yields what each bridge has to be sent."""
        wanted = by_bridge(parts)
        owners = {name: sorted({part.bridge_id for part in of_array}) for name, of_array in parts.items()}
        self.table = table = SlotTable(f"{self._prefix}-table", plan.slots)
        self.counters = counters = ArrivalCounters(
            f"{self._prefix}-counters", {name: len(bridges) for name, bridges in owners.items()}
        )
        self.feedback = feedback = FeedbackPages(self._prefix, plan.feedback, bridges)
        shared = (feedback.page, feedback.questions)
        for bridge_id in bridges:
            streams = tuple(
                messages.WantedStream(
                    plan.streams[name].array,
                    plan.streams[name].every,
                    tuple(messages.WantedPart(p.chunk, p.region, p.start, p.step, p.shape) for p in own),
                    plan.slots[name],
                    table.rows[name],
                    counters.rows[name],
                    len(owners[name]),
                    counters.entry(name, owners[name].index(bridge_id)),
                )
                for name, own in wanted.get(bridge_id, {}).items()
            )
            capacity = sum(len(stream.parts) * stream.slots for stream in streams)
            pages: tuple[Page, ...] = ()
            if streams:
                ring = self.rings[bridge_id] = RingReader(f"{self._prefix}-ring", capacity)
                pages = (table.page, counters.page, ring.page)
            start = messages.Start(
                tuple(page.nbytes for page in pages),
                capacity,
                streams,
                self._if_lost,
                tuple(page.nbytes for page in shared),
                feedback.rows[bridge_id],
            )
            yield bridge_id, (start, [page.descriptor for page in (*pages, *shared)])

    def wake_if_blocked(self, bridge_id: int) -> None:
        """Have a rank that waits for a slot look at its connection."""
        ring = self.rings.get(bridge_id)
        if ring is not None and self.table is not None and ring.is_blocked:
            self.table.wake_all()
        if self.feedback is not None:
            self.feedback.wake()

    @property
    def feedback_state(self) -> FeedbackState:
        """For an analytics that takes over."""
        return self.feedback.state if self.feedback is not None else FeedbackState()

    # Journals.

    def journal(self, consumer: str, callbacks: int, agent_id: str) -> Post:
        """Create the journal of a consumer anew, with what it has noted so far."""
        noted = [*self.handled(consumer), *[Handled()] * callbacks]
        if consumer in self._journals:
            self._journals[consumer][0].close()
        page = Page(f"{self._prefix}-journal", WORDS_EACH * callbacks)
        self._journals[consumer] = page, callbacks
        journal = Journal(page.words)
        for callback, handled in enumerate(noted[:callbacks]):
            journal.note(callback, handled)
        return messages.Journal(page.nbytes, agent_id), [page.descriptor]

    def handled(self, consumer: str) -> tuple[Handled, ...]:
        """What a consumer has noted."""
        if consumer not in self._journals:
            return ()
        page, callbacks = self._journals[consumer]
        return Journal(page.words[: WORDS_EACH * callbacks]).read()

    def close(self) -> None:
        """Give all memory back, as far as nobody else has it mapped."""
        for segment in self.segments:
            os.close(segment.descriptor)
        pages = [ring.page for ring in self.rings.values()]
        pages += [page for page, _ in self._journals.values()]
        if self.table is not None and self.counters is not None:
            self.table.wake_all()
            pages += [self.table.page, self.counters.page]
        for page in pages:
            page.close()
        if self.feedback is not None:
            self.feedback.close()
            self.feedback = None
        self.segments.clear()
        self.rings.clear()
        self._journals.clear()
        self.table = self.counters = None


def known_dtypes(plan: StartPlan, without: Boxes) -> dict[str, np.dtype]:
    """The dtypes of the arrays whose chunks have memory of their own, as far as bridges have declared them."""
    return {name: dtype for name, dtype in plan.dtypes.items() if dtype is not None and name not in without}


def _descriptors_of(owner: Owner, plan: StartPlan, boxes: Boxes) -> int:
    """What will be opened for a bridge: its ring, one segment, and one more for each dtype that comes late."""
    wanted = list(owner.parts)
    late = len({plan.streams[name].array for name in wanted if plan.dtypes[name] is None})
    at_once = any(plan.dtypes[name] is not None and name not in boxes for name in wanted)
    return (DESCRIPTORS_PER_PAGE if wanted else 0) + at_once + late


def _lay_out_boxes(array: str, boxes: Boxes, plan: StartPlan) -> tuple[list[RegionSpec], int]:
    dtype = plan.dtypes[array]
    assert dtype is not None
    return lay_out([(box.chunks[0][0], box.shape, dtype, plan.slots[array]) for box in boxes[array]])
