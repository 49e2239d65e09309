"""The analytics' line to the agent of its own host: shows that it is there, and keeps what it has handled.

The line needs no messages: the kernel closes it when the process ends, however it ends, and the journal is memory of
the agent that the analytics writes to.
"""

from __future__ import annotations

import socket

from deisa.ray._handoff.fork import close_in_children
from deisa.ray._transport import messages
from deisa.ray._transport.address import check_same_user
from deisa.ray._transport.descriptors import receive_messages
from deisa.ray._transport.pages import map_words
from deisa.ray.errors import ProtocolError

ANSWER_TIMEOUT_S = 10.0


class JournalLine:
    """A connection to the agent at an address, for as long as this process lives or until `close`."""

    def __init__(self, address: str, driver_id: str) -> None:
        self._driver_id = driver_id
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_TIMEOUT_S)
        try:
            self._socket.connect(address)
            check_same_user(self._socket)
        except BaseException:
            self._socket.close()
            raise
        close_in_children(self)

    def journal(self, callbacks: int) -> memoryview:
        """Return one 64-bit word for each callback, with the timestep that it has handled last.

        Raises
        ------
        ProtocolError, OSError
        """
        follow = messages.Follow(messages.PROTOCOL_VERSION, self._driver_id, callbacks, 0)
        self._socket.sendall(messages.encode(follow))
        for message, descriptors in receive_messages(self._socket):
            if not isinstance(message, messages.Journal) or not descriptors:
                raise ProtocolError(f"the agent sent a {type(message).__name__} in place of a journal")
            return map_words(descriptors.pop(), message.nbytes, writable=True)[:callbacks]
        raise ProtocolError("the agent has hung up")

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    close_in_child = close
