"""The pages that an agent and its ranks share."""

from __future__ import annotations

import os
import threading
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._state.arrivals import Entry
from deisa.ray._transport.memory import map_segment
from deisa.ray._transport.pages import (
    HEADER_WORDS,
    NO_TIMESTEP,
    ArrivalCounters,
    RingReader,
    SlotTable,
    Submitted,
    map_words,
)
from deisa.ray.errors import ProtocolError
from tests.oracle import pages as rank
from tests.support.patience import PATIENCE_S


def test_only_the_agent_writes_to_its_slot_table() -> None:
    table = SlotTable("deisa-test-table", {"a": 2, "b": 1})
    page = table.page
    theirs = rank.map_page(os.dup(page.descriptor), page.nbytes, rank.SLOT_TABLE)
    a, b = (rank.SlotTableRow(theirs, table.rows[name], slots) for name, slots in (("a", 2), ("b", 1)))
    assert [a.has_slot(n) for n in range(3)] == [True, True, False]
    assert [b.has_slot(n) for n in range(2)] == [True, False]
    assert [a.slot_of(0), a.slot_of(1), b.slot_of(0)] == [0, 1, 0]
    before = a.wakes()
    table.grant("a", 2, 1)
    assert a.wakes() != before
    table.grant("a", 3, 0)
    assert [a.has_slot(n) for n in range(5)] == [True] * 4 + [False]
    assert [a.slot_of(2), a.slot_of(3)] == [1, 0]
    assert not b.has_slot(1)
    with pytest.raises(TypeError, match="read-only"):
        theirs[0] = 99
    with pytest.raises(PermissionError):
        map_segment(page.descriptor, page.nbytes, writable=True)
    with pytest.raises(PermissionError):
        os.pwrite(page.descriptor, b"x", 0)
    page.close()


def test_a_rank_that_waits_is_woken() -> None:
    table = SlotTable("deisa-test-table", {"a": 1, "b": 1})
    theirs = rank.map_page(os.dup(table.page.descriptor), table.page.nbytes, rank.SLOT_TABLE)
    a, b = (rank.SlotTableRow(theirs, table.rows[name], 1) for name in ("a", "b"))
    waits = threading.Thread(target=a.wait, args=(a.wakes(), PATIENCE_S))
    waits.start()
    table.wake("b")
    assert waits.is_alive()
    table.wake("a")
    waits.join(PATIENCE_S / 2)
    assert not waits.is_alive()
    seen = b.wakes()
    table.wake_all()
    b.wait(seen, PATIENCE_S)  # it has been woken before, and does not wait
    table.page.close()


@given(st.integers(1, 5), st.lists(st.one_of(st.just("look"), st.integers(-(2**63), 2**63 - 1)), max_size=40))
def test_a_ring_gives_every_entry_once_and_in_order(capacity: int, actions: list[str | int]) -> None:
    reader = RingReader("deisa-test-ring", capacity)
    words = rank.map_page(os.dup(reader.page.descriptor), reader.page.nbytes, rank.RING)
    writer = rank.RingWriter(words, capacity)
    under_way: deque[Entry] = deque()
    for number, action in enumerate(actions):
        if isinstance(action, int) and len(under_way) < capacity:
            time = None if action % 3 == 0 else action / 7
            writer.submit([number], action, time)
            under_way.append(Entry(number, action, 0, time))
        elif action == "look":
            assert reader.look() == Submitted(tuple(under_way), None, None)
            under_way.clear()
    assert reader.look() == Submitted(tuple(under_way), None, None)
    reader.page.close()


def test_a_ring_says_where_its_bridge_is() -> None:
    reader = RingReader("deisa-test-ring", 2)
    writer = rank.RingWriter(rank.map_page(os.dup(reader.page.descriptor), reader.page.nbytes, rank.RING), 2)
    assert reader.look() == Submitted((), None, None) and not reader.is_blocked
    writer.move_on(0)
    writer.block(0)
    assert reader.look() == Submitted((), 0, 0) and reader.is_blocked
    writer.unblock()
    writer.move_on(-7)
    assert reader.look() == Submitted((), -7, None) and not reader.is_blocked
    reader.page.close()


@pytest.mark.parametrize("submitted", [3, -1, 2**62, -(2**63), 2**63 - 1])
def test_a_ring_that_says_more_than_it_can_hold_is_refused(submitted: int) -> None:
    reader = RingReader("deisa-test-ring", 2)
    words = map_words(os.dup(reader.page.descriptor), reader.page.nbytes, writable=True)
    words[rank.SUBMITTED] = submitted
    with pytest.raises(ProtocolError, match="more chunks than it has slots"):
        reader.look()
    reader.page.close()


@given(st.data(), st.dictionaries(st.sampled_from("abc"), st.integers(1, 4), min_size=1))
def test_the_last_bridge_of_a_timestep_knows_it(data: st.DataObject, owners: dict[str, int]) -> None:
    """Whoever submits the last chunk of a timestep is told so, and nobody else; arrays do not mix."""
    counters = ArrivalCounters("deisa-test-counters", owners)
    words = rank.map_page(os.dup(counters.page.descriptor), counters.page.nbytes, rank.COUNTERS)
    entries = {
        (name, i): rank.CountersEntry(words, counters.rows[name], count, counters.entry(name, i))
        for name, count in owners.items()
        for i in range(count)
    }
    whole, passed = dict.fromkeys(entries, 0), dict.fromkeys(entries, NO_TIMESTEP)
    for _ in range(30):
        who = data.draw(st.sampled_from(sorted(entries)))
        others = [other for other in entries if other[0] == who[0] and other != who]
        if data.draw(st.booleans()):
            whole[who] += 1
            last = all(whole[other] >= whole[who] for other in others)
            assert entries[who].count_whole(whole[who]) == last
        else:
            passed[who] = max(passed[who], 0) + 1
            last = all(passed[other] >= passed[who] for other in others)
            assert entries[who].move_on(passed[who]) == last
    counters.page.close()


def test_one_rank_notifies_for_all_until_the_agent_looks() -> None:
    counters = ArrivalCounters("deisa-test-counters", {"a": 2})
    words = rank.map_page(os.dup(counters.page.descriptor), counters.page.nbytes, rank.COUNTERS)
    assert [rank.must_notify(words) for _ in range(3)] == [True, False, False]
    counters.begin_look()
    assert rank.must_notify(words)
    counters.page.close()


def test_pages_start_with_their_header() -> None:
    """As ``docs/protocol.md`` has it."""
    table = SlotTable("deisa-test-table", {"a": 3})
    counters = ArrivalCounters("deisa-test-counters", {"a": 2})
    ring = RingReader("deisa-test-ring", 4)
    for page, magic, words in (
        (table.page, b"deisaSLT", 5),
        (counters.page, b"deisaCNT", 4),
        (ring.page, b"deisaRNG", 16),
    ):
        assert bytes(page.words[:1]) == magic
        assert page.words[1:4].tolist() == [2, HEADER_WORDS, HEADER_WORDS + words]
    assert ring.page.words[4:8].tolist() == [4, 0, -(2**63), 0]
    assert counters.page.words[8:12].tolist() == [0, -(2**63)] * 2
    for page in (table.page, counters.page, ring.page):
        page.close()
