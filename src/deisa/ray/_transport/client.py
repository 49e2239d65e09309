"""The rank's end: find the agent, get slots, hand chunks over."""

from __future__ import annotations

import logging
import math
import os
import select
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from deisa.ray._state.events import BridgeStats
from deisa.ray._state.layout import ArrayDescription
from deisa.ray._transport import messages
from deisa.ray._transport.address import (
    agent_address,
    check_same_user,
    check_socket_path,
    other_agents,
    shown,
)
from deisa.ray._transport.descriptors import receive_with_descriptors
from deisa.ray._transport.fork import close_in_children, words_of_this_process
from deisa.ray._transport.limits import own_limits
from deisa.ray._transport.memory import map_segments, prefer_huge_pages, slot_view, touch
from deisa.ray._transport.messages import FrameBuffer, Message
from deisa.ray._transport.pages import Fence, OutboxWriter, TallyRow, map_words
from deisa.ray._transport.peers import has_ended, open_process
from deisa.ray.config import Settings
from deisa.ray.errors import (
    MEMORY_MONITOR,
    AnalyticsLostError,
    ClosedError,
    ConfigurationError,
    DeisaError,
    LayoutError,
    NoAnalyticsError,
    ProtocolError,
    WaitTimeoutError,
    named_error,
)

try:
    from deisa.ray._transport._lane import Lane
except ImportError:  # installed without a C compiler
    Lane = None  # type: ignore[assignment, misc]
try:
    from deisa.ray._transport._ending import decide_by_exit_status
except ImportError:
    decide_by_exit_status = None  # type: ignore[assignment]

logger = logging.getLogger("deisa.ray.bridge")

MAX_REASON = 500  # characters
FIRST_RETRY_S, LAST_RETRY_S = 0.01, 0.25
REFUSAL_S = 2.0  # that a rank whose description is refused looks for somebody to tell
ANALYTICS_BUSY = "the analytics (slower than the simulation, or keeping arrays alive)"
PAGES = 3  # that come along with a start: board, tally, outbox
_LOOK = messages.encode(messages.Look())


class Account:
    """What a bridge has handed over, as words that the compiled `Lane` reads and writes as well.

    Attributes
    ----------
    words : memoryview of int64
        The newest timestep, chunks and bytes handed over, whether lanes may be taken (never in a child: all words
        are 0 there); then for each array the chunks handed over for a timestep that is not whole yet, and for each
        of its outlets the turn, which is the number of timesteps handed over, and the newest of them.
    """

    __slots__ = ("words",)

    NEWEST, CHUNKS, BYTES, OPEN, FIRST_ARRAY = range(5)
    TURN, SENT, OUTLET_WORDS = range(3)
    NOTHING_YET = -(2**63)

    def __init__(self, chunks: Sequence[int]) -> None:
        words = self.FIRST_ARRAY + sum(1 + self.OUTLET_WORDS * count for count in chunks)
        self.words = words_of_this_process(words)
        self.words[self.NEWEST] = self.NOTHING_YET

    def handed_over(self, array: TallyRow) -> int:
        """Chunks of an array handed over so far."""
        first, words = array.within + 1 + self.TURN, self.OUTLET_WORDS * array.chunks
        return sum(self.words[first : first + words : self.OUTLET_WORDS])


@dataclass(frozen=True, slots=True)
class _HandOver:
    """What the account says once a chunk is handed over.

    Noted before, so that an exception between any two steps of `Outlet.put`, such as Ctrl-C raises, leaves a
    chunk that is handed over or one that is not, and nothing in between.
    """

    number: int  # of the entry in the outbox
    at: int
    turn: int
    timestep: int
    chunks: int
    nbytes: int
    tally: TallyRow

    def note(self, account: memoryview) -> None:
        account[self.at + Account.TURN] = self.turn
        account[self.at + Account.SENT] = account[Account.NEWEST] = self.timestep
        account[Account.CHUNKS] = self.chunks
        account[Account.BYTES] = self.nbytes


class Outlet:
    """Where one chunk of this rank is handed over, timestep after timestep.

    Attributes
    ----------
    memory : tuple of numpy.ndarray or None
        By slot; None until the dtype of the array is known.
    lane : Lane or None
        The compiled short cut, where there is one.
    """

    def __init__(
        self,
        channel: RankChannel,
        array: str,
        index: int,
        wanted: messages.WantedArray,
        at: int,
        tally: TallyRow,
    ) -> None:
        self._channel = channel
        self._array = array
        self.region = wanted.regions[index]
        self._wanted = wanted
        self._account = channel.account.words
        self._turn = at + Account.TURN  # which word of the account it is
        self._sent = at + Account.SENT
        self._board = channel.board
        self._tally = tally
        self.memory: tuple[np.ndarray, ...] | None = None
        self.lane: Lane | None = None

    def provide(self, memory: tuple[np.ndarray, ...]) -> None:
        """Take the slots."""
        self.memory = memory
        wanted, outbox = self._wanted, self._channel.outbox
        if Lane is not None:
            self.lane = Lane(
                account=self._account,
                at=self._turn - Account.TURN,
                within=self._tally.within,
                chunks=self._tally.chunks,
                board=self._board,
                row=wanted.row,
                slots=wanted.slots,
                outbox=outbox.words,
                capacity=outbox.capacity,
                region=self.region,
                tally=self._tally.words,
                first=wanted.tally,
                bridges=wanted.bridges,
                own=wanted.own,
                memory=memory,
                fd=self._channel.fileno(),
                look=_LOOK,
            )

    @property
    def dtype(self) -> np.dtype | None:
        """The dtype of the slots; None before `RankChannel.learn` where no bridge has declared it."""
        return self.memory[0].dtype if self.memory is not None else None

    def has_sent(self, timestep: int) -> bool:
        """Whether this was the last timestep handed over."""
        return bool(self._account[self._turn]) and self._account[self._sent] == timestep

    def free_slot(self, timestep: int) -> np.ndarray:
        """Return the memory for the next chunk, waiting for it if need be; the same until `put`.

        Raises
        ------
        WaitTimeoutError, AnalyticsLostError
        """
        assert self.memory is not None
        if not self._has_slot():
            self._channel.wait_free(self.region, timestep, self._has_slot, self._describe_wait(timestep))
        turn = self._account[self._turn]
        return self.memory[self._board[self._wanted.row + 1 + turn % self._wanted.slots]]

    def _has_slot(self) -> bool:
        return self._account[self._turn] < self._board[self._wanted.row]

    def _describe_wait(self, timestep: int) -> str:
        return f"all {self._wanted.slots} slots of array {self._array!r} are in use: timestep {timestep} waits for"

    def put(self, timestep: int, nbytes: int) -> None:
        """Hand the filled slot over; wakes the agent only when every rank of its node has done so.

        Raises
        ------
        AnalyticsLostError, DeisaError
            When the agent has gone, or has said that the session is over.
        """
        account, channel = self._account, self._channel
        noted = channel.under_way = _HandOver(
            number=channel.outbox.added + 1,
            at=self._turn - Account.TURN,
            turn=account[self._turn] + 1,
            timestep=timestep,
            chunks=account[Account.CHUNKS] + 1,
            nbytes=account[Account.BYTES] + nbytes,
            tally=self._tally,
        )
        channel.outbox.add(self.region, timestep)  # from here on it is handed over
        noted.note(account)
        is_last = self._tally.is_last()
        channel.under_way = None
        if is_last:
            channel.have_agent_look()
        channel.hear()


class RankChannel:
    """A rank's connection to the agent of its host, and the memory it got from it.

    Not thread-safe: `Bridge` holds a lock around it.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._address = agent_address(settings)
        self._frames = FrameBuffer()
        self._descriptors: list[int] = []
        self._memory: dict[int, tuple[np.ndarray, ...]] = {}  # slots by region, until their outlets are there
        self._started = False
        self._outlets: dict[
            str, tuple[Outlet, ...]
        ] = {}  # until the bridge has taken them: they refer to this object
        self._learning: set[str] = set()  # arrays whose dtype the agent has been told
        self.under_way: _HandOver | None = None
        self.account = Account(())
        self.board = memoryview(b"")
        self._outbox: OutboxWriter | None = None
        self.held_up_s = 0.0
        self._welcomed = False
        self._sent_away = False
        self._progress = ""  # whom the analytics waits for
        self._later = ""  # why this rank has to look again
        self._orphaned = ""
        self._failure: DeisaError | None = None
        self._socket: socket.socket | None = None
        self._agent: int | None = None  # its process, see `open_process`
        self._poll = select.poll()
        close_in_children(self)

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
        deadline, said = time.monotonic() + self._settings.connect_timeout_s, -math.inf
        while True:
            self._connect(deadline)
            try:
                self._send(
                    messages.encode(
                        messages.Hello(
                            messages.PROTOCOL_VERSION,
                            self._settings.session,
                            bridge_id,
                            world_size,
                            tuple(arrays),
                            own_limits(),
                        )
                    )
                )
                self._wait_until_started()
                return
            except AnalyticsLostError:
                # An agent of an earlier run; the next one may be on its way.
                now = time.monotonic()
                if self._welcomed:
                    raise
                if self._sent_away:  # after it had waited there
                    self._sent_away = False
                    deadline = now + self._settings.connect_timeout_s
                if now > deadline:
                    raise self._no_analytics() from None
                if self._later and now - said >= self._settings.warn_every_s:
                    said = now
                    logger.warning("%s; waiting for the next analytics", self._later)
                time.sleep(LAST_RETRY_S)

    def refuse(self, bridge_id: int, world_size: int, error: LayoutError) -> None:
        """Come only to say why this rank cannot: the analytics, and the other ranks, would wait for it."""
        hello = messages.Hello(
            messages.PROTOCOL_VERSION, self._settings.session, bridge_id, world_size, (), ()
        )
        abort = messages.Abort(f"{type(error).__name__}: {error}"[:MAX_REASON])
        with suppress(DeisaError, OSError):
            self._connect(time.monotonic() + min(REFUSAL_S, self._settings.connect_timeout_s))
            self._send(messages.encode(hello) + messages.encode(abort))
        self._drop_connection()

    def _no_analytics(self) -> NoAnalyticsError:
        tried = (
            f"(tried {shown(self._address)} for {self._settings.connect_timeout_s:g} s; "
            "DEISA_RAY_CONNECT_TIMEOUT_S sets how long)"
        )
        session = self._settings.session
        if self._later:
            return NoAnalyticsError(
                f"{self._later}, and no other analytics of session {session!r} has come {tried}"
            )
        return NoAnalyticsError(
            f"no analytics on this host for session {session!r}: is Ray running here and the analytics started? {tried}"
            f"{other_agents(self._settings)}"
        )

    def _connect(self, deadline: float) -> None:
        started = said = time.monotonic()
        pause = FIRST_RETRY_S
        while True:
            if self._settings.socket_path:
                check_socket_path(self._address)
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(self._address)
                agent = open_process(check_same_user(connection))
                if not has_ended(agent):
                    break
                if agent is not None:
                    os.close(agent)
                connection.close()
            except (ConnectionRefusedError, FileNotFoundError, BlockingIOError, ProcessLookupError):
                connection.close()
            except PermissionError as exc:
                connection.close()
                if isinstance(exc, DeisaError):
                    raise
                raise ConfigurationError(
                    f"cannot connect to the agent at {shown(self._address)}: {exc.strerror}; give a path that this "
                    "user may write to, the same on both sides (DEISA_RAY_SOCKET_PATH)"
                ) from exc
            except BaseException:
                connection.close()
                raise
            now = time.monotonic()
            if now >= deadline:
                raise self._no_analytics()
            if now - said >= self._settings.warn_every_s:
                said = now
                logger.warning(
                    "waiting for the analytics of session %r (%.0f s so far)",
                    self._settings.session,
                    now - started,
                )
            time.sleep(pause)
            pause = min(pause * 2, LAST_RETRY_S)
        self._drop_connection()
        self._socket = connection
        self._frames = FrameBuffer()
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)
        self._agent = agent
        if agent is not None:
            self._poll.register(agent, select.POLLIN)

    def _wait_until_started(self) -> None:
        self._wait(
            lambda: self._started,
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
                orphaned = f"; {self._orphaned}, and no other has come yet" if self._orphaned else ""
                logger.warning("%s (%.0f s so far)%s", describe(), now - started, orphaned)
            self._poll.poll(1000 * min(timeout_s - (now - started), self._settings.warn_every_s))
            self.receive()

    @property
    def outbox(self) -> OutboxWriter:
        """Where chunks are noted, from the start on."""
        assert self._outbox is not None
        return self._outbox

    def fileno(self) -> int:
        """Descriptor of the connection."""
        assert self._socket is not None
        return self._socket.fileno()

    def take_outlets(self) -> dict[str, tuple[Outlet, ...]]:
        """Where chunks are handed over, by array, for those that callbacks ask for; theirs who takes them."""
        outlets, self._outlets = self._outlets, {}
        return outlets

    def settle(self) -> None:
        """Bring the account up to date after an exception in the middle of `Outlet.put`."""
        noted = self.under_way
        if noted is not None:
            if self.outbox.added == noted.number:
                noted.note(self.account.words)
                noted.tally.count_again(self.account.handed_over(noted.tally))
            self.under_way = None

    def receive(self) -> None:
        """Handle what the agent has sent, without waiting; raises what it says has failed."""
        if self._failure is not None:
            raise type(self._failure)(
                str(self._failure)
            )  # itself it would keep the frames that it went through
        if self._socket is None:
            raise AnalyticsLostError("the connection to the agent is closed")
        while True:
            try:
                data, descriptors = receive_with_descriptors(self._socket, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if has_ended(self._agent):  # and a child of it keeps the connection open
                    raise self._lost() from None
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
            f"the agent of session {self._settings.session!r} on this host has gone; the analytics has ended or died, "
            f"or the node's memory is nearly full ({MEMORY_MONITOR})"
        )
        if self._orphaned:
            error = AnalyticsLostError(f"{self._orphaned}; then its agent on this host has ended as well")
        if self._welcomed:
            self._failure = AnalyticsLostError(str(error))
        return error

    def _handle(self, message: Message) -> None:
        match message:
            case messages.Free():
                pass  # it stands on the board
            case messages.Progress(text):
                self._welcomed, self._progress = True, text
            case messages.Later(text):
                self._sent_away = self._welcomed
                self._later, self._welcomed, self._orphaned = text, False, ""
                raise AnalyticsLostError(text)
            case messages.Orphaned(text):
                self._hear_orphaned(text)
            case messages.Slots():
                self._map(message)
            case messages.Start():
                self._begin(message)
            case messages.Fail(kind, text):
                self._failure = named_error(kind, text)
                raise named_error(kind, text)
            case _:
                raise ProtocolError(
                    f"the agent sent a {type(message).__name__}, which a rank does not expect"
                )

    def _hear_orphaned(self, text: str) -> None:
        """The analytics has gone; or, without a text, there is one again."""
        self._orphaned = text
        if text and self._settings.on_analytics_lost != "wait":
            self._failure = AnalyticsLostError(text)
            raise AnalyticsLostError(text)
        logger.warning(
            "%s", f"{text}; waiting for another one" if text else "another analytics has taken over"
        )

    def _map(self, message: messages.Slots) -> None:
        received = self._descriptors[: len(message.sizes)]
        del self._descriptors[: len(message.sizes)]
        memory = map_segments(received, message.sizes, writable=True)
        for segment in memory:
            prefer_huge_pages(segment)
        for spec in message.regions:
            slots = tuple(slot_view(memory[spec.segment], spec, slot) for slot in range(spec.slots))
            for slot in slots:
                touch(slot)
            self._memory[spec.region] = slots

    def _provide(self, outlets: Iterable[Outlet]) -> bool:
        """Give outlets the slots that have come for them; whether all have theirs."""
        for outlet in outlets:
            if outlet.memory is None and outlet.region in self._memory:
                outlet.provide(self._memory.pop(outlet.region))
        return all(outlet.memory is not None for outlet in outlets)

    def _begin(self, start: messages.Start) -> None:
        self._started = True
        self._progress = ""
        if start.pages:
            received, self._descriptors = self._descriptors[:PAGES], self._descriptors[PAGES:]
            if len(received) != PAGES or len(start.pages) != PAGES:
                for descriptor in received:
                    os.close(descriptor)
                raise ProtocolError(
                    "the agent's pages did not all come along; is the limit on open files (ulimit -n) too small?"
                )
            self.board, tally, outbox = (
                map_words(descriptor, nbytes, writable=writable)
                for descriptor, nbytes, writable in zip(
                    received, start.pages, (False, True, True), strict=True
                )
            )
            fence = Fence()
            capacity = sum(len(wanted.regions) * wanted.slots for wanted in start.arrays.values())
            self._outbox = OutboxWriter(outbox, capacity, fence)
            self.account = Account([len(wanted.regions) for wanted in start.arrays.values()])
            at = Account.FIRST_ARRAY
            for name, wanted in start.arrays.items():
                chunks = len(wanted.regions)
                words = (wanted.tally, wanted.bridges, wanted.own)
                row = TallyRow(tally, *words, chunks, self.account.words, at, fence)
                places = range(at + 1, at + 1 + Account.OUTLET_WORDS * chunks, Account.OUTLET_WORDS)
                self._outlets[name] = tuple(
                    Outlet(self, name, index, wanted, place, row) for index, place in enumerate(places)
                )
                at = places.stop
                self._provide(self._outlets[name])

    def learn(self, array: str, outlets: Sequence[Outlet], dtype: np.dtype) -> None:
        """Tell the agent the dtype of an array, once, and wait for the slots of its outlets here."""
        if array not in self._learning:
            self._learning.add(array)
            self._send(messages.encode(messages.Learned(array, dtype, own_limits())))
        self._wait(
            lambda: self._provide(outlets),
            self._settings.start_timeout_s,
            lambda: f"waiting for the memory of array {array!r}",
            "DEISA_RAY_START_TIMEOUT_S",
        )

    def wait_free(self, region: int, timestep: int, is_free: Callable[[], bool], waiting: str) -> None:
        """Tell the agent that a chunk has no slot, and wait until it has one."""
        started = time.perf_counter()
        self._send(messages.encode(messages.HeldUp(region, timestep)))
        self._progress = ""
        self._wait(
            is_free,
            self._settings.send_timeout_s,
            lambda: f"{waiting} {self._progress or ANALYTICS_BUSY}",
            "DEISA_RAY_SEND_TIMEOUT_S",
        )
        self.held_up_s += time.perf_counter() - started

    def have_agent_look(self) -> None:
        """Wake the agent: a timestep is complete on this node."""
        self._send(_LOOK)

    def hear(self) -> None:
        """Look whether the agent has sent anything, or has gone."""
        if self._failure is not None or self._poll.poll(0):
            self.receive()

    def advance(self, timestep: int) -> None:
        """Say that nothing older than `timestep` will come."""
        self.receive()
        self._send(messages.encode(messages.Advance(timestep)))

    def close(self, stats: BridgeStats) -> None:
        """End in order; what was handed over stays with the agent."""
        if self._socket is None:
            return
        frame = messages.encode(messages.Close(stats))
        try:
            if self._failure is None:
                self._send(frame)
            else:  # an analytics that takes over wants to know, and the rank has been told of the failure
                with suppress(OSError):
                    self._socket.sendall(frame)
        finally:
            self._drop_connection()

    def close_with_process(self, stats: BridgeStats, otherwise: str) -> None:
        """End in order if the process does: if its exit status is 0; else as `abort` does, with that reason."""
        if self._socket is not None and decide_by_exit_status is not None and self._failure is None:
            with suppress(OSError):
                self._socket.sendall(messages.encode(messages.Ending()))
            decide_by_exit_status(
                os.dup(self._socket.fileno()),  # for the rest of the process's life
                messages.encode(messages.Close(stats)),
                messages.encode(messages.Abort(otherwise)),
            )
            self._drop_connection()
        else:
            self.close(stats)

    def abort(self, reason: str = "") -> None:
        """End because of an error, whose text the analytics reports; without one, as a dying rank does."""
        if self._socket is not None and reason:
            with suppress(OSError):
                self._socket.sendall(messages.encode(messages.Abort(reason[:MAX_REASON])))
        self._drop_connection()

    def interrupt(self, reason: str) -> None:
        """Abort as far as possible while another thread may wait here, which gets an error; then comes `abort`."""
        connection = self._socket
        self._failure = ClosedError(f"another thread has ended the bridge: {reason}")
        if connection is not None:
            with suppress(OSError):
                connection.send(messages.encode(messages.Abort(reason[:MAX_REASON])), socket.MSG_DONTWAIT)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

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

    def close_in_child(self) -> None:
        """Close a child's copies of the descriptors, and let go of the memory."""
        self.account.words[Account.OPEN] = (
            0  # where the kernel does not wipe it; the parent has words of its own
        )
        self._drop_connection()

    def _drop_connection(self) -> None:
        if self._agent is not None:
            os.close(self._agent)
            self._agent = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors.clear()
        self._memory.clear()
        self._started = False
        self._outlets = {}
        self._outbox = None
        self.under_way = None
        self.board = memoryview(b"")
