"""A replay, as the analytics leads it: processes take the place of the simulation, in a session of their own."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from zlib import crc32

from deisa.ray._replay.simulation import Part
from deisa.ray._replay.source import open_source
from deisa.ray.config import ENVIRONMENT_PREFIX, REPLAY, ReplaySettings, Settings
from deisa.ray.errors import BridgeLostError, ReplayError, WaitTimeoutError

END_TIMEOUT_S = 10.0  # for processes to end that have sent everything
PATIENCE_S = 10 * 24 * 3600.0  # a callback may stand in a debugger
NEVER_MERGED = 2**31
LONGEST_SESSION = 64  # characters
_RUN = secrets.token_hex(4)


class Replay:
    """What takes the place of a simulation.

    Parameters
    ----------
    settings : ReplaySettings

    Attributes
    ----------
    cuts : mapping of str to tuple of tuple of int
        How Dask is to see arrays, where a recording says so.

    Raises
    ------
    ReplayError
        When it cannot be read.
    """

    def __init__(self, settings: ReplaySettings) -> None:
        source = open_source(settings)
        self.settings = settings
        self.cuts = source.cuts
        self._names = tuple(source.arrays)
        self._is_recording = source.is_recording
        self._ranks = min(settings.ranks, max(len(a.blocks.blocks) for a in source.arrays.values()))
        arrays = ", ".join(f"{name!r} at {len(a.steps)} timesteps" for name, a in source.arrays.items())
        print(f"deisa-ray: {settings.path} is replayed in place of a simulation: {arrays}", file=sys.stderr)

    def settings_for(self, settings: Settings) -> Settings:
        """The settings of an analytics that is replayed: no simulation that runs meets it.

        Chunks of a recording are not merged: they are as they had been merged when it was recorded.
        """
        session = f"replay-{os.getpid()}-{_RUN}-{settings.session}"
        if len(session) > LONGEST_SESSION:
            session = f"replay-{os.getpid()}-{_RUN}-{crc32(settings.session.encode()):08x}"
        merge = NEVER_MERGED if self._is_recording else settings.merge_chunks_beyond
        return replace(settings, session=session, socket_path=None, merge_chunks_beyond=merge)

    def is_at(self, path: str) -> bool:
        """Whether this is what is replayed."""
        return self.settings.path == path

    @contextmanager
    def running(
        self, settings: Settings, wanted: Collection[str], failed: Callable[[ReplayError], Any]
    ) -> Iterator[None]:
        """Have the processes send, for as long as the context.

        Parameters
        ----------
        settings : Settings
            Of the analytics.
        wanted : collection of str
            The arrays that callbacks ask for.
        failed : callable
            Called when a process has failed, so that nobody waits for it.

        Raises
        ------
        ReplayError
            Naming what a process could not do.
        """
        names = tuple(name for name in self._names if name in wanted)
        parts = [Part(self.settings, names, rank, self._ranks) for rank in range(self._ranks)]
        ranks = [_Rank(part, _environment(settings), failed) for part in parts]
        try:
            yield
        except (BridgeLostError, WaitTimeoutError) as error:
            _raise_failure(ranks, error)
            raise
        else:
            _raise_failure(ranks, None)
        finally:
            for rank in ranks:
                rank.stop()


def _environment(settings: Settings) -> dict[str, str]:
    """The variables of the processes."""
    own = {
        "SESSION": settings.session,
        "SEND_TIMEOUT_S": f"{PATIENCE_S:g}",
        "ON_ANALYTICS_LOST": "raise",
    }
    variables = {name: value for name, value in os.environ.items() if not name.startswith(REPLAY)}
    for name in ("SOCKET_PATH", "DISABLED"):
        variables.pop(ENVIRONMENT_PREFIX + name, None)
    return variables | {ENVIRONMENT_PREFIX + name: value for name, value in own.items()}


class _Rank:
    """One of the processes, and a thread that waits for its end."""

    def __init__(
        self, part: Part, environment: Mapping[str, str], failed: Callable[[ReplayError], Any]
    ) -> None:
        self.failure: ReplayError | None = None
        self._rank = part.rank
        self._path = part.settings.path
        self._failed = failed
        self._stopping = False
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deisa.ray._replay.simulation", part.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            text=True,
            start_new_session=True,  # Ctrl-C is for the analytics, which ends this one
        )
        self._waiter = threading.Thread(target=self._wait, name="deisa-replay", daemon=True)
        self._waiter.start()

    def _wait(self) -> None:
        assert self._process.stdout is not None
        said = self._process.stdout.read().strip()
        status = self._process.wait()
        if status and not self._stopping:
            what = said.splitlines()[-1] if said else f"it ended with status {status}"
            self.failure = ReplayError(f"process {self._rank} that replays {self._path} has failed: {what}")
            self._failed(self.failure)

    def wait(self) -> None:
        """Wait for its end."""
        self._waiter.join(END_TIMEOUT_S)

    def stop(self) -> None:
        """End it, if it has not."""
        self._stopping = True
        if self._process.poll() is None:
            self._process.kill()
        self._waiter.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _raise_failure(ranks: Collection[_Rank], cause: BaseException | None) -> None:
    for rank in ranks:
        rank.wait()
    for rank in ranks:
        if rank.failure is not None:
            raise rank.failure from cause
