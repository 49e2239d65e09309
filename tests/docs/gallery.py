"""The gallery: runs what its page shows, and draws its pictures anew.

python -m tests.docs.gallery    # into docs/_static/gallery
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from tests.docs.pages import DOCS, Block, python_blocks, replaced
from tests.docs.running import Communicator, ranks_in_threads

PAGE = DOCS / "gallery.md"
PICTURES = DOCS / "_static/gallery"
BEGIN, END, SIMULATION, *OTHERS = python_blocks(PAGE)
OWN_SIMULATIONS = {block.heading: block for block in OTHERS if "Bridge(" in block.code}
ENTRIES = [block for block in OTHERS if "Bridge(" not in block.code]


def pictures_of_page() -> list[str]:
    """The names of the pictures that the page shows."""
    return re.findall(r"\(_static/gallery/(\w+\.png)\)", PAGE.read_text())


def simulation_of(entry: Block) -> Callable[[Communicator], None]:
    code = OWN_SIMULATIONS.get(entry.heading, SIMULATION).code
    return lambda comm: exec(code, {"comm": comm})


def run(block: Block, folder: Path) -> dict[str, Any]:
    """Run an entry on the local engine: returns its names and the images drawn, and leaves its picture in a folder."""
    names: dict[str, Any] = {}
    begin = replaced(BEGIN.code, "Deisa()", 'Deisa(engine="local", on_error="raise")')
    with chdir(folder), drawing(), ranks_in_threads(simulation_of(block)):
        exec(begin + block.code + ("" if END.code in block.code else END.code), names)
        images = [image for axes in plt.gcf().axes for image in (*axes.images, *axes.collections)]
        names["images"] = [np.asarray(image.get_array()) for image in images]
    return names


@contextmanager
def drawing() -> Iterator[None]:
    """Draw into files, in one style, and start from an empty figure."""
    matplotlib.use("agg")
    with plt.rc_context({"figure.figsize": (5, 3.6), "savefig.dpi": 80, "savefig.bbox": "tight"}):
        plt.close("all")
        yield
        plt.close("all")


if __name__ == "__main__":
    os.environ["DEISA_RAY_SESSION"] = f"gallery-{os.getpid()}"
    PICTURES.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        for entry, picture in zip(ENTRIES, pictures_of_page(), strict=True):
            run(entry, Path(folder))
            shutil.copy(Path(folder, picture), PICTURES / picture)
