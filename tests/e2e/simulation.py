"""A small simulation for tests: ranks as threads, fields whose values say where and when they are."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise, product
from typing import Any

import numpy as np

from deisa.ray import Bridge, Deisa, Settings
from tests.support.patience import PATIENCE_S, wait_until

QUICK_TO_GIVE_UP: dict[str, Any] = {
    "connect_timeout_s": PATIENCE_S,
    "start_timeout_s": PATIENCE_S,
    "send_timeout_s": PATIENCE_S,
    "data_timeout_s": PATIENCE_S,
    "driver_timeout_s": PATIENCE_S,
    "on_analytics_lost": "raise",
}

Metadata = dict[str, Any]


@dataclass(frozen=True)
class Comm:
    """What a Bridge needs of a communicator, without MPI."""

    rank: int
    size: int

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size


@dataclass
class Site:
    """One deisa session: makes the two sides of it on one engine, and closes what the test left open."""

    engine: str
    settings: Settings
    opened: list[Deisa] = field(default_factory=list)

    def deisa(self, **settings: Any) -> Deisa:
        deisa = Deisa(engine=self.engine, settings=replace(self.settings, **settings))
        self.opened.append(deisa)
        return deisa

    def deisa_with(self, **arguments: Any) -> Deisa:
        deisa = Deisa(engine=self.engine, settings=self.settings, **arguments)
        self.opened.append(deisa)
        return deisa

    def bridge(self, rank: int, size: int, arrays: Mapping[str, Any], **settings: Any) -> Bridge:
        return Bridge(
            bridge_id=rank,
            arrays_metadata=arrays,
            system_metadata={"world_size": size, "master_address": "127.0.0.1", "master_port": 29500},
            settings=replace(self.settings, **settings),
        )

    def send_rows(
        self, rank: int, size: int, timesteps: Sequence[int], name: str = "x", **settings: Any
    ) -> None:
        """Be a rank that owns one chunk of a 1-d array, as `rows` describes it."""
        chunk = slice(4 * rank, 4 * rank + 4)
        with self.bridge(rank, size, {name: rows(rank, size)}, **settings) as bridge:
            for timestep in timesteps:
                bridge.send(name, values((4 * size,), timestep)[chunk], timestep)

    def close(self) -> None:
        for deisa in self.opened:
            deisa.close()


def rows(rank: int, size: int, **more: Any) -> Metadata:
    """The chunk of `rank` of a 1-d array with four elements for each rank."""
    return {
        "chunk_shape": (4,),
        "nb_chunks_per_dim": (size,),
        "chunk_position": (rank,),
        "dtype": float,
    } | more


def values(shape: tuple[int, ...], timestep: int) -> np.ndarray:
    """The whole field at a timestep: no two elements are the same, nor any element at two timesteps."""
    return np.arange(math.prod(shape), dtype=float).reshape(shape) + 1000.0 * timestep


def grid_boxes(*cuts: Sequence[int]) -> dict[tuple[int, ...], tuple[slice, ...]]:
    """The boxes of a grid, by position; `cuts` are the borders along each dimension, both ends included."""
    sides = [[slice(*ends) for ends in pairwise(along)] for along in cuts]
    return {
        position: tuple(side[i] for side, i in zip(sides, position, strict=True))
        for position in product(*(range(len(side)) for side in sides))
    }


class Ranks:
    """Functions that run in threads of their own, as the ranks of a simulation."""

    def __init__(self, bodies: Sequence[Callable[[], object]]) -> None:
        self._errors: list[Exception | None] = [None] * len(bodies)
        self._threads = [
            threading.Thread(target=self._run, args=(number, body), name=f"rank-{number}", daemon=True)
            for number, body in enumerate(bodies)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, number: int, body: Callable[[], object]) -> None:
        try:
            body()
        except Exception as error:
            self._errors[number] = error

    @property
    def ended(self) -> bool:
        return not any(thread.is_alive() for thread in self._threads)

    def errors(self) -> list[Exception | None]:
        """What each rank raised, once all have ended."""
        wait_until(lambda: self.ended, "all ranks have ended", 2 * PATIENCE_S)
        return self._errors

    def check(self) -> None:
        """Raise what a rank has raised."""
        for error in self.errors():
            if error is not None:
                raise error


@contextmanager
def ranks(*bodies: Callable[[], object]) -> Iterator[Ranks]:
    """Run ranks for as long as the context; they must end by themselves, and well."""
    running = Ranks(bodies)
    yield running
    running.check()
