"""An agent's connections: who comes, who has gone, and sending without ever waiting for a peer."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import selectors
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum

from deisa.ray._handoff.fork import close_in_children
from deisa.ray._transport import messages
from deisa.ray._transport.address import check_same_user
from deisa.ray._transport.limits import MemoryLimit
from deisa.ray._transport.listening import Listener
from deisa.ray._transport.messages import FrameBuffer, Message
from deisa.ray._transport.peers import open_process
from deisa.ray.errors import PeerError

logger = logging.getLogger("deisa.ray.agent")

PASSING = {errno.ENOBUFS, errno.ENOMEM, errno.ETOOMANYREFS, errno.EINTR}  # the same will work later


class Ready(Enum):
    """What `Connections.wait` has seen."""

    SOMEBODY_COMES = "connection to be accepted"
    TO_READ = "bytes to be read"
    TO_WRITE = "room for more bytes"
    ENDED = "end of the peer's process"


@dataclass(slots=True, eq=False)
class Connection:
    """A peer: a rank, a reader, or an analytics."""

    number: int
    socket: socket.socket
    pid: int
    process: int | None = None  # from `open_process`
    frames: FrameBuffer = field(default_factory=FrameBuffer)
    outgoing: deque[tuple[memoryview, list[int]]] = field(default_factory=deque)
    limits: tuple[MemoryLimit, ...] = ()  # that a rank has said it is under

    def queue(self, message: Message, descriptors: Sequence[int]) -> None:
        """Have a message go with the next `Connections.flush`."""
        self.outgoing.append((memoryview(messages.encode(message)), list(descriptors)))


class Connections:
    """The connections of an agent, and the socket at which it listens, if it does.

    One thread waits. Others may call everything else, with a lock of theirs around it.
    """

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener
        self._open: dict[int, Connection] = {}  # by number
        self._numbers = itertools.count()
        self._stuck: set[Connection] = set()  # to which something could not be sent for the moment
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._selector.register(self._wake, selectors.EVENT_READ)
        if listener is not None:
            self._selector.register(listener.socket, selectors.EVENT_READ)
        close_in_children(self)

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._open.values()))

    def __contains__(self, connection: Connection) -> bool:
        return connection.number in self._open

    def get(self, number: int) -> Connection | None:
        """Return the connection of a number, if it has not ended."""
        return self._open.get(number)

    def wake(self) -> None:
        """End the wait of the thread that waits."""
        os.eventfd_write(self._wake, 1)

    def wait(self, timeout_s: float) -> list[tuple[Ready, Connection | None]]:
        """Wait until anything happens, and say what."""
        seen: list[tuple[Ready, Connection | None]] = []
        for key, mask in self._selector.select(timeout_s):
            connection: Connection | None = key.data
            if connection is None:
                if key.fileobj == self._wake:
                    os.eventfd_read(self._wake)
                else:
                    seen.append((Ready.SOMEBODY_COMES, None))
            elif key.fileobj is not connection.socket:
                seen.append((Ready.ENDED, connection))
            else:
                if mask & selectors.EVENT_WRITE:
                    seen.append((Ready.TO_WRITE, connection))
                if mask & selectors.EVENT_READ:
                    seen.append((Ready.TO_READ, connection))
        return seen

    def accept(self) -> tuple[Connection, bool] | None:
        """Let somebody in; returns also whether its process has ended by now. None where nobody may come in.

        Raises
        ------
        OSError
        """
        assert self._listener is not None
        try:
            accepted, _ = self._listener.socket.accept()
        except BlockingIOError:
            return None
        try:
            pid = check_same_user(accepted)
        except PeerError as error:
            logger.warning("%s", error)
            accepted.close()
            return None
        accepted.setblocking(False)
        connection = Connection(next(self._numbers), accepted, pid)
        self._open[connection.number] = connection
        self._selector.register(accepted, selectors.EVENT_READ, connection)
        try:
            connection.process = open_process(pid)
        except ProcessLookupError:
            return connection, True
        if connection.process is not None:
            self._selector.register(connection.process, selectors.EVENT_READ, connection)
        return connection, False

    def flush(self, connection: Connection) -> None:
        """Send what is queued as far as the socket takes it; the rest goes when it is writable again.

        Raises
        ------
        OSError
            When nothing can be sent any more.
        """
        if connection not in self:
            return
        self._stuck.discard(connection)
        try:
            _send(connection)
        except (BrokenPipeError, ConnectionResetError):
            connection.outgoing.clear()  # a dead peer shows when it is read from
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno not in PASSING:
                raise
            self._stuck.add(connection)  # it may look writable all the time: once in every round is enough
        waits = connection.outgoing and connection not in self._stuck
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if waits else 0)
        self._selector.modify(connection.socket, wanted, connection)

    @property
    def stuck(self) -> list[Connection]:
        """Connections to be flushed again after a while, though nothing will say so."""
        return list(self._stuck)

    def hang_up(self, connection: Connection) -> None:
        """End a connection."""
        self._open.pop(connection.number, None)
        self._stuck.discard(connection)
        self._selector.unregister(connection.socket)
        connection.socket.close()
        if connection.process is not None:
            self._selector.unregister(connection.process)
            os.close(connection.process)
            connection.process = None

    def close(self) -> None:
        """End all connections, and stop listening."""
        for connection in self:
            self.hang_up(connection)
        if self._listener is not None:
            self._listener.close()
        self._selector.close()
        os.close(self._wake)

    def close_in_child(self) -> None:
        """Close a forked child's copies: peers see when this process ends, and others may listen.

        The selector's own table is the parent's: nothing may be unregistered here.
        """
        for connection in self:
            connection.socket.close()
            if connection.process is not None:
                os.close(connection.process)
        if self._listener is not None:
            self._listener.socket.close()


def _send(connection: Connection) -> None:
    outgoing = connection.outgoing
    while outgoing:
        data, descriptors = outgoing[0]
        peer = connection.socket
        sent = socket.send_fds(peer, [data], descriptors) if descriptors else peer.send(data)
        if sent < len(data):
            outgoing[0] = (data[sent:], [])
        else:
            outgoing.popleft()
