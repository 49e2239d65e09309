"""How an agent comes to listen at the address of its session."""

from __future__ import annotations

import errno
import logging
import os
import socket
import stat
import time

from deisa.ray._handoff._native import check_socket_path
from deisa.ray._state.presence import in_use, is_certain
from deisa.ray._transport.address import agent_address, shown
from deisa.ray._transport.peers import holders_of
from deisa.ray._transport.reader import OwnerHasEnded, probe
from deisa.ray.config import Settings
from deisa.ray.errors import ConfigurationError, PeerError, PeerIdentityError, SessionInUseError

logger = logging.getLogger("deisa.ray.agent")

QUEUE = 4096  # connections that wait to be accepted
LOOK_AGAIN_S = 0.5


class Listener:
    """A socket that is bound to the address of a session, and the file that goes with it if the address is a path."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._file: tuple[str, os.stat_result] | None = None
        try:
            self.socket.bind(address)
            if not address.startswith("\0"):
                self._file = address, os.lstat(address)
            self.socket.listen(QUEUE)
            self.socket.setblocking(False)
        except BaseException:
            self.socket.close()
            raise

    def close(self) -> None:
        """Stop listening, and remove the file unless it is another one by now."""
        self.socket.close()
        if self._file is not None:
            path, made = self._file
            try:
                if os.path.samestat(os.lstat(path), made):
                    os.unlink(path)
            except FileNotFoundError:
                pass


def listen(settings: Settings, run_id: str) -> Listener | None:
    """Listen at the address of a session; None if another agent of this run does so on this host.

    Parameters
    ----------
    settings : Settings
    run_id : str

    Raises
    ------
    ConfigurationError
        When the address is a path where nothing can listen.
    SessionInUseError
        When an agent of another analytics has the address, and goes on.
    """
    address = agent_address(settings)
    if settings.socket_path:
        check_socket_path(address)
    started = said = time.monotonic()
    unanswered_since: float | None = None
    while True:
        try:
            return Listener(address)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise ConfigurationError(f"cannot listen at {shown(address)}: {exc}") from exc
        other = None
        try:
            other = probe(address)
        except ConnectionRefusedError as exc:
            if not address.startswith("\0"):
                _remove_left_behind(address)
            elif isinstance(exc, OwnerHasEnded):
                raise SessionInUseError(_kept_by_child(settings, address)) from exc
            continue
        except PeerIdentityError as error:
            raise SessionInUseError(_in_use(settings, address, str(error))) from error
        except (OSError, PeerError) as error:
            logger.debug("the agent at %s: %s", shown(address), error)
        if other is not None and other.agent_id.split(":")[0] == run_id:
            return None  # another node of this cluster is on this host and serves its ranks
        now = time.monotonic()
        if other is not None:
            state, quiet_s, waited_s, unanswered_since = other.analytics, other.quiet_s, now - started, None
        else:  # it may be ending
            unanswered_since = unanswered_since or now
            state, quiet_s, waited_s = "here", 0.0, now - unanswered_since
        if is_certain(state, quiet_s, waited_s, settings.driver_timeout_s):
            raise SessionInUseError(_in_use(settings, address, other.holder if other is not None else None))
        if now - said > settings.warn_every_s:
            said = now
            logger.warning(
                "waiting until the agent of an earlier run of session %r ends (%.0f s so far): its data is kept "
                "for %g s (DEISA_RAY_DRIVER_TIMEOUT_S); another session name need not wait (%s)",
                settings.session,
                now - started,
                settings.driver_timeout_s,
                shown(address),
            )
        time.sleep(LOOK_AGAIN_S)  # its analytics has died; it will end itself


def _remove_left_behind(path: str) -> None:
    """Remove the socket of an agent that was killed; nothing else."""
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        pass


def _in_use(settings: Settings, address: str, holder: str | None) -> str:
    other_path = ", or DEISA_RAY_SOCKET_PATH another path" if settings.socket_path else ""
    return f"{in_use(settings.session, f'on this host ({shown(address)})', holder)}{other_path}"


def _kept_by_child(settings: Settings, address: str) -> str:
    children = ", ".join(map(str, holders_of(address))) or "which /proc does not show"
    return (
        f"the analytics that had session {settings.session!r} has ended, but a process that it has forked keeps the "
        f"address {shown(address)} (process {children}); end that process, or choose another session name"
    )
