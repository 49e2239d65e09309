"""The pages that an agent and its ranks share."""

from __future__ import annotations

import os
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._transport.memory import map_segment
from deisa.ray._transport.pages import Board, Fence, OutboxReader, OutboxWriter, Page, TallyRow, map_words
from deisa.ray.errors import ProtocolError


def test_only_the_agent_writes_on_its_board() -> None:
    board = Board("deisa-test-board", {"a": 2, "b": 1})
    theirs = map_words(os.dup(board.page.descriptor), board.page.nbytes, writable=False)
    assert theirs[board.rows["a"] :][:3].tolist() == [2, 0, 1]
    assert theirs[board.rows["b"] :][:2].tolist() == [1, 0]
    board.give("a", 2, 1)
    board.give("a", 3, 0)
    assert theirs[board.rows["a"] :][:3].tolist() == [4, 1, 0]
    with pytest.raises(TypeError, match="read-only"):
        theirs[0] = 99
    with pytest.raises(PermissionError):
        map_segment(board.page.descriptor, board.page.nbytes, writable=True)
    with pytest.raises(PermissionError):
        os.pwrite(board.page.descriptor, b"x", 0)
    board.page.close()


@given(st.integers(1, 5), st.lists(st.one_of(st.just("take"), st.integers(-(2**63), 2**63 - 1)), max_size=40))
def test_an_outbox_gives_every_entry_once_and_in_order(capacity: int, actions: list[str | int]) -> None:
    reader = OutboxReader("deisa-test-outbox", capacity)
    words = map_words(os.dup(reader.page.descriptor), reader.page.nbytes, writable=True)
    writer = OutboxWriter(words, capacity, Fence())
    under_way: deque[tuple[int, int]] = deque()
    for number, action in enumerate(actions):
        if isinstance(action, int) and len(under_way) < capacity:
            writer.add(number, action)
            under_way.append((number, action))
        elif action == "take":
            assert reader.take() == list(under_way)
            under_way.clear()
    assert reader.take() == list(under_way)
    reader.page.close()


@pytest.mark.parametrize("added", [3, -1, 2**62])
def test_an_outbox_that_says_more_than_it_can_hold_is_refused(added: int) -> None:
    reader = OutboxReader("deisa-test-outbox", 2)
    words = map_words(os.dup(reader.page.descriptor), reader.page.nbytes, writable=True)
    words[0] = added
    with pytest.raises(ProtocolError, match="more chunks than it has slots"):
        reader.take()
    reader.page.close()


@given(st.data(), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_the_last_bridge_of_a_timestep_knows_it(data: st.DataObject, chunks: list[int]) -> None:
    """Whoever hands the last chunk of a timestep over is told so, and nobody else."""
    page = Page("deisa-test-tally", 2 + len(chunks))
    rows = [
        TallyRow(
            page.words, 2, len(chunks), 2 + number, count, memoryview(bytearray(8)).cast("q"), 0, Fence()
        )
        for number, count in enumerate(chunks)
    ]
    handed_over = [0] * len(chunks)
    complete = 0
    for _ in range(30):
        number = data.draw(st.sampled_from(range(len(chunks))))
        handed_over[number] += 1
        now = min(n // count for n, count in zip(handed_over, chunks, strict=True))
        assert rows[number].is_last() == (now > complete)
        complete = now
    del rows
    page.close()
