"""Join the Ray cluster that is meant, or start a local one."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import ray
from ray._private import ray_constants
from ray.exceptions import AuthenticationError, RayError

from deisa.ray._engine.ray_discovery import (
    DEFAULT_PORT,
    NoAnswerError,
    check_answers,
    nodes_here,
    noted_address,
    split_address,
    temp_folder,
    user_name,
)
from deisa.ray._session.mpi_job import no_rank
from deisa.ray.config import Settings
from deisa.ray.errors import ClusterError, cause_chain

logger = logging.getLogger("deisa.ray")

TRY_AGAIN_S = 0.5
OOM_RETRIES = "RAY_task_oom_retries"
RETRIES_AFTER_OOM = 3
TRIES = 3  # of Ray, to join a cluster; about a second each where it is refused
SOCKET_PATH_BYTES = 107  # the longest path of a Unix socket

_connecting = threading.Lock()  # ray.init() takes one caller at a time


def connect(settings: Settings) -> None:
    """Connect this process to Ray, if it is not yet.

    That is the Ray at ``settings.address``, else at ``RAY_ADDRESS``, else a cluster of this user that runs on this
    host, else a new local one.

    Raises
    ------
    ClusterError
        When there is no such cluster, it refuses this process, or a local one cannot be started.
    """
    with _connecting:
        if ray.is_initialized():
            return
        if settings.address:
            _connect_to(settings.address.strip(), "DEISA_RAY_ADDRESS", settings)
        elif address := os.environ.get("RAY_ADDRESS", "").strip():
            _connect_to(address, "RAY_ADDRESS", settings)
        elif not _join_own():
            logger.warning(
                "no running Ray of yours found: starting a local one (`ray start --head` has it stay)"
            )
            _start_local()


def _connect_to(address: str, variable: str, settings: Settings) -> None:
    if address == "local":
        _start_local()
    elif address == "auto":
        _wait_own(variable, settings)
        if not _join_own():
            raise ClusterError(
                f"no Ray of this user runs on this host, and {variable} is 'auto': start one with "
                f"`ray start --head`, or unset {variable} to have a local one started"
            )
    else:
        _wait_answers(address, variable, settings)
        _join(address, f" at {address} ({variable})")


# A cluster that somebody names.


def _wait_answers(address: str, variable: str, settings: Settings) -> None:
    """Wait for a cluster that may be just starting."""
    place = _parse(address, variable)
    started = said = time.monotonic()
    while True:
        try:
            check_answers(*place)
            _check_node_here(place[1])
            return
        except NoAnswerError as exc:
            now = time.monotonic()
            if exc.final or now - started > settings.connect_timeout_s:
                gave_up = (
                    ""
                    if exc.final
                    else (
                        f"; gave up after {settings.connect_timeout_s:g} s (DEISA_RAY_CONNECT_TIMEOUT_S sets how long)"
                    )
                )
                raise ClusterError(
                    f"nothing answers at {address} ({variable}): {exc}{gave_up}. Is the head node still up? Start it "
                    f"with `ray start --head`, or unset {variable} to use a cluster of yours that runs on this host"
                ) from exc
            if now - said > settings.warn_every_s:
                said = now
                logger.warning(
                    "waiting for Ray at %s (%s): %s (%.0f s so far)", address, variable, exc, now - started
                )
        time.sleep(TRY_AGAIN_S)


def _parse(address: str, variable: str) -> tuple[str, int]:
    scheme, separator, rest = address.partition("://")
    if separator:
        host = rest.rpartition(":")[0] or rest.partition("/")[0] or "host"
        what = (
            "Ray Client is not supported"
            if scheme == "ray"
            else f"{scheme}:// is no way to reach a Ray cluster"
        )
        raise ClusterError(
            f"{variable} is {address!r}: {what}, since the analytics must run on a node of the cluster, near the "
            f"chunks. Start it there, with {variable}={host}:{DEFAULT_PORT} (the port of `ray start --head --port`)"
        )
    place = split_address(address)
    if place is None:
        raise ClusterError(
            f"{variable} is {address!r}: expected host:port, such as 10.0.0.1:{DEFAULT_PORT}, 'auto' or 'local'"
        )
    return place


def _check_node_here(port: int) -> None:
    """Check that this host is a node of a cluster whose head has this port.

    Hosts are not compared: a head has as many addresses as networks.
    """
    ports = {place[1] for node in nodes_here() if (place := split_address(node.address)) is not None}
    if port not in ports:
        raise NoAnswerError(
            "the head is up, but this host is no node of its cluster: run `ray start --address` with the same "
            "address on this host, or start the analytics on a node of the cluster"
        )


# A cluster that is found.


def _wait_own(variable: str, settings: Settings) -> None:
    """Wait for a cluster of this user on this host, for as long as for one that is named."""
    started = said = time.monotonic()
    while not any(node.is_own for node in nodes_here()):
        now = time.monotonic()
        if now - started > settings.connect_timeout_s:
            return
        if now - said > settings.warn_every_s:
            said = now
            logger.warning(
                "waiting for a Ray of this user on this host (%s, %.0f s so far)", variable, now - started
            )
        time.sleep(TRY_AGAIN_S)


def _join_own() -> bool:
    """Join a cluster of this user that runs on this host; says why not if there is only something like one."""
    noted, complaint = noted_address()
    here = nodes_here()
    own = sorted({node.address for node in here if node.is_own}, key=lambda address: address != noted)
    for address in own:
        place = split_address(address)
        try:
            if place is not None:
                check_answers(*place)
        except NoAnswerError as exc:
            logger.warning(
                "a node of your Ray cluster at %s runs on this host, but its head is gone: %s", address, exc
            )
            continue
        _find_token()
        _join(address, "")
        return True
    if complaint:
        logger.warning("%s: not used", complaint)
    elif noted is not None and noted not in own:
        logger.warning(
            "%s names a Ray cluster at %s, of which nothing runs on this host: not used",
            temp_folder()[0] / "ray_current_cluster",
            noted,
        )
    for node in {node.address: node for node in here if not node.is_own}.values():
        logger.warning(
            "the Ray cluster at %s belongs to %s, and only one of your own is joined by itself (RAY_ADDRESS=%s joins "
            "that one)",
            node.address,
            user_name(node.uid),
            node.address,
        )
    return False


def _find_token() -> None:
    """Use the token in ~/.ray, as Ray does for a cluster that it finds by itself."""
    try:
        from ray._private.authentication.authentication_token_setup import (
            maybe_enable_token_auth_if_token_available,
        )
    except ImportError:  # older releases take the variable RAY_AUTH_MODE only
        return
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _join(address: str, at: str) -> None:
    """Join the cluster at an address that answers; `at` says which that is."""
    try:
        with _few_tries(), _few_retries():
            ray.init(address=address, logging_level=logging.WARNING)
    except (RayError, OSError, RuntimeError, ValueError, AssertionError) as exc:
        ray.shutdown()
        if _is_about_tokens(exc):
            owner = _foreign_owner(address)
            if owner is not None:
                raise ClusterError(
                    f"the Ray cluster{at} belongs to {user_name(owner)} and wants an authentication token: use a "
                    "cluster of your own (without an address, one is found or started), or ask that user for the token"
                ) from exc
            raise ClusterError(
                f"the Ray cluster{at} wants an authentication token, and this process has none or another one: "
                "set RAY_AUTH_MODE=token here, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH as on the head node "
                "(a token in ~/.ray/auth_token is used without them only where RAY_AUTH_MODE=token is set); or set "
                "RAY_ADDRESS=local to use a Ray of this process's own"
            ) from exc
        raise ClusterError(f"cannot connect to the Ray cluster{at or f' at {address}'}: {exc}") from exc


def _foreign_owner(address: str) -> int | None:
    """The user of the cluster at an address, as far as this host knows, if that is another one."""
    place = split_address(address)
    here = [node for node in nodes_here() if place and node.address.rpartition(":")[2] == str(place[1])]
    return None if any(node.is_own for node in here) else next((node.uid for node in here), None)


@contextmanager
def _few_retries() -> Iterator[None]:
    """Have Ray give up tasks that its memory monitor ends again and again; by default it never does."""
    if OOM_RETRIES in os.environ:
        yield
        return
    os.environ[OOM_RETRIES] = str(RETRIES_AFTER_OOM)
    try:
        yield
    finally:
        os.environ.pop(OOM_RETRIES, None)


@contextmanager
def _few_tries() -> Iterator[None]:
    """Have Ray give up after seconds rather than minutes: the head has answered, so that a refusal is one."""
    usual = ray_constants.NUM_REDIS_GET_RETRIES
    if "RAY_NUM_REDIS_GET_RETRIES" not in os.environ:
        ray_constants.NUM_REDIS_GET_RETRIES = TRIES
    try:
        yield
    finally:
        ray_constants.NUM_REDIS_GET_RETRIES = usual


def _is_about_tokens(error: BaseException) -> bool:
    return any(
        isinstance(link, AuthenticationError) or "InvalidAuthToken" in str(link)
        for link in cause_chain(error)
    )


# A cluster of this process.


def _start_local() -> None:
    folder = _folder_for_local()
    more = {} if folder is None else {"_temp_dir": str(folder)}

    def start() -> None:
        ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING, **more)

    try:
        with no_rank(), _few_retries():
            _in_lasting_thread(start)
    except (RayError, OSError, RuntimeError, ValueError, AssertionError) as exc:
        ray.shutdown()
        raise ClusterError(f"a local Ray cannot be started: {exc}") from exc


def _in_lasting_thread(action: Callable[[], None]) -> None:
    """Do something in a thread that lasts as long as this process: Linux kills Ray with the thread that started it."""
    if threading.current_thread() is threading.main_thread():
        action()
        return
    done: Future[None] = Future()

    def act_and_stay() -> None:
        try:
            action()
        except Exception as exc:
            done.set_exception(exc)
        else:
            done.set_result(None)
            threading.Event().wait()

    threading.Thread(target=act_and_stay, name="deisa-local-ray", daemon=True).start()
    done.result()


def _folder_for_local() -> Path | None:
    """A folder for Ray's sessions, if it is another one than Ray's own choice, which may be another user's."""
    chosen, variable = temp_folder()
    folder = chosen
    if chosen.is_dir() and not os.access(chosen, os.W_OK | os.X_OK):
        folder = chosen.with_name(f"ray-{os.geteuid()}")
        logger.warning("%s belongs to %s: using %s", chosen, user_name(chosen.stat().st_uid), folder)
    session = f"session_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}_{os.getpid()}/sockets/plasma_store"
    nbytes = len(os.fsencode(folder / session))
    if nbytes > SOCKET_PATH_BYTES:
        longest = SOCKET_PATH_BYTES - (nbytes - len(os.fsencode(folder.parent)))
        raise ClusterError(
            f"a local Ray cannot be started in {str(folder.parent)!r} ({variable or 'the default'}): the paths of its "
            f"sockets would have {nbytes} characters, and may have {SOCKET_PATH_BYTES}. Set RAY_TMPDIR to a folder "
            f"whose path has {longest} characters at most, such as /tmp"
        )
    return None if folder == chosen else folder


def node_cpus() -> dict[str, int]:
    """Whole CPUs that Ray counts on each node that is alive."""
    return {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]}
