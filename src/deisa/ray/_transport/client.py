"""The rank's end: find the agent, get slots, hand chunks over."""

from __future__ import annotations

import logging
import os
import select
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from deisa.ray._state.events import BridgeStats
from deisa.ray._state.layout import ArrayDescription
from deisa.ray._transport import messages
from deisa.ray._transport.address import agent_address, check_same_user, shown
from deisa.ray._transport.board import read_board
from deisa.ray._transport.descriptors import receive_with_descriptors
from deisa.ray._transport.memory import map_segments, prefer_huge_pages, slot_view, touch
from deisa.ray._transport.messages import FrameBuffer, Message
from deisa.ray.config import Settings
from deisa.ray.errors import (
    AnalyticsLostError,
    DeisaError,
    NoAnalyticsError,
    ProtocolError,
    WaitTimeoutError,
    named_error,
)

logger = logging.getLogger("deisa.ray.bridge")

MAX_REASON = 500  # characters
FIRST_RETRY_S, LAST_RETRY_S = 0.01, 0.25


@dataclass(slots=True)
class _Region:
    row: int  # of its array on the board
    slots: int
    memory: list[np.ndarray] | None  # by slot; None until the dtype is known
    turn: int = 0  # timesteps handed over


class RankChannel:
    """A rank's connection to the agent of its host, and the memory it got from it.

    Not thread-safe: `Bridge` holds a lock around it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._address = agent_address(settings)
        self._frames = FrameBuffer()
        self._descriptors: list[int] = []
        self._memory: dict[int, list[np.ndarray]] = {}  # slots of regions, before the start says more of them
        self._regions: dict[int, _Region] = {}
        self._board = memoryview(b"")
        self._arrays: dict[str, tuple[int, ...]] | None = None
        self._progress = ""
        self._failure: DeisaError | None = None
        self._socket: socket.socket | None = None
        self._poll = select.poll()

    def start(self, bridge_id: int, world_size: int, arrays: Sequence[ArrayDescription]) -> None:
        """Announce the bridge and wait until the analytics starts the session.

        Raises
        ------
        NoAnalyticsError
            When no agent answers on this host.
        WaitTimeoutError
            When the analytics, or other bridges, do not come in time.
        LayoutError
            When the bridges' descriptions do not fit together.
        """
        hello = messages.encode(
            messages.Hello(messages.PROTOCOL_VERSION, bridge_id, world_size, tuple(arrays))
        )
        deadline = time.monotonic() + self._settings.connect_timeout_s
        while True:
            self._connect(deadline)
            try:
                self._send(hello)
                self._wait_until_started()
                return
            except AnalyticsLostError:
                # An agent of an earlier run that was just leaving; the next one may be on its way.
                if self._progress or time.monotonic() > deadline:
                    raise
                time.sleep(LAST_RETRY_S)

    def _connect(self, deadline: float) -> None:
        said = time.monotonic()
        pause = FIRST_RETRY_S
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(self._address)
                check_same_user(connection)
                break
            except (ConnectionRefusedError, FileNotFoundError, BlockingIOError):
                connection.close()
            except BaseException:
                connection.close()
                raise
            now = time.monotonic()
            if now >= deadline:
                raise NoAnalyticsError(
                    f"no analytics on this host for session {self._settings.session!r}: is Ray running here and the "
                    f"analytics started? (tried {shown(self._address)} for {self._settings.connect_timeout_s:g} s; "
                    "DEISA_RAY_CONNECT_TIMEOUT_S sets how long)"
                )
            if now - said >= self._settings.warn_every_s:
                said = now
                logger.warning("waiting for the analytics of session %r", self._settings.session)
            time.sleep(pause)
            pause = min(pause * 2, LAST_RETRY_S)
        self._drop_connection()
        self._socket = connection
        self._frames = FrameBuffer()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def _wait_until_started(self) -> None:
        self._wait(
            lambda: self._arrays is not None,
            self._settings.start_timeout_s,
            lambda: self._progress or "waiting for the agent's answer",
            "DEISA_RAY_START_TIMEOUT_S",
        )

    def _wait(self, done, timeout_s: float, describe, setting: str) -> None:  # type: ignore[no-untyped-def]
        started = said = time.monotonic()
        while not done():
            now = time.monotonic()
            if now - started >= timeout_s:
                raise WaitTimeoutError(
                    f"{describe()}; gave up after {timeout_s:g} s ({setting} sets how long)"
                )
            if now - said >= self._settings.warn_every_s:
                said = now
                logger.warning("%s (%.0f s so far)", describe(), now - started)
            self._poll.poll(1000 * min(timeout_s - (now - started), self._settings.warn_every_s))
            self.receive()

    @property
    def wanted(self) -> dict[str, tuple[int, ...]]:
        """Regions of this bridge, by array, of the arrays that a callback asks for."""
        return self._arrays or {}

    def receive(self) -> None:
        """Handle what the agent has sent, without waiting; raises what it says has failed."""
        if self._failure is not None:
            raise self._failure
        if self._socket is None:
            raise AnalyticsLostError("the connection to the agent is closed")
        while True:
            try:
                data, descriptors = receive_with_descriptors(self._socket, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as exc:
                raise self._lost() from exc
            self._descriptors += descriptors
            if not data:
                raise self._lost()
            for message in self._frames.feed(data):
                self._handle(message)

    def _lost(self) -> DeisaError:
        error = AnalyticsLostError(
            f"the agent of session {self._settings.session!r} on this host has gone; the analytics has ended or died"
        )
        if self._progress:
            self._failure = error
        return error

    def _handle(self, message: Message) -> None:
        match message:
            case messages.Free():
                pass  # it stands on the board
            case messages.Progress(text):
                self._progress = text
            case messages.Slots():
                self._map(message)
            case messages.Start():
                self._begin(message)
            case messages.Fail(kind, text):
                self._failure = named_error(kind, text)
                raise self._failure
            case _:
                raise ProtocolError(
                    f"the agent sent a {type(message).__name__}, which a rank does not expect"
                )

    def _map(self, message: messages.Slots) -> None:
        received = self._descriptors[: len(message.sizes)]
        del self._descriptors[: len(message.sizes)]
        memory = map_segments(received, message.sizes, writable=True)
        for segment in memory:
            prefer_huge_pages(segment)
        for spec in message.regions:
            slots = [slot_view(memory[spec.segment], spec, slot) for slot in range(spec.slots)]
            for slot in slots:
                touch(slot)
            if spec.region in self._regions:  # its dtype was left open
                self._regions[spec.region].memory = slots
            else:
                self._memory[spec.region] = slots

    def _begin(self, start: messages.Start) -> None:
        if start.board_bytes:
            if not self._descriptors:
                raise ProtocolError(
                    "the agent's board did not come along; is the limit on open files too small?"
                )
            self._board = read_board(self._descriptors.pop(0), start.board_bytes)
        for wanted in start.arrays.values():
            for region in wanted.regions:
                self._regions[region] = _Region(wanted.row, wanted.slots, self._memory.pop(region, None))
        self._arrays = {name: wanted.regions for name, wanted in start.arrays.items()}

    def dtype_of(self, region: int) -> np.dtype | None:
        """The dtype of a region's slots; None before `learn` where no bridge has declared it."""
        memory = self._regions[region].memory
        return memory[0].dtype if memory is not None else None

    def learn(self, array: str, region: int, dtype: np.dtype) -> None:
        """Tell the agent the dtype of an array and wait for its slots."""
        self._send(messages.encode(messages.Learned(array, dtype)))
        self._wait(
            lambda: self._regions[region].memory is not None,
            self._settings.start_timeout_s,
            lambda: f"waiting for the memory of array {array!r}",
            "DEISA_RAY_START_TIMEOUT_S",
        )

    def free_slot(self, array: str, region: int, timestep: int) -> tuple[np.ndarray, float]:
        """Return the memory for a region's next chunk, waiting for it if need be; the same until `put`.

        Returns
        -------
        slot, held_up_s
            The memory as an array, and the seconds spent waiting.
        """
        own = self._regions[region]
        assert own.memory is not None
        held_up_s = 0.0
        if own.turn >= self._board[own.row]:
            started = time.perf_counter()
            self._send(messages.encode(messages.HeldUp(region, timestep)))
            self._wait(
                lambda: own.turn < self._board[own.row],
                self._settings.send_timeout_s,
                lambda: (
                    f"all {own.slots} slots of array {array!r} are in use: timestep {timestep} waits for the "
                    "analytics (slower than the simulation, or keeping arrays alive)"
                ),
                "DEISA_RAY_SEND_TIMEOUT_S",
            )
            held_up_s = time.perf_counter() - started
        return own.memory[self._board[own.row + 1 + own.turn % own.slots]], held_up_s

    def put(self, region: int, timestep: int) -> None:
        """Hand a filled slot over."""
        self._regions[region].turn += 1
        self._send(messages.frame([messages.Put.code, region, timestep]))

    def advance(self, timestep: int) -> None:
        """Say that nothing older than `timestep` will come."""
        self.receive()
        self._send(messages.frame([messages.Advance.code, timestep]))

    def close(self, stats: BridgeStats) -> None:
        """End in order; what was handed over stays with the agent."""
        if self._socket is not None and self._failure is None:
            try:
                self._send(messages.encode(messages.Close(stats)))
            finally:
                self._drop_connection()

    def abort(self, reason: str = "") -> None:
        """End because of an error, whose text the analytics reports; without one, as a dying rank does."""
        if self._socket is not None and reason:
            with suppress(OSError):
                self._socket.sendall(messages.encode(messages.Abort(reason[:MAX_REASON])))
        self._drop_connection()

    def _send(self, frame: bytes) -> None:
        if self._socket is None:
            raise AnalyticsLostError("the connection to the agent is closed")
        try:
            self._socket.sendall(frame)
            return
        except OSError:
            pass  # the agent has gone; it may have said why
        self.receive()
        raise self._lost()

    def _drop_connection(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._memory.clear()
        self._regions.clear()
        self._board = memoryview(b"")
