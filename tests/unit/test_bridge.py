"""What `send` refuses, with which words, and that nothing is lost by it."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from deisa.ray._state.events import BridgeClosed, BridgeJoined, OwnersPassed, StepComplete
from deisa.ray.bridge import Bridge
from deisa.ray.config import Settings
from deisa.ray.errors import (
    BridgeIdError,
    ChunkDtypeError,
    ChunkIndexError,
    ChunkShapeError,
    ClosedError,
    ConfigurationError,
    ContractError,
    DescriptionError,
    DeviceMemoryError,
    DuplicateChunkError,
    ForkedProcessError,
    TimestepError,
    UnknownArrayError,
)
from tests.support.patience import PATIENCE_S
from tests.unit.agent import Agent, Client, running, whole

pytestmark = pytest.mark.usefixtures("client")

GOOD = np.arange(6.0).reshape(2, 3)


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running() as agent:
        yield agent


@pytest.fixture
def bridge(agent: Agent) -> Bridge:
    """A bridge that has sent timestep 4 of "a"."""
    halves = [whole((4,)) | {"chunk_shape": (2,), "offset": (2 * i,)} for i in range(2)]
    (bridge,) = agent.bridges(
        {
            "a": whole((2, 3)),
            "halves": halves,
            "none": [],
            "open": whole((2,), dtype=None),
            "unwanted": whole((2, 3)),
            "ghosts": whole((2, 3), halo=((1, 1), (0, 2))),
        },
        slots={"a": 3, "halves": 3, "open": 2, "ghosts": 1},
        open=None,
    )
    bridge.send("a", GOOD, 4)
    agent.wait(StepComplete)
    return bridge


class OnDevice:
    """What CuPy shows."""

    shape, dtype = (2, 3), np.dtype("f8")
    __cuda_array_interface__: dict[str, Any] = {}  # noqa: RUF012

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise AssertionError("must not be copied behind the caller's back")


class Exchanged:
    """What PyTorch and JAX show."""

    def __init__(self, device: tuple[int, int]) -> None:
        self.device = device

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **kwargs: Any) -> Any:
        return GOOD.__dlpack__(**kwargs)


MASKED = np.ma.masked_array(GOOD, mask=GOOD > 3)
Refusal = tuple[Callable[[Bridge], Any], type[ContractError], str]
REFUSALS: dict[str, Refusal] = {
    "unknown array": (
        lambda b: b.send("b", GOOD, 5),
        UnknownArrayError,
        "^bridge 0 described no array 'b'; it has 'a', 'halves', 'none', 'open', 'unwanted', 'ghosts'$",
    ),
    "an array by its number": (
        lambda b: b.send(5, GOOD, 5),  # type: ignore[arg-type]
        UnknownArrayError,
        "^bridge 0 described no array 5; it has 'a', ",
    ),
    "a name that is a list": (
        lambda b: b.send(["a"], GOOD, 5),  # type: ignore[arg-type]
        UnknownArrayError,
        r"^bridge 0 described no array \['a'\]; it has 'a', ",
    ),
    "a slot of an array by its number": (
        lambda b: b.slot(0, 5),  # type: ignore[arg-type]
        UnknownArrayError,
        "^bridge 0 described no array 0; it has 'a', ",
    ),
    "a name that cannot be written": (
        lambda b: b.send("\udcff", GOOD, 5),
        UnknownArrayError,
        r"^bridge 0 described no array '.udcff'; it has 'a', ",
    ),
    "a name with a zero": (
        lambda b: b.slot("a\0", 5),
        UnknownArrayError,
        r"^bridge 0 described no array 'a.x00'; it has 'a', ",
    ),
    "the timestep before the earliest one": (
        lambda b: b.send("a", GOOD, -(2**63)),
        TimestepError,
        f"array 'a': timestep {-(2**63)} exceeds 64 bits",
    ),
    "shape": (
        lambda b: b.send("a", GOOD.T, 5),
        ChunkShapeError,
        r"^bridge 0, array 'a', timestep 5: declared chunk shape \(2, 3\), got \(3, 2\)$",
    ),
    "shape that would broadcast": (
        lambda b: b.send("a", GOOD[:1], 5),
        ChunkShapeError,
        r"declared chunk shape \(2, 3\), got \(1, 3\)",
    ),
    "shape of an array that nobody asks for": (
        lambda b: b.send("unwanted", GOOD[:1], 5),
        ChunkShapeError,
        "array 'unwanted'",
    ),
    "a chunk without its halo": (
        lambda b: b.send("ghosts", GOOD, 5),
        ChunkShapeError,
        r"^bridge 0, array 'ghosts', timestep 5: declared chunk shape \(2, 3\) with halo \(\(1, 1\), \(0, 2\)\), so "
        r"the local array has shape \(4, 5\); got \(2, 3\), the chunk without its halo: send the whole local array, or "
        "leave 'halo' out of the description and send a view of the interior$",
    ),
    "a chunk with half of its halo": (
        lambda b: b.send("ghosts", np.zeros((4, 3)), 5),
        ChunkShapeError,
        r"so the local array has shape \(4, 5\); got \(4, 3\); an array keeps its size for the whole run",
    ),
    "a chunk with its halo turned round": (
        lambda b: b.send("ghosts", np.zeros((5, 4)), 5),
        ChunkShapeError,
        r"so the local array has shape \(4, 5\); got \(5, 4\)$",
    ),
    "dtype of a chunk with its halo": (
        lambda b: b.send("ghosts", np.zeros((4, 5), "f4"), 5),
        ChunkDtypeError,
        "^bridge 0, array 'ghosts', timestep 5: declared dtype float64, got float32",
    ),
    "dtype": (
        lambda b: b.send("a", GOOD.astype("f4"), 5),
        ChunkDtypeError,
        r"^bridge 0, array 'a', timestep 5: declared dtype float64, got float32; send chunk.astype\('float64'\)",
    ),
    "byte order": (
        lambda b: b.send("a", GOOD.astype(">f8"), 5),
        ChunkDtypeError,
        "declared dtype float64, got >f8",
    ),
    "objects for an open dtype": (
        lambda b: b.send("open", np.array([None, 1]), 5),
        ChunkDtypeError,
        "bridge 0, array 'open': dtype .* cannot be shared",
    ),
    "a slot of an open dtype": (
        lambda b: b.slot("open", 5),
        ChunkDtypeError,
        "bridge 0, array 'open': a slot needs the dtype; declare it",
    ),
    "masked": (
        lambda b: b.send("a", MASKED, 5),
        ChunkDtypeError,
        r"'a': a masked array .* send chunk.filled",
    ),
    "masked, though nothing is": (
        lambda b: b.send("a", np.ma.masked_array(GOOD), 5),
        ChunkDtypeError,
        r"send chunk.filled\(\), where its fill_value stands for what is masked, or chunk.data where nothing ever is$",
    ),
    "masked, of an array that nobody asks for": (
        lambda b: b.send("unwanted", np.ma.masked_array(GOOD), 5),
        ChunkDtypeError,
        "'unwanted': a masked array",
    ),
    "more elements than before": (
        lambda b: b.send("a", np.zeros((2, 4)), 5),
        ChunkShapeError,
        r"declared chunk shape \(2, 3\), got \(2, 4\); an array keeps its size for the whole run: where it changes, "
        "describe the largest one, fill up what is not used",
    ),
    "no array": (lambda b: b.send("a", {"x": 1}, 5), ChunkDtypeError, "'a': a chunk must be .* got dict"),
    "CuPy": (
        lambda b: b.send("a", OnDevice(), 5),
        DeviceMemoryError,
        r"'a': the chunk \(OnDevice\) lies in the",
    ),
    "PyTorch on a GPU": (
        lambda b: b.send("a", Exchanged((2, 0)), 5),
        DeviceMemoryError,
        r"'a': the chunk \(Exchanged\) lies in the memory of an accelerator; copy it to the host first",
    ),
    "older": (
        lambda b: b.send("a", GOOD, 3),
        TimestepError,
        "^bridge 0, array 'a': timestep 3 comes after timestep 4 of array 'a'; the timesteps of a bridge must not "
        "decrease, whatever it sends$",
    ),
    "older of another array": (
        lambda b: b.send("unwanted", GOOD, 3),
        TimestepError,
        "^bridge 0, array 'unwanted': timestep 3 comes after timestep 4 of array 'a'; ",
    ),
    "an older slot": (lambda b: b.slot("a", 3), TimestepError, "timestep 3 comes after timestep 4"),
    "a truth value": (lambda b: b.send("a", GOOD, True), TimestepError, "timesteps are integers, got True$"),
    "a truth value of NumPy": (
        lambda b: b.send("a", GOOD, np.True_),  # type: ignore[arg-type]
        TimestepError,
        "'a': timesteps are integers, got np.True_$",
    ),
    "a slot for a truth value": (lambda b: b.slot("a", True), TimestepError, "integers, got True$"),
    "advance to a truth value": (
        lambda b: b.advance(True),
        TimestepError,
        r"^bridge 0, advance\(\): timesteps are integers, got True$",
    ),
    "close at a fraction": (
        lambda b: b.close(timestep=4.5),  # type: ignore[arg-type]
        TimestepError,
        r"^bridge 0, close\(\): timesteps are integers, got 4.5$",
    ),
    "fraction": (lambda b: b.send("a", GOOD, 4.5), TimestepError, "'a': timesteps are integers, got 4.5"),
    "too large": (lambda b: b.send("a", GOOD, 2**63), TimestepError, "exceeds 64 bits"),
    "twice": (
        lambda b: b.send("a", GOOD, 4),
        DuplicateChunkError,
        "^bridge 0 has already sent chunk 0 of array 'a' for timestep 4$",
    ),
    "which chunk": (
        lambda b: b.send("halves", GOOD[0, :2], 5),
        ChunkIndexError,
        "^bridge 0 owns 2 chunks of array 'halves'; say which with chunk_index=$",
    ),
    "no such chunk": (
        lambda b: b.send("halves", GOOD[0, :2], 5, chunk_index=2),
        ChunkIndexError,
        "owns 2 chunks of array 'halves', there is no chunk 2",
    ),
    "negative chunk": (
        lambda b: b.send("a", GOOD, 5, chunk_index=-1),
        ChunkIndexError,
        "there is no chunk -1",
    ),
    "chunk by name": (
        lambda b: b.send("a", GOOD, 5, chunk_index="0"),  # type: ignore[arg-type]
        ChunkIndexError,
        "^bridge 0, array 'a': chunk_index is an integer, got '0'$",
    ),
    "a chunk as a fraction": (
        lambda b: b.send("halves", GOOD[0, :2], 5, chunk_index=0.0),  # type: ignore[arg-type]
        ChunkIndexError,
        "^bridge 0, array 'halves': chunk_index is an integer, got 0.0$",
    ),
    "a chunk as a truth value": (
        lambda b: b.send("a", GOOD, 5, chunk_index=False),
        ChunkIndexError,
        "^bridge 0, array 'a': chunk_index is an integer, got False$",
    ),
    "a slot of a chunk as a fraction": (
        lambda b: b.slot("halves", 5, chunk_index=1.0),  # type: ignore[arg-type]
        ChunkIndexError,
        "^bridge 0, array 'halves': chunk_index is an integer, got 1.0$",
    ),
    "a list of chunks": (
        lambda b: b.send("halves", GOOD, 5, chunk_index=[0, 1]),  # type: ignore[arg-type]
        ChunkIndexError,
        r"^bridge 0, array 'halves': chunk_index is an integer, got \[0, 1\]$",
    ),
    "a chunk far away": (
        lambda b: b.send("halves", GOOD, 5, chunk_index=-(2**70)),
        ChunkIndexError,
        f"^bridge 0 owns 2 chunks of array 'halves', there is no chunk {-(2**70)}$",
    ),
    "the least chunk": (
        lambda b: b.send("halves", GOOD, 5, chunk_index=-(2**63)),
        ChunkIndexError,
        f"there is no chunk {-(2**63)}$",
    ),
    "owns none": (lambda b: b.send("none", GOOD, 5), ChunkIndexError, "owns 0 chunks of array 'none'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused_and_nothing_is_lost(agent: Agent, bridge: Bridge, name: str) -> None:
    act, error, message = REFUSALS[name]
    for _ in range(4):  # more often than there are slots
        with pytest.raises(error, match=message):
            act(bridge)
    assert all(isinstance(event, OwnersPassed) and event.timestep == 4 for event in agent.events())
    bridge.send("unwanted", GOOD, 4)
    bridge.send("a", GOOD, 5)
    step = agent.wait(StepComplete)
    assert step.timestep == 5
    np.testing.assert_array_equal(agent.chunks(step)[0], GOOD)
    bridge.send("open", np.array([1, 2], "i8"), 5)
    assert agent.wait(StepComplete).array == "open"
    bridge.close(timestep=6)
    assert agent.wait(BridgeClosed).stats.chunks == 3


def test_several_chunks(agent: Agent, bridge: Bridge) -> None:
    bridge.send("halves", np.array([3.0, 4.0]), 4, chunk_index=1)
    with pytest.raises(DuplicateChunkError, match="chunk 1 of array 'halves' for timestep 4"):
        bridge.send("halves", np.array([3.0, 4.0]), 4, chunk_index=np.int8(1))  # type: ignore[arg-type]
    bridge.send("halves", np.array([1.0, 2.0]), 4, chunk_index=0)
    assert [chunk.tolist() for chunk in agent.chunks(agent.wait(StepComplete))] == [[1, 2], [3, 4]]


@pytest.mark.parametrize("chunk", [Exchanged((1, 0)), GOOD.tolist()], ids=lambda c: type(c).__name__)
def test_what_else_is_a_chunk(agent: Agent, bridge: Bridge, chunk: Any) -> None:
    bridge.send("a", chunk, 5)
    np.testing.assert_array_equal(agent.chunks(agent.wait(StepComplete))[0], GOOD)


@pytest.mark.parametrize("timestep", [np.int64(5), np.uint8(5), 5])
def test_timesteps_of_any_integer_kind(agent: Agent, bridge: Bridge, timestep: Any) -> None:
    bridge.send("a", GOOD, timestep)
    assert agent.wait(StepComplete).timestep == 5


def test_a_slot_begins_its_timestep(agent: Agent, bridge: Bridge) -> None:
    given = bridge.slot("a", 6)
    with pytest.raises(TimestepError, match="'unwanted': timestep 5 comes after timestep 6 of array 'a'"):
        bridge.send("unwanted", GOOD, 5)
    with pytest.raises(ChunkShapeError):
        bridge.send("a", GOOD.T, 6)
    given[...] = 8
    bridge.send("a", given, 6)
    assert agent.chunks(agent.wait(StepComplete))[0].tolist() == [[8.0] * 3] * 2


def test_nothing_after_close(agent: Agent, bridge: Bridge) -> None:
    assert repr(bridge) == "<Bridge 0 of 1, open, arrays: a, halves, none, open, unwanted, ghosts>"
    bridge.close()
    bridge.close()
    assert "closed" in repr(bridge)
    for act in (lambda: bridge.send("a", GOOD, 5), lambda: bridge.slot("a", 5)):
        with pytest.raises(ClosedError, match="bridge 0 is closed; nothing can be sent after close"):
            act()
    assert agent.wait(BridgeClosed).bridge_id == 0


def test_closing_at_an_older_timestep_only_warns(bridge: Bridge, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "deisa.ray.bridge"):
        bridge.close(timestep=2)
    assert "bridge 0 closes at timestep 2, having sent timestep 4" in caplog.text


def test_advance_says_that_nothing_older_comes(agent: Agent, bridge: Bridge) -> None:
    bridge.advance(9)
    while agent.wait(OwnersPassed).timestep < 9:
        pass
    with pytest.raises(TimestepError, match=r"array 'a': timestep 8 comes after timestep 9 of advance\(\);"):
        bridge.send("a", GOOD, 8)
    with pytest.raises(TimestepError, match=r"advance\(\): timestep 3 comes after"):
        bridge.advance(3)
    bridge.send("a", GOOD, 9)
    bridge.send("unwanted", GOOD, 10)
    with pytest.raises(TimestepError, match="timestep 9 comes after timestep 10 of array 'unwanted'"):
        bridge.advance(9)
    bridge.close()
    with pytest.raises(ClosedError):
        bridge.advance(10)


def test_a_bridge_is_not_for_another_process(bridge: Bridge) -> None:
    """As an argument of one that `multiprocessing` spawns, for example."""
    with pytest.raises(
        ForkedProcessError, match="bridge 0 belongs to this process and cannot be pickled; create a"
    ):
        pickle.dumps({"bridge": bridge})


def test_leaving_the_block_closes(agent: Agent, bridge: Bridge) -> None:
    with bridge as same:
        assert same is bridge
    assert agent.wait(BridgeClosed).stats.bytes_handed_over == 48


# Who is this bridge?


@dataclass(frozen=True)
class Comm:
    rank: int
    size: int

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.size


def test_identity_from_a_communicator(agent: Agent, client: Client) -> None:
    opening = agent.in_thread(client, Comm(0, 1), {"a": whole((2,))}, settings=agent.settings)
    joined = agent.wait(BridgeJoined)
    assert (joined.bridge_id, joined.world_size) == (0, 1)
    agent.start({})
    with opening.result(PATIENCE_S) as bridge:
        assert bridge.bridge_id == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ConfigurationError, "who is this bridge"),
        ({"bridge_id": 0}, ConfigurationError, "who is this bridge"),
        ({"comm": "world"}, ConfigurationError, "comm must have Get_rank.* got str"),
        ({"comm": Comm(1, 2), "bridge_id": 0}, BridgeIdError, "bridge_id is 0, but comm says rank 1"),
        ({"bridge_id": 0, "system_metadata": {}}, ConfigurationError, "must be a dict with 'world_size'"),
        ({"bridge_id": 0, "system_metadata": 4}, ConfigurationError, "must be a dict with 'world_size'"),
        ({"bridge_id": "0", "system_metadata": {"world_size": 1}}, ConfigurationError, "must be integers"),
        ({"bridge_id": 0, "system_metadata": {"world_size": 0}}, ConfigurationError, "world_size is 0"),
        ({"bridge_id": 2, "system_metadata": {"world_size": 2}}, BridgeIdError, r"2 lies outside 0\.\.1"),
        ({"comm": Comm(0, 1), "arrays_metadata": None}, DescriptionError, "arrays_metadata is missing"),
        (
            {"comm": Comm(0, 1), "arrays_metadata": {"a": {}}},
            DescriptionError,
            "'a': 'chunk_shape' is missing",
        ),
        ({"comm": Comm(0, 1), "session": "x y"}, ConfigurationError, "session name 'x y'"),
        (
            {"comm": Comm(0, 1), "session": "x", "settings": Settings(session="y")},
            ConfigurationError,
            "session='x', but settings.session is 'y'",
        ),
    ],
    ids=str,
)
def test_refused_before_anything_is_sent(
    client: Client, arguments: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEISA_RAY_CONNECT_TIMEOUT_S", "0.01")  # nobody is there to be told
    with pytest.raises(error, match=message):
        client(**{"arrays_metadata": {}, **arguments})
