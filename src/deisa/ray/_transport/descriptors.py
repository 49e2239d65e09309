"""Receive bytes, or messages, and the file descriptors beside them.

``socket.recv_fds`` would do, but it drops its flags (as of Python 3.13).
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Generator

from deisa.ray._transport.messages import MAX_MESSAGE_BYTES, FrameBuffer, Message

RECEIVE_BYTES = 65536
MAX_DESCRIPTORS = 253  # the kernel's limit for one message
_INT_BYTES = array.array("i").itemsize
_ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_DESCRIPTORS * _INT_BYTES)


def receive_with_descriptors(connection: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """Receive some bytes (none: the other end has gone) and the descriptors that came along."""
    data, ancillary, _, _ = connection.recvmsg(
        RECEIVE_BYTES, _ANCILLARY_BYTES, flags | socket.MSG_CMSG_CLOEXEC
    )
    descriptors = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(payload[: len(payload) - len(payload) % _INT_BYTES])
    return data, list(descriptors)


def receive_messages(
    connection: socket.socket, most_bytes: int = MAX_MESSAGE_BYTES
) -> Generator[tuple[Message, list[int]], None, None]:
    """Receive until the other end has gone; whoever takes descriptors out of the list owns them, others are closed."""
    frames = FrameBuffer(most_bytes)
    descriptors: list[int] = []
    try:
        while True:
            data, received = receive_with_descriptors(connection)
            descriptors += received
            if not data:
                return
            for message in frames.feed(data):
                yield message, descriptors
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
