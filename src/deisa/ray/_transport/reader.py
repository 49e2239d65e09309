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

from deisa.ray._transport import messages
from deisa.ray._transport.address import check_same_user
from deisa.ray._transport.descriptors import RECEIVE_BYTES, receive_messages
from deisa.ray._transport.memory import map_segments, slot_view
from deisa.ray._transport.messages import RegionSpec
from deisa.ray.errors import PeerError, ProtocolError, SessionEndedError

ATTACH_TIMEOUT_S = 30.0

_attached: dict[str, AgentMemory] = {}
_attaching = threading.Lock()


class AgentMemory:
    """The mapped regions of one agent."""

    def __init__(self, address: str, agent_id: str) -> None:
        self._address = address
        self._agent_id = agent_id
        self._regions: dict[int, tuple[mmap.mmap, RegionSpec]] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(ATTACH_TIMEOUT_S)
            self._socket.connect(address)
            check_same_user(self._socket)
            self._map_all()
            self._socket.settimeout(None)
        except BaseException:
            self._socket.close()
            raise
        threading.Thread(target=self._wait_for_end, name="deisa-reader", daemon=True).start()

    def _map_all(self) -> None:
        self._socket.sendall(messages.encode(messages.Attach(messages.PROTOCOL_VERSION)))
        for message, descriptors in receive_messages(self._socket):
            match message:
                case messages.Slots():
                    self._map(message, descriptors)
                case messages.Attached(agent_id, _):
                    if agent_id != self._agent_id:
                        raise SessionEndedError(
                            "the agent that held this chunk has been replaced by another one"
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
                memory = AgentMemory(address, agent_id)
            except PeerError:
                raise
            except OSError as exc:
                raise SessionEndedError(
                    f"the chunk memory of agent {agent_id} is not on this host or is gone: chunks can be read while "
                    "their session lasts, by tasks on their node; compute or persist inside the callback"
                ) from exc
            _attached[agent_id] = memory
        return memory


def probe(address: str) -> tuple[str, float]:
    """Ask who serves an address: the agent's id, and how long it has not heard from its analytics."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ATTACH_TIMEOUT_S)
        connection.connect(address)
        check_same_user(connection)
        connection.sendall(messages.encode(messages.Attach(messages.PROTOCOL_VERSION)))
        for message, descriptors in receive_messages(connection):
            while descriptors:
                os.close(descriptors.pop())
            if isinstance(message, messages.Attached):
                return message.agent_id, message.quiet_s
    raise ProtocolError("the agent gave no answer")
