"""Ghost cells around a chunk: what a description says of them, and that they stay in the rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._state.descriptions import describe_arrays
from deisa.ray._state.events import StepComplete
from deisa.ray._state.halos import Halo, read_halo
from deisa.ray.errors import ChunkShapeError, DescriptionError
from tests.unit.agent import Agent, running, whole

GHOST = -1.0


def widths_of(halo: Any, shape: tuple[int, ...] = (4, 5)) -> tuple[tuple[int, int], ...] | None:
    (described,) = describe_arrays({"a": whole(shape, halo=halo)})[0].chunks
    return None if described.halo is None else described.halo.widths


# Describing them.


@pytest.mark.parametrize(
    ("halo", "shape", "widths"),
    [
        (2, (4, 5), ((2, 2), (2, 2))),
        (np.int64(2), (4,), ((2, 2),)),
        (np.array(2), (4,), ((2, 2),)),
        ((1, 2), (4,), ((1, 2),)),
        ((1, 2), (4, 5, 6), ((1, 2),) * 3),
        ((1, 1), (4, 5), ((1, 1), (1, 1))),
        ((1, 0, 2), (4, 5, 6), ((1, 1), (0, 0), (2, 2))),
        ((3,), (4,), ((3, 3),)),
        (((1, 2), (3, 4)), (4, 5), ((1, 2), (3, 4))),
        (np.array([[1, 2], [3, 4]]), (4, 5), ((1, 2), (3, 4))),
        ([(1, 2), 3], (4, 5), ((1, 2), (3, 3))),
        (9, (1, 1), ((9, 9), (9, 9))),
        (None, (4, 5), None),
        (0, (4, 5), None),
        (((0, 0), 0), (4, 5), None),
        (1, (), None),
        ((), (), None),
    ],
    ids=str,
)
def test_ways_to_say_how_wide_it_is(halo: Any, shape: tuple[int, ...], widths: Any) -> None:
    assert widths_of(halo, shape) == widths


@pytest.mark.parametrize(
    ("halo", "message"),
    [
        (
            (1, 2),
            r"'halo' \(1, 2\) may mean two things in two dimensions; write \(\(1, 2\), \(1, 2\)\) for 1 before and 2 "
            r"after the chunk in both dimensions, or \(\(1, 1\), \(2, 2\)\) for 1 on both sides in the first and 2 in "
            "the second",
        ),
        ((1, 2, 3), r"'halo' \(1, 2, 3\) lists 3, but the chunk has 2 dimensions; give one width"),
        ((1,), "lists 1, but"),
        (((1, 1),), "lists 1, but"),
        ((), "lists 0, but"),
        (((1, 1), (1, 2, 3)), r"has \(1, 2, 3\) for one dimension; give one width"),
        (((1, 1), ()), r"has \(\) for one dimension"),
        (-1, "holds -1; ghost cells cannot be fewer than none"),
        (((0, -2), 0), "holds -2"),
        (1.0, "must hold integers, got 1.0; give one width for all sides"),
        ((1.0, 2.0), r"must hold integers, got \(1.0, 2.0\)"),
        ("11", "must hold integers, got '11'"),
        ({0: 1}, "must hold integers, got {0: 1}"),
        (({1, 2}, 1), "must hold integers"),
        (True, "holds True; give one width"),
        ((((1, 1), 1), 1), "must hold integers"),
        ((2**63 - 5, (0, 0)), f"has more than {2**63 - 1} elements along a dimension"),
    ],
    ids=str,
)
def test_refused(halo: Any, message: str) -> None:
    with pytest.raises(DescriptionError, match=f"^array 'a': .*{message}"):
        widths_of(halo)


@given(st.data())
def test_it_is_as_wide_as_numpy_pads(data: st.DataObject) -> None:
    """Whatever both take, they take for the same."""
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=4)))
    width = st.integers(0, 5)
    pairs = st.tuples(width, width)
    ways = width | pairs | st.tuples(*[pairs] * len(shape))
    said = data.draw(ways)
    try:
        halo = read_halo("a", said, shape)
    except DescriptionError as error:
        assert len(shape) == 2 and "may mean two things" in str(error)
        return
    local = np.pad(np.zeros(shape), said, constant_values=GHOST) if shape else np.zeros(())
    halo = halo or Halo(((0, 0),) * len(shape))
    assert halo.around(shape) == local.shape
    assert not local[halo.inside(shape)].any() and local[halo.inside(shape)].shape == shape


# Sending.

ORDERS: dict[str, Callable[[np.ndarray], Any]] = {
    "C": lambda local: np.array(local, order="C"),
    "Fortran": lambda local: np.array(local, order="F"),
    "backwards": lambda local: np.flip(np.flip(local).copy()),
    "strided": lambda local: np.stack([local, local], axis=-1)[..., 0],
    "part of another array": lambda local: np.pad(local, 3)[tuple([slice(3, -3)] * local.ndim)],
    "list": lambda local: local.tolist(),
    "DLPack": lambda local: Exchanged(local),
}
CASES: dict[str, tuple[tuple[int, ...], Any]] = {
    "one width": ((3, 4), 1),
    "uneven": ((3, 4), ((2, 0), (0, 3))),
    "larger than the chunk": ((2, 1), 5),
    "size 1": ((1, 1, 1), 1),
    "in one dimension of three": ((2, 3, 4), (0, 2, 0)),
    "before only": ((5,), (2, 0)),
    "none": ((3, 2), 0),
    "None": ((3, 2), None),
    "of a scalar": ((), 3),
}


class Exchanged:
    """What libraries show that know DLPack only."""

    def __init__(self, local: np.ndarray) -> None:
        self._local = np.asarray(local)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._local.__dlpack__(**kwargs)


def local_array(interior: np.ndarray, halo: Any) -> np.ndarray:
    """A chunk in the middle of ghost cells, as a simulation has it."""
    read = read_halo("a", halo, interior.shape)
    if read is None:
        return interior
    local = np.full(read.around(interior.shape), GHOST, interior.dtype)
    local[read.inside(interior.shape)] = interior
    return local


@pytest.mark.usefixtures("client")
def test_only_the_interior_is_handed_over() -> None:
    described = {name: whole(shape, halo=halo) for name, (shape, halo) in CASES.items()}
    with running() as agent:
        (bridge,) = agent.bridges(described, slots=dict.fromkeys(CASES, 2))
        nbytes = 0
        for timestep, (order, make) in enumerate(ORDERS.items()):
            for name, (shape, halo) in CASES.items():
                interior = np.arange(np.prod(shape, dtype=int), dtype=float).reshape(shape) + 1000 * timestep
                bridge.send(name, make(local_array(interior, halo)), timestep)
                step = agent.wait(StepComplete)
                np.testing.assert_array_equal(agent.chunks(step)[0], interior, f"{name}, {order}")
                agent.release((name, timestep))
                nbytes += interior.nbytes
        assert bridge.stats.bytes_handed_over == nbytes


@pytest.fixture
def agent() -> Iterator[Agent]:
    with running() as agent:
        yield agent


@pytest.mark.usefixtures("client")
def test_chunks_of_one_bridge_may_have_different_halos(agent: Agent) -> None:
    halos = [(0, 1), (2, 0)]
    halves = [
        whole((4,)) | {"chunk_shape": (2,), "offset": (2 * i,), "halo": halo} for i, halo in enumerate(halos)
    ]
    (bridge,) = agent.bridges({"a": halves}, slots={"a": 1})
    bridge.send("a", np.array([1, 2, GHOST]), 0, chunk_index=0)
    with pytest.raises(
        ChunkShapeError, match=r"chunk shape \(2,\) with halo \(\(2, 0\),\), so the local array .* got \(3,\)"
    ):
        bridge.send("a", np.array([1, 2, GHOST]), 0, chunk_index=1)
    bridge.send("a", np.array([GHOST, GHOST, 3, 4]), 0, chunk_index=1)
    assert [chunk.tolist() for chunk in agent.chunks(agent.wait(StepComplete))] == [[1, 2], [3, 4]]


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "with the chunk"])
def test_structured_elements(agent: Agent, declared: bool) -> None:
    """Sent with the fields in another order, too."""
    dtype = np.dtype([("n", "<i2"), ("x", "<f8")])
    said = dtype if declared else None
    (bridge,) = agent.bridges({"a": whole((2, 2), dtype=said, halo=1)}, slots={"a": 2}, a=said)
    local = np.zeros((4, 4), dtype)
    local["n"], local["x"] = 7, GHOST
    local["x"][1:-1, 1:-1] = [[1, 2], [3, 4]]
    bridge.send("a", local, 0)
    elsewhere = np.zeros((4, 4), {"names": ["n", "x"], "formats": ["<i2", "<f8"], "offsets": [8, 0]})
    elsewhere[...] = local
    bridge.send("a", elsewhere, 1)
    for _ in range(2):
        (chunk,) = agent.chunks(agent.wait(StepComplete))
        assert chunk.dtype == dtype
        assert chunk["x"].tolist() == [[1, 2], [3, 4]] and (chunk["n"] == 7).all()


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize("wanted", [True, False], ids=["wanted", "unwanted"])
def test_a_slot_has_no_halo(agent: Agent, wanted: bool) -> None:
    (bridge,) = agent.bridges({"a": whole((2, 3), halo=1)}, slots={"a": 3} if wanted else {})
    for timestep in (0, np.int64(1)):
        slot = bridge.slot("a", timestep)  # type: ignore[arg-type]
        assert slot.shape == (2, 3)
        slot[...] = 5
        bridge.send("a", slot, timestep)  # type: ignore[arg-type]
        if wanted:
            assert agent.chunks(agent.wait(StepComplete))[0].tolist() == [[5] * 3] * 2
    with pytest.raises(ChunkShapeError, match="without its halo"):
        bridge.send("a", bridge.slot("a", 2)[::-1], 2)
