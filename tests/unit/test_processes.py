"""What the end of a process means, and what its forked children must not do: ranks and analytics as real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from deisa.ray._state import node
from deisa.ray._state.events import BridgeClosed, BridgeJoined, BridgeLost, OwnersPassed, StepComplete
from deisa.ray._transport import store
from deisa.ray._transport.pages import DESCRIPTORS_PER_PAGE
from deisa.ray.bridge import Bridge
from deisa.ray.errors import AnalyticsLostError, SessionInUseError
from tests.support.patience import PATIENCE_S, wait_until
from tests.unit.agent import CLIENTS, Agent, descriptors, new_settings, running, whole

PREAMBLE = """
import ctypes, multiprocessing, os, sys, threading, time
import numpy as np
from deisa.ray.errors import *
from tests.unit.agent import CLIENTS

Bridge = CLIENTS[os.environ["CLIENT"]]

def opened():
    return Bridge(
        bridge_id=0,
        arrays_metadata={"a": {"chunk_shape": (4,), "global_shape": (4,), "offset": (0,), "dtype": "f8"}},
        system_metadata={"world_size": 1},
    )

def values(t):
    return np.full(4, float(t))

def fork(way):
    "As Python does, or as C code does, behind Python's back."
    return os.fork() if way == "python" else ctypes.PyDLL(None).fork()

def say(*words):
    print(*words, flush=True)

def stay():
    "Be a child that outlives its parent."
    say("child", os.getpid())
    os.close(1)
    time.sleep(600)
"""


@dataclass
class Program:
    """A process that runs a few lines."""

    process: subprocess.Popen[str]

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, self.errors()
        return line

    def number(self, word: str) -> int:
        """The number behind a word that it prints."""
        said, number = self.line().split()
        assert said == word
        return int(number)

    def go_on(self) -> None:
        """Answer its `input()`."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def errors(self) -> str:
        """Wait for its end; returns what it has written to stderr."""
        assert self.process.stderr is not None
        self.process.wait(PATIENCE_S)
        return self.process.stderr.read()


@contextmanager
def program(lines: str, session: str, client: str = "native", **variables: str) -> Iterator[Program]:
    process = subprocess.Popen(
        [sys.executable, "-c", PREAMBLE + lines],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "DEISA_RAY_SESSION": session, "CLIENT": client, **variables},
    )
    with process:
        try:
            yield Program(process)
        finally:
            process.kill()


@contextmanager
def killed_at_the_end(pid: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)


@contextmanager
def one_rank(agent: Agent, lines: str, client: str = "native") -> Iterator[Program]:
    """A rank that owns the array "a", in a session that starts as soon as it has joined."""
    with program(lines, agent.settings.session, client) as rank:
        agent.wait(BridgeJoined)
        agent.start({"a": 8})
        yield rank


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running() as agent:
        yield agent


def delivered(agent: Agent, count: int) -> list[tuple[int, list[float]]]:
    """The next timesteps that are complete, and their values."""
    steps = [agent.wait(StepComplete) for _ in range(count)]
    return [(step.timestep, agent.chunks(step)[0].tolist()) for step in steps]


def test_every_descriptor_of_a_bridge_is_counted(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = """
said = {"a": {"dtype": "f8"}, "b": {"dtype": "i4"}, "late": {}, "later": {}, "unwanted": {}}
place = {"chunk_shape": (4,), "global_shape": (4,), "offset": (0,)}
arrays = {name: {**place, **dtype} for name, dtype in said.items()}
bridge = Bridge(bridge_id=0, arrays_metadata=arrays, system_metadata={"world_size": 1})
for name in ("late", "later", "unwanted"):
    bridge.send(name, values(0), 0)
bridge.advance(1)
input()
"""
    counted: list[int] = []
    monkeypatch.setattr(store, "check_descriptors", lambda needed, bridges: counted.append(needed))
    with program(lines, agent.settings.session):
        agent.wait(BridgeJoined)
        plan = agent.plan({"a": 1, "b": 1, "late": 1, "later": 1}, b="i4", late=None, later=None)
        before = descriptors()
        agent.server.bound_bytes(*plan)
        agent.server.start(*plan)
        while agent.wait(OwnersPassed).timestep != 1:
            pass
        of_the_node = 4 * DESCRIPTORS_PER_PAGE  # slot table, arrival counters, and two pages for steering
        assert [descriptors() - before - of_the_node] == counted


def test_a_rank_that_may_not_have_so_much_address_space(agent: Agent) -> None:
    lines = """
import resource
pages = int(open("/proc/self/statm").read().split()[0])
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 100 * 2**20, hard))
large = {"chunk_shape": (2**25,), "global_shape": (2**25,), "offset": (0,), "dtype": "f8"}
try:
    Bridge(bridge_id=0, arrays_metadata={"a": large}, system_metadata={"world_size": 1})
except MemoryBoundError as error:
    say(error)
"""
    with program(lines, agent.settings.session) as rank:
        agent.wait(BridgeJoined)
        agent.start({"a": 1})
        said = rank.line()
        assert said.startswith("this process may not map 256.0 MiB of chunk memory; raise the limit"), said
        assert agent.wait(BridgeLost).reason == f"MemoryBoundError: {said}"


# Forked children.


@pytest.mark.parametrize(
    ("leaving", "status"), [("sys.exit(0)", 0), ("sys.exit(3)", 3), ("raise ValueError", 1), ("break", 0)]
)
def test_a_child_that_leaves_the_block_leaves_the_session_alone(
    agent: Agent, leaving: str, status: int
) -> None:
    lines = f"""
with opened() as bridge:
    bridge.send("a", values(0), 0)
    pid = os.fork()
    while pid == 0:
        {leaving}
    if pid:
        say("status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        bridge.send("a", values(1), 1)
"""
    with one_rank(agent, lines) as rank:
        assert rank.number("status") == status
        assert delivered(agent, 2) == [(0, [0.0] * 4), (1, [1.0] * 4)]
        assert agent.wait(BridgeClosed).stats.chunks == 2
        assert rank.process.wait(PATIENCE_S) == 0


CALLS = """
bridge = opened()
bridge.send("a", values(0), 0)
slot = bridge.slot("a", 1)
pid = fork(WAY)
if pid == 0:
    for call in (
        lambda: bridge.send("a", values(-1), 1),
        lambda: bridge.send("a", slot, 1),
        lambda: bridge.send("a", np.full(4, -1.0, "f4"), 1),
        lambda: bridge.slot("a", 1),
        lambda: bridge.advance(5),
        lambda: bridge.close(),
        lambda: bridge.__enter__(),
    ):
        try:
            call()
        except ForkedProcessError as error:
            say(str(error))
        except BaseException as error:
            say("wrong", repr(error))
        else:
            say("no error")
    os._exit(0)
os.waitpid(pid, 0)
slot[...] = 1
bridge.send("a", slot, 1)
bridge.close()
"""


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("way", ["python", "c"])
def test_what_a_child_calls_is_refused_and_touches_nothing(agent: Agent, client: str, way: str) -> None:
    with one_rank(agent, CALLS.replace("WAY", repr(way)), client) as rank:
        for _ in range(7):
            said = rank.line()
            assert said.startswith(f"bridge 0 belongs to process {rank.process.pid}; this is process "), said
            assert "get_context('spawn')" in said
        assert delivered(agent, 2) == [(0, [0.0] * 4), (1, [1.0] * 4)]
        assert agent.wait(BridgeClosed).stats.chunks == 2


@pytest.mark.parametrize("way", ["python", "c"])
def test_a_child_does_not_hide_the_death_of_its_rank(agent: Agent, way: str) -> None:
    lines = f"""
bridge = opened()
bridge.send("a", values(0), 0)
if fork({way!r}) == 0:
    stay()
input()
"""
    with one_rank(agent, lines) as rank, killed_at_the_end(rank.number("child")):
        rank.process.kill()
        lost = agent.wait(BridgeLost)
        assert (lost.bridge_id, lost.last_timestep, lost.reason) == (
            0,
            0,
            "its process ended without close()",
        )


def test_a_child_does_not_hide_that_its_rank_has_closed(agent: Agent) -> None:
    lines = """
bridge = opened()
if fork("c") == 0:
    stay()
input()
bridge.send("a", values(0), 0)
bridge.close()
"""
    with one_rank(agent, lines) as rank, killed_at_the_end(rank.number("child")):
        rank.go_on()
        assert agent.wait(BridgeClosed).stats.chunks == 1
        assert rank.process.wait(PATIENCE_S) == 0
        assert not any(isinstance(event, BridgeLost) for event in agent.events())


def test_a_bridge_that_is_switched_off_does_nothing_in_a_child_either() -> None:
    lines = """
bridge = opened()
if os.fork() == 0:
    bridge.send("a", values(0), 0)
    bridge.close()
    say("well")
    os._exit(0)
"""
    with program(lines, "unused", DEISA_RAY_DISABLED="1") as rank:
        assert rank.line() == "well"


AGENT = """
from deisa.ray._transport.server import AgentServer
from deisa.ray.config import Settings

server = AgentServer(Settings.from_environment(), "run", "node", ends_alone=False)
if fork(WAY) == 0:
    stay()
input()
"""


@pytest.mark.parametrize(("way", "path"), [("python", False), ("python", True), ("c", True)])
def test_a_child_of_the_analytics_does_not_keep_the_address(tmp_path: Path, way: str, path: bool) -> None:
    settings = new_settings(socket_path=str(tmp_path / "agent") if path else None)
    place = {"DEISA_RAY_SOCKET_PATH": settings.socket_path} if settings.socket_path else {}
    with (
        program(AGENT.replace("WAY", repr(way)), settings.session, **place) as analytics,
        ExitStack() as undo,
    ):
        undo.enter_context(killed_at_the_end(analytics.number("child")))
        analytics.process.kill()
        analytics.process.wait()
        agent = undo.enter_context(running(settings))
        (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
        bridge.send("a", np.ones(4), 0)
        assert delivered(agent, 1) == [(0, [1.0] * 4)]


def test_who_keeps_an_address_that_no_path_gives_is_named() -> None:
    settings = new_settings()
    with program(AGENT.replace("WAY", "'c'"), settings.session) as analytics:
        child = analytics.number("child")
        with killed_at_the_end(child):
            analytics.process.kill()
            analytics.process.wait()
            with pytest.raises(SessionInUseError, match=rf"has forked keeps the address .*process {child}\)"):
                Agent(settings)


SERVING = """
from tests.unit.agent import Agent
from deisa.ray._state.events import BridgeJoined
from deisa.ray.config import Settings

agent = Agent(Settings.from_environment())
agent.wait(BridgeJoined)
agent.start({"a": 2})
if fork(WAY) == 0:
    stay()
input()
"""


@pytest.mark.parametrize("way", ["python", "c"])
def test_a_child_of_the_analytics_does_not_hide_its_death(way: str) -> None:
    settings = new_settings(on_analytics_lost="raise")
    with program(SERVING.replace("WAY", repr(way)), settings.session) as analytics:
        bridge = Bridge(
            bridge_id=0,
            arrays_metadata={"a": whole((4,))},
            system_metadata={"world_size": 1},
            settings=settings,
        )
        with killed_at_the_end(analytics.number("child")):
            analytics.process.kill()
            analytics.process.wait()
            with pytest.raises(AnalyticsLostError):
                for t in range(5):
                    bridge.send("a", np.zeros(4), t)
            bridge.close()


FOLLOWING = """
from deisa.ray._transport.address import agent_address
from deisa.ray._transport.line import AnalyticsLine
from deisa.ray.config import Settings

line = AnalyticsLine(agent_address(Settings.from_environment()), "analytics")
line.start(print, print)
journal = line.journal(1)
if fork(WAY) == 0:
    stay()
input()
"""


@pytest.mark.parametrize("way", ["python", "c"])
def test_a_child_of_the_analytics_does_not_keep_the_session(agent: Agent, way: str) -> None:
    agent.server.take_over("analytics")
    with (
        program(FOLLOWING.replace("WAY", repr(way)), agent.settings.session) as analytics,
        ExitStack() as undo,
    ):
        undo.enter_context(killed_at_the_end(analytics.number("child")))
        assert agent.server.driver_presence[0] == "here"
        analytics.process.kill()
        analytics.process.wait()
        wait_until(lambda: agent.server.driver_presence[0] == "gone", "the agent has noticed")


ANALYTICS = """
from deisa.ray import Deisa

deisa = Deisa(engine="local")
pid = os.fork()
if pid == 0:
    for call in (
        lambda: deisa.register_callback(lambda a: None, "a"),
        lambda: deisa.register("a")(lambda a: None),
        lambda: deisa.execute_callbacks(),
        lambda: deisa.close(),
    ):
        try:
            call()
        except ForkedProcessError as error:
            say(str(error))
    with deisa:
        sys.exit(0)
os.waitpid(pid, 0)

@deisa.register("a")
def seen(a):
    say("seen", a[-1].t)

def rank():
    with opened() as bridge:
        bridge.send("a", values(0), 0)

threading.Thread(target=rank).start()
deisa.execute_callbacks()
"""


def test_a_child_of_the_analytics_is_refused_and_ends_nothing() -> None:
    session = new_settings().session
    with program(ANALYTICS, session) as analytics:
        for _ in range(4):
            said = analytics.line()
            assert said.startswith(f"<Deisa session {session!r}, 0 callbacks> belongs to process"), said
        assert analytics.line() == "seen 0"
        assert analytics.process.wait(PATIENCE_S) == 0


# The end of a process.

IN_ORDER = {
    "last line": "",
    "sys.exit()": "sys.exit()",
    "sys.exit(0)": "sys.exit(0)",
    "SystemExit": "raise SystemExit(0)",
    "in a function": "def main(bridge):\n    sys.exit(0)\nkept = [bridge]\ndel bridge\nmain(kept.pop())",
    "with": "with bridge:\n    sys.exit(0)",
    "generator": "def steps(bridge):\n    with bridge:\n        yield\nsome = steps(bridge)\nnext(some)\nsome.close()",
    "atexit": "import atexit; atexit.register(bridge.close)",
}


@pytest.mark.parametrize("end", IN_ORDER)
def test_a_process_that_ends_in_order_closes(agent: Agent, end: str) -> None:
    with one_rank(agent, f"bridge = opened()\nbridge.send('a', values(0), 0)\n{IN_ORDER[end]}\n") as rank:
        assert agent.wait(BridgeClosed).stats.chunks == 1
        errors = rank.errors()
        assert not any(isinstance(event, BridgeLost) for event in agent.events())
    if end in ("with", "generator", "atexit"):
        assert errors == ""
    else:
        assert "bridge 0 is still open as its process ends" in errors


STATUS = "its process ended without close(), and its exit status was not 0"
LOST = {
    "exception": ("raise RuntimeError('the solver diverges')", "RuntimeError: the solver diverges"),
    "in a function": (
        "def main():\n    mine = bridge\n    raise RuntimeError('diverges')\nmain()",
        "RuntimeError: diverges",
    ),
    "with a hook of the user's that ends the process": (
        "sys.excepthook = lambda *error: os._exit(9)\nraise RuntimeError('diverges')",
        "its process ended without close()",
    ),
    "with a hook of the user's from before": (
        "BEFORE sys.excepthook = lambda *error: os._exit(9)\nraise RuntimeError('diverges')",
        "RuntimeError: diverges",
    ),
    "sys.exit(3)": ("sys.exit(3)", STATUS),
    "SystemExit": ("raise SystemExit('no more fuel')", STATUS),
    "sys.exit in a function": (
        "def main(bridge):\n    sys.exit(3)\nkept = [bridge]\ndel bridge\nmain(kept.pop())",
        STATUS,
    ),
    "with": ("with bridge:\n    sys.exit('no more fuel')", "SystemExit: no more fuel"),
    "os._exit": ("os._exit(0)", "its process ended without close()"),
    "signal": ("os.kill(os.getpid(), 15)", "its process ended without close()"),
    "Ctrl-C": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "a thread": (
        "def rank():\n    mine = opened()\n    raise OSError('disk')\n"
        "thread = threading.Thread(target=rank); thread.start(); thread.join()",
        "OSError: disk",
    ),
}


@pytest.mark.parametrize("end", LOST)
def test_a_process_that_does_not_end_in_order_is_lost(agent: Agent, end: str) -> None:
    lines, reason = LOST[end]
    before = ""
    if lines.startswith("BEFORE "):
        before, lines = lines.removeprefix("BEFORE ").split("\n", 1)
    begin = "" if end == "a thread" else "bridge = opened()\nbridge.send('a', values(0), 0)"
    with one_rank(agent, f"{before}\n{begin}\n{lines}\n") as rank:
        assert agent.wait(BridgeLost).reason == reason
        rank.errors()


# A process that is about to end and waits for the others, as MPI_Finalize does.

HALF = {"chunk_shape": (2,), "global_shape": (4,), "dtype": "f8"}
ENDS_LATE = f"""
import atexit

atexit.register(input)  # what is registered first runs last: after deisa-ray, as MPI_Finalize does
half = {{"a": {{**{HALF!r}, "offset": (0,)}}}}
bridge = Bridge(bridge_id=0, arrays_metadata=half, system_metadata={{"world_size": 2}})
bridge.send("a", np.zeros(2), 0)
"""


@contextmanager
def one_that_ends_late(agent: Agent, status: int) -> Iterator[tuple[Program, Bridge]]:
    """A rank whose process is about to end, and the only other bridge; both have sent timestep 0."""
    with program(f"{ENDS_LATE}sys.exit({status})", agent.settings.session) as rank:
        opening = agent.open_bridge(1, 2, {"a": {**HALF, "offset": (2,)}})
        for _ in range(2):
            agent.wait(BridgeJoined)
        agent.start({"a": 4})
        other = opening.result(PATIENCE_S)
        other.send("a", np.zeros(2), 0)
        assert agent.wait(StepComplete).timestep == 0
        yield rank, other


def test_a_rank_that_waits_for_the_others_at_its_end_is_lost(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node, "ENDING_S", 0.1)
    with one_that_ends_late(agent, 3) as (rank, other):
        other.send("a", np.zeros(2), 1)
        lost = agent.wait(BridgeLost)
        assert (lost.bridge_id, lost.last_timestep) == (0, 0)
        assert "its process has been ending for " in lost.reason
        assert "MPI_Finalize waits for the other ranks" in lost.reason
        other.close()
        rank.go_on()
        assert rank.process.wait(PATIENCE_S) == 3
        assert agent.wait(BridgeClosed).bridge_id == 1
        assert not any(isinstance(event, BridgeLost) for event in agent.events())


@pytest.mark.parametrize("status", [0, 3])
def test_a_rank_that_waits_at_its_end_and_owes_nothing_counts_as_finished(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setattr(node, "ENDING_S", 0.1)
    with one_that_ends_late(agent, status) as (rank, other):
        other.close()
        assert agent.wait(BridgeClosed).bridge_id == 1
        assert agent.wait(OwnersPassed).timestep is None
        assert rank.process.poll() is None
        rank.go_on()
        if status == 0:
            assert agent.wait(BridgeClosed).bridge_id == 0
        else:
            assert agent.wait(BridgeLost).reason == STATUS
        assert rank.process.wait(PATIENCE_S) == status


CHILD = """
def simulate():
    global bridge
    bridge = opened()
    bridge.send("a", values(0), 0)
    END

if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=simulate)
    child.start()
    child.join()
"""


@pytest.mark.parametrize(
    ("end", "reason"), [("", None), ("sys.exit(0)", None), ("1 / 0", "ZeroDivisionError: division by zero")]
)
def test_a_rank_that_multiprocessing_has_started(agent: Agent, end: str, reason: str | None) -> None:
    with one_rank(agent, CHILD.replace("END", end)):
        if reason is None:
            assert agent.wait(BridgeClosed).stats.chunks == 1
        else:
            assert agent.wait(BridgeLost).reason == reason


def test_hooks_are_put_back(agent: Agent) -> None:
    program_hook = sys.excepthook
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 1})
    assert sys.excepthook is not program_hook
    bridge.close()
    assert sys.excepthook is program_hook


# A bridge that is dropped.


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("used", ["sent", "failed", "slot"])
def test_a_bridge_that_is_dropped_closes(
    agent: Agent, used: str, caplog: pytest.LogCaptureFixture, no_collector: None
) -> None:
    (bridge,) = agent.bridges(
        {"a": whole((4,)), "late": whole((4,), dtype=None)}, slots={"a": 8, "late": 2}, late=None
    )
    agent.forget()
    bridge.send("a", np.zeros(4), 0)
    bridge.send("late", np.zeros(4), 0)
    if used == "failed":
        with pytest.raises(ValueError, match="declared chunk shape"):
            bridge.send("a", np.zeros(5), 1)
    if used == "slot":
        bridge.slot("a", 1)
    del bridge
    assert agent.wait(BridgeClosed).stats.chunks == 2
    assert "bridge 0 was dropped without close(), and closes now" in caplog.text


def test_a_bridge_that_was_lost_is_dropped_without_a_collector(agent: Agent, no_collector: None) -> None:
    (bridge,) = agent.bridges({"a": whole((4,))}, slots={"a": 8})
    agent.forget()
    agent.server.close(AnalyticsLostError("the analytics has ended"))
    for _ in range(2):
        with pytest.raises(AnalyticsLostError, match="the analytics has ended"):
            bridge.advance(3)
    gone: list[int] = []
    weakref.finalize(bridge, gone.append, 1)
    del bridge
    assert gone == [1]
