"""Where agents listen: paths that cannot be, sessions that share one, and what a rank is told that finds nobody."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from deisa.ray._transport import reader
from deisa.ray._transport.server import AgentServer
from deisa.ray.bridge import Bridge
from deisa.ray.config import MAX_SOCKET_PATH_BYTES, Settings
from deisa.ray.errors import ConfigurationError, NoAnalyticsError, SessionInUseError
from tests.conftest import skip_or_fail
from tests.unit.agent import CLIENTS, Client, new_settings, running, whole

WRONG = {
    "a file": (lambda path: path.write_text("kept"), r"is a file that is no socket, which stays as it is"),
    "a link to a file": (
        lambda path: [path.with_name("kept").write_text("kept"), path.symlink_to("kept")],
        "is a file that is no socket",
    ),
    "a folder": (lambda path: path.mkdir(), "is a folder, which stays as it is"),
    "a missing folder": (lambda path: path.parent.rmdir(), "there is no folder '.*' on this host; create it"),
    "a file for a folder": (
        lambda path: [path.parent.rmdir(), path.parent.write_text("kept")],
        "cannot be reached: Not a directory",
    ),
}


def connect(settings: Settings, client: Client = Bridge) -> Bridge:
    return client(bridge_id=0, arrays_metadata={}, system_metadata={"world_size": 1}, settings=settings)


def listen(settings: Settings) -> AgentServer:
    return AgentServer(settings, "run", "node")


@pytest.mark.parametrize("side", [listen, *(partial(connect, client=client) for client in CLIENTS.values())])
@pytest.mark.parametrize("what", WRONG)
def test_nothing_can_listen_there(tmp_path: Path, what: str, side: Callable[[Settings], object]) -> None:
    path = tmp_path / "folder" / "agent.sock"
    path.parent.mkdir()
    make, message = WRONG[what]
    make(path)
    with pytest.raises(ConfigurationError, match=message) as caught:
        side(new_settings(socket_path=str(path), connect_timeout_s=600))
    assert repr(str(path)) in str(caught.value)
    assert "the same on both sides (DEISA_RAY_SOCKET_PATH)" in str(caught.value)
    if what == "a file":
        assert path.read_text() == "kept"
    if "link" in what:
        assert path.is_symlink()


def test_a_path_is_as_long_as_the_kernel_allows(tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    name = "é" + "s" * (MAX_SOCKET_PATH_BYTES - len(f"{folder}/") - 2)
    settings = new_settings(socket_path=f"{folder}/{name}")
    with running(settings) as agent:
        (bridge,) = agent.bridges({"a": whole((2,))}, slots={"a": 1})
        bridge.close()
    with pytest.raises(
        ConfigurationError, match=r"has 108 bytes; a socket's path may have 107: give a shorter one"
    ):
        new_settings(socket_path=f"{folder}/{name}s")


def test_a_path_in_the_user_s_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert new_settings(socket_path="~/agent").socket_path == f"{tmp_path}/agent"
    assert new_settings(socket_path="./agent").socket_path == f"{tmp_path}/agent"
    assert new_settings(socket_path="").socket_path == ""


def test_a_path_where_one_may_not_go(tmp_path: Path) -> None:
    if os.getuid() != 0:
        skip_or_fail("only root can become another user")
    with running(socket_path=str(tmp_path / "agent")) as agent:
        tmp_path.chmod(0o700)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setuid(65534)
                connect(agent.settings)
            except ConfigurationError as error:
                status = 0 if "Permission denied" in str(error) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_has_taken_the_place_of_the_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "agent"
    with running(socket_path=str(path)):
        path.unlink()
        path.write_text("kept")
    assert path.read_text() == "kept"


def test_the_socket_of_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "agent"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        other.listen()
        monkeypatch.setattr(reader, "ATTACH_TIMEOUT_S", 0.1)
        with pytest.raises(SessionInUseError, match="or DEISA_RAY_SOCKET_PATH another path"):
            listen(new_settings(socket_path=str(path)))
    assert path.is_socket()


def test_two_sessions_at_one_path(tmp_path: Path) -> None:
    path = str(tmp_path / "agent")
    with running(socket_path=path) as agent:
        with pytest.raises(ConfigurationError) as caught:
            connect(new_settings(session="other", socket_path=path))
        assert str(caught.value).startswith(
            f"bridge 0 of session 'other' came to the agent of session {agent.settings.session!r} at {path}: give both "
            "sides the same session name (DEISA_RAY_SESSION), or each session a path of its own"
        )
        (bridge,) = agent.bridges({"a": whole((2,))}, slots={"a": 1})  # nobody was disturbed
        bridge.send("a", np.zeros(2), 0)
        bridge.close()


def test_a_rank_that_finds_nobody_hears_of_the_user_s_other_sessions() -> None:
    with running() as agent, pytest.raises(NoAnalyticsError) as caught:
        connect(new_settings(session=f"{agent.settings.session}-other", connect_timeout_s=0.03))
    said = str(caught.value)
    assert "is DEISA_RAY_SESSION the same on both sides?" in said


@contextmanager
def listening(name: str) -> Iterator[None]:
    """A socket at an abstract address."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(f"\0{name}")
        other.listen()
        yield


def test_which_other_agents_there_are(client: Client, session_name: str) -> None:
    """Those of other tests may be there, too; the names here come before theirs."""
    uid = os.getuid()
    mine, strange = f"deisa-ray/{uid}/-{session_name}", f"deisa-ray/-{uid + 1000}/{session_name}"
    settings = new_settings(connect_timeout_s=0.03)
    with listening(mine), listening(strange), pytest.raises(NoAnalyticsError) as caught:
        connect(settings, client)
    said = str(caught.value)
    assert said.index(f"; you have an agent of session '-{session_name}'") < said.index(
        " here: is DEISA_RAY_SESSION the same on both sides?; there are agents of other user ids (@"
    )
    assert (
        f"(@{strange}): if one is yours, seen from a container with user ids of its own (here you are {uid}), set "
        "DEISA_RAY_SOCKET_PATH to a path that both sides see"
    ) in said
    with pytest.raises(NoAnalyticsError) as caught:
        connect(settings, client)
    assert mine not in str(caught.value) and strange not in str(caught.value)


def test_a_message_names_a_few_agents(client: Client, session_name: str) -> None:
    uid = os.getuid()
    with ExitStack() as bound:
        for number in range(7):
            bound.enter_context(listening(f"deisa-ray/{uid}/-{number}-{session_name}"))
        with pytest.raises(NoAnalyticsError) as caught:
            connect(new_settings(connect_timeout_s=0.03), client)
    listed = ", ".join(f"'-{number}-{session_name}'" for number in range(5))
    assert f"an agent of session {listed} here: is" in str(caught.value)
