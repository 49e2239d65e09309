"""What is said, and in the end done, when ranks wait for slots and no callback can run."""

from __future__ import annotations

import gc
import itertools
import logging
import math
import queue
import selectors
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Collection
from concurrent.futures import thread as pool
from pathlib import Path
from types import FrameType

from deisa.ray import bridge
from deisa.ray._session.engine import AgentGroup
from deisa.ray._session.leases import Leases, Step
from deisa.ray._session.start import SlotCounts
from deisa.ray._state.events import SendersBlocked, StepComplete
from deisa.ray._state.naming import name_bridges
from deisa.ray._state.stalls import steps_in_the_way
from deisa.ray._state.timeline import NEXT_TIMESTEP, Timeline
from deisa.ray.config import Settings
from deisa.ray.errors import KeptArraysError

logger = logging.getLogger("deisa.ray")

STALLED_S = 1.0  # without a change, before it is looked whom the simulation waits for; and how often
GRACE_S = 5.0  # for arrays to be dropped before nothing can come any more
GRACE_OF_THREADS_S = 60.0  # where threads of the user are at work, which may drop them
SHOWN_STEPS = 10
_LIBRARIES = (
    *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    str(Path(bridge.__file__).parent),
    "<frozen",
)
_WAITS = {module.__file__ for module in (threading, queue, selectors, pool)}


class Stalls:
    """Finds out whom a simulation waits for that has no slot, and tells both sides.

    Parameters
    ----------
    agents : AgentGroup
    leases : Leases
    counts : SlotCounts
    settings : Settings
    computing : callable
        Whether bundles are under way: they hold arrays, and let them go.
    """

    def __init__(
        self,
        agents: AgentGroup,
        leases: Leases,
        counts: SlotCounts,
        settings: Settings,
        computing: Callable[[], bool],
    ) -> None:
        self._agents = agents
        self._leases = leases
        self._counts = counts
        self._settings = settings
        self._computing = computing
        self._waiting: dict[int, Step] = {}  # bridges, and what they wait to send
        self._moved_at: dict[str, float] = {}  # arrays for which ranks wait, or have waited
        self._stuck_since: float | None = None
        self._checked = self._warned = -math.inf
        self.told = ""  # whom ranks that have no slot were told to wait for

    def wait_for_slots(self, event: SendersBlocked) -> None:
        """Ranks of a node wait."""
        self._waiting |= {bridge_id: (event.array, t) for bridge_id, t in event.timesteps.items()}
        self._moved_at[event.array] = time.monotonic()

    def waited(self, bridge_id: int) -> bool:
        """Whether a bridge was last seen waiting for a slot."""
        return bridge_id in self._waiting

    def complete(self, step: StepComplete) -> None:
        """A step is complete: whoever waited with it has gone on."""
        self._waiting = {
            bridge_id: (array, timestep)
            for bridge_id, (array, timestep) in self._waiting.items()
            if array != step.array or timestep > step.timestep
        }
        self.moved([step.array])

    def moved(self, arrays: Collection[str]) -> None:
        """Arrays go on: one is complete at another timestep, or a callback looks at them."""
        self._moved_at |= dict.fromkeys(arrays, time.monotonic())
        self._stuck_since = None
        if self.told and not any(array not in arrays for array, _ in self._waiting.values()):
            self._tell("")

    def check(self, timeline: Timeline, windows: Collection[Step], closed: Collection[int]) -> None:
        """See who holds up ranks whose arrays have not moved for a moment.

        Parameters
        ----------
        timeline : Timeline
        windows : collection of (str, int)
            The steps that callbacks may still need.
        closed : collection of int
            Bridges that have closed.

        Raises
        ------
        KeptArraysError
            When nothing can come, since the analytics keeps arrays, and has kept them for a while.
        """
        now = time.monotonic()
        waiting = {
            b: array for b, (array, _) in self._waiting.items() if now - self._moved_at[array] >= STALLED_S
        }
        if not waiting or now - self._checked < STALLED_S:
            return
        self._checked = now
        if self._leases.live() - set(windows):
            gc.collect()  # arrays in reference cycles, as tracebacks make them
        kept = sorted(self._leases.live() - set(windows))
        names = {name for name, _ in kept}
        if not names.isdisjoint(waiting.values()):
            if self._computing():  # what is under way lets go of them, as persist() does
                self._stuck_since = None
                return
            self._tell(f"the analytics, which keeps arrays of earlier timesteps alive: {_shown(kept)}")
            self._warn(
                now,
                "the simulation waits because arrays of earlier timesteps are kept alive: "
                f"{_shown(kept)}; drop them, or keep copies with persist() or compute()",
            )
            self._mind_kept(now, windows, timeline.owners.difference(closed))
            return
        culprit = timeline.waiting_for(self._agents.positions())
        if culprit != NEXT_TIMESTEP:
            self._tell(culprit)
            self._warn(now, f"{name_bridges(waiting)} can't go on: the analytics waits for {culprit}")

    def _mind_kept(self, now: float, windows: Collection[Step], senders: Collection[int]) -> None:
        slots = self._counts.slots
        waiting = {bridge_id: array for bridge_id, (array, _) in self._waiting.items()}
        in_the_way = steps_in_the_way(slots, self._leases.live(), windows, waiting, senders)
        if not in_the_way or self._computing():
            self._stuck_since = None
            return
        if self._stuck_since is None:
            self._stuck_since = now
        if now - self._stuck_since < (GRACE_OF_THREADS_S if others_at_work() else GRACE_S):
            return
        name = in_the_way[0][0]
        spare = slots[name] - self._counts.windows[name]
        bridge_id = min(b for b in senders if waiting[b] == name)
        raise KeptArraysError(
            f"nothing more can come: the analytics keeps arrays of earlier timesteps, {_shown(in_the_way)}, so that "
            f"none of the {slots[name]} slots of array {name!r} is free while {name_bridges(senders)} wait with "
            f"timestep {self._waiting[bridge_id][1]}. Beside its windows, a run may keep {spare} "
            f"timestep{'s' if spare != 1 else ''} of {name!r} (max_simulation_ahead). An array that is computed lazily "
            "from others keeps them: call compute() or persist() on what you keep, or raise max_simulation_ahead"
        )

    def _tell(self, text: str) -> None:
        if text != self.told:
            self.told = text
            self._agents.report_progress(text)

    def _warn(self, now: float, text: str) -> None:
        if now - self._warned > self._settings.warn_every_s:
            self._warned = now
            logger.warning("%s", text)


def _shown(steps: Collection[Step]) -> str:
    shown = ", ".join(f"{name!r} at {timestep}" for name, timestep in itertools.islice(steps, SHOWN_STEPS))
    return f"{shown} ..." if len(steps) > SHOWN_STEPS else shown


def others_at_work() -> bool:
    """Whether other threads of the user are running, which may hold arrays for a while."""
    frames = sys._current_frames()
    return any(
        _is_at_work(frames.get(thread.ident or 0))
        for thread in threading.enumerate()
        if thread is not threading.current_thread() and not thread.name.startswith("deisa-")
    )


def _is_at_work(innermost: FrameType | None) -> bool:
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_stack(innermost)] if innermost else []
    if not files or files[0] in _WAITS or bridge.__file__ in files:  # ranks may be threads of this process
        return False
    return pool.__file__ in files or any(not file.startswith(_LIBRARIES) for file in files)
