from typing import Any

import numpy as np

class Lane:
    lent: np.ndarray | None
    def __init__(
        self,
        *,
        account: memoryview,
        at: int,
        within: int,
        chunks: int,
        board: memoryview,
        row: int,
        slots: int,
        outbox: memoryview,
        capacity: int,
        region: int,
        tally: memoryview,
        first: int,
        bridges: int,
        own: int,
        memory: tuple[np.ndarray, ...],
        fd: int,
        look: bytes,
    ) -> None: ...
    def send(self, chunk: Any, timestep: Any) -> bool | None: ...
