"""The hand-off in C, as Python sees it."""

from collections.abc import Callable
from typing import Any

import numpy as np

class Memory:
    """Chunk memory that is mapped for as long as anything refers to it."""

    def __buffer__(self, flags: int, /) -> memoryview: ...

class Chunk:
    """Where one chunk is handed over."""

    lent: np.ndarray | None
    dtype: np.dtype | None
    wanted: bool

    def send(self, chunk: Any, timestep: Any, time: Any, /) -> bool: ...
    def put(self, array: np.ndarray, timestep: int, time: float | None, /) -> None: ...
    def commit(self, timestep: int, time: float | None, /) -> None: ...
    def slot(self, timestep: int, /) -> tuple[Memory, int, tuple[int, ...]] | None: ...
    def check(self, timestep: int, /) -> None: ...
    def declare_dtype(self, dtype: str, /) -> str | None: ...

class Client:
    """A rank's client; opening one waits until the session has started."""

    chunks: tuple[tuple[Chunk, ...], ...]
    stats: tuple[int, int, float]
    newest: int | None
    closed: bool
    detached: bool

    def __init__(
        self,
        *,
        session: str,
        socket_path: str | None,
        bridge_id: int,
        world_size: int,
        connect_timeout_s: float,
        start_timeout_s: float,
        send_timeout_s: float,
        warn_every_s: float,
        on_lost: str,
        disabled: bool,
        say: Callable[[int, str], None],
        arrays: tuple[Any, ...],
    ) -> None: ...
    def find(self, array: object, index: object, /) -> tuple[int, int]: ...
    def advance(self, timestep: int, /) -> None: ...
    def get(self, key: str, timestep: int, wait_s: float | None, /) -> bytes | None: ...
    def get_queue(self, key: str, /) -> tuple[tuple[int, bytes], ...] | None: ...
    def close(self) -> None: ...
    def abort(self, reason: str, /) -> None: ...
    def close_with_process(self, otherwise: str, /) -> None: ...
    def close_in_child(self) -> None: ...

def refuse(reason: str, /, **options: Any) -> None: ...
def own_limits(
    memberships: str | None = None, root: str | None = None, /
) -> tuple[tuple[int, str, int, int], ...]: ...
def check_socket_path(path: str, /) -> None: ...
def load(page: memoryview, word: int, /) -> int:
    """Return a word, and see what was published before it."""

def store(page: memoryview, word: int, value: int, /) -> None:
    """Publish what has been written before, by a word."""

def exchange(page: memoryview, word: int, value: int, /) -> int:
    """Store a word and return what it was, in one step."""

def fence() -> None:
    """Have all that was written before come before all that is read or written later."""

def wake(page: memoryview, word: int, /) -> None:
    """Change a word and wake all that wait for it."""

def wait(page: memoryview, word: int, value: int, seconds: float, /) -> None:
    """Wait while a word has a value, and not longer than that."""
