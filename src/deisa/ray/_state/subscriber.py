"""One consumer of a node: whether it is there, and what it has heard of the node's events."""

from __future__ import annotations

from collections.abc import Sequence

from deisa.ray._state.events import BridgeJoined, Event, OwnersPassed
from deisa.ray._state.presence import Presence


class EventLog:
    """The events of a node, for as long as some subscriber has not heard them.

    They are few even where nobody listens: arrays become complete as long as there are slots, and of what owners have
    passed the latest counts.

    Attributes
    ----------
    first : int
        Number of the first event that is kept.
    """

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._heard = 0  # number of the first event that no subscriber has heard
        self.first = 0

    @property
    def end(self) -> int:
        """The number of the next event."""
        return self.first + len(self._events)

    def append(self, event: Event) -> None:
        """Note what has happened."""
        if isinstance(event, OwnersPassed):
            self._forget_last_passed(event.array)
        self._events.append(event)

    def _forget_last_passed(self, array: str) -> None:
        """Drop the last event if it says how far the owners of an array were, or the one before, and so on."""
        for index in range(len(self._events) - 1, self._heard - self.first - 1, -1):
            event = self._events[index]
            if not isinstance(event, OwnersPassed):
                break
            if event.array == array:
                del self._events[index]
                break

    def take(self, cursor: int, most: int | None = None) -> list[Event]:
        """Return the events from a number on, oldest first; of at most so many, the first `BridgeJoined` is the last.

        A bridge may describe as many chunks as a message has room for.
        """
        start = cursor - self.first
        events = self._events[start : None if most is None else start + most]
        if most is not None:
            joined = (count for count, event in enumerate(events, 1) if isinstance(event, BridgeJoined))
            del events[next(joined, most) :]
        self._heard = max(self._heard, cursor + len(events))
        return events

    def forget(self, before: int) -> None:
        """Drop the events before a number: everybody has heard them."""
        del self._events[: before - self.first]
        self.first = max(self.first, before)


class Subscriber:
    """An analytics, or what takes its place.

    Parameters
    ----------
    name : str
        As in a lease.
    presence : Presence

    Attributes
    ----------
    cursor : int
        The number of the next event to be told.
    line : int or None
        Its connection to this node, if it has one.
    listens : bool
        Whether events go there.
    callbacks : int
        That its journal has words for.
    """

    def __init__(self, name: str, presence: Presence) -> None:
        self.name = name
        self.presence = presence
        self.cursor = 0
        self.line: int | None = None
        self.listens = False
        self.callbacks = 0

    def connect(self, line: int, callbacks: int, *, listens: bool) -> bool:
        """It has a connection, which shows that it is there; returns whether it had been taken for gone."""
        self.line, self.callbacks, self.listens = line, callbacks, listens
        return self.presence.connect()

    def disconnect(self) -> int | None:
        """It has none any more; returns which it was."""
        line, self.line, self.listens = self.line, None, False
        self.presence.connected = False
        return line

    def hear(self, log: EventLog, most: int | None = None) -> Sequence[Event]:
        """Take the events that are new to it, oldest first."""
        events = log.take(self.cursor, most)
        self.cursor += len(events)
        return events

    def has_news(self, log: EventLog) -> bool:
        """Whether there are any."""
        return self.cursor < log.end
