"""The analytics side: register callbacks on windows of arrays, then run them."""

from __future__ import annotations

import atexit
import difflib
import inspect
import logging
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, cast

from deisa.ray._engine.base import Engine
from deisa.ray._engine.session import Session, Windows
from deisa.ray._engine.watchdog import Watchdog
from deisa.ray._graph.running import dask_computes_with
from deisa.ray._graph.scheduler import BundleScheduler
from deisa.ray._state.layout import ArrayLayout
from deisa.ray._state.timeline import Firing, Subscription, When
from deisa.ray._transport.fork import OwnProcess
from deisa.ray.config import Settings
from deisa.ray.errors import (
    AnalyticsLostError,
    ClosedError,
    ConfigurationError,
    DeisaError,
    NoCallbacksError,
    RegistrationError,
    WindowError,
    cause_chain,
)
from deisa.ray.report import CallbackFigures, ComputationFigures, Report
from deisa.ray.types import WindowSpec, window_spec

logger = logging.getLogger("deisa.ray")

Callback = Callable[..., Any]
ExceptionHandler = Callable[[Exception], Any]

LAST_BUNDLES_S = 1.0  # for the figures of bundles to come in, after a run


@dataclass(frozen=True, slots=True)
class _Registration:
    callback: Callback
    windows: tuple[WindowSpec, ...]
    exception_handler: ExceptionHandler
    when: When
    by_name: bool

    @property
    def name(self) -> str:
        return getattr(self.callback, "__name__", None) or repr(self.callback)

    @property
    def subscription(self) -> Subscription:
        return Subscription(tuple((w.name, w.window_size) for w in self.windows), self.when)


class Deisa:
    """Analytics of a running simulation.

    Connects to Ray when it is created: the Ray that this process is connected to, else
    ``RAY_ADDRESS``, else a cluster that runs on this host, else a new local one. Bridges can
    register from then on; they start sending when `execute_callbacks` runs.

    Parameters
    ----------
    session : str, optional
        Name under which simulation and analytics meet, ``"default"`` unless ``DEISA_RAY_SESSION``
        says otherwise.
    engine : {"ray", "local"}
        ``"local"`` runs everything in this process, without Ray, on this node only.
    max_simulation_ahead : int, optional
        Timesteps that the simulation may be ahead of the analytics, 1 by default.
    settings : Settings, optional
        Timeouts and the rest; by default from the environment.

    Raises
    ------
    ClusterError
        When there is no Ray at ``RAY_ADDRESS``, or the cluster refuses this process.
    SessionInUseError
        When another analytics has a session of this name on one of the nodes.

    Examples
    --------
    >>> deisa = Deisa()  # doctest: +SKIP
    >>> @deisa.register(WindowSpec("temperature", window_size=3))  # doctest: +SKIP
    ... def summary(temperature):
    ...     latest = temperature[-1]
    ...     print(latest.t, latest.dask.mean().compute())
    >>> deisa.execute_callbacks()  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        session: str | None = None,
        engine: Literal["ray", "local"] = "ray",
        max_simulation_ahead: int | None = None,
        settings: Settings | None = None,
    ) -> None:
        if settings is None:
            settings = Settings.from_environment()
        if session is not None:
            settings = replace(settings, session=session)
        if max_simulation_ahead is not None:
            settings = replace(settings, max_simulation_ahead=max_simulation_ahead)
        self._settings = settings
        self._process = OwnProcess()
        self._registrations: list[_Registration] = []
        self._executed = False
        self._closing = threading.Lock()
        self._closed = False
        self.report: Report | None = None
        self._engine = _make_engine(engine, settings)
        self._scheduler = BundleScheduler(self._engine.executor)
        self._engine.agents.open()
        self._session = Session(self._engine.agents, settings)
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    def register_callback(
        self,
        callback: Callback,
        *windows: Any,
        exception_handler: ExceptionHandler | None = None,
        when: When = "AND",
    ) -> Callback:
        """Have a callback run on windows of arrays.

        Its arguments are lists of `DeisaArray`, oldest to newest, one for each window: by name when
        its parameters are called like the arrays, otherwise by position in the order of the windows.

        Parameters
        ----------
        callback : callable
        *windows : WindowSpec, Window, str, or a list of these
            At least one.
        exception_handler : callable, optional
            Called with what the callback raises; the run goes on if it returns. By default the
            exception is logged with its traceback.
        when : {"AND", "OR"}
            Run for a timestep at which all the arrays are complete; or at least one, once
            every array has been seen.

        Returns
        -------
        callable
            The callback itself.

        Raises
        ------
        RegistrationError, WindowError
        """
        self._process.check(repr(self))
        if self._executed or self._closed:
            raise ClosedError("callbacks must be registered before execute_callbacks(); create a new Deisa")
        if not callable(callback):
            raise RegistrationError(f"a callback must be callable, got {callback!r}")
        if when not in ("AND", "OR"):
            raise RegistrationError(f"when must be 'AND' or 'OR', got {when!r}")
        specs = tuple(map(window_spec, _flat(windows)))
        if not specs:
            raise WindowError(
                f"callback {getattr(callback, '__name__', callback)!r} needs at least one window, "
                "as in register_callback(callback, [WindowSpec('temperature', window_size=3)])"
            )
        names = [spec.name for spec in specs]
        if len(set(names)) < len(names):
            raise WindowError(f"two windows of one callback name the same array: {names}")
        by_name = _binds_by_name(callback, names)
        handler = exception_handler or _log_exception
        self._registrations.append(_Registration(callback, specs, handler, when, by_name))
        return callback

    def register(
        self, *windows: Any, exception_handler: ExceptionHandler | None = None, when: When = "AND"
    ) -> Callable[[Callback], Callback]:
        """Register the decorated function; the parameters are those of `register_callback`."""

        def decorate(callback: Callback) -> Callback:
            return self.register_callback(callback, *windows, exception_handler=exception_handler, when=when)

        return decorate

    def execute_callbacks(self) -> Report:
        """Let the simulation start, run the callbacks until every bridge has closed, and say what happened.

        Callbacks run in this thread, in the order of timesteps, each exactly once for a timestep.

        Returns
        -------
        Report
            Also kept as ``deisa.report``, which a run that raises leaves as well.

        Raises
        ------
        NoCallbacksError
        LayoutError
            When the bridges' descriptions do not fit together; every rank gets the same error.
        MemoryBoundError
            When the slots would not fit into a node; nothing has been allocated.
        WaitTimeoutError
            When bridges, or their next timestep, do not come in time.
        IncompleteTimestepError, BridgeLostError, AgentLostError
            After everything that was complete before has been delivered.
        """
        self._process.check(repr(self))
        if self._executed or self._closed:
            raise ClosedError("execute_callbacks() runs once; create a new Deisa for another run")
        if not self._registrations:
            raise NoCallbacksError(
                "no callback is registered: call register_callback() before execute_callbacks()"
            )
        self._executed = True
        run = _Run([_Calls(registration) for registration in self._registrations])
        try:
            self._run(run)
        except DeisaError as error:
            self.close(error)
            raise
        except BaseException as error:  # another analytics may do better
            self._end(self._session.abandon, AnalyticsLostError(f"the analytics has ended: {error!r}"))
            raise
        finally:
            self.report = report = self._report(run)
        if self._session.drop_arrays():
            self.close()
        else:  # arrays that outlive the run keep their agents; callbacks may hold such arrays
            self._registrations.clear()
            threading.Thread(target=self._close_when_unused, name="deisa-linger", daemon=True).start()
        return report

    def _run(self, run: _Run) -> None:
        layouts = self._session.wait_registered()
        runnable = [calls for calls in run.callbacks if _can_run(calls.registration, layouts)]
        self._session.start([calls.registration.subscription for calls in runnable])
        started = time.monotonic()
        watchdog = Watchdog(self._settings.callback_warn_s)

        def deliver(firing: Firing, windows: Windows) -> None:
            calls = runnable[firing.callback]
            with watchdog.watching(calls.registration.name, firing.timestep):
                calls.call(firing, windows)

        try:
            with dask_computes_with(self._scheduler), watchdog.on_guard():
                self._session.run(deliver)
        finally:
            run.wall_s = time.monotonic() - started

    def _report(self, run: _Run) -> Report:
        self._engine.executor.wait_ended(LAST_BUNDLES_S)
        usage, bundles = self._scheduler.usage, self._engine.executor.stats
        return Report(
            arrays=self._session.array_figures,
            bridges=self._session.bridge_stats,
            callbacks=tuple(calls.figures for calls in run.callbacks),
            computations=ComputationFigures(
                graphs=usage.computations,
                reused_plans=usage.reused_plans,
                planning_s=usage.planning_s,
                waiting_s=usage.waiting_s,
                bundles=bundles.submitted,
                run_s=bundles.run_s,
                moved_bytes=bundles.moved_bytes,
            ),
            bound_bytes=self._session.bound_bytes,
            wall_s=run.wall_s,
        )

    def _close_when_unused(self) -> None:
        self._session.leases.wait_gone()
        self.close()

    def close(self, error: DeisaError | None = None) -> None:
        """End the session: the agents go, with the chunk memory. Done by itself after a run and at exit.

        Parameters
        ----------
        error : DeisaError, optional
            What ranks that are still there are told.
        """
        self._process.check(repr(self))
        self._end(self._session.close, error or AnalyticsLostError("the analytics has ended"))

    def _end(self, end_session: Callable[[DeisaError], None], error: DeisaError) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            end_session(error)
            self._engine.executor.close()
        atexit.unregister(self._at_exit)

    def __enter__(self) -> Deisa:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.is_this:
            self.close()

    def __repr__(self) -> str:
        return f"<Deisa session {self._settings.session!r}, {len(self._registrations)} callbacks>"


@dataclass(slots=True)
class _Calls:
    """Calls one callback and counts."""

    registration: _Registration
    count: int = 0
    failures: int = 0
    total_s: float = 0.0
    longest_s: float = 0.0

    def call(self, firing: Firing, windows: Windows) -> None:
        registration = self.registration
        started = time.monotonic()
        self.count += 1
        try:
            if registration.by_name:
                names = (window.name for window in registration.windows)
                registration.callback(**dict(zip(names, windows, strict=True)))
            else:
                registration.callback(*windows)
        except Exception as error:
            self.failures += 1
            error.add_note(f"in callback {registration.name!r} at timestep {firing.timestep}")
            registration.exception_handler(error)
            _clear_frames(error)
            windows.clear()  # this frame is one of the traceback's
        finally:
            seconds = time.monotonic() - started
            self.total_s += seconds
            self.longest_s = max(self.longest_s, seconds)

    @property
    def figures(self) -> CallbackFigures:
        return CallbackFigures(
            self.registration.name, self.count, self.failures, self.total_s, self.longest_s
        )


@dataclass(slots=True)
class _Run:
    """What is counted while callbacks run."""

    callbacks: Sequence[_Calls]
    wall_s: float = 0.0


def _clear_frames(error: BaseException) -> None:
    """Let go of the windows that an exception holds, lest a handler that keeps it stall the simulation."""
    for link in cause_chain(error):
        traceback.clear_frames(link.__traceback__)


def _close(reference: weakref.ref[Deisa]) -> None:
    deisa = reference()
    if deisa is not None and deisa._process.is_this:
        deisa.close()


def _make_engine(name: str, settings: Settings) -> Engine:
    if name == "ray":
        from deisa.ray._engine.ray_engine import RayEngine

        return cast(Engine, RayEngine(settings))
    if name == "local":
        from deisa.ray._engine.local import LocalEngine

        return cast(Engine, LocalEngine(settings))
    raise ConfigurationError(f"engine must be 'ray' or 'local', got {name!r}")


def _flat(windows: Iterable[Any]) -> list[Any]:
    flat: list[Any] = []
    for window in windows:
        is_list = (
            isinstance(window, Sequence | set) and not isinstance(window, str) and not hasattr(window, "name")
        )
        flat += window if is_list else [window]
    return flat


def _binds_by_name(callback: Callback, names: Sequence[str]) -> bool:
    """Whether the callback's parameters are called like its arrays; raises if it can't take them at all."""
    try:
        signature = inspect.signature(callback)
    except (TypeError, ValueError):
        return False  # some builtins have no signature
    kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    named = {p.name for p in signature.parameters.values() if p.kind in kinds}
    try:
        if set(names) <= named:
            signature.bind(**dict.fromkeys(names))
            return True
        signature.bind(*names)
    except TypeError as exc:
        raise RegistrationError(
            f"callback {getattr(callback, '__name__', callback)!r} takes {signature}, but is registered on "
            f"{len(names)} windows: {', '.join(names)} ({exc})"
        ) from exc
    return False


def _can_run(registration: _Registration, layouts: Mapping[str, ArrayLayout]) -> bool:
    missing = [w.name for w in registration.windows if w.name not in layouts]
    for name in missing:
        close = difflib.get_close_matches(name, layouts, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        logger.error(
            "callback %r will not run: no bridge has an array %r, there are %s%s",
            registration.name,
            name,
            ", ".join(map(repr, sorted(layouts))) or "none",
            hint,
        )
    return not missing


def _log_exception(error: Exception) -> None:
    logger.error("a callback raised; the run goes on", exc_info=error)
