"""`deisa-core`'s abstract classes: which classes of this project count as implementations of them.

deisa-core is optional, and importing it imports Dask, which a rank must not pay for. So nothing here imports it.
A class registers with its interface when its module is imported, and again whenever an object of it is created: by
then, a program that asks ``isinstance`` has imported deisa-core.
"""

from __future__ import annotations

import sys
from abc import ABCMeta


def implements(interface: str, cls: type) -> None:
    """Count a class as a subclass of an interface of deisa-core, if the program has imported that."""
    abstract = getattr(sys.modules.get("deisa.core"), interface, None)
    if abstract is not None:
        ABCMeta.register(abstract, cls)  # `IDeisa.register` is the decorator for callbacks
