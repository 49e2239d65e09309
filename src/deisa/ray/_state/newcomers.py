"""What a bridge hears that comes to an agent where its place is taken.

It may belong to the next run, whose ranks were started while the one before was still dying: then it has to look again
until there is another agent. Or two programs use one session: then it is refused. A process that is killed takes a
moment to end, so a newcomer is held for a while before it is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deisa.ray._state.naming import two_programs
from deisa.ray._state.presence import HOLD_S, QUIET_HOLD_S, State

Answer = Literal["join", "hold", "later", "refuse"]


@dataclass(frozen=True, slots=True)
class Run:
    """How the run is that an agent serves, when a newcomer asks.

    Attributes
    ----------
    session : str
    started : bool
        Whether all its bridges had come.
    ends : bool
        Whether the analytics is just ending it.
    analytics : {"here", "gone", "quiet"}
    gone : str
        Why there is no analytics; empty while there is one.
    lost, closed : bool
        Whether a bridge was lost, and whether all have closed.
    owner : str
        The process of the bridge that has the newcomer's id; empty where none has.
    """

    session: str
    started: bool = True
    ends: bool = False
    analytics: State = "here"
    gone: str = ""
    lost: bool = False
    closed: bool = False
    owner: str = ""


def answer_newcomer(bridge_id: int, pid: int, waited_s: float, run: Run) -> tuple[Answer, str]:
    """Decide what a newcomer hears after it has waited for so long, and say why."""
    if run.ends:
        return "later", f"the analytics of session {run.session!r} is just ending its run"
    if not run.started:
        return ("join" if not run.owner or waited_s > HOLD_S else "hold"), ""
    if run.closed:
        return (
            "later",
            f"the analytics of session {run.session!r} still handles what the last simulation sent",
        )
    if run.lost or run.gone:
        why = run.gone or "one of its ranks was lost"
        return "later", f"an earlier run of session {run.session!r} is still there, but {why}"
    if waited_s <= (HOLD_S if run.analytics == "here" else QUIET_HOLD_S):
        return "hold", ""
    owner = f", bridge {bridge_id} being {run.owner}" if run.owner else ""
    return "refuse", (
        f"bridge {bridge_id} (pid {pid}) came after session {run.session!r} had started with all its bridges{owner}; "
        f"is a second simulation using the same session name? Here {two_programs(run.session)}"
    )
