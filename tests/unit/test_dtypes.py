"""Which dtypes can be sent, and that what errors advise does what they say."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
import numpy.lib.recfunctions
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._state.descriptions import describe_arrays
from deisa.ray._state.dtypes import conversion, packed, same_values, shareable
from deisa.ray._state.events import StepComplete
from deisa.ray.errors import ChunkDtypeError, DescriptionError
from tests.unit.agent import PATIENCE_S, running, whole

PARTICLES = np.array(
    [(1, 0.5, 2.5, "a"), (2, 1.5, 3.5, "b")], [("id", "i4"), ("x", "f8"), ("y", "f4"), ("kind", "S1")]
)
PICKED = {
    "in order": ["id", "x"],
    "with a gap": ["id", "y"],
    "one": ["y"],
    "out of order": ["x", "id"],
    "all, backwards": ["kind", "y", "x", "id"],
}
WITH_METADATA = {
    "text": np.array([b"ab", b"c"], h5py.string_dtype(length=5)),
    "enum": np.array([0, 1], h5py.enum_dtype({"cold": 0, "hot": 1}, basetype="i4")),
    "own": np.array([1.0, 2.0], np.dtype("f8", metadata={"unit": "K"})),
    "in a field": np.array([(1, b"x")], [("id", "i8"), ("name", h5py.string_dtype(length=3))]),
    "in a subarray": np.zeros(2, [("v", (np.dtype(">f4", metadata={"unit": "m/s"}), (3,)))]),
    "fields picked, out of order": np.zeros(2, [("a", "i4"), ("b", np.dtype("f8", metadata={"c": 1}))])[
        ["b", "a"]
    ],
}


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "declared late"])
@pytest.mark.parametrize("sent", [*(PARTICLES[names] for names in PICKED.values()), *WITH_METADATA.values()],
                         ids=[*PICKED, *WITH_METADATA])  # fmt: skip
@pytest.mark.usefixtures("client")
def test_it_arrives(sent: np.ndarray, declared: bool) -> None:
    with running() as agent, warnings.catch_warnings():
        warnings.simplefilter("error")
        dtype = sent.dtype if declared else None
        opening = agent.connect({"a": whole(sent.shape, dtype=dtype)})
        agent.start({"a": 2}, a=shareable("a", sent.dtype) if declared else None)
        (bridge,) = [future.result(PATIENCE_S) for future in opening]
        for t in range(2):
            bridge.send("a", sent, t)
            (chunk,) = agent.chunks(agent.wait(StepComplete))
            assert repr(chunk.tolist()) == repr(sent.tolist())  # fields may be arrays
            assert chunk.dtype.names == sent.dtype.names
            assert chunk.dtype.metadata is None


def test_the_fields_of_another_layout_are_the_same_values() -> None:
    with running() as agent:
        picked = PARTICLES[["id", "y"]]
        (bridge,) = agent.bridges(
            {"a": whole((2,), dtype=packed(picked.dtype))}, slots={"a": 1}, a=packed(picked.dtype)
        )
        bridge.send("a", picked, 0)
        assert agent.chunks(agent.wait(StepComplete))[0].tolist() == [(1, 2.5), (2, 3.5)]


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (h5py.string_dtype(), r"h5py.string_dtype\(length=n\)"),
        (h5py.vlen_dtype("f8"), "cannot be shared; use one of NumPy's own with a fixed size"),
        (h5py.ref_dtype, "cannot be shared"),
        (np.dtype([("id", "i4"), ("name", h5py.string_dtype())]), "cannot be shared"),
        ([("a", "f8"), ("a", "f4")], "is not a NumPy dtype"),
    ],
    ids=["vlen text", "vlen", "reference", "in a field", "the same name twice"],
)
def test_what_has_no_size_is_refused(dtype: Any, advice: str) -> None:
    with pytest.raises(DescriptionError, match=advice):
        describe_arrays({"a": whole((2,), dtype=dtype)})


FIELDS = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True)
SCALARS = st.sampled_from(["i1", "<f4", ">f8", "S3", "U2", "M8[s]", "c8"])


@given(st.data())
def test_any_fields_of_any_dtype(data: st.DataObject) -> None:
    names = data.draw(FIELDS)
    whole_dtype = np.dtype([(name, data.draw(SCALARS)) for name in names], align=data.draw(st.booleans()))
    picked = np.zeros(1, whole_dtype)[
        data.draw(st.permutations(names).map(lambda p: p[: len(p) // 2 + 1]))
    ].dtype
    shared = shareable("a", picked)
    assert same_values(shared, picked)
    assert shareable("a", shared) == shared
    assert packed(shared) == packed(picked)


class Tensor:
    """Has no method of NumPy's."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.data


class Exchanged:
    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **named: Any) -> Any:
        return self.data.__dlpack__(**named)


SAME: Callable[[np.ndarray], Any] = lambda data: data  # noqa: E731
CONVERSIONS: list[tuple[np.ndarray, Any, Callable[[np.ndarray], Any], Any]] = [
    (np.array([1, 2]), "f8", SAME, [1.0, 2.0]),
    (np.array([1.0, 2.0]), ">f4", SAME, [1.0, 2.0]),
    (np.array([1.0, 2.0]), "f4", np.ndarray.tolist, [1.0, 2.0]),
    (np.array([1.0, 2.0]), "f4", Tensor, [1.0, 2.0]),
    (np.array([1.0, 2.0]), "f4", Exchanged, [1.0, 2.0]),
    (np.array([1 + 2j, 3]), "f8", SAME, [1.0, 3.0]),
    (np.array([1 + 2j, 3]), "f4", SAME, [1.0, 3.0]),
    (np.array(["2020-01-01"], "M8[D]"), "M8[s]", SAME, np.array(["2020-01-01"], "M8[s]").tolist()),
    (np.array([b"a"], "S1"), "S4", SAME, [b"a"]),
    (PARTICLES, [("x", "f8"), ("id", "i4")], SAME, [(0.5, 1), (1.5, 2)]),
    (PARTICLES[["x", "id"]], [("id", "i8"), ("x", "f4")], SAME, [(1, 0.5), (2, 1.5)]),
    (PARTICLES, "f8", SAME, [0.5, 1.5]),
    (PARTICLES, "f2", SAME, [1.0, 2.0]),
]


@pytest.mark.parametrize(("data", "wanted", "given", "expected"), CONVERSIONS, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("late", [False, True], ids=["declared", "by others"])
def test_what_the_error_says_to_send_is_right(
    data: np.ndarray, wanted: Any, given: Callable[[np.ndarray], Any], expected: Any, late: bool
) -> None:
    chunk = given(data)
    with running() as agent, warnings.catch_warnings():
        warnings.simplefilter("error")
        said = [{"a": [whole((n,), dtype=wanted)]} for n in (len(expected),)]
        if late:
            size = (2 * len(expected),)
            said = [
                {
                    "a": whole(size, dtype=d)
                    | {"chunk_shape": (len(expected),), "offset": (i * len(expected),)}
                }
                for i, d in enumerate([wanted, None])
            ]
        bridges = agent.bridges(*said, slots={"a": 1}, a=wanted)
        with pytest.raises(ChunkDtypeError) as caught:
            bridges[-1].send("a", chunk, 0)
        advice = str(caught.value).split("; send ")[1].removesuffix(" or declare the other dtype")
        bridges[-1].send("a", eval(advice, {"np": np, "numpy": np, "chunk": chunk}), 0)
        for bridge in bridges[:-1]:
            bridge.send("a", np.zeros(len(expected), wanted), 0)
        assert expected in [chunk.tolist() for chunk in agent.chunks(agent.wait(StepComplete))]


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (np.array(["one"]), "f8"),
        (np.zeros(1), [("x", "f8")]),
        (PARTICLES, [("z", "f8")]),
        (PARTICLES[["kind"]], "f8"),
    ],
    ids=["text", "no fields", "other fields", "a field of text"],
)
def test_no_advice_where_there_is_none(data: np.ndarray, wanted: Any) -> None:
    assert conversion(data, data, np.dtype(wanted)) == ""
