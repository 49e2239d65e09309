"""When a simulation can never go on, and what is said of one that waits."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from deisa.ray._session.stalls import others_at_work
from deisa.ray._state.events import OwnersPassed, StepComplete
from deisa.ray._state.stalls import steps_in_the_way
from deisa.ray._state.timeline import Subscription, Timeline, When
from tests.support.patience import wait_until

SLOTS = {"a": 2, "b": 3}
KEPT = [("a", 0), ("a", 1)]


def test_nothing_can_come() -> None:
    assert steps_in_the_way(SLOTS, KEPT, [], {0: "a", 1: "a"}, [0, 1]) == KEPT
    assert steps_in_the_way(SLOTS, KEPT, [("a", 1)], {0: "a"}, [0]) == [("a", 0)]


@pytest.mark.parametrize(
    ("held", "windows", "waiting", "senders"),
    [
        (KEPT, [], {0: "a"}, [0, 1]),  # bridge 1 may still send
        (KEPT[:1], [], {0: "a"}, [0]),  # a slot is free
        (KEPT, KEPT, {0: "a"}, [0]),  # windows explain it
        (KEPT, [], {0: "a", 1: "b"}, [0, 1]),  # `b` has slots
        (KEPT, [], {}, []),  # all have closed
    ],
)
def test_something_can_come(held, windows, waiting, senders) -> None:  # type: ignore[no-untyped-def]
    assert steps_in_the_way(SLOTS, held, windows, waiting, senders) == []


def mesh_timeline(when: When) -> Timeline:
    """Bridges 0 and 1 own `x`, bridge 2 `mesh`, all on one node; `x` is complete at 0 and 1, `mesh` at 0."""
    windows = Subscription((("x", 1), ("mesh", 1)), when)
    timeline = Timeline({"x": {"n": (0, 1)}, "mesh": {"n": (2,)}}, [windows])
    for array, timestep in [("mesh", 0), ("x", 0), ("x", 1)]:
        timeline.owners_passed("n", OwnersPassed(array, timestep))
        timeline.step_complete("n", StepComplete(array, timestep, 0))
    while timeline.next_firing() is not None:
        pass
    return timeline


@pytest.mark.parametrize("when", ["AND", "OR"])
def test_who_has_not_passed_a_timestep(when: When) -> None:
    assert mesh_timeline(when).waiting_for({0: 2, 1: 2, 2: 0}) == (
        "bridge 2, which has not passed timestep 1 (at timestep 0): a callback that has timestep 1 also looks at "
        "'mesh'. A bridge that sends nothing for a timestep says so with advance()"
    )


def test_who_is_behind_on_a_node() -> None:
    timeline = Timeline({"x": {"n": (0, 1, 2)}}, [Subscription((("x", 1),), "AND")])
    assert (
        timeline.waiting_for({0: 5, 1: 3, 2: 5})
        == "'x' from bridge 1 (at timestep 3), others being at timestep 5"
    )
    assert timeline.waiting_for({0: 5, 1: float("-inf")}) == (
        "'x' from bridge 1 (nothing sent yet), others being at timestep 5"
    )
    assert timeline.waiting_for({0: 5, 1: 5, 2: 5}) == "the next timestep"


def test_who_is_behind_on_another_node() -> None:
    timeline = Timeline({"x": {"n": (0,), "m": (1, 2)}}, [Subscription((("x", 1),), "AND")])
    timeline.step_complete("n", StepComplete("x", 4, 0))
    assert timeline.waiting_for() == "'x' at timestep 4 from bridges 1 and 2"
    assert timeline.waiting_for({0: 4, 1: 4, 2: 3}) == "'x' at timestep 4 from bridge 2 (at timestep 3)"


def test_threads_that_only_wait_are_not_at_work() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        waiting: queue.Queue[int] = queue.Queue()
        reader = threading.Thread(target=waiting.get)
        reader.start()
        wait_until(lambda: not others_at_work(), "nobody is at work")
        busy = threading.Event()

        def work() -> None:
            while not busy.is_set():
                pass

        worker = pool.submit(work)
        wait_until(others_at_work, "somebody is at work")
        busy.set()
        worker.result()
        waiting.put(1)
        reader.join()
