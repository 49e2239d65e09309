"""The reader's end: map a node's chunk memory read-only, for the tasks that run beside it.

A process attaches to an agent once and keeps its mappings for as long as the agent lives; a thread
that waits for the end of the connection drops them, so that an idle Ray worker holds no memory of
a session that is over.
"""

from __future__ import annotations

import mmap
import os
import socket
import threading

import numpy as np

from deisa.ray._handoff.fork import close_in_children
from deisa.ray._transport import messages
from deisa.ray._transport.address import check_same_user, shown
from deisa.ray._transport.descriptors import RECEIVE_BYTES, receive_messages
from deisa.ray._transport.memory import map_segments, slot_view
from deisa.ray._transport.messages import RegionSpec
from deisa.ray._transport.peers import process_has_ended
from deisa.ray.errors import PeerError, ProtocolError, SessionEndedError

ATTACH_TIMEOUT_S = 30.0
NO_SEGMENTS = 2**62  # is more than any agent has


class OwnerHasEnded(ConnectionRefusedError):
    """A child of the process that listened keeps its socket, and nobody will ever answer."""


_attached: dict[str, AgentMemory] = {}
_attaching = threading.Lock()


class AgentMemory:
    """The mapped regions of one agent."""

    def __init__(self, address: str, agent_id: str) -> None:
        self._address = address
        self._agent_id = agent_id
        self._regions: dict[int, tuple[mmap.mmap, RegionSpec]] = {}
        self._segments = 0  # that are mapped
        self._socket = _connect(address)
        try:
            self._map_new(self._socket)
            self._socket.settimeout(None)
        except BaseException:
            self._socket.close()
            raise
        close_in_children(self)
        threading.Thread(target=self._wait_for_end, name="deisa-reader", daemon=True).start()

    def map_late(self) -> None:
        """Map what has come since: memory of arrays whose dtype was declared late."""
        with _connect(self._address) as connection:  # a thread waits for the end of the other one
            self._map_new(connection)

    def _map_new(self, connection: socket.socket) -> None:
        connection.sendall(messages.encode(messages.Attach(messages.PROTOCOL_VERSION, self._segments)))
        for message, descriptors in receive_messages(connection):
            match message:
                case messages.Slots():
                    self._map(message, descriptors)
                case messages.Attached(agent_id):
                    if agent_id != self._agent_id:
                        raise SessionEndedError(
                            "the agent that held this chunk has been replaced by another one; compute or persist what "
                            "is to outlive its run"
                        )
                    return
                case messages.Fail(_, text):
                    raise ProtocolError(text)
                case _:
                    raise ProtocolError(f"unexpected {type(message).__name__} from the agent")
        raise SessionEndedError("the agent ended while its memory was being mapped")

    def _map(self, message: messages.Slots, descriptors: list[int]) -> None:
        received = descriptors[: len(message.sizes)]
        del descriptors[: len(message.sizes)]
        memory = map_segments(received, message.sizes, writable=False)
        for spec in message.regions:
            self._regions[spec.region] = (memory[spec.segment], spec)
        self._segments += len(memory)

    def _wait_for_end(self) -> None:
        try:
            while self._socket.recv(RECEIVE_BYTES):
                pass
        except OSError:
            pass
        with _attaching:
            if _attached.get(self._agent_id) is self:
                del _attached[self._agent_id]
        self._regions.clear()
        self._socket.close()

    def close_in_child(self) -> None:
        """Close a child's copy of the socket."""
        self._socket.close()

    def chunk(self, region: int, slot: int) -> np.ndarray:
        """Return one slot as a read-only array over the shared memory."""
        try:
            memory, spec = self._regions[region]
        except KeyError:
            raise SessionEndedError(
                f"region {region} is not in the memory of agent {self._agent_id}"
            ) from None
        return slot_view(memory, spec, slot)

    def has(self, region: int) -> bool:
        """Whether the region is mapped; one whose dtype came late may not be yet."""
        return region in self._regions


def _connect(address: str) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(ATTACH_TIMEOUT_S)
        connection.connect(address)
        if process_has_ended(check_same_user(connection)):
            raise OwnerHasEnded(f"the process that listened at {shown(address)} has ended")
    except BaseException:
        connection.close()
        raise
    return connection


def _forget_in_child() -> None:
    """A child of this process attaches anew; another thread of the parent may have held the lock."""
    global _attaching
    _attaching = threading.Lock()
    _attached.clear()


os.register_at_fork(after_in_child=_forget_in_child)


def attach(address: str, agent_id: str, region: int) -> AgentMemory:
    """Return the memory of an agent on this host, mapped once for the process.

    Raises
    ------
    SessionEndedError
        When no such agent is on this host any more, or it is not on this host.
    """
    with _attaching:
        memory = _attached.get(agent_id)
        if memory is None or not memory.has(region):
            try:
                if memory is None:
                    memory = AgentMemory(address, agent_id)
                else:
                    memory.map_late()
            except PeerError:
                raise
            except OSError as exc:
                raise SessionEndedError(
                    f"the chunk memory of agent {agent_id} is not on this host or is gone: chunks can be read while "
                    "their session lasts, by tasks on their node; compute or persist inside the callback"
                ) from exc
            _attached[agent_id] = memory
        return memory


def probe(address: str) -> messages.Attached:
    """Ask who serves an address: the agent's id, and how its analytics is."""
    with _connect(address) as connection:
        connection.sendall(messages.encode(messages.Attach(messages.PROTOCOL_VERSION, NO_SEGMENTS)))
        for message, descriptors in receive_messages(connection):
            while descriptors:
                os.close(descriptors.pop())
            if isinstance(message, messages.Attached):
                return message
    raise ProtocolError("the agent gave no answer")
