"""The analytics' line to the agent of its own host: events come in, and ended leases go out.

The line also shows each end that the other one is there: the kernel closes it when a process ends, however it
ends. The journal needs no messages: it is memory of the agent that the analytics writes to.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from deisa.ray._handoff.fork import close_in_children
from deisa.ray._state.events import Event
from deisa.ray._state.feedback import Asked, Proposal, Verdict
from deisa.ray._state.journal import WORDS_EACH, Journal
from deisa.ray._transport import messages
from deisa.ray._transport.address import check_same_user
from deisa.ray._transport.descriptors import receive_messages
from deisa.ray._transport.messages import ReleasedStep
from deisa.ray._transport.pages import map_words
from deisa.ray.errors import DeisaError, ProtocolError

ANSWER_TIMEOUT_S = 10.0


class AnalyticsLine:
    """A connection to the agent at an address, for as long as both processes live, or until `close`.

    Parameters
    ----------
    address : str
    driver_id : str
        The analytics that the agent serves.
    callbacks : int
        That a journal has room for which an analytics before may have begun.
    listens : bool
        Whether events come here from now on, and no longer in answers to polls.

    Attributes
    ----------
    agent_id : str
        Of the agent that has answered.

    Raises
    ------
    ProtocolError, OSError
    """

    def __init__(self, address: str, driver_id: str, callbacks: int = 0, *, listens: bool = False) -> None:
        self._driver_id = driver_id
        self._listens = listens
        self._closing = False
        self._sending = threading.Lock()
        self._journals: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._verdicts: queue.SimpleQueue[messages.Judged | None] = queue.SimpleQueue()
        self._receiver: threading.Thread | None = None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._messages = receive_messages(self._socket, messages.Events.most_bytes)
        try:
            self._socket.settimeout(ANSWER_TIMEOUT_S)
            self._socket.connect(address)
            check_same_user(self._socket)
            self._send(self._follow(callbacks))
            self.agent_id = self._first_answer()
            self._socket.settimeout(None)
        except BaseException:
            self._messages.close()
            self._socket.close()
            raise
        close_in_children(self)

    def _follow(self, callbacks: int) -> messages.Follow:
        return messages.Follow(messages.PROTOCOL_VERSION, self._driver_id, callbacks, int(self._listens))

    def _first_answer(self) -> str:
        for message, descriptors in self._messages:
            match message:
                case messages.Journal(_, agent_id) if descriptors:
                    os.close(descriptors.pop())  # nothing is written there: `journal` makes it anew
                    return agent_id
                case messages.Fail(_, text):
                    raise ProtocolError(text)
                case _:
                    raise ProtocolError(f"the agent sent a {type(message).__name__} in place of a journal")
        raise ProtocolError("the agent has hung up")

    def start(self, hear: Callable[[Sequence[Event]], None], ended: Callable[[str], None]) -> None:
        """Have a thread receive: it calls `hear` with events, and `ended` with the reason when the agent hangs up."""
        self._receiver = threading.Thread(
            target=self._receive, args=(hear, ended), name="deisa-line", daemon=True
        )
        self._receiver.start()

    def _receive(self, hear: Callable[[Sequence[Event]], None], ended: Callable[[str], None]) -> None:
        reason = "the agent has hung up"
        try:
            for message, descriptors in self._messages:
                match message:
                    case messages.Events(events):
                        hear(events)
                    case messages.Journal(nbytes, _) if descriptors:
                        self._journals.put((descriptors.pop(0), nbytes))
                    case messages.Judged():
                        self._verdicts.put(message)
                    case messages.Fail(_, text):
                        reason = text
                    case _:
                        raise ProtocolError(f"unexpected {type(message).__name__} from the agent")
        except (OSError, DeisaError) as error:
            reason = str(error)
        self._messages.close()
        self._journals.put(None)
        self._verdicts.put(None)
        if not self._closing:
            ended(reason)

    def journal(self, callbacks: int) -> Journal:
        """Return the journal of so many callbacks; after `start`.

        Raises
        ------
        ProtocolError, OSError
        """
        self._send(self._follow(callbacks))
        try:
            answer = self._journals.get(timeout=ANSWER_TIMEOUT_S)
        except queue.Empty:
            raise ProtocolError(f"the agent sent no journal within {ANSWER_TIMEOUT_S:g} s") from None
        if answer is None:
            raise ProtocolError("the agent has hung up")
        return Journal(map_words(*answer, writable=True)[: WORDS_EACH * callbacks])

    def release(self, consumer: str, steps: Sequence[tuple[str, int]]) -> None:
        """Tell the agent that leases on (array, timestep) pairs have ended, if it is there."""
        with suppress(OSError):  # its memory has gone with it; the receiver says so
            self._send(messages.Release(consumer, tuple(ReleasedStep(*step) for step in steps)))

    def propose(self, proposal: Proposal) -> None:
        """Ask whether a value can be set; `verdict` has the answer.

        Raises
        ------
        OSError
        """
        setting = proposal.setting
        self._send(
            messages.Propose(
                proposal.number,
                setting.key,
                setting.timestep,
                setting.value,
                int(proposal.final),
                proposal.last_accepted,
            )
        )

    def verdict(self, number: int, timeout_s: float) -> Verdict | None:
        """Wait for what the agent says of a proposal; None where it has gone, or takes longer."""
        deadline = time.monotonic() + timeout_s
        with suppress(queue.Empty):
            while True:  # one of an earlier call that was interrupted may be there
                judged = self._verdicts.get(timeout=max(0.0, deadline - time.monotonic()))
                if judged is None:
                    self._verdicts.put(None)
                    return None
                if judged.number == number:
                    asked = None
                    if judged.asked_by is not None and judged.asked is not None:
                        asked = Asked(judged.asked_by, judged.asked)
                    return Verdict(asked, bool(judged.known), judged.refusal)
        return None

    def settle(self, number: int, is_accepted: bool) -> None:
        """Say what has become of a proposal, if the agent is there. It hears that even if this process ends now."""
        with suppress(OSError):
            self._send(messages.Settle(number, int(is_accepted)))

    def finish(self, timestep: int) -> None:
        """Say that a timestep is finished, if the agent is there."""
        with suppress(OSError):
            self._send(messages.Finish(timestep))

    def _send(self, message: messages.Message) -> None:
        with self._sending:
            self._socket.sendall(messages.encode(message))

    def close(self) -> None:
        """Hang up."""
        self._closing = True
        with suppress(OSError):  # the agent has hung up
            self._socket.shutdown(socket.SHUT_RDWR)  # ends what other threads wait for
        if self._receiver is not None:
            self._receiver.join()
        self._socket.close()

    def close_in_child(self) -> None:
        """Close a child's copy of the socket."""
        self._socket.close()
