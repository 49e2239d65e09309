"""One consumer of a node: whether it is there, and what it has heard of the node's events."""

from __future__ import annotations

from collections.abc import Sequence

from deisa.ray._state.events import Event
from deisa.ray._state.presence import Presence


class EventLog:
    """The events of a node, for as long as some subscriber has not heard them."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self.first = 0  # number of the first one kept

    @property
    def end(self) -> int:
        """The number of the next event."""
        return self.first + len(self._events)

    def append(self, event: Event) -> None:
        """Note what has happened."""
        self._events.append(event)

    def since(self, cursor: int, most: int | None = None) -> list[Event]:
        """Return the events from a number on, oldest first."""
        start = cursor - self.first
        return self._events[start : None if most is None else start + most]

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
        That its journal has a word for.
    """

    def __init__(self, name: str, presence: Presence) -> None:
        self.name = name
        self.presence = presence
        self.cursor = 0
        self.line: int | None = None
        self.listens = False
        self.callbacks = 0

    def connect(self, line: int, callbacks: int, *, listens: bool) -> None:
        """It has a connection, which shows that it is there for as long as it lasts."""
        self.line, self.callbacks, self.listens = line, callbacks, listens
        self.presence.connected = True

    def disconnect(self) -> int | None:
        """It has none any more; returns which it was."""
        line, self.line, self.listens = self.line, None, False
        self.presence.connected = False
        return line

    def hear(self, log: EventLog, most: int | None = None) -> Sequence[Event]:
        """Take the events that are new to it, oldest first."""
        events = log.since(self.cursor, most)
        self.cursor += len(events)
        return events

    def has_news(self, log: EventLog) -> bool:
        """Whether there are any."""
        return self.cursor < log.end
