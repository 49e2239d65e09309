"""Which releases may wait for a poll: those that go at once, and those of slots that the ranks do not miss."""

from __future__ import annotations

from deisa.ray._state.riding import WaitingReleases


def polled(slots: dict[str, int], *leased: tuple[str, str]) -> WaitingReleases:
    """Nodes with a poll under way, which have told of so many leased timesteps of arrays."""
    releases = WaitingReleases()
    releases.slots = slots
    for node_id, array in leased:
        releases.answer(node_id, [array])
        releases.poll(node_id)
    return releases


def test_a_release_waits_where_ranks_have_two_other_slots() -> None:
    releases = polled({"a": 3}, ("node", "a"))
    assert not releases.add("node", [("a", 0)]) and releases
    releases.answer("node", ["a"])
    assert releases.poll("node") == [("a", 0)]
    assert not releases and not releases.poll("node")
    assert not releases.add("node", [("a", 1)])


def test_a_release_that_leaves_too_few_slots_takes_along_what_waits() -> None:
    releases = polled({"a": 3, "b": 2}, ("node", "a"), ("node", "b"))
    assert not releases.add("node", [("a", 0)])
    assert releases.add("node", [("b", 0)]) == [("a", 0), ("b", 0)]
    releases.answer("node", ["a", "a"])
    releases.poll("node")
    assert releases.add("node", [("a", 1)]) == [("a", 1)]  # another one is leased: the ranks have one slot
    assert not releases


def test_a_release_goes_with_a_poll_that_is_due() -> None:
    releases = polled({"a": 1}, ("node", "a"))
    releases.answer("node", [])
    assert not releases.add("node", [("a", 0)])
    assert releases.poll("node") == [("a", 0)]


def test_nodes_are_apart() -> None:
    releases = polled({"a": 3}, ("one", "a"), ("two", "a"), ("two", "a"))
    assert not releases.add("one", [("a", 0)])
    assert releases.add("two", [("a", 0)]) == [("a", 0)]
    assert releases.take_all() == {"one": [("a", 0)]} and not releases


def test_nothing_waits_where_nobody_knows_how_many_slots_there_are() -> None:
    """An analytics has taken over."""
    assert polled({}, ("node", "a")).add("node", [("a", 7)]) == [("a", 7)]
