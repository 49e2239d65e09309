"""Peers that are out to do harm: what each of them can spoil, and that it is nothing else.

`test_messages` shows that no bytes make the decoder fail in an unexpected way, `test_hand_off` and `test_pages` that
each single breach of the protocol is refused. Here peers say and write what they like, in any order, beside ranks
that behave.
"""

from __future__ import annotations

import ast
import ctypes
import fcntl
import gc
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeGuard
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deisa.ray import _transport
from deisa.ray._state.descriptions import ArrayDescription, ChunkDescription, describe_arrays
from deisa.ray._state.events import (
    AgentLost,
    BridgeClosed,
    BridgeJoined,
    BridgeLost,
    Event,
    SendersBlocked,
    StepComplete,
    StepTorn,
)
from deisa.ray._state.naming import missing_bridges
from deisa.ray._state.stats import BridgeStats
from deisa.ray._transport import exchange, messages
from deisa.ray._transport.address import agent_address
from deisa.ray._transport.descriptors import receive_with_descriptors
from deisa.ray._transport.limits import MemoryLimit
from deisa.ray._transport.line import AnalyticsLine
from deisa.ray._transport.messages import FrameBuffer, Message, encode
from deisa.ray._transport.pages import map_words
from deisa.ray._transport.reader import attach
from deisa.ray._transport.server import AgentServer
from deisa.ray.bridge import Bridge
from deisa.ray.errors import BridgeLostError, HoleError, PeerIdentityError, ProtocolError, SessionInUseError
from tests.conftest import skip_or_fail
from tests.oracle.pages import RingWriter
from tests.support.patience import PATIENCE_S, wait_until
from tests.unit.agent import CLIENTS, Agent, descriptors, new_settings, running, use_client, whole
from tests.unit.test_hand_off import raw
from tests.unit.test_messages import ANY, DTYPES, TEXT, described_arrays

MIB = 2**20
GOOD, HOSTILE = (0, 1), 2  # bridges
WORLD_SIZE = 3
SESSION = f"unit-{os.getpid()}-hostile"
SLOTS = {"a": 2, "h": 2, "open": 1}
ANALYTICS = "an id that nobody else knows"
SLOT, TABLE, COUNTERS, RING, FEEDBACK, QUESTIONS = range(6)  # what a rank has mapped
ROWS = [whole((4,)) | {"chunk_shape": (2,), "offset": (2 * number,)} for number in GOOD]


class Hostile:
    """A rank made by hand. It joins as any other does, and then has in its hands what an agent gives to a rank.

    Attributes
    ----------
    descriptors : list of int
        Those of its slots, of the slot table, the arrival counters and its ring.
    pages : list of memoryview
        The same memory, as words; the slot table cannot be written to.
    ring : RingWriter
    """

    def __init__(self, agent: Agent) -> None:
        self.socket = raw(agent)
        self.descriptors: list[int] = []
        self.pages: list[memoryview] = []
        self.wanted: dict[str, messages.WantedStream] = {}
        arrays = describe_arrays({"h": whole((4,)), "open": whole((4,), dtype=None)})
        self.say(encode(messages.Hello(messages.PROTOCOL_VERSION, SESSION, HOSTILE, WORLD_SIZE, arrays, ())))

    def say(self, data: bytes) -> None:
        """Send bytes, to whoever still listens."""
        with suppress(OSError):
            self.socket.sendall(data)

    def hear_start(self) -> None:
        """Wait for the start, and map what comes with it."""
        sizes: list[int] = []
        frames = FrameBuffer()
        while not self.wanted:
            data, received = receive_with_descriptors(self.socket)
            assert data
            self.descriptors += received
            for message in frames.feed(data):
                if isinstance(message, messages.Slots):
                    sizes += message.sizes
                elif isinstance(message, messages.Start):
                    sizes += (*message.pages, *message.feedback)
                    self.wanted = {stream.array: stream for stream in message.streams}
        for number, (descriptor, nbytes) in enumerate(zip(self.descriptors, sizes, strict=True)):
            self.pages.append(map_words(os.dup(descriptor), nbytes, writable=number not in (TABLE, FEEDBACK)))
        self.ring = RingWriter(self.pages[RING], SLOTS["h"] + SLOTS["open"])

    def close(self) -> None:
        self.socket.close()
        while self.descriptors:
            os.close(self.descriptors.pop())


class Scene:
    """An agent, two ranks that own an array together, and a hostile one that owns others."""

    def __init__(self, agent: Agent, before: Sequence[bytes] = ()) -> None:
        self.agent = agent
        agent.server.take_over(ANALYTICS)
        self.seen: list[Event] = []
        self._strangers: list[socket.socket] = []
        opening = agent.connect(*({"a": row} for row in ROWS))
        self.hostile = Hostile(agent)
        agent.wait(BridgeJoined)
        for said in before:
            self.stranger_says(said)
        self.listen()
        agent.start(SLOTS, open=None)
        self.good = [future.result(PATIENCE_S) for future in opening]
        self.hostile.hear_start()
        self._timestep = 0

    def stranger_says(self, data: bytes, *, stays: bool = True) -> None:
        """A process that has not joined connects, and says something."""
        peer = raw(self.agent)
        with suppress(OSError):
            peer.sendall(data)
        if stays:
            self._strangers.append(peer)
        else:
            self.listen()
            peer.close()

    def listen(self) -> None:
        """Have the agent look at all that has been said and written so far, and note what it tells."""
        probe = raw(self.agent)  # it is served after all that came before
        probe.sendall(encode(messages.Attach(messages.PROTOCOL_VERSION, 0)))
        assert probe.recv(1)
        probe.close()
        self.seen += self.agent.events()

    def step(self) -> None:
        """The good ranks send a timestep, and it arrives as they sent it."""
        timestep, self._timestep = self._timestep, self._timestep + 1
        for bridge in self.good:
            bridge.send("a", np.full(2, 10.0 * timestep + bridge.bridge_id), timestep)
        while not (complete := [e for e in self.seen if _is_step(e, "a", timestep)]):
            events = self.agent.server.poll(PATIENCE_S)
            assert events, f"timestep {timestep} did not become complete"
            self.seen += events
        (step,) = complete
        values = np.sort(np.concatenate(self.agent.chunks(step))).tolist()
        assert values == [10.0 * timestep + number for number in (0, 0, 1, 1)]
        self.agent.release(("a", timestep))

    def end(self) -> None:
        """The good ranks close, and nobody has lost anything but the hostile one."""
        self.listen()
        for bridge in self.good:
            bridge.close()
        while not (closed := {e.bridge_id for e in self.seen if isinstance(e, BridgeClosed)}).issuperset(
            GOOD
        ):
            events = self.agent.server.poll(PATIENCE_S)
            assert events, f"only {closed} have closed"
            self.seen += events
        self.close()
        self.listen()
        assert self.agent.server._thread.is_alive()
        assert not any(isinstance(event, AgentLost) for event in self.seen)
        assert {e.bridge_id for e in self.seen if isinstance(e, BridgeLost)}.isdisjoint(GOOD)
        assert {e.array for e in self.seen if isinstance(e, StepTorn)} <= {"h", "open"}

    def close(self) -> None:
        self.hostile.close()
        for peer in self._strangers:
            peer.close()


def _is_step(event: Event, array: str, timestep: int) -> TypeGuard[StepComplete]:
    return isinstance(event, StepComplete) and (event.array, event.timestep) == (array, timestep)


@contextmanager
def scene(before: Sequence[bytes] = (), client: str = "native") -> Iterator[Scene]:
    with use_client(client), running(session=SESSION) as agent:
        scene = Scene(agent, before)
        try:
            yield scene
        finally:
            scene.close()


# What is said.

BORDERS = st.sampled_from([-(2**63), 1 - 2**63, -1, 2**31, 2**62, 2**63 - 2, 2**63 - 1])
TIMESTEPS = st.integers(0, 5) | BORDERS
REGIONS = st.integers(0, 6) | st.sampled_from([2**31, 2**63 - 1])
VERSIONS = st.just(messages.PROTOCOL_VERSION) | BORDERS
ARRAYS = st.lists(
    described_arrays().filter(lambda array: array.name not in SLOTS),
    max_size=2,
    unique_by=lambda array: array.name,
).map(tuple)
LIMITS = st.lists(st.builds(MemoryLimit, REGIONS, TEXT, REGIONS, REGIONS), max_size=3).map(tuple)
SESSIONS = st.just(SESSION) | TEXT
HELLO = st.builds(
    messages.Hello,
    VERSIONS,
    SESSIONS,
    st.integers(0, 5) | BORDERS,
    st.integers(0, 5) | BORDERS,
    ARRAYS,
    LIMITS,
)
HOSTILE_MESSAGES = st.one_of(
    st.builds(messages.DeclareDtype, st.sampled_from(["a", "h", "open", ""]), DTYPES, LIMITS),
    st.builds(
        messages.Follow,
        VERSIONS,
        st.sampled_from(["", "someone else"]),
        st.sampled_from([0, 1, 100_000]),
        st.sampled_from([0, 1, 2**62]),
    ),
    st.builds(messages.Attach, VERSIONS, REGIONS),
    HELLO,
    ANY.filter(lambda message: not isinstance(message, messages.Hello | messages.Follow)),
)
ANNOUNCED = st.sampled_from([1, 100, 65535, 2**31, 2**32 - 1])


def frame(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body


BODIES = st.one_of(
    st.just(b""),
    st.binary(max_size=50),
    st.builds(
        lambda code, announced, rest: struct.pack("<HI", code, announced) + rest,
        st.integers(0, 30),
        ANNOUNCED,
        st.binary(max_size=40),
    ),
    st.builds(
        lambda code, fields: struct.pack(f"<H{len(fields)}q", code, *fields),
        st.integers(0, 30),
        st.lists(TIMESTEPS),
    ),
)
FRAMES = st.one_of(
    HOSTILE_MESSAGES.map(encode),
    BODIES.map(frame),
    st.builds(lambda message, end: encode(message)[:end], HOSTILE_MESSAGES, st.integers(0, 40)),
    st.builds(lambda length, body: struct.pack("<I", length) + body, ANNOUNCED, st.binary(max_size=20)),
    st.binary(max_size=30),
)
JOINING = st.builds(
    messages.Hello,
    st.just(messages.PROTOCOL_VERSION),
    st.just(SESSION),
    st.integers(3, 5),
    st.just(WORLD_SIZE),
    ARRAYS,
    LIMITS,
)
STREAMS = st.lists(FRAMES, min_size=1, max_size=3).map(b"".join) | st.builds(
    lambda hello, message: encode(hello) + encode(message), JOINING, HOSTILE_MESSAGES
)
SAID = st.tuples(st.sampled_from(["rank", "stranger", "passer-by", "good"]), STREAMS)


@settings(max_examples=100)
@given(before=st.lists(STREAMS, max_size=3), said=st.lists(SAID, max_size=12))
def test_whatever_peers_say_the_others_go_on(before: list[bytes], said: list[tuple[str, bytes]]) -> None:
    with scene(before) as here:
        for who, data in said:
            if who == "rank":
                here.hostile.say(data)
            elif who != "good":
                here.stranger_says(data, stays=who == "stranger")
            else:
                here.step()
        here.listen()
        here.step()
        here.end()


@settings(max_examples=100)
@given(st.lists(st.one_of(HOSTILE_MESSAGES, st.just(messages.Notify())), max_size=25), st.integers(1, 64))
def test_however_a_rank_breaks_the_order_of_messages_the_others_go_on(
    said: list[Message], piece: int
) -> None:
    with scene() as here:
        stream = b"".join(map(encode, said))
        for start in range(0, min(len(stream), 100 * piece), piece):
            here.hostile.say(stream[start : start + piece])
        here.hostile.say(stream[100 * piece :])
        here.step()
        here.end()


def test_a_refusal_does_not_grow_with_what_is_refused() -> None:
    """The text of an error quotes what it is about, and might not fit into a message."""
    chunk = ChunkDescription((4,), None, None)  # it lies nowhere
    name = "\1" * (messages.MAX_MESSAGE_BYTES // 2)  # written out, each character takes four
    arrays = (ArrayDescription(name, np.dtype("f8"), (4,), None, (chunk,)),)
    with scene() as here, mock.patch.object(exchange, "logger") as logger:
        here.stranger_says(encode(messages.Hello(messages.PROTOCOL_VERSION, SESSION, 9, 10, arrays, ())))
        here.step()
        here.end()
    logged = [call.args for call in logger.warning.call_args_list]
    assert logged
    assert sum(len(str(argument)) for arguments in logged for argument in arguments) < 10_000


def test_what_a_rank_gives_as_its_reason_does_not_keep_the_session_from_ending() -> None:
    """The analytics passes the reason on to all others."""
    with scene() as here:
        here.hostile.say(encode(messages.Abort("x" * (messages.MAX_MESSAGE_BYTES - 10))))
        lost = here.agent.wait(BridgeLost)
        here.agent.server.close(BridgeLostError(f"bridge {lost.bridge_id} was lost: {lost.reason}"))
        for bridge in here.good:
            with pytest.raises(BridgeLostError, match=f"bridge {HOSTILE} was lost"):
                bridge.send("a", np.zeros(2), 0)


def test_an_error_of_any_length_ends_the_session() -> None:
    """It is told in part; the analytics has the whole."""
    with scene() as here:
        here.agent.server.close(HoleError("no bridge owns " + "x" * messages.MAX_MESSAGE_BYTES))
        for bridge in here.good:
            with pytest.raises(HoleError, match=r"^no bridge owns x"):
                bridge.send("a", np.zeros(2), 0)


def test_an_array_of_more_dimensions_than_numpy_has_is_refused() -> None:
    chunk = ChunkDescription((1,) * 65, None, (0,) * 65)
    arrays = (ArrayDescription("a", np.dtype("f8"), (1,) * 65, None, (chunk,)),)
    hello = messages.Hello(messages.PROTOCOL_VERSION, SESSION, 0, 1, arrays, ())
    with pytest.raises(ProtocolError, match="65 dimensions"):
        messages.decode(encode(hello)[4:])


def test_nobody_follows_an_agent_by_an_empty_name() -> None:
    """An agent in the analytics' own process has no analytics that would follow it."""
    with running() as agent:  # of the driver ""
        (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
        with raw(agent) as peer:
            peer.sendall(encode(messages.Follow(messages.PROTOCOL_VERSION, "", 1, 0)))
            assert peer.recv(4096)
        bridge.send("a", np.zeros(4), 0)
        assert agent.wait(StepComplete).timestep == 0


def test_a_rank_that_was_blocked_and_has_closed_does_not_wait_any_more() -> None:
    """Another analytics that takes the session over asks who waits."""
    with scene() as here:
        region = here.hostile.wanted["h"].parts[0].region
        for timestep in range(SLOTS["h"]):
            here.hostile.ring.submit([region], timestep)
        here.hostile.ring.block(region)
        here.agent.wait(SendersBlocked)
        here.hostile.say(encode(messages.Close(BridgeStats())))
        here.agent.wait(BridgeClosed)
        state = here.agent.server.take_over("another one")
        assert BridgeClosed(HOSTILE, BridgeStats()) in state.since
        assert not any(isinstance(event, SendersBlocked) for event in state.since)
        here.step()
        here.end()


def test_descriptors_that_a_peer_sends_along_are_not_kept() -> None:
    with scene() as here:
        before = descriptors()
        with suppress(OSError):
            for _ in range(50):
                socket.send_fds(here.hostile.socket, [encode(messages.Notify())], [0] * 200)
        here.listen()
        wait_until(lambda: descriptors() <= before, "they are closed")
        here.step()
        here.end()


# What is written into shared memory.

WORDS = BORDERS | st.integers(-3, 600) | st.integers(-(2**63), 2**63 - 1)
PLACES = st.integers(0, 8) | st.integers(0, 511)
WRITES = st.one_of(
    st.tuples(st.just("write"), st.sampled_from([SLOT, COUNTERS, RING, QUESTIONS]), PLACES, WORDS),
    st.tuples(st.sampled_from(["submit", "block", "move on"]), st.just(RING), REGIONS, TIMESTEPS),
    st.tuples(st.sampled_from(["step", "notify"]), st.just(0), st.just(0), st.just(0)),
)


@settings(max_examples=100)
@given(st.lists(WRITES, max_size=20), st.sampled_from(sorted(CLIENTS)))
def test_whatever_a_rank_writes_the_others_go_on(
    actions: list[tuple[str, int, int, int]], client: str
) -> None:
    """Its slots, the arrival counters and its ring; `test_hand_off` and `test_pages` have the single cases."""
    with scene(client=client) as here:
        pages = here.hostile.pages
        for action, page, at, value in actions:
            match action:
                case "write":
                    pages[page][at % len(pages[page])] = value
                case "submit":
                    with suppress(OverflowError):  # its own count is at the border
                        here.hostile.ring.submit([at], value)
                case "block":
                    here.hostile.ring.block(min(at, 2**62))
                case "move on":
                    here.hostile.ring.move_on(value)
                case "notify":
                    here.hostile.say(encode(messages.Notify()))
                    here.listen()
                case "step":
                    here.step()
        here.step()
        here.end()


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("word", [2**63 - 1, -(2**63)], ids=str)
def test_counters_at_the_borders_of_their_words_keep_nobody_from_sending(client: str, word: int) -> None:
    with scene(client=client) as here:
        for _ in range(3):
            for at in range(len(here.hostile.pages[COUNTERS])):
                here.hostile.pages[COUNTERS][at] = word
            here.step()
        here.end()


LIBC = ctypes.CDLL(None, use_errno=True)


def punch_hole(descriptor: int, nbytes: int) -> None:
    """Give the memory behind a descriptor back to the kernel."""
    LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
    if LIBC.fallocate(descriptor, 1 | 2, 0, nbytes) != 0:  # FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
        raise OSError(ctypes.get_errno(), "fallocate")


def make_writable(memory: memoryview) -> None:
    """Change the protection of memory that was mapped to be read only."""
    address = np.frombuffer(memory, "q").ctypes.data
    if (
        LIBC.mprotect(
            ctypes.c_void_p(address), ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_WRITE
        )
        != 0
    ):
        raise OSError(ctypes.get_errno(), "mprotect")


def map_again(descriptor: int) -> None:
    """Open the same memory anew, and map it to be written to."""
    opened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
    try:
        mmap.mmap(opened, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(opened)


def seal(descriptor: int) -> None:
    """Have nobody write to it any more."""
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_no_rank_changes_the_size_or_the_seals_of_memory_or_writes_to_the_slot_table() -> None:
    """With the descriptors that it got; `test_pages` and `test_memory` have the plain ways."""
    with scene() as here:
        here.step()
        for descriptor, page in zip(here.hostile.descriptors, here.hostile.pages, strict=True):
            for change in (
                lambda: os.ftruncate(descriptor, 0),  # noqa: B023
                lambda: os.ftruncate(descriptor, page.nbytes + mmap.PAGESIZE),  # noqa: B023
                lambda: os.posix_fallocate(descriptor, page.nbytes, mmap.PAGESIZE),  # noqa: B023
                lambda: seal(descriptor),  # noqa: B023
            ):
                with pytest.raises(PermissionError):
                    change()
            assert os.fstat(descriptor).st_size == page.nbytes
        for number in (TABLE, FEEDBACK):
            descriptor, page = here.hostile.descriptors[number], here.hostile.pages[number]
            attempts: list[Callable[[], None]] = [
                partial(punch_hole, descriptor, mmap.PAGESIZE),
                partial(make_writable, page),
                partial(map_again, descriptor),
            ]
            for attempt in attempts:
                with pytest.raises(PermissionError):
                    attempt()
        here.step()
        here.end()


def test_a_reader_survives_a_rank_that_gives_its_memory_back() -> None:
    """The chunk reads as zeros: the memory keeps its size, so that no reader is killed by a bus error."""
    with scene() as here:
        region = here.hostile.wanted["h"].parts[0].region
        np.frombuffer(here.hostile.pages[SLOT], "f8")[:4] = [1, 2, 3, 4]
        here.hostile.ring.submit([region], 0)
        step = here.agent.wait(StepComplete)
        here.agent.regions["h"] = [region]
        (chunk,) = here.agent.chunks(step)
        assert chunk.tolist() == [1, 2, 3, 4]
        punch_hole(here.hostile.descriptors[SLOT], here.hostile.pages[SLOT].nbytes)
        assert chunk.tolist() == [0, 0, 0, 0]
        here.step()
        here.end()


# Memory.


def resident(which: str = "VmRSS") -> int:
    """Resident memory of this process in bytes, now or (``VmHWM``) at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return 1024 * int(line.split()[1])


@contextmanager
def growing_at_most(nbytes: int) -> Iterator[None]:
    """Check how much more memory this process, in which the agent runs, has had at any time."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = resident()
    with mock.patch.object(
        exchange.logger, "disabled", True
    ):  # pytest keeps what is logged, with all that it refers to
        yield
    assert resident("VmHWM") - before <= nbytes


def test_garbage_takes_no_more_memory_than_a_few_messages() -> None:
    """64 MiB of it, in frames as large as they may be."""
    piece = bytes(MIB)
    with scene() as here, growing_at_most(6 * messages.MAX_MESSAGE_BYTES):
        for _ in range(4):
            with raw(here.agent) as peer, suppress(OSError):
                peer.sendall(struct.pack("<I", messages.MAX_MESSAGE_BYTES))
                for _ in range(messages.MAX_MESSAGE_BYTES // MIB):
                    peer.sendall(piece)
                peer.recv(1)
        here.step()
        here.end()


def test_a_message_that_is_only_announced_takes_no_memory() -> None:
    with scene() as here, growing_at_most(8 * MIB):
        for _ in range(200):  # 3 GiB in all
            here.stranger_says(struct.pack("<I", messages.MAX_MESSAGE_BYTES) + bytes(1024))
        here.step()
        here.end()


def filled(code: int, *fields: bytes, with_item: bytes, announced: int = 100_000) -> bytes:
    """A message of the greatest size: some fields, and a list of nothing but one item."""
    head = struct.pack("<H", code) + b"".join(fields) + struct.pack("<I", announced)
    return head + with_item * ((messages.MAX_MESSAGE_BYTES - len(head)) // len(with_item))


def text(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


@pytest.mark.parametrize(
    "body",
    [
        filled(1, bytes(8), text(b"s"), bytes(16), with_item=bytes(4)),
        filled(1, bytes(8), text(b"s"), bytes(16), with_item=text(b"")),
        filled(9, text(b"c"), with_item=text(text(b"") + bytes(8))[:-1]),
        filled(17, with_item=b"\xff" * 8),
        filled(17, with_item=bytes(8), announced=2**32 - 1),
        filled(26, with_item=text(struct.pack("<H", 4) + text(b"") + b"\2")),
        struct.pack("<H", 5) + text(b"\xff" * (messages.MAX_MESSAGE_BYTES - 6)),
        struct.pack("<H", 2) + text(b"a") + text(b"[" * (messages.MAX_MESSAGE_BYTES - 20)),
    ],
    ids=["arrays", "empty", "structures", "numbers", "many", "events", "text", "dtype"],
)
def test_decoding_takes_a_bounded_multiple_of_a_message(body: bytes) -> None:
    assert len(body) <= messages.MAX_MESSAGE_BYTES
    with growing_at_most(16 * messages.MAX_MESSAGE_BYTES), pytest.raises(ProtocolError):
        messages.decode(body)


def test_a_world_of_any_size_is_waited_for_in_a_few_words() -> None:
    """The analytics names the bridges that are missing, and a bridge says how many there are."""
    with growing_at_most(8 * MIB):
        said = missing_bridges([0, 2], 2**24)
    assert said == f"bridges 1, 3, 4, 5, 6, 7, 8, 9, 10, 11 ... ({2**24 - 2} in all) of {2**24}"


@pytest.mark.parametrize("who", ["rank", "stranger"])
def test_what_a_peer_never_reads_does_not_pile_up(who: str) -> None:
    """Each of these messages is answered."""
    with scene() as here, growing_at_most(12 * MIB):
        burst = encode(messages.Attach(messages.PROTOCOL_VERSION, 0)) * 1000
        peer = here.hostile.socket if who == "rank" else raw(here.agent)
        for _ in range(60):
            with suppress(OSError):
                peer.sendall(burst)
            here.agent.events()
        here.step()
        peer.close()
        here.end()


def test_nobody_waits_for_a_peer_that_is_refused_and_does_not_read() -> None:
    with scene() as here:
        attach = encode(messages.Attach(messages.PROTOCOL_VERSION, 0))
        here.hostile.say(attach * 700)  # the answers do not fit into the socket
        here.hostile.say(frame(b""))
        started = time.monotonic()
        here.step()
        assert time.monotonic() - started < PATIENCE_S
        here.end()


# Who may come in.

NOBODY = 65534

KNOCK = """
import os, socket, sys
os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
peer.connect(bytes.fromhex(sys.argv[1]))
peer.settimeout({patience_s})
try:
    peer.sendall(bytes.fromhex(sys.argv[2]))
    data, descriptors, _, _ = socket.recv_fds(peer, 65536, 253)
except (BrokenPipeError, ConnectionResetError):
    data, descriptors = b"", []
print(len(data), len(descriptors))
"""

SQUAT = """
import os, socket, sys
os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
listener.bind(bytes.fromhex(sys.argv[1]))
listener.listen(16)
print("listening", flush=True)
for _ in range(int(sys.argv[2])):
    peer, _ = listener.accept()
    peer.settimeout({patience_s})
    print(len(peer.recv(65536)), flush=True)
    peer.close()
"""


def as_nobody(program: str, *arguments: str) -> subprocess.Popen[str]:
    """Run a program that becomes another user before it opens a socket."""
    if os.getuid() != 0:
        skip_or_fail("only root can become another user")
    return subprocess.Popen(
        [sys.executable, "-I", "-c", program.format(nobody=NOBODY, patience_s=PATIENCE_S), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    "said",
    [
        messages.Hello(messages.PROTOCOL_VERSION, SESSION, HOSTILE, WORLD_SIZE, (), ()),
        messages.Attach(messages.PROTOCOL_VERSION, 0),
        messages.Follow(messages.PROTOCOL_VERSION, ANALYTICS, 1, 1),
    ],
    ids=lambda message: type(message).__name__,
)
def test_another_user_gets_nothing_from_an_agent(said: Message) -> None:
    """Neither an answer nor memory; the kernel says who it is."""
    with scene() as here:
        here.listen()
        knocking = as_nobody(KNOCK, agent_address(here.agent.settings).encode().hex(), encode(said).hex())
        assert knocking.communicate(timeout=PATIENCE_S)[0].split() == ["0", "0"]
        here.step()
        here.end()


def test_nothing_is_said_to_an_agent_of_another_user() -> None:
    """Anybody can take an abstract name first: then nothing works under it, and nothing leaks."""
    settings = new_settings()
    address = agent_address(settings)
    ways: list[Callable[[], object]] = [
        lambda: Bridge(bridge_id=0, arrays_metadata={}, system_metadata={"world_size": 1}, settings=settings),
        lambda: attach(address, "agent", 0),
        lambda: AnalyticsLine(address, ANALYTICS),
    ]
    squatter = as_nobody(SQUAT, address.encode().hex(), str(len(ways) + 1))
    try:
        assert squatter.stdout is not None
        assert squatter.stdout.readline() == "listening\n"
        for way in ways:
            with pytest.raises(PeerIdentityError, match=f"belongs to user id {NOBODY}, this one to 0"):
                way()
        with pytest.raises(SessionInUseError, match="is in use on this host"):
            AgentServer(settings, "run", "node")
        assert squatter.communicate(timeout=PATIENCE_S)[0].split() == ["0"] * (len(ways) + 1)
    finally:
        squatter.kill()
        squatter.communicate()


# Nothing that is received is code.

UNPICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "copyreg"}
EVALUATORS = {"eval", "exec", "compile", "__import__", "importlib", "runpy"}
ROOM = Path(_transport.__file__).parent


def names_in(tree: ast.AST) -> Iterator[str]:
    """Everything that a module imports, calls by name, or asks for by keyword."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.arg


@pytest.mark.parametrize(
    "path",
    [*sorted(ROOM.glob("*.py")), *sorted((ROOM.parent / "_state").glob("*.py"))],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_nothing_from_a_socket_is_unpickled_or_evaluated(path: Path) -> None:
    """Neither the hand-off nor what it is built on knows how to."""
    assert not set(names_in(ast.parse(path.read_text()))) & (UNPICKLERS | EVALUATORS | {"allow_pickle"})
