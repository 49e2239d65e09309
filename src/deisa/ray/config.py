"""Settings: one frozen object, built once and passed down; the environment is read here only."""

from __future__ import annotations

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from deisa.ray.errors import ConfigError, ConfigurationError

logger = logging.getLogger("deisa.ray")

ENVIRONMENT_PREFIX = "DEISA_RAY_"
FOR_TESTS = "REQUIRE_"  # DEISA_RAY_REQUIRE_...: what the project's own tests must not skip
OnAnalyticsLost = Literal["wait", "continue", "raise"]
MAX_SOCKET_PATH_BYTES = 107  # struct sockaddr_un
ON_ANALYTICS_LOST = get_args(OnAnalyticsLost)
OnError = Literal["log", "raise"]
ON_ERROR = get_args(OnError)
Leftover = Literal["drop", "deliver"]
LEFTOVER = get_args(Leftover)
MAX_QUEUE_SIZE = 65_536
MIN_FEEDBACK_MIB, MAX_FEEDBACK_MIB = 2.0**-8, 2.0**14
_SWITCH = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
    "": False,
}
REPLAY = ENVIRONMENT_PREFIX + "REPLAY"
_warned_of: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a session behaves; every field is also an environment variable ``DEISA_RAY_<FIELD>``.

    Attributes
    ----------
    session : str
        Name of the session. Analytics and simulation meet under it; several sessions run
        side by side on one cluster under different names.
    socket_path : str or None
        Where the agent listens. By default an address in the abstract namespace made of user
        and session, which needs no file. Give a path where abstract sockets cannot serve
        (containers with separate network namespaces).
    address : str or None
        Address of the Ray cluster that the analytics joins, as ``host:port``; wins over ``RAY_ADDRESS``.
        By default a cluster of this user on this host, or a new local one.
    max_simulation_ahead : int
        Timesteps that the simulation may be ahead of the analytics, at least 1. Each costs
        one more slot for each chunk.
    memory_fraction : float
        Largest part of a node's available memory that chunk slots may take, in (0, 1].
    merge_chunks_beyond : int
        Number of chunks of an array beyond which those of one node are merged into boxes that its ranks
        share, so that Dask sees about as many chunks as the analytics has CPUs; 0 merges always.
    connect_timeout_s : float
        How long a `Bridge` looks for the agent of its host, and `Deisa` for a Ray cluster whose address
        is given.
    start_timeout_s : float
        How long either side waits for all bridges to register and the analytics to start.
    send_timeout_s : float
        How long ``send`` waits for a free slot.
    data_timeout_s : float
        How long the analytics waits for the simulation's next sign of life.
    cpu_timeout_s : float
        How long a computation waits while others hold every CPU of a node.
    driver_timeout_s : float
        How long agents keep what they hold for another analytics, when theirs has died.
    leftover : {"drop", "deliver"}
        What an analytics does with the complete timesteps of a session that can't go on, since its analytics
        and a rank were lost: drop them and start a new run, or handle them first and then raise `BridgeLostError`.
    on_analytics_lost : {"wait", "continue", "raise"}
        What a rank does when the analytics dies: wait for another one to take over (an error after
        `driver_timeout_s`), go on without, or raise `AnalyticsLostError` at its next call.
    on_error : {"log", "raise"}
        What a callback's exception does where the callback has no exception handler: it is logged and the run goes
        on, or it ends the run. `AssertionError` and `TimeoutError` always end it.
    warn_every_s : float
        How often a long wait says what it waits for.
    callback_warn_s : float
        How long a callback runs before a warning says which one, and where it is.
    feedback_queue_size : int
        Values that are kept for the simulation of each key that the analytics sets, 1 to 65,536.
    feedback_memory_mib : float
        Memory for all such values on each node (MiB). The oldest ones make way.
    threads_per_bundle : int or None
        Threads that one bundle of tasks uses at most; by default as many as CPUs of its node are free
        (with the local engine: one, the caller's).
    """

    session: str = "default"
    socket_path: str | None = None
    address: str | None = None
    max_simulation_ahead: int = 1
    memory_fraction: float = 0.8
    merge_chunks_beyond: int = 32
    connect_timeout_s: float = 120.0
    start_timeout_s: float = 300.0
    send_timeout_s: float = 1800.0
    data_timeout_s: float = 3600.0
    cpu_timeout_s: float = 300.0
    driver_timeout_s: float = 60.0
    leftover: str = "drop"
    on_analytics_lost: str = "wait"
    on_error: str = "log"
    warn_every_s: float = 5.0
    callback_warn_s: float = 60.0
    feedback_queue_size: int = 1024
    feedback_memory_mib: float = 64.0
    threads_per_bundle: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", self.session):
            raise ConfigurationError(
                f"session name {self.session!r}: use 1 to 64 letters, digits, '.', '_' or '-'"
            )
        if self.socket_path:
            object.__setattr__(self, "socket_path", _socket_path(self.socket_path))
        if self.max_simulation_ahead < 1:
            raise ConfigurationError(
                f"max_simulation_ahead is {self.max_simulation_ahead}; it must be at least 1"
            )
        if self.merge_chunks_beyond < 0:
            raise ConfigurationError(
                f"merge_chunks_beyond is {self.merge_chunks_beyond}; it must be at least 0"
            )
        if not 1 <= self.feedback_queue_size <= MAX_QUEUE_SIZE:
            raise ConfigurationError(
                f"feedback_queue_size is {self.feedback_queue_size}; it must lie in 1..{MAX_QUEUE_SIZE}"
            )
        if not MIN_FEEDBACK_MIB <= self.feedback_memory_mib <= MAX_FEEDBACK_MIB:
            raise ConfigurationError(
                f"feedback_memory_mib is {self.feedback_memory_mib}; it must lie in {MIN_FEEDBACK_MIB:g}.."
                f"{MAX_FEEDBACK_MIB:g}"
            )
        if not 0 < self.memory_fraction <= 1:
            raise ConfigurationError(f"memory_fraction is {self.memory_fraction}; it must lie in (0, 1]")
        if self.threads_per_bundle is not None and self.threads_per_bundle < 1:
            raise ConfigurationError(
                f"threads_per_bundle is {self.threads_per_bundle}; it must be at least 1"
            )
        for name, choices in (
            ("leftover", LEFTOVER),
            ("on_analytics_lost", ON_ANALYTICS_LOST),
            ("on_error", ON_ERROR),
        ):
            if getattr(self, name) not in choices:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}"
                )
        for field in dataclasses.fields(self):
            if field.name.endswith("_s") and not getattr(self, field.name) > 0:
                raise ConfigurationError(f"{field.name} is {getattr(self, field.name)}; it must be positive")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Read ``DEISA_RAY_*`` variables; an override that is not None wins over its variable."""
        if environment is None:
            environment = os.environ
            _warn_of_unknown(environment)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            variable = ENVIRONMENT_PREFIX + field.name.upper()
            if variable in environment:
                values[field.name] = _parse(variable, environment[variable], str(field.type))
        values.update({name: value for name, value in overrides.items() if value is not None})
        return cls(**values)


def _warn_of_unknown(environment: Mapping[str, str]) -> None:
    """Say once in a process which variables look like settings and are none."""
    known = [field.name.upper() for field in dataclasses.fields(Settings)] + ["DISABLED", "REPLAY"]
    known += [f"REPLAY_{name}" for name in REPLAY_OPTIONS]
    named = {v.removeprefix(ENVIRONMENT_PREFIX) for v in environment if v.startswith(ENVIRONMENT_PREFIX)}
    for name in sorted(named - set(known) - _warned_of):
        if not name.startswith(FOR_TESTS):
            import difflib  # a rank hardly ever needs it

            _warned_of.add(name)
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {ENVIRONMENT_PREFIX}{close[0]}?" if close else ""
            logger.warning(
                "%s%s is set, but there is no such setting: it changes nothing%s",
                ENVIRONMENT_PREFIX,
                name,
                hint,
            )


def disabled_by_environment(environment: Mapping[str, str] | None = None) -> bool:
    """Whether ``DEISA_RAY_DISABLED`` switches every bridge off, or ``DEISA_RAY_REPLAY`` takes their place."""
    environment = os.environ if environment is None else environment
    text = environment.get("DEISA_RAY_DISABLED", "0").lower()
    if text not in _SWITCH:
        raise ConfigurationError(f"DEISA_RAY_DISABLED={text!r}: use 1 or 0")
    if environment.get(REPLAY):
        if REPLAY not in _warned_of:
            _warned_of.add(REPLAY)
            logger.warning("%s is set: bridges of this process send nothing", REPLAY)
        return True
    return _SWITCH[text]


def check_scheduling_variable(environment: Mapping[str, str] | None = None) -> None:
    """Accept ``DEISA_DISTRIBUTED_SCHEDULING``, with which deisa-ray 0.1.8 chooses how graphs are scheduled.

    It changes nothing: graphs are always scheduled on the nodes of their data.

    Raises
    ------
    ConfigError
        For what 0.1.8 refuses.
    """
    text = (os.environ if environment is None else environment).get("DEISA_DISTRIBUTED_SCHEDULING", "")
    if text.strip().lower() not in _SWITCH:
        raise ConfigError(
            f"DEISA_DISTRIBUTED_SCHEDULING={text!r}: use 1 or 0, or unset it; it changes nothing in this release"
        )


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """What an analytics runs on in place of a simulation.

    Attributes
    ----------
    path : str
        A recording, or a Zarr or NetCDF data set; ``DEISA_RAY_REPLAY``.
    arrays : tuple of (str, str)
        The arrays, each with the variable it is read from; empty for all;
        ``DEISA_RAY_REPLAY_ARRAYS="T=temperature,p"``.
    start, stop : int or None
        The first timestep, and the one before which it ends; ``DEISA_RAY_REPLAY_TIMESTEPS="100:200"``.
    ranks : int
        How many processes read; ``DEISA_RAY_REPLAY_RANKS``.
    """

    path: str
    arrays: tuple[tuple[str, str], ...] = ()
    start: int | None = None
    stop: int | None = None
    ranks: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> ReplaySettings | None:
        """Read ``DEISA_RAY_REPLAY`` and what belongs to it; None where that is not set.

        Raises
        ------
        ConfigurationError
        """
        environment = os.environ if environment is None else environment
        path = environment.get(REPLAY)
        if not path:
            return None
        arrays, timesteps, ranks = (environment.get(f"{REPLAY}_{name}", "") for name in REPLAY_OPTIONS)
        start, stop = _timesteps(timesteps)
        return cls(
            path=path if "://" in path else os.path.abspath(os.path.expanduser(path)),
            arrays=_renamed(arrays),
            start=start,
            stop=stop,
            ranks=_ranks(ranks),
        )


REPLAY_OPTIONS = ("ARRAYS", "TIMESTEPS", "RANKS")


def _renamed(text: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, _, variable = (part.strip() for part in item.partition("="))
        if not name or ("=" in item and not variable):
            raise ConfigurationError(
                f"{REPLAY}_ARRAYS={text!r}: give names, or name=variable, with commas between them, as in "
                "'T=temperature,pressure'"
            )
        pairs.append((name, variable or name))
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"{REPLAY}_ARRAYS={text!r} names an array twice")
    return tuple(pairs)


def _timesteps(text: str) -> tuple[int | None, int | None]:
    found = re.fullmatch(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*", text) if text else None
    if text and found is None:
        raise ConfigurationError(
            f"{REPLAY}_TIMESTEPS={text!r}: give the first timestep and the one before which it ends, as in '100:200', "
            "'100:' or ':200'"
        )
    start, stop = (int(n) if n else None for n in (found.groups() if found else (None, None)))
    if start is not None and stop is not None and start >= stop:
        raise ConfigurationError(f"{REPLAY}_TIMESTEPS={text!r} has no timestep in it")
    return start, stop


def _ranks(text: str) -> int:
    if not text:
        return 1
    if not text.isdecimal() or int(text) < 1:
        raise ConfigurationError(
            f"{REPLAY}_RANKS={text!r}: give the number of processes that read, at least 1"
        )
    return int(text)


def _socket_path(path: str) -> str:
    """Make a path absolute, of the user's own folder where it says ``~``, and check its length."""
    whole = os.path.abspath(os.path.expanduser(path))
    length = len(os.fsencode(whole))
    if length > MAX_SOCKET_PATH_BYTES:
        raise ConfigurationError(
            f"socket_path {path!r} has {length} bytes; a socket's path may have {MAX_SOCKET_PATH_BYTES}: give a "
            "shorter one, such as below /tmp or $XDG_RUNTIME_DIR, the same on both sides (DEISA_RAY_SOCKET_PATH)"
        )
    return whole


def _parse(variable: str, text: str, annotation: str) -> Any:
    kind = annotation.split("|")[0].strip()
    try:
        return {"int": int, "float": float, "str": str}[kind](text)
    except ValueError as exc:
        raise ConfigurationError(f"{variable}={text!r} is not a valid {kind}") from exc
