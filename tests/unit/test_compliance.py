"""What deisa-core asks of an implementation, against the package itself."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from typing import Any

import dask.array as da
import numpy as np
import pytest

import deisa.core
from deisa.core import IBridge, ICommunicator, IDeisa, validate_arrays_metadata
from deisa.ray import Bridge, Deisa, DeisaArray, Settings, Timestep, Window, WindowSpec
from deisa.ray._state.descriptions import describe_arrays
from deisa.ray.config import check_scheduling_variable
from deisa.ray.errors import (
    ChunkShapeError,
    ConfigError,
    ConfigurationError,
    ConfigurationTypeError,
    ContractError,
    DescriptionError,
    NoCallbacksError,
)
from deisa.ray.types import CallbackArgs, window_spec
from tests.support.patience import PATIENCE_S

FINE = {"global_shape": (32, 32), "chunk_shape": (16, 16), "chunk_position": (0, 0)}


class Comm:
    """A communicator of one rank, with all that `ICommunicator` asks for."""

    def Get_rank(self) -> int:
        return 0

    def Get_size(self) -> int:
        return 1

    def gather(self, data: Any, root: int = 0) -> list[Any]:
        return [data]

    def bcast(self, obj: Any, root: int = 0) -> Any:
        return obj

    def barrier(self) -> None: ...


def bridge() -> Bridge:
    """A bridge by itself, which does nothing."""
    whole = FINE | {"chunk_shape": (32, 32)}
    return Bridge(Comm(), {"a": whole}, enabled=False)


# Interfaces.


def test_objects_are_instances_of_the_interfaces(session_name: str) -> None:
    assert isinstance(Comm(), ICommunicator)
    with bridge() as made, Deisa(engine="local", settings=Settings(session=session_name)) as deisa:
        deisa.register_callback(lambda a: None, "a")
        assert isinstance(made, IBridge)
        assert isinstance(deisa, IDeisa)
        deisa.close()
    assert issubclass(Bridge, IBridge) and issubclass(Deisa, IDeisa)
    assert not issubclass(Bridge, IDeisa)


CORE_FIRST = """
import deisa.core
from deisa.ray.bridge import Bridge
assert issubclass(Bridge, deisa.core.IBridge)
"""
CORE_LAST = """
import sys
from deisa.ray.bridge import Bridge
assert "deisa.core" not in sys.modules
import deisa.core
array = {"global_shape": (1,), "chunk_shape": (1,), "chunk_position": (0,)}
bridge = Bridge(bridge_id=0, system_metadata={"world_size": 1}, arrays_metadata={"a": array}, enabled=False)
assert isinstance(bridge, deisa.core.IBridge)
"""


@pytest.mark.parametrize("program", [CORE_FIRST, CORE_LAST], ids=["core first", "core last"])
def test_whichever_is_imported_first(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


ABSTRACT = [
    (theirs, ours, name)
    for theirs, ours in ((IBridge, Bridge), (IDeisa, Deisa))
    for name in (*sorted(theirs.__abstractmethods__), "__init__")
]
LIMITED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@pytest.mark.parametrize(
    ("theirs", "ours", "name"), ABSTRACT, ids=[f"{ours.__name__}.{name}" for _, ours, name in ABSTRACT]
)
def test_every_call_of_the_interface_is_a_call_of_ours(theirs: type, ours: type, name: str) -> None:
    parameters = list(inspect.signature(getattr(theirs, name)).parameters.values())
    named = [p for p in parameters if p.kind not in LIMITED]
    by_position = [p.name for p in named if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    by_name = {p.name: None for p in named if p.kind is inspect.Parameter.KEYWORD_ONLY}
    more = ["x", "y"] if name.startswith("register") else []
    signature = inspect.signature(getattr(ours, name))
    signature.bind(*by_position, *more, **by_name)
    signature.bind("self", **dict.fromkeys(by_position[1:]), **by_name)
    required = [p.name for p in named if p.default is inspect.Parameter.empty]
    signature.bind(*required, *more)
    bound = signature.bind(*by_position, *more).arguments
    assert {of: value for of, value in bound.items() if of in by_position} == {of: of for of in by_position}


# Its validator.

CASES: dict[str, Any] = {
    "a list": [],
    "nothing": None,
    "a text": "temperature",
    "a number for a name": {3: FINE},
    "a number for a description": {"a": 3},
    "nothing for a description": {"a": None},
    "a text for a description": {"a": "(16, 16)"},
    "an unknown key": {"a": FINE | {"shape": (16, 16)}},
    "no key at all": {"a": {}},
    "a longer global_shape": {"a": FINE | {"global_shape": (32, 32, 32)}},
    "a shorter chunk_position": {"a": FINE | {"chunk_position": (0,)}},
    **{f"without {key}": {"a": {k: v for k, v in FINE.items() if k != key}} for key in FINE},
    **{f"{key} is a number": {"a": FINE | {key: 16}} for key in FINE},
    **{f"{key} of fractions": {"a": FINE | {key: (16.0, 0.5)}} for key in FINE},
    **{f"{key} of texts": {"a": FINE | {key: "16"}} for key in FINE},
}


@pytest.mark.parametrize("said", CASES.values(), ids=CASES)
def test_what_its_validator_refuses_is_refused_with_the_same_kind_of_error(said: Any) -> None:
    with pytest.raises((TypeError, ValueError)) as theirs:
        validate_arrays_metadata(said)
    with pytest.raises(type(theirs.value)) as ours:
        Bridge(Comm(), said, enabled=False)
    assert isinstance(ours.value, DescriptionError)


def test_what_its_validator_accepts_is_accepted() -> None:
    for said in ({}, {"a": FINE}, {"a": FINE, "b": {key: list(value) for key, value in FINE.items()}}):
        assert len(describe_arrays(validate_arrays_metadata(said))) == len(said)


@pytest.mark.parametrize(("comm", "kind"), [(None, ValueError), ("world", TypeError), (object(), TypeError)])
def test_what_is_no_communicator(comm: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        Bridge(comm, {"a": FINE}, enabled=False)
    assert isinstance(caught.value, ConfigurationError)


def test_identities_that_are_no_numbers() -> None:
    with pytest.raises(ConfigurationTypeError, match="must be integers"):
        Bridge(bridge_id="0", system_metadata={"world_size": 1}, arrays_metadata={"a": FINE})  # type: ignore[arg-type]


# Windows and arrays.


def test_windows_of_both() -> None:
    windows: list[CallbackArgs] = ["a", Window("a"), WindowSpec("a"), deisa.core.Window("a", 1)]
    assert {window_spec(window) for window in windows} == {WindowSpec("a", 1)}
    assert Window("a", size=2) == deisa.core.Window(name="a", size=2)


NUMBERS = np.arange(6.0).reshape(2, 3)
PLAIN = da.from_array(NUMBERS, chunks=(1, 3))
GRAPH = PLAIN.dask, PLAIN.name, PLAIN.chunks
ARRAYS: dict[str, Any] = {
    "an array": lambda: DeisaArray(PLAIN, 5),
    "an array, by name": lambda: DeisaArray(dask=PLAIN, t=5),
    "deisa-core": lambda: DeisaArray(5, *GRAPH, dtype=PLAIN.dtype, meta=PLAIN, shape=PLAIN.shape),
    "deisa-core, by name": lambda: DeisaArray(
        t=5, dask=PLAIN.dask, name=PLAIN.name, chunks=PLAIN.chunks, dtype=PLAIN.dtype
    ),
    "an array, the timestep first": lambda: DeisaArray(np.int64(5), PLAIN),
    "0.1.8": lambda: DeisaArray(*GRAPH, 5, dtype=PLAIN.dtype),
    "0.1.8, by name": lambda: DeisaArray(*GRAPH, dtype=PLAIN.dtype, shape=PLAIN.shape, t=5),
}


@pytest.mark.parametrize("make", ARRAYS.values(), ids=ARRAYS)
def test_an_array_is_made_as_elsewhere(make: Any) -> None:
    made = make()
    for array in (made, made.copy(), copy.copy(made), copy.deepcopy(made)):
        assert type(array) is DeisaArray and isinstance(array, da.Array)
        assert array.t == array.timestep == 5
        assert (array.shape, array.dtype, array.chunks) == (PLAIN.shape, PLAIN.dtype, PLAIN.chunks)
        np.testing.assert_array_equal((array + 1).compute(scheduler="sync"), NUMBERS + 1)


def test_an_array_needs_a_timestep() -> None:
    with pytest.raises(TypeError, match=r"needs a timestep: DeisaArray\(array, t\)"):
        DeisaArray(PLAIN)
    with pytest.raises(TypeError, match="needs a timestep"):
        DeisaArray(*GRAPH)


def test_timesteps_are_numbers() -> None:
    assert isinstance(DeisaArray(PLAIN, 5).t, Timestep)


# Errors of 0.1.8.


def test_errors_are_caught_as_there() -> None:
    error = ChunkShapeError("4 rows instead of 5")
    assert isinstance(error, ContractError)
    assert error.message == "4 rows instead of 5"
    assert issubclass(NoCallbacksError, RuntimeError)


@pytest.mark.parametrize("text", ["", "0", "1", "true", "TRUE", "yes", "on", "false", "no", " off "])
def test_the_variable_that_chose_a_scheduler_changes_nothing(text: str) -> None:
    check_scheduling_variable({"DEISA_DISTRIBUTED_SCHEDULING": text})


def test_a_value_of_it_that_was_refused_still_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEISA_DISTRIBUTED_SCHEDULING", "maybe")
    with pytest.raises(ConfigError, match="DEISA_DISTRIBUTED_SCHEDULING='maybe': use 1 or 0"):
        Deisa(engine="local")


def test_a_function_that_connects_is_for_ray() -> None:
    with pytest.raises(ConfigurationError, match="ray_start is for engine='ray', and engine is 'local'"):
        Deisa(engine="local", ray_start=lambda: None)
