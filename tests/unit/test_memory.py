"""Segments, slots, and the bound on memory."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._transport import memory, messages
from deisa.ray._transport.address import agent_address
from deisa.ray._transport.memory import (
    PAGE_BYTES,
    check_fits,
    contiguous_strides,
    create_segment,
    human_bytes,
    lay_out,
    map_segment,
    slot_size,
    slot_view,
    within,
)
from deisa.ray._transport.messages import RegionSpec, encode
from deisa.ray.errors import MemoryBoundError, ProtocolError
from tests.support.patience import PATIENCE_S
from tests.unit.agent import Client, new_settings


@pytest.fixture
def segment() -> Iterator[int]:
    descriptor = create_segment("deisa-test", 3 * PAGE_BYTES)
    yield descriptor
    os.close(descriptor)


def test_a_segment_never_changes_size(segment: int) -> None:
    for nbytes in (0, PAGE_BYTES, 4 * PAGE_BYTES):
        with pytest.raises(PermissionError):
            os.ftruncate(segment, nbytes)
    with pytest.raises(PermissionError):
        os.pwrite(segment, b"x", 3 * PAGE_BYTES)
    assert os.fstat(segment).st_size == 3 * PAGE_BYTES
    assert not os.get_inheritable(segment)


def test_what_one_end_writes_the_other_end_reads(segment: int) -> None:
    (spec,), nbytes = lay_out([(0, (2, 3), np.dtype("i4"), 2)])
    assert nbytes == 2 * PAGE_BYTES
    mine, theirs = (map_segment(segment, nbytes, writable=w) for w in (True, False))
    slot_view(mine, spec, 1)[...] = np.arange(6).reshape(2, 3)
    read = slot_view(theirs, spec, 1)
    np.testing.assert_array_equal(read, np.arange(6).reshape(2, 3))
    assert not read.flags.writeable
    assert not slot_view(theirs, spec, 0).any()
    with pytest.raises(ValueError, match="read-only"):
        read[...] = 0


def test_a_segment_that_is_too_small_is_not_mapped(segment: int) -> None:
    with pytest.raises(
        ProtocolError, match=f"has {3 * PAGE_BYTES} bytes, {3 * PAGE_BYTES + 1} were announced"
    ):
        map_segment(segment, 3 * PAGE_BYTES + 1, writable=False)


def receive_slots(client: Client, segment: int, nbytes: int, *regions: RegionSpec) -> None:
    """Have a rank start with regions of a segment; no callback asks for its arrays."""
    settings = new_settings()
    with (
        socket.socket(socket.AF_UNIX) as listener,
        ThreadPoolExecutor(1) as threads,
    ):
        listener.bind(agent_address(settings))
        listener.listen()
        rank = threads.submit(
            client, bridge_id=0, arrays_metadata={}, system_metadata={"world_size": 1}, settings=settings
        )
        agent, _ = listener.accept()
        with agent:
            agent.settimeout(PATIENCE_S)
            agent.sendall(encode(messages.Progress("")))
            socket.send_fds(agent, [encode(messages.Slots((nbytes,), regions))], [segment])
            agent.sendall(encode(messages.Start((), 0, ())))
            rank.result(PATIENCE_S).close()


def test_a_rank_brings_every_page_of_its_slots_in(client: Client, segment: int) -> None:
    assert os.fstat(segment).st_blocks == 0
    (spec,), nbytes = lay_out([(0, (3 * PAGE_BYTES // 8,), np.dtype("f8"), 1)])
    receive_slots(client, segment, nbytes, spec)
    assert os.fstat(segment).st_blocks * 512 == 3 * PAGE_BYTES


def test_a_rank_brings_the_pages_of_all_its_slots_in(client: Client, segment: int) -> None:
    (spec,), nbytes = lay_out([(0, (4,), np.dtype("f8"), 3)])
    receive_slots(client, segment, nbytes, spec)
    assert os.fstat(segment).st_blocks * 512 == 3 * PAGE_BYTES


def test_a_rank_touches_its_own_part_of_a_box(client: Client, segment: int) -> None:
    (box,), nbytes = lay_out([(4, (3, PAGE_BYTES // 4), np.dtype("i4"), 1)])
    memory = map_segment(segment, nbytes, writable=True)
    slot_view(memory, box, 0)[...] = -1
    receive_slots(client, segment, nbytes, within(box, 5, (1, 3), (2, 5)))
    touched = slot_view(memory, box, 0) != -1
    own = np.zeros(box.shape, bool)
    own[1:3, 3:8] = True
    assert touched.any() and not touched[~own].any()


def test_a_rank_brings_the_pages_of_its_part_of_a_box_in(client: Client, segment: int) -> None:
    (box,), nbytes = lay_out([(4, (3, PAGE_BYTES // 4), np.dtype("f4"), 1)])
    receive_slots(client, segment, nbytes, within(box, 5, (1, 3), (2, 5)))
    assert os.fstat(segment).st_blocks * 512 == 2 * PAGE_BYTES


def test_slots_are_whole_pages() -> None:
    assert slot_size((), np.dtype("i1")) == PAGE_BYTES
    assert slot_size((PAGE_BYTES,), np.dtype("i1")) == PAGE_BYTES
    assert slot_size((PAGE_BYTES + 1,), np.dtype("i1")) == 2 * PAGE_BYTES


CHUNKS = st.tuples(
    st.lists(st.integers(1, 40), max_size=3).map(tuple),
    st.sampled_from([np.dtype("f8"), np.dtype("i1"), np.dtype("V37")]),
    st.integers(1, 5),
)


@given(st.lists(CHUNKS, min_size=1, max_size=6), st.integers(0, 3))
def test_nothing_overlaps(chunks: list, number: int) -> None:  # type: ignore[type-arg]
    regions, nbytes = lay_out([(7 * i, *chunk) for i, chunk in enumerate(chunks)], segment=number)
    taken = []
    for i, (spec, (shape, dtype, slots)) in enumerate(zip(regions, chunks, strict=True)):
        assert (spec.region, spec.segment, spec.shape, spec.dtype, spec.slots) == (
            7 * i,
            number,
            shape,
            dtype,
            slots,
        )
        assert spec.strides == np.empty(shape, dtype).strides == contiguous_strides(shape, dtype.itemsize)
        for slot in range(slots):
            start = spec.base + slot * spec.slot_bytes
            assert start % PAGE_BYTES == 0
            taken.append((start, start + np.empty(shape, dtype).nbytes))
    taken.sort()
    assert taken[0][0] >= 0
    assert taken[-1][1] <= nbytes
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(taken))


def test_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10 * 2**30)
    check_fits(8 * 2**30, 0.8, "session 'x'")
    with pytest.raises(MemoryBoundError) as caught:
        check_fits(8 * 2**30 + 1, 0.8, "session 'x'")
    assert str(caught.value) == (
        "session 'x' needs 8.0 GiB of chunk memory, but only 8.0 GiB may be used on this node (80% of 10.0 GiB "
        "available); use smaller windows, a smaller max_simulation_ahead, fewer ranks per node, or raise "
        "memory_fraction"
    )


def test_there_is_some_memory() -> None:
    assert 2**20 < memory.available_bytes() < 2**50


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1.5 * 2**20, "1.5 MiB"),
        (2**30, "1.0 GiB"),
        (3 * 2**40, "3.0 TiB"),
        (5000 * 2**40, "5000.0 TiB"),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text
