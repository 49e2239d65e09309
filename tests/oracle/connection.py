"""The rank's connection to the agent of its node: bytes, descriptors, and how long to wait for them."""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from deisa.ray._handoff.fork import close_in_children
from deisa.ray._transport.address import agent_address, check_same_user, shown
from deisa.ray._transport.descriptors import receive_with_descriptors
from deisa.ray._transport.messages import FrameBuffer, Message, encode
from deisa.ray._transport.peers import has_ended, open_process
from deisa.ray.config import Settings
from deisa.ray.errors import (
    AnalyticsLostError,
    ConfigurationError,
    DeisaError,
    NoAnalyticsError,
    WaitTimeoutError,
)
from tests.oracle.address import check_socket_path

logger = logging.getLogger("deisa.ray.bridge")

FIRST_RETRY_S, LAST_RETRY_S = 0.01, 0.25


class Patience:
    """Waits of a rank: warned of now and then, and ended after a while.

    Parameters
    ----------
    settings : Settings
    timeout_s : float
    setting : str
        The variable that sets it.
    """

    def __init__(self, settings: Settings, timeout_s: float, setting: str) -> None:
        self._started = self._said = time.monotonic()
        self._warn_every_s = settings.warn_every_s
        self._timeout_s = timeout_s
        self._setting = setting

    def left(self, waiting: str, analytics_down: str) -> float:
        """Return for how many seconds to wait before coming here again.

        Raises
        ------
        WaitTimeoutError
        """
        now = time.monotonic()
        waited = now - self._started
        if waited >= self._timeout_s:
            raise WaitTimeoutError(
                f"{waiting}; gave up after {self._timeout_s:g} s ({self._setting} sets how long)"
            )
        if now - self._said >= self._warn_every_s:
            self._said = now
            down = f"; {analytics_down}, and no other has come yet" if analytics_down else ""
            logger.warning("%s (%.0f s so far)%s", waiting, waited, down)
        return min(self._timeout_s - waited, self._warn_every_s)


class Connection:
    """A socket and the process at its other end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.address = agent_address(settings)
        self._frames = FrameBuffer()
        self._descriptors: list[int] = []
        self._socket: socket.socket | None = None
        self._agent: int | None = None  # its process, see `open_process`
        self._poll = select.poll()
        close_in_children(self)

    def open(self, deadline: float, no_analytics: Callable[[], NoAnalyticsError]) -> None:
        """Connect anew, as soon as there is an agent.

        Raises
        ------
        NoAnalyticsError
            After the deadline.
        ConfigurationError, PeerIdentityError
        """
        started = said = time.monotonic()
        pause = FIRST_RETRY_S
        while not self._try_to_open():
            now = time.monotonic()
            if now >= deadline:
                raise no_analytics()
            if now - said >= self._settings.warn_every_s:
                said = now
                logger.warning(
                    "waiting for the analytics of session %r (%.0f s so far)",
                    self._settings.session,
                    now - started,
                )
            time.sleep(pause)
            pause = min(pause * 2, LAST_RETRY_S)

    def _try_to_open(self) -> bool:
        if self._settings.socket_path:
            check_socket_path(self.address)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        agent: int | None = None
        try:
            connection.connect(self.address)
            agent = open_process(check_same_user(connection))
            there = not has_ended(agent)
        except (ConnectionRefusedError, FileNotFoundError, BlockingIOError, ProcessLookupError):
            there = False
        except PermissionError as exc:
            connection.close()
            if isinstance(exc, DeisaError):
                raise
            raise ConfigurationError(
                f"cannot connect to the agent at {shown(self.address)}: {exc.strerror}; give a path that this "
                "user may write to, the same on both sides (DEISA_RAY_SOCKET_PATH)"
            ) from exc
        except BaseException:
            connection.close()
            raise
        if not there:
            connection.close()
            if agent is not None:
                os.close(agent)
            return False
        self.drop()
        self._socket, self._agent = connection, agent
        self._frames = FrameBuffer()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        if agent is not None:
            self._poll.register(agent, select.POLLIN)
        return True

    @property
    def is_open(self) -> bool:
        """Whether there is one, as far as this side has seen."""
        return self._socket is not None

    def duplicate(self) -> int:
        """Return another descriptor of the connection."""
        return os.dup(self._open_socket().fileno())

    def wait(self, seconds: float) -> bool:
        """Wait until there is something to receive; whether there is."""
        return bool(self._poll.poll(1000 * seconds))

    def received(self) -> Iterator[Message]:
        """Return what has come, without waiting.

        Raises
        ------
        ConnectionError
            When the agent has gone.
        """
        while True:
            try:
                data, descriptors = receive_with_descriptors(self._open_socket(), socket.MSG_DONTWAIT)
            except BlockingIOError:
                if has_ended(self._agent):  # and a child of it keeps the connection open
                    raise ConnectionResetError from None
                return
            self._descriptors += descriptors
            if not data:
                raise ConnectionResetError
            yield from self._frames.feed(data)

    def take(self, count: int) -> list[int]:
        """Return the next descriptors that have come; the caller closes them."""
        taken = self._descriptors[:count]
        del self._descriptors[:count]
        return taken

    def send(self, message: Message, flags: int = 0) -> None:
        """Send a message.

        Raises
        ------
        OSError
            When the agent has gone.
        """
        self._open_socket().sendall(encode(message), flags)

    def shut_down(self) -> None:
        """End it, also for a thread that waits."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _open_socket(self) -> socket.socket:
        if self._socket is None:
            raise AnalyticsLostError("the connection to the agent is closed")
        return self._socket

    def drop(self) -> None:
        """Close what belongs to it."""
        if self._agent is not None:
            os.close(self._agent)
            self._agent = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()

    def close_in_child(self) -> None:
        """Close a child's copies."""
        self.drop()
