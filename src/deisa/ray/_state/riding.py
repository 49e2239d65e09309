"""Which ended leases may wait until their node is polled again, so that they need no call of their own."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

Step = tuple[str, int]  # array, timestep

FREE_SLOTS = (
    2  # that ranks have for certain while a release waits: for what they send now, and for one timestep more
)


class WaitingReleases:
    """The releases that wait, of each node.

    A node is polled again as soon as it has told something, and it tells of every complete timestep. While a poll is
    under way, a release may wait if the ranks miss nothing: they have other slots.

    Attributes
    ----------
    slots : mapping of str to int
        Of each array; slots of arrays that are not there are released at once.
    """

    def __init__(self) -> None:
        self.slots: Mapping[str, int] = {}
        self._leased: Counter[tuple[str, str]] = (
            Counter()
        )  # timesteps that a node has told of, by node and array
        self._waiting: dict[str, list[Step]] = defaultdict(list)
        self._under_way: set[str] = set()  # nodes with a poll

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def poll(self, node_id: str) -> Sequence[Step]:
        """A node is polled; returns what goes along."""
        self._under_way.add(node_id)
        return self._take(node_id)

    def answer(self, node_id: str, arrays: Iterable[str]) -> None:
        """A node has told that it has leased a timestep of each of these arrays; it will be polled again."""
        self._under_way.discard(node_id)
        self._leased.update((node_id, array) for array in arrays)

    def add(self, node_id: str, steps: Sequence[Step]) -> Sequence[Step]:
        """Add releases of a node; returns all that it has to hear of at once, none if they may wait."""
        self._waiting[node_id] += steps
        if node_id not in self._under_way or all(
            self._may_wait(node_id, array) for array, _ in self._waiting[node_id]
        ):
            return ()
        return self._take(node_id)

    def _may_wait(self, node_id: str, array: str) -> bool:
        return self.slots.get(array, 0) - self._leased[node_id, array] >= FREE_SLOTS

    def _take(self, node_id: str) -> Sequence[Step]:
        steps = self._waiting.pop(node_id, [])
        self._leased.subtract((node_id, array) for array, _ in steps)
        return steps

    def take_all(self) -> Mapping[str, Sequence[Step]]:
        """Hand over what waits, by node."""
        return {node_id: self._take(node_id) for node_id in list(self._waiting)}
