"""The cells of the page on notebooks, run in one process as a kernel runs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deisa.ray import Bridge
from tests.docs.pages import DOCS, python_blocks, replaced
from tests.docs.running import Communicator, ranks_in_threads

CONNECT, REGISTER, RUN, *_ = (block.code for block in python_blocks(DOCS / "notebooks.md"))
INTERRUPT = """
    if latest.t == 2:
        import signal

        signal.raise_signal(signal.SIGINT)
"""


class Kernel:
    """Runs cells in one namespace, each as a file of its own."""

    def __init__(self) -> None:
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.cells = 0

    def run(self, cell: str) -> None:
        self.cells += 1
        exec(compile(cell, f"<cell {self.cells}>", "exec"), self.names)


def send_temperature(comm: Communicator) -> None:
    chunk = {"global_shape": (8, 8), "chunk_shape": (4, 4), "chunk_position": divmod(comm.rank, 2)}
    with Bridge(comm, {"temperature": chunk}) as bridge:
        for t in range(5):
            bridge.send("temperature", np.full((4, 4), float(t)), t)


@pytest.mark.ray
def test_interrupt_edit_and_run_again(ray_cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = Kernel()
    kernel.run(CONNECT)
    kernel.run(CONNECT)  # nobody minds
    kernel.run(REGISTER)
    kernel.run(REGISTER + INTERRUPT)  # an edited cell
    with ranks_in_threads(send_temperature):
        with pytest.raises(KeyboardInterrupt):
            kernel.run(RUN)
        kernel.run(CONNECT)
        kernel.run(replaced(REGISTER, "mean=", "average="))
        kernel.run(RUN)
    assert capsys.readouterr().out.splitlines() == [
        *(f"t={t} mean={t:.1f}" for t in (0, 1, 2)),
        *(f"t={t} average={t:.1f}" for t in (2, 3, 4)),
    ]
    assert kernel.names["report"].callbacks_run == 3
