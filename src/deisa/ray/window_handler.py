"""The analytics side: register callbacks on windows of arrays, then run them."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Literal, NoReturn, cast

from deisa.ray._files.callback import Save, at_multiples, save_of
from deisa.ray._files.formats import Format
from deisa.ray._graph._dask import check_kind_of_arrays
from deisa.ray._graph.running import dask_computes_with
from deisa.ray._graph.scheduler import BundleScheduler
from deisa.ray._handoff.fork import OwnProcess
from deisa.ray._replay.recorder import RecordRequest, place_of
from deisa.ray._replay.replay import Replay
from deisa.ray._session.engine import Engine
from deisa.ray._session.run import Windows
from deisa.ray._session.selection import Streams
from deisa.ray._session.session import Session
from deisa.ray._session.watchdog import Watchdog
from deisa.ray._state.timeline import Firing, When
from deisa.ray._transport.address import this_process
from deisa.ray.callbacks import (
    Callback,
    Calls,
    Condition,
    ExceptionHandler,
    Registration,
    Registrations,
    window_specs,
)
from deisa.ray.compliance import implements
from deisa.ray.config import OnError, ReplaySettings, Settings, check_scheduling_variable
from deisa.ray.errors import (
    AnalyticsLostError,
    AnalyticsStoppedError,
    ClosedError,
    ConfigurationError,
    DeisaError,
    NoCallbacksError,
    RegistrationError,
    SessionInUseError,
    WindowError,
)
from deisa.ray.files import Writer
from deisa.ray.functions import name_of
from deisa.ray.report import ComputationFigures, Report, failures_of

logger = logging.getLogger("deisa.ray")

EngineName = Literal["ray", "local"]

LAST_BUNDLES_S = 1.0  # for the figures of bundles to come in, after a run
NEVER_RAN = "the analytics ended without execute_callbacks()"


class Deisa:
    """Analytics of a running simulation.

    Connects to Ray when it is created: the Ray that this process is connected to, else
    ``DEISA_RAY_ADDRESS`` or ``RAY_ADDRESS``, else a cluster of this user on this host, else a new
    local one. Bridges can register from then on; they start sending when `execute_callbacks` runs.

    Parameters
    ----------
    feedback_queue_size : int, optional
        Values that are kept of each key that `set` sets, 1024 by default; the oldest timestep is dropped first.
    session : str, optional
        Name under which simulation and analytics meet, ``"default"`` unless ``DEISA_RAY_SESSION``
        says otherwise.
    engine : {"ray", "local"}
        ``"local"`` runs everything in this process, without Ray, on this node only.
    max_simulation_ahead : int, optional
        Timesteps that the simulation may be ahead of the analytics, 1 by default.
    on_error : {"log", "raise"}, optional
        What a callback's exception does where the callback has no exception handler: with "log", the default, it is
        logged and the run goes on; with "raise" it ends the run, and `execute_callbacks` raises it. An
        ``AssertionError`` or a ``TimeoutError`` ends the run in either case.
    ray_start : callable, optional
        Called first, to connect this process to Ray.
    settings : Settings, optional
        Timeouts and the rest; by default from the environment.

    Raises
    ------
    ClusterError
        When no Ray comes up at the address that is given, or the cluster refuses this process.
    SessionInUseError
        When another analytics has a session of this name on one of the nodes, or one that runs in this process. An
        earlier one of this process that does not run makes way.

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
        feedback_queue_size: int | None = None,
        *,
        session: str | None = None,
        engine: EngineName = "ray",
        max_simulation_ahead: int | None = None,
        on_error: OnError | None = None,
        ray_start: Callable[[], object] | None = None,
        settings: Settings | None = None,
    ) -> None:
        implements("IDeisa", Deisa)
        check_scheduling_variable()
        if settings is None:
            settings = Settings.from_environment()
        given: dict[str, Any] = {
            "session": session,
            "max_simulation_ahead": max_simulation_ahead,
            "feedback_queue_size": feedback_queue_size,
            "on_error": on_error,
        }
        settings = replace(settings, **{name: value for name, value in given.items() if value is not None})
        replayed = ReplaySettings.from_environment()
        self._replay = Replay(replayed) if replayed is not None else None
        if self._replay is not None:
            settings = self._replay.settings_for(settings)
        self._settings = settings
        self._process = OwnProcess()
        self._registrations = Registrations()
        self._records: dict[str, RecordRequest] = {}  # by path
        self._executed = False
        self._runs: str | None = None  # where, and since when
        self._running = False
        self._closing = threading.RLock()  # a signal handler may close as well
        self._closed = False
        self._replaced = False
        self._place = os.getpid(), settings.session, settings.socket_path
        self.report: Report | None = None
        check_kind_of_arrays()
        if ray_start is not None:
            _connect_by(ray_start, engine)
        with _opening:
            earlier = _open.get(self._place)
            handed_over = earlier._make_way(engine, settings) if earlier is not None else None
            self._engine_name = engine
            self._engine = handed_over or _make_engine(engine, settings)
            self._scheduler = BundleScheduler(self._engine.executor)
            if handed_over is None:
                self._engine.agents.open()
            cuts = self._replay.cuts if self._replay is not None else None
            self._session = Session(self._engine.agents, settings, self._is_computing, cuts)
            atexit.register(self._close_at_exit)
            with _listing:
                _open[self._place] = self

    def _make_way(self, engine: EngineName, settings: Settings) -> Engine | None:
        """End for a new `Deisa` of the same session in this process.

        Returns
        -------
        Engine or None
            That of one which never ran, where the new one wants the same: with the bridges that are there already.

        Raises
        ------
        SessionInUseError
            When this one runs.
        """
        session = settings.session
        with self._closing:
            if self._runs is not None:
                raise SessionInUseError(
                    f"session {session!r} is in use by this very process, where a Deisa runs its callbacks: "
                    f"{self._runs}; interrupt it or wait for its end, or choose another name: Deisa(session=...) and "
                    "Bridge(session=...), or DEISA_RAY_SESSION on both sides"
                )
            self._replaced = True
            if self._executed:
                logger.warning(
                    "a new Deisa takes session %r over from one of this process that has run; arrays which are left of "
                    "that run can no longer be read (persist() or compute() keeps values)",
                    session,
                )
                self.close()
                return None
            logger.warning(
                "a new Deisa takes the place of one of this process that never ran (session %r, %d callbacks)",
                session,
                len(self._registrations),
            )
            if (engine, settings) == (self._engine_name, self._settings):
                self._closed = True
                self._forget()
                return self._engine
            error = AnalyticsLostError("the analytics has made way for a new Deisa of its process")
            self._end(self._session.abandon, error)
            return None

    def register_callback(
        self,
        callback: Callback,
        *windows: Any,
        exception_handler: ExceptionHandler | None = None,
        when: When = "AND",
        trigger: Condition | None = None,
        following: int = 0,
    ) -> Callback:
        """Have a callback run on windows of arrays.

        Its arguments are lists of `DeisaArray`, oldest to newest, one for each window: by name when
        its parameters are called like the arrays or it takes ``**windows``, otherwise by position in the order of
        the windows. A function that is defined anew under its name, as by a notebook's cell that runs again, takes
        the place of its earlier version.

        Parameters
        ----------
        callback : callable
        *windows : WindowSpec, Window, str, or a list of these
            At least one.
        exception_handler : callable, optional
            Called with what the callback raises; the run goes on if it returns. By default `on_error`
            decides: the exception is logged, with its traceback when it is new.
        when : {"AND", "OR"}
            Run for a timestep at which all the arrays are complete; or at least one, once
            every array has been seen.
        trigger : callable, optional
            A condition that is asked first, on the same windows: the callback runs only for timesteps at which it is
            true. It returns a bool, a number or an array of one element; what is lazy is computed.
        following : int, optional
            At how many timesteps after one at which the trigger was true the callback also runs.

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
            self._refuse("callbacks must be registered before execute_callbacks()")
        specs = window_specs(windows, f"callback {name_of(callback)!r}")
        self._registrations.add(Registration.of(callback, specs, exception_handler, when, trigger, following))
        return callback

    def register(
        self,
        *windows: Any,
        exception_handler: ExceptionHandler | None = None,
        when: When = "AND",
        trigger: Condition | None = None,
        following: int = 0,
    ) -> Callable[[Callback], Callback]:
        """Register the decorated function; the parameters are those of `register_callback`.

        Examples
        --------
        >>> @deisa.register("pressure", WindowSpec("temperature", window_size=3))  # doctest: +SKIP
        ... def watch(pressure, temperature):
        ...     print(pressure[-1].t)
        """
        for window in windows:
            if callable(window) and not isinstance(window, type):
                raise RegistrationError(
                    f"register() takes windows, got {name_of(window)!r}: say of which array, as in "
                    '@deisa.register("temperature")'
                )
        specs = window_specs(windows, "register()")

        def decorate(callback: Callback) -> Callback:
            return self.register_callback(
                callback,
                *specs,
                exception_handler=exception_handler,
                when=when,
                trigger=trigger,
                following=following,
            )

        return decorate

    def unregister_callback(self, callback: Callback) -> None:
        """Have a function run no more, on whatever windows it was registered; before a run, or while one runs.

        In a run that has begun, its arrays are handed over all the same.

        Raises
        ------
        RegistrationError
            When it is not registered.
        """
        self._process.check(repr(self))
        self._registrations.remove(callback)

    def save(
        self,
        windows: Any,
        path: Any,
        *,
        every: int = 1,
        format: Format | None = None,
        virtual: bool = False,
        encoding: Mapping[str, Mapping[str, Any]] | None = None,
        exception_handler: ExceptionHandler | None = None,
        when: When = "AND",
        trigger: Condition | None = None,
        following: int = 0,
    ) -> Writer:
        """Have arrays saved at each timestep, without a callback of your own.

        Parameters
        ----------
        windows : str, WindowSpec, or a list of these
            What to save. Of a larger window, all that is not saved yet: with a trigger, what came before it.
        path : str, path, or Zarr store
            With ``{timestep}`` in it a file for each timestep, otherwise one that grows. `Writer` says more.
        every : int
            Only timesteps that are multiples of it. What no window asks for besides is not copied.
        format, virtual, encoding
            As `Writer` has them.
        exception_handler, when, trigger, following
            As `register_callback` has them.

        Returns
        -------
        Writer

        Raises
        ------
        RegistrationError, WindowError
        SaveError
            When nothing can be saved there.

        Examples
        --------
        >>> deisa.save("temperature", "out.zarr", every=10)  # doctest: +SKIP
        """
        specs = at_multiples(window_specs([windows], "save()"), every)
        given = [registration.callback for registration in self._registrations]
        save = save_of(
            [(spec.name, spec.window_size) for spec in specs],
            path,
            every,
            {"format": format, "virtual": virtual, "encoding": encoding},
            given,
            (specs, when, trigger, following),
        )
        if save not in given:
            self.register_callback(
                save,
                *specs,
                exception_handler=exception_handler,
                when=when,
                trigger=trigger,
                following=following,
            )
        return save.writer

    def set(self, key: str, value: Any, timestep: int) -> None:
        """Set a value that every bridge gets which asks for the key at the timestep, with ``bridge.get``.

        A callback, another thread or the script may call it, before `execute_callbacks` too. The last value that is set
        for a key and a timestep counts, until a bridge has asked for it. Once one has, the answer is final: setting
        another value changes nothing, and is warned of once for each key, and counted in the report.

        Parameters
        ----------
        key : str
            1 to 255 bytes of UTF-8; at most 256 different keys in a session.
        value : None, bool, int, float, complex, str, bytes, list, dict or numpy.ndarray
            Lists and dicts of these; keys are strings. Bridges get lists for tuples.
        timestep : int
            For which the simulation asks. It may be ahead of the analytics by ``max_simulation_ahead`` timesteps and
            one more, unless it waits for the answer (``wait=``).

        Raises
        ------
        FeedbackError, UnsupportedValueError
            For what cannot be a key, a timestep or a value, or is too large (``DEISA_RAY_FEEDBACK_MEMORY_MIB``).
        ClosedError
            After the run.

        Examples
        --------
        >>> def stop_when_steady(V):  # doctest: +SKIP
        ...     if abs(V[-1].dask - V[0].dask).max().compute() < 1e-6:
        ...         deisa.set("stop", True, timestep=V[-1].t)
        """
        self._process.check(repr(self))
        if self._closed:
            self._refuse("values can be set until the run has ended")
        self._session.feedback.set(key, value, timestep)

    def record(
        self,
        path: str | os.PathLike[str],
        *windows: Any,
        trigger: Condition | None = None,
        following: int = 0,
        exception_handler: ExceptionHandler | None = None,
        when: When = "AND",
    ) -> None:
        """Keep what is delivered, so that the same script can run on it without the simulation.

        Each complete timestep of an array is kept before callbacks run for it, with its time and labels.
        ``DEISA_RAY_REPLAY`` runs a script on a recording.

        Parameters
        ----------
        path : str or path
            A folder for a Zarr store, on a file system that all nodes share, or a URL. A recording that is there
            already goes on.
        *windows : str, WindowSpec, Window, or a list of these
            What to keep; by default all arrays that callbacks ask for.
        trigger, following
            Keep only the windows of timesteps at which the trigger is true, and so many timesteps after; as
            `register_callback` has them.
        exception_handler, when
            As `register_callback` has them; `when` matters with a trigger only.

        Raises
        ------
        RegistrationError, WindowError
        SaveFormatError
            When something else is at the path.
        MissingPackageError
            When Zarr is not installed.

        Examples
        --------
        >>> deisa.record("run.zarr")  # doctest: +SKIP
        """
        self._process.check(repr(self))
        if self._executed or self._closed:
            self._refuse("record() must be called before execute_callbacks()")
        place = place_of(path)
        if self._replay is not None and self._replay.is_at(place):
            logger.info("%s is not recorded, since it is replayed", place)
            return
        specs = window_specs(windows, "record()") if windows else ()
        self._records[place] = RecordRequest.of(place, specs, trigger, following, exception_handler, when)

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
        run = self._begin()
        try:
            return self._execute(run)
        finally:
            for request in self._records.values():
                request.recording.close()
            for registration in self._registrations:
                if isinstance(registration.callback, Save):
                    registration.callback.writer.close()
            failures = failures_of(calls.figures for calls in run.callbacks)
            if failures:
                logger.error("%s", failures)

    def _begin(self) -> _Run:
        with self._closing:
            if self._executed or self._closed:
                self._refuse("execute_callbacks() runs once")
            self._registrations.put_first(
                [
                    registration
                    for request in self._records.values()
                    for registration in request.registrations(self._registrations)
                ]
            )
            if not self._registrations:
                raise NoCallbacksError(
                    "no callback is registered: call register_callback() before execute_callbacks(); to record only, "
                    "name the arrays, as in record(path, 'temperature')"
                )
            self._executed = True
            self._runs = f"thread {threading.current_thread().name!r}, {this_process()}"
        ends_run = self._settings.on_error == "raise"
        return _Run([Calls(registration, ends_run) for registration in self._registrations])

    def _refuse(self, why: str) -> NoReturn:
        if self._replaced:
            raise ClosedError(
                f"a new Deisa of session {self._settings.session!r} has taken the place of this one; use that one"
            )
        raise ClosedError(f"{why}; create a new Deisa for another run")

    def _execute(self, run: _Run) -> Report:
        try:
            self._running = True
            try:
                with self._replaying(run):
                    self._run(run)
            finally:
                self._running = False
        except BaseException as error:
            # Where callbacks or windows are at fault, another analytics may do better.
            if isinstance(error, DeisaError) and not run.in_callback and not isinstance(error, WindowError):
                self.close(error)
            else:
                self._end(self._session.abandon, AnalyticsLostError(f"the analytics has ended: {error!r}"))
            raise
        finally:
            self._runs = None
            self.report = report = self._report(run)
        if self._session.stopped or self._session.drop_arrays():
            self.close()
        else:  # arrays that outlive the run keep their agents; callbacks may hold such arrays
            self._registrations.clear()
            threading.Thread(target=self._close_when_unused, name="deisa-linger", daemon=True).start()
        return report

    def _replaying(self, run: _Run) -> AbstractContextManager[None]:
        if self._replay is None:
            return nullcontext()
        wanted = {window.name for calls in run.callbacks for window in calls.registration.windows}
        return self._replay.running(self._settings, wanted, self.close)

    def _run(self, run: _Run) -> None:
        layouts = self._session.wait_registered()
        if layouts is None:  # `close` was called
            return
        runnable = [calls for calls in run.callbacks if calls.registration.can_run(layouts)]
        streams = Streams(layouts)
        subscriptions = [calls.registration.subscription(streams.of) for calls in runnable]
        self._session.start(subscriptions, streams.by_name)
        for number, calls in enumerate(runnable):
            calls.resume(self._session.following(number))
        started = time.monotonic()
        watchdog = Watchdog(self._settings.callback_warn_s)

        def deliver(firing: Firing, windows: Windows) -> int:
            calls = runnable[firing.callback]
            if calls.registration not in self._registrations:
                return 0
            run.in_callback = True
            with watchdog.watching(calls.registration.name, firing.timestep):
                calls.call(firing.timestep, windows)
            run.in_callback = False
            return calls.following

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
            feedback=self._session.feedback.figures,
        )

    def _close_when_unused(self) -> None:
        self._session.leases.wait_gone()
        self.close()

    def close(self, error: DeisaError | None = None) -> None:
        """End the session: the agents go, with the chunk memory. Done by itself after a run and at exit.

        While `execute_callbacks` runs, a callback, another thread or a signal handler may call it to end the run early.
        Ranks learn at once that they need not go on. `execute_callbacks` returns its report when the callback
        under way has returned; no other one is called any more.

        Parameters
        ----------
        error : DeisaError, optional
            What ranks that are still there are told; `AnalyticsStoppedError` by default.
        """
        self._process.check(repr(self))
        if error is None and not self._executed:
            error = AnalyticsLostError(NEVER_RAN)
        elif error is None:
            error = AnalyticsStoppedError(
                f"the analytics has ended session {self._settings.session!r} by its own wish, with close(); what is "
                "sent from now on is not looked at"
            )
        if self._running:
            self._session.stop(error)
        else:
            self._end(self._session.close, error)

    def _is_computing(self) -> bool:
        stats = self._engine.executor.stats
        return stats.ended < stats.submitted

    def _end(self, end_session: Callable[[DeisaError], None], error: DeisaError) -> None:
        with self._closing:
            if self._closed:
                return
            self._closed = True
            end_session(error)
            self._engine.executor.close()
        self._forget()

    def _forget(self) -> None:
        atexit.unregister(self._close_at_exit)
        with _listing:
            if _open.get(self._place) is self:
                del _open[self._place]

    def _close_at_exit(self) -> None:
        if not self._process.is_this:
            return
        error = None
        if not self._executed:
            self._say_never_ran()
            raised = getattr(sys, "last_value", None)  # what the script ends with, if it has raised
            error = AnalyticsLostError(NEVER_RAN if raised is None else f"{NEVER_RAN}: {raised!r}")
        self.close(error)

    def _say_never_ran(self) -> None:
        logger.warning(
            "session %r ends without execute_callbacks(): its %d callbacks never ran; a simulation that waits for it "
            "is told so",
            self._settings.session,
            len(self._registrations),
        )

    def __enter__(self) -> Deisa:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._process.is_this:
            return
        if kind is None and not self._executed and not self._closed:
            self._say_never_ran()
        self.close()

    def __repr__(self) -> str:
        return f"<Deisa session {self._settings.session!r}, {len(self._registrations)} callbacks>"


_open: dict[tuple[int, str, str | None], Deisa] = {}  # those that have not ended, by process and address
_listing = threading.Lock()
_opening = threading.Lock()  # two of one session, one after the other


@dataclass(slots=True)
class _Run:
    """What is counted while callbacks run."""

    callbacks: Sequence[Calls]
    wall_s: float = 0.0
    in_callback: bool = False  # one runs, or has ended the run


implements("IDeisa", Deisa)


def _connect_by(ray_start: Callable[[], object], engine: str) -> None:
    """Have a function of the script connect to Ray."""
    if engine != "ray":
        raise ConfigurationError(
            f"ray_start is for engine='ray', and engine is {engine!r}: leave one of them out"
        )
    ray_start()


def _make_engine(name: str, settings: Settings) -> Engine:
    if name == "ray":
        from deisa.ray._engine.ray_engine import RayEngine

        return cast(Engine, RayEngine(settings))
    if name == "local":
        from deisa.ray._engine.local import LocalEngine

        return cast(Engine, LocalEngine(settings))
    raise ConfigurationError(f"engine must be 'ray' or 'local', got {name!r}")
