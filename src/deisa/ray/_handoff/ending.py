"""Bridges that nobody has closed when their process, or their thread, ends.

A process that ends in order closes its bridges; one that dies of an exception loses them, with the exception's text.
Who sees which of the two it is:

- `sys.excepthook` sees an exception that ends the program, `threading.excepthook` one that ends a thread;
- ``atexit`` runs after the last line and after ``SystemExit`` alike: there only the exit status tells, and that is
  known when the interpreter has gone (`last_words` of the client in C);
- a child that ``multiprocessing`` has forked ends without ``atexit``, but runs the finalizers of that package.
"""

from __future__ import annotations

import atexit
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

from deisa.ray._handoff.fork import OwnProcess


class Unclosed(Protocol):
    """A bridge, as this module sees it."""

    @property
    def opened_by(self) -> threading.Thread | None:
        """The thread that has opened it, as long as that lives."""

    def lose(self, reason: str) -> None:
        """End as a dying rank does."""

    def end_with_process(self, *, in_order: bool) -> None:
        """End as the process does, which is about to; unless that is in order, its exit status says how."""


class _Open:
    """The open bridges of this process, and the hooks that are there for as long as there are any."""

    def __init__(self) -> None:
        self.process = OwnProcess()
        self.bridges: weakref.WeakSet[Unclosed] = weakref.WeakSet()
        self._program_hook: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self._thread_hook: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        atexit.register(self.end_all, in_order=False)
        self._watch_end_of_child()

    def _watch_end_of_child(self) -> None:
        multiprocessing = sys.modules.get("multiprocessing.process")
        if multiprocessing is not None and multiprocessing.parent_process() is not None:
            from multiprocessing.util import Finalize

            Finalize(None, self.end_with_target, exitpriority=0)

    def install_hooks(self) -> None:
        if self._program_hook is None or sys.excepthook is not self._program_hook[0]:
            before = sys.excepthook

            def program_failed(
                kind: type[BaseException], error: BaseException, trace: TracebackType | None
            ) -> Any:
                if not hasattr(sys, "ps1"):  # at a prompt the next line may be better
                    self.lose_all(error)
                return before(kind, error, trace)

            self._program_hook = program_failed, before
            sys.excepthook = program_failed
        if self._thread_hook is None or threading.excepthook is not self._thread_hook[0]:
            thread_before = threading.excepthook

            def thread_failed(what: threading.ExceptHookArgs) -> Any:
                error, thread = what.exc_value, what.thread
                if error is not None and thread is not None and not isinstance(error, SystemExit):
                    self.lose_all(error, thread)
                return thread_before(what)

            self._thread_hook = thread_failed, thread_before
            threading.excepthook = thread_failed

    def remove_hooks(self) -> None:
        """Put back what was there; where others have chained to a hook, it stays and does nothing."""
        if self._program_hook is not None and sys.excepthook is self._program_hook[0]:
            sys.excepthook = self._program_hook[1]
        if self._thread_hook is not None and threading.excepthook is self._thread_hook[0]:
            threading.excepthook = self._thread_hook[1]
        self._program_hook = self._thread_hook = None

    def lose_all(self, error: BaseException, thread: threading.Thread | None = None) -> None:
        """Have the bridges end as lost; only those that a thread has opened, if one is named."""
        if self.process.is_this:
            for bridge in list(self.bridges):
                if thread is None or bridge.opened_by is thread:
                    bridge.lose(reason_of(error))

    def end_all(self, *, in_order: bool) -> None:
        if self.process.is_this:
            for bridge in list(self.bridges):
                bridge.end_with_process(in_order=in_order)

    def end_with_target(self) -> None:
        """The function that a child of multiprocessing runs has ended: with an exception, if there is one now."""
        error = sys.exc_info()[1]
        if error is None or is_orderly_end(error):
            self.end_all(in_order=True)
        else:
            self.lose_all(error)


_open: _Open | None = None


def watch(bridge: Unclosed) -> None:
    """See to a bridge that has been opened, until `forget`."""
    global _open
    if _open is None or not _open.process.is_this:
        _open = _Open()
    _open.bridges.add(bridge)
    _open.install_hooks()


def forget(bridge: Unclosed) -> None:
    """A bridge has ended."""
    if _open is not None:
        _open.bridges.discard(bridge)
        if not _open.bridges:
            _open.remove_hooks()


def is_orderly_end(error: BaseException) -> bool:
    """Whether an exception only says that a program, or a generator, ends as intended."""
    return isinstance(error, GeneratorExit) or (isinstance(error, SystemExit) and error.code in (None, 0))


def reason_of(error: BaseException) -> str:
    """Write an exception for the others, in characters that UTF-8 has."""
    text = "".join(traceback.format_exception_only(error)).strip()
    return text.encode("utf-8", "replace").decode()


def program_has_left() -> bool:
    """Whether the main program's frames are gone: ``SystemExit`` has passed through all of them."""
    if threading.current_thread() is not threading.main_thread():
        return False
    try:
        sys._getframe(2)  # whoever called the caller
    except ValueError:
        return True
    return False
