"""Where a timestep goes in a series that may have some already, and which of those it replaces."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from deisa.ray.errors import SaveFormatError, SaveOrderError

logger = logging.getLogger("deisa.ray")


@dataclass
class Progress:
    """The timesteps of a series, and how many of them an earlier run has saved.

    A simulation that starts again from a checkpoint sends timesteps that are stored already. What this run sends takes
    their place: with its first timestep, all timesteps of earlier runs from there on go. So no timestep comes twice,
    and none is left of a run that has been overtaken.

    Parameters
    ----------
    path : str
        Of the series, for errors.
    stored : list of int
        What there is, increasing.
    """

    path: str
    stored: list[int]
    earlier: int = field(init=False)  # so many of `stored`, from the first, are of earlier runs

    def __post_init__(self) -> None:
        check_increasing(self.path, self.stored)
        self.earlier = len(self.stored)

    def place(self, timestep: int) -> int:
        """Say at which index a timestep goes; whatever is stored from there on is replaced.

        Raises
        ------
        SaveOrderError
            When this run has saved a later one.
        """
        index = bisect_left(self.stored, timestep)
        own = self.stored[self.earlier :]
        if own and own[-1] > timestep:
            raise SaveOrderError(
                f"{self.path}: timestep {timestep} comes after timestep {own[-1]}, which this run has saved already; "
                "append timesteps in increasing order"
            )
        return index

    def drop(self, length: int) -> None:
        """Note that only the first so many are left."""
        del self.stored[length:]
        self.earlier = min(self.earlier, length)

    def has_own(self, timestep: int) -> bool:
        """Whether this run has saved a timestep."""
        index = bisect_left(self.stored, timestep, self.earlier)
        return index < len(self.stored) and self.stored[index] == timestep

    def note(self, index: int, timestep: int) -> None:
        """Note that a timestep is saved at an index."""
        self.drop(index)
        self.stored.append(timestep)

    def warn(self, index: int) -> None:
        """Say which timesteps of an earlier run go when one is saved at an index."""
        replaced = self.stored[index : self.earlier]
        if replaced:
            logger.warning(
                "%s has timesteps %d to %d of an earlier run: those of this run replace them",
                self.path,
                replaced[0],
                replaced[-1],
            )


def check_increasing(path: str, timesteps: Sequence[int]) -> None:
    """Check that stored timesteps are increasing.

    Raises
    ------
    SaveFormatError
    """
    for before, after in pairwise(timesteps):
        if before >= after:
            raise SaveFormatError(
                f"{path}: its timesteps are not increasing, {before} comes before {after}: something else has written "
                "it; give another path"
            )
