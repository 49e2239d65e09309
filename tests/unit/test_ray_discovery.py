"""Which Ray clusters are on a host, whose they are, and whether one answers; without Ray."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from deisa.ray import Settings
from deisa.ray._engine import ray_cluster
from deisa.ray._engine.ray_discovery import (
    NoAnswerError,
    RayNodeHere,
    check_answers,
    nodes_here,
    noted_address,
    split_address,
    temp_folder,
)
from deisa.ray.errors import ClusterError
from tests.support.patience import PATIENCE_S, wait_until

SOON = Settings(connect_timeout_s=0.2)


@pytest.fixture
def temp_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ray's folder, of this test alone."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Something that listens, and is no Ray."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def at(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def refusal(address: str, settings: Settings = SOON) -> str:
    with pytest.raises(ClusterError) as caught:
        ray_cluster._connect_to(address, "RAY_ADDRESS", settings)
    return str(caught.value)


# What runs here.


def test_nodes_are_told_by_their_command_lines(tmp_path: Path) -> None:
    commands = {
        1: "/x/ray/core/src/ray/raylet/raylet\0--gcs-address=10.0.0.1:6379\0--node_id=a",
        2: "/x/raylet --gcs-address=10.0.0.2:7000 --node_id=b",  # as setproctitle leaves it
        3: "python\0/x/default_worker.py\0--gcs-address=10.0.0.3:6379",
        4: "grep\0raylet\0--gcs-address=10.0.0.4:6379",
        5: "",
    }
    for pid, command in commands.items():
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "cmdline").write_text(command)
    (tmp_path / "6").mkdir()  # has ended
    found = sorted(nodes_here(tmp_path), key=lambda node: node.address)
    assert found == [RayNodeHere("10.0.0.1:6379", os.geteuid()), RayNodeHere("10.0.0.2:7000", os.geteuid())]
    assert all(node.is_own for node in found)
    assert not RayNodeHere("10.0.0.1:6379", os.geteuid() + 1).is_own


def test_an_address_noted_by_oneself(temp_dir: Path) -> None:
    assert noted_address() == (None, "")
    note = temp_dir / "ray_current_cluster"
    note.write_text("10.0.0.1:6379\n")
    assert noted_address() == ("10.0.0.1:6379", "")
    note.write_text("")
    assert noted_address() == (None, "")
    note.unlink()
    note.mkdir()  # as unreadable for root as for anybody
    assert noted_address() == (None, f"{note} cannot be read (Is a directory)")


def test_an_address_noted_by_another_user(temp_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    note = temp_dir / "ray_current_cluster"
    note.write_text("10.0.0.1:6379")
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    address, complaint = noted_address()
    assert address is None
    assert complaint.startswith(f"{note} belongs to ") and f"uid {owner}" in complaint


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"RAY_TMPDIR": "/a", "TMPDIR": "/b"}, (Path("/a/ray"), "RAY_TMPDIR")),
        ({"TMPDIR": "/b"}, (Path("/b/ray"), "TMPDIR")),
        ({}, (Path("/tmp/ray"), "")),
    ],
    ids=["both", "system", "none"],
)
def test_the_folder_of_sessions(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: tuple[Path, str]
) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert temp_folder() == expected


def test_a_cluster_of_ones_own_is_waited_for(
    tmp_path: Path, temp_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proc = tmp_path / "proc"
    proc.mkdir()
    monkeypatch.setattr(ray_cluster, "nodes_here", partial(nodes_here, proc))
    assert "no Ray of this user runs on this host, and RAY_ADDRESS is 'auto'" in refusal("auto")
    monkeypatch.setattr(ray_cluster, "_join_own", lambda: bool(nodes_here(proc)))
    patient = Settings(connect_timeout_s=PATIENCE_S, warn_every_s=0.01)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ray_cluster._connect_to, "auto", "RAY_ADDRESS", patient)
        wait_until(lambda: "waiting for a Ray of this user" in caplog.text, "it says so", PATIENCE_S)
        assert not waiting.done()
        (proc / "1").mkdir()
        (proc / "1/cmdline").write_text("raylet\0--gcs-address=10.0.0.1:6379")
        waiting.result(PATIENCE_S)


# Addresses that are given.


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("host:6379", ("host", 6379)),
        ("[::1]:6379", ("::1", 6379)),
        ("::1", None),
        ("host", None),
        ("6379", None),
        (":6379", None),
        ("host:0", None),
        ("host:65536", None),
        ("host:six", None),
        ("host:", None),
    ],
)
def test_addresses_are_taken_apart(address: str, expected: tuple[str, int] | None) -> None:
    assert split_address(address) == expected


@pytest.mark.parametrize(
    ("address", "text"),
    [
        ("ray://head:10001", "Ray Client is not supported.*RAY_ADDRESS=head:6379"),
        ("ray://head", "Ray Client is not supported.*RAY_ADDRESS=head:6379"),
        ("http://head:8265", "http:// is no way to reach a Ray cluster.*RAY_ADDRESS=head:6379"),
        ("head", "expected host:port, such as 10.0.0.1:6379, 'auto' or 'local'"),
        ("no-such-host.invalid:6379", "there is no host 'no-such-host.invalid'"),
    ],
)
def test_addresses_that_make_no_sense_are_refused_at_once(address: str, text: str) -> None:
    refused = refusal(address, Settings(connect_timeout_s=3600))
    assert re.search(text, refused)
    assert address in refused


def test_the_address_of_something_else(listener: socket.socket) -> None:
    """A server that speaks HTTP/1, as the dashboard does."""

    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 505 HTTP Version Not Supported\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()
    text = refusal(at(listener), Settings(connect_timeout_s=3600))
    assert f"nothing answers at {at(listener)} (RAY_ADDRESS): what listens there is no Ray head" in text


def test_something_that_listens_and_is_silent(listener: socket.socket) -> None:
    with pytest.raises(NoAnswerError, match=r"nothing came within 0\.1 s") as caught:
        check_answers(*listener.getsockname(), timeout_s=0.1)
    assert not caught.value.final


def test_a_cluster_that_may_yet_come_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = at(server)
    text = refusal(address, Settings(connect_timeout_s=1.0, warn_every_s=0.1))
    assert f"nothing answers at {address} (RAY_ADDRESS): " in text
    assert "gave up after 1 s (DEISA_RAY_CONNECT_TIMEOUT_S sets how long)" in text
    assert "`ray start --head`" in text
    assert f"waiting for Ray at {address} (RAY_ADDRESS): [Errno 111] Connection refused" in caplog.text


def test_a_host_that_is_no_node_of_the_cluster(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_cluster, "check_answers", lambda *place: None)
    assert "this host is no node of its cluster: run `ray start --address`" in refusal(at(listener))


def test_whose_cluster_refuses_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, theirs = os.geteuid(), os.geteuid() + 1
    found = [RayNodeHere("10.0.0.1:6379", theirs), RayNodeHere("10.0.0.1:7000", mine)]
    monkeypatch.setattr(ray_cluster, "nodes_here", lambda: found)
    assert ray_cluster._foreign_owner("head:6379") == theirs
    assert ray_cluster._foreign_owner("head:7000") is None
    assert ray_cluster._foreign_owner("elsewhere:8000") is None


# A local one.


def test_sockets_whose_paths_would_be_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + 70 * "x")
    with pytest.raises(ClusterError) as caught:
        ray_cluster._folder_for_local()
    text = str(caught.value)
    longest = int(re.search(r"whose path has (\d+) characters at most", text)[1])  # type: ignore[index]
    assert "(RAY_TMPDIR)" in text and "and may have 107. Set RAY_TMPDIR to a folder" in text
    monkeypatch.setenv("RAY_TMPDIR", "/" + (longest - 1) * "x")
    assert ray_cluster._folder_for_local() is None
    monkeypatch.setenv("RAY_TMPDIR", "/" + longest * "x")
    with pytest.raises(ClusterError):
        ray_cluster._folder_for_local()


def test_a_folder_that_only_others_may_write(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setenv("RAY_TMPDIR", short)
        Path(short, "ray").mkdir()
        assert ray_cluster._folder_for_local() is None
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) != f"{short}/ray")
        assert ray_cluster._folder_for_local() == Path(short, f"ray-{os.geteuid()}")
    assert f"{short}/ray belongs to " in caplog.text
