"""Labels: what one bridge says, and what all of them together say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._state.agreement import Labels
from deisa.ray._state.descriptions import describe_arrays
from deisa.ray._state.labels import MAX_ATTRS_BYTES, even_values
from deisa.ray._state.layout import resolve_layout
from deisa.ray._state.values import decode_value
from deisa.ray.errors import DescriptionError, DescriptionMismatchError

X = np.linspace(0.0, 1.0, 8)
DATES = np.datetime64("2020-02-28", "h") + np.arange(8) * np.timedelta64(6, "h")


def chunk(bridge: int, **labels: Any) -> dict[str, Any]:
    """Two bridges with four columns each of an array of shape (3, 8)."""
    return {
        "global_shape": (3, 8),
        "chunk_shape": (3, 4),
        "offset": (0, 4 * bridge),
        "dims": ("y", "x"),
        **labels,
    }


def resolve(*bridges: Any) -> Labels:
    return resolve_layout({b: describe_arrays({"a": said}) for b, said in enumerate(bridges)})["a"].labels


def values_of(labels: Labels) -> dict[str, list[Any]]:
    return {c.name: c.values.tolist() for c in labels.coords}


def own(bridge: int, values: np.ndarray) -> np.ndarray:
    return values[4 * bridge : 4 * bridge + 4]


# What all say is joined.


@pytest.mark.parametrize(
    "said",
    [
        lambda b: {"x": own(b, X)},
        lambda b: {"x": X},
        lambda b: {"x": list(own(b, X))},
        lambda b: {"x": ("x", X)},
        lambda b: {"x": (["x"], own(b, X), {})},
        lambda b: {"x": X} if b else {"x": own(b, X)},
        lambda b: {} if b else {"x": X},
    ],
)
def test_a_coordinate_has_the_values_of_all_bridges(said: Any) -> None:
    labels = resolve(*(chunk(b, coords=said(b)) for b in range(2)))
    assert labels.dims == ("y", "x")
    assert values_of(labels) == {"x": X.tolist()}


def test_equal_steps_count_from_the_start_of_the_whole_array() -> None:
    labels = resolve(
        *(chunk(b, coords={"x": {"start": 2, "step": 3}, "y": {"start": 0.5, "step": -1}}) for b in range(2))
    )
    assert values_of(labels) == {"y": [0.5, -0.5, -1.5], "x": [2, 5, 8, 11, 14, 17, 20, 23]}
    assert [c.values.dtype.kind for c in labels.coords] == ["f", "i"]


def test_values_and_equal_steps_may_say_the_same() -> None:
    labels = resolve(
        chunk(0, coords={"x": np.arange(4) * 0.5}), chunk(1, coords={"x": {"start": 0, "step": 0.5}})
    )
    assert values_of(labels) == {"x": (np.arange(8) * 0.5).tolist()}


@pytest.mark.parametrize(
    "values",
    [
        X,
        X.astype("f4"),
        np.arange(8),
        DATES,
        DATES - DATES[0],
        np.array(list("abcdefgh")),
        X > 0.5,
        np.array([b"ab"] * 8),
    ],
    ids=lambda values: str(values.dtype),
)
def test_values_may_be_of_many_kinds(values: np.ndarray) -> None:
    (coordinate,) = resolve(*(chunk(b, coords={"x": own(b, values)}) for b in range(2))).coords
    assert coordinate.values.dtype == values.dtype
    np.testing.assert_array_equal(coordinate.values, values)
    with pytest.raises(ValueError, match="read-only"):
        coordinate.values[0] = coordinate.values[1]  # all timesteps share it


def test_numbers_and_texts_of_several_sizes_are_joined() -> None:
    labels = resolve(
        chunk(0, coords={"x": [0, 1, 2, 3], "name": ("x", list("abcd"))}),
        chunk(1, coords={"x": [4.5, 5, 6, 7], "name": ("x", ["long", "er", "", "é"])}),
    )
    assert values_of(labels) == {"x": [0, 1, 2, 3, 4.5, 5, 6, 7], "name": [*"abcd", "long", "er", "", "é"]}


def test_dates_with_equal_steps() -> None:
    steps = {"start": DATES[0], "step": np.timedelta64(6, "h")}
    assert values_of(resolve(*(chunk(b, coords={"x": steps}) for b in range(2)))) == {"x": DATES.tolist()}


def test_several_coordinates_along_one_dimension_with_attributes() -> None:
    names = [f"station {n}" for n in range(8)]
    labels = resolve(
        chunk(0, coords={"x": ("x", X, {"units": "m"}), "station": ("x", names)}),
        chunk(1, coords={"station": ("x", names, {"long_name": "weather station"})}),
    )
    assert [(c.name, c.dim, dict(c.attrs)) for c in labels.coords] == [
        ("x", "x", {"units": "m"}),
        ("station", "x", {"long_name": "weather station"}),
    ]


def test_a_bridge_that_says_nothing_takes_what_the_others_say() -> None:
    silent = {key: value for key, value in chunk(0).items() if key != "dims"}
    said = chunk(1, coords={"y": [1, 2, 3]}, attrs={"units": "K"})
    for bridges in ((silent, said), (chunk(0, attrs={"long_name": "air"}), said)):
        labels = resolve(*bridges)
        assert labels.dims == ("y", "x") and values_of(labels) == {"y": [1, 2, 3]}
        assert labels.attrs["units"] == "K"
    assert dict(labels.attrs) == {"long_name": "air", "units": "K"}


def test_without_labels_there_are_none() -> None:
    labels = resolve(*({"global_shape": (8,), "chunk_shape": (4,), "offset": (4 * b,)} for b in range(2)))
    assert (labels.dims, labels.coords, dict(labels.attrs)) == (None, (), {})


def test_attributes_need_no_dimensions_with_names() -> None:
    attrs = {
        "units": "K",
        "valid_range": np.array([0.0, 400.0]),
        "flags": ["a", 1, None],
        "origin": {"x": 1.5},
    }
    labels = resolve({"global_shape": (4,), "chunk_shape": (4,), "offset": (0,), "attrs": attrs})
    assert labels.dims is None
    assert str(dict(labels.attrs)) == str(attrs)


def test_chunks_of_one_bridge_say_it_together() -> None:
    labels = resolve(
        [chunk(0, coords={"x": own(0, X)}, attrs={"a": 1}), chunk(1, coords={"x": own(1, X)}, attrs={"b": 2})]
    )
    assert values_of(labels) == {"x": X.tolist()}
    assert dict(labels.attrs) == {"a": 1, "b": 2}


def test_labels_of_a_part() -> None:
    labels = resolve(*(chunk(b, coords={"x": X}, attrs={"units": "K"}) for b in range(2)))
    part = labels.part((slice(None), slice(1, 7, 3)))
    assert values_of(part) == {"x": [X[1], X[4]]}
    assert part.dims == ("y", "x") and dict(part.attrs) == {"units": "K"}


# A bridge passes on no more of a coordinate than it has to.


def passed_on(description: dict[str, Any]) -> np.ndarray:
    (array,) = describe_arrays({"a": description})
    values: np.ndarray = decode_value(array.chunks[0].coords[0].values)
    return values


def test_of_a_whole_coordinate_only_the_part_of_the_chunk_is_passed_on() -> None:
    whole = np.arange(10_000.0)
    for place in (
        {"offset": (200,), "global_shape": (10_000,)},
        {"chunk_position": (2,), "nb_chunks_per_dim": (100,)},
        {"chunk_position": (2,), "nb_chunks_per_dim": (100,), "global_shape": (10_000,)},
        {"chunk_position": (2,), "global_shape": (10_000,)},
    ):
        part = passed_on({"chunk_shape": (100,), "dims": ["x"], "coords": {"x": whole}, **place})
        assert part.tolist() == whole[200:300].tolist()


@given(st.data())
def test_a_whole_coordinate_is_the_same_however_the_chunks_lie(data: st.DataObject) -> None:
    """Also where a bridge knows its chunk's position only, and chunks are of any sizes."""
    sizes = data.draw(
        st.one_of(
            st.lists(st.integers(1, 700), min_size=1, max_size=5),
            st.tuples(st.integers(1, 5), st.integers(5, 3000)).map(
                lambda n: [len(p) for p in np.array_split(np.arange(n[1]), n[0])]
            ),
        )
    )
    length, count = sum(sizes), len(sizes)
    whole = np.arange(length) * 0.1
    says = [data.draw(st.booleans()) for _ in range(2)]
    bridges = [
        {
            "chunk_shape": (size,),
            "chunk_position": (position,),
            **({"nb_chunks_per_dim": (count,)} if says[0] else {}),
            **({"global_shape": (length,)} if says[1] or not says[0] else {}),
            "dims": "x",
            "coords": {"x": whole},
        }
        for position, size in enumerate(sizes)
    ]
    assert values_of(resolve(*bridges)) == {"x": whole.tolist()}
    wrong = bridges[-1] | {"coords": {"x": whole + 1e-9}}
    if count > 1:
        with pytest.raises(DescriptionMismatchError, match="differs between bridges at position"):
            resolve(*bridges[:-1], wrong)


def test_a_value_with_equal_steps_is_passed_on_as_such() -> None:
    assert passed_on(chunk(0, coords={"x": {"start": 0, "step": 1}})) == {"start": 0, "step": 1}


# What one bridge can say wrongly.


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"dims": ("x",)}, r"'dims' \('x',\) has 1 names, 'chunk_shape' has 2 dimensions"),
        ({"dims": ("x", "x")}, "names two dimensions alike"),
        ({"dims": "yx"}, "'dims' must be a list of names, got 'yx'"),
        ({"dims": ("y", "")}, "'dims' must be non-empty strings"),
        ({"dims": ("y", 3)}, "'dims' must be non-empty strings"),
        ({"dims": ("y", "time")}, "'dims' cannot be called 'time'"),
        ({"coords": {"timestep": ("x", X)}}, "a coordinate cannot be called 'timestep'"),
        ({"dims": None, "coords": {"x": X}}, "'coords' needs 'dims'"),
        ({"coords": [X]}, "'coords' must map names to values, got list"),
        ({"coords": {"z": X}}, "coordinate 'z': no dimension has this name.*as in 'z': \\('y', values\\)"),
        ({"coords": {"z": ("w", X)}}, "there is no dimension 'w', the dimensions are 'y', 'x'"),
        ({"coords": {"y": ("x", X)}}, "lies along it, not along 'x'"),
        ({"coords": {"z": (("y", "x"), X)}}, "lies along one dimension"),
        ({"coords": {"z": ("x",)}}, "give \\(dimension, values\\) or"),
        ({"coords": {"x": X[:5]}}, "has 5 values; the chunk has 4 elements along 'x', and the whole array 8"),
        ({"coords": {"x": np.zeros((4, 2))}}, "values must have one dimension, got shape \\(4, 2\\)"),
        ({"coords": {"x": 1.5}}, "values must have one dimension, got shape \\(\\)"),
        ({"coords": {"x": [object()] * 4}}, "values must be numbers.*for dates.*got dtype object"),
        ({"coords": {"x": [[1], [2, 3]]}}, "coordinate 'x'"),
        ({"coords": {"x": np.ma.masked_array(X)}}, "filled"),
        ({"coords": {"x": {"start": 1}}}, "got the keys 'start'"),
        ({"coords": {"x": {"start": 1, "step": np.nan}}}, "'step' must be a finite number, got nan"),
        ({"coords": {"x": {"start": "1", "step": 1}}}, "'start' must be a finite number, got '1'"),
        ({"coords": {"x": {"start": True, "step": 1}}}, "'start' must be a finite number"),
        ({"coords": {"x": {"start": 2**63 - 1, "step": 1}}}, "cannot be added"),
        ({"coords": {"x": ("x", X, {"a": object()})}}, "coordinate 'x': attributes: 'a': object is not supported"),
        ({"attrs": ["K"]}, "'attrs' must map names to values"),
        ({"attrs": {"units": {1, 2}}}, "'attrs': 'units': set is not supported"),
        ({"attrs": {3: 1}}, "'attrs': names must be non-empty strings"),
        ({"attrs": {"a": bytes(MAX_ATTRS_BYTES)}}, "send what is large as an array"),
    ],
)  # fmt: skip
def test_a_bridge_that_says_it_wrongly_is_told(labels: dict[str, Any], says: str) -> None:
    with pytest.raises(DescriptionError, match=f"array 'a'.*{says}"):
        describe_arrays({"a": chunk(0, **labels)})


def test_chunks_of_one_bridge_that_disagree() -> None:
    with pytest.raises(DescriptionError, match="two chunks of one bridge disagree on 'dims'"):
        describe_arrays({"a": [chunk(0), chunk(1, dims=("u", "v"))]})
    with pytest.raises(DescriptionError, match="disagree on the attribute 'units': 'K' and 'C'"):
        describe_arrays({"a": [chunk(0, attrs={"units": "K"}), chunk(1, attrs={"units": "C"})]})


# What bridges can say differently.


@pytest.mark.parametrize(
    ("one", "other", "says"),
    [
        ({}, {"dims": ("y", "z")},
         r"the 'dims' differ between bridges: bridge 0: \('y', 'x'\); bridge 1: \('y', 'z'\)"),
        ({"attrs": {"units": "K"}}, {"attrs": {"units": "C"}},
         "the attribute 'units' differs between bridges: bridge 0: 'K'; bridge 1: 'C'"),
        ({"coords": {"y": [0, 1, 2]}}, {"coords": {"y": [0, 1.5, 2.5]}},
         "coordinate 'y' along 'y' differs between bridges at position 1: bridge 0: 1.0; bridge 1: 1.5"),
        ({"coords": {"x": X}}, {"coords": {"x": {"start": 0, "step": 0.5}}},
         "coordinate 'x' along 'x' differs between bridges at position 1: bridge 0: 0.142857142"),
        ({"coords": {"x": {"start": 0, "step": 1}}}, {"coords": {"x": {"start": 0, "step": 2}}},
         "at position 1: bridge 0: 1; bridge 1: 2"),
        ({"coords": {"y": DATES[:3]}}, {"coords": {"y": DATES[1:4]}},
         "at position 0: bridge 0: 2020-02-28T00; bridge 1: 2020-02-28T06"),
        ({"coords": {"x": own(0, X)}}, {"coords": {"x": list("efgh")}},
         "values of different kinds: bridge 0: dtype float64; bridge 1: dtype <U1"),
        ({"coords": {"z": ("x", own(0, X))}}, {"coords": {"z": ("y", [1, 2, 3])}},
         "coordinate 'z' lies along different dimensions: bridge 0: 'x'; bridge 1: 'y'"),
        ({"coords": {"x": ("x", X, {"units": "m"})}}, {"coords": {"x": ("x", X, {"units": "km"})}},
         "coordinate 'x': the attribute 'units' differs between bridges: bridge 0: 'm'; bridge 1: 'km'"),
    ],
)  # fmt: skip
def test_bridges_that_disagree_are_named(one: Any, other: Any, says: str) -> None:
    with pytest.raises(DescriptionMismatchError, match=f"array 'a': .*{says}"):
        resolve(chunk(0, **one), chunk(1, **other))


def test_values_that_nobody_gives_are_named() -> None:
    says = "coordinate 'x': no bridge gives the values at positions 4 to 7 of 8 along 'x', where bridge 1 has a chunk"
    with pytest.raises(DescriptionError, match=says):
        resolve(chunk(0, coords={"x": own(0, X)}), chunk(1))


def test_a_whole_coordinate_of_another_length_than_the_array() -> None:
    def bridge(position: int, length: int) -> dict[str, Any]:
        place = {"chunk_shape": (4,), "chunk_position": (position,), "nb_chunks_per_dim": (2,)}
        return {**place, "dims": "x", "coords": {"x": np.arange(length)}}

    with pytest.raises(
        DescriptionMismatchError, match="bridge 1 gives 9 values for the whole array, which has 8"
    ):
        resolve(bridge(0, 8), bridge(1, 9))


def test_not_a_number_agrees_with_itself() -> None:
    values = np.array([np.nan, 1.0, 2.0])
    labels = resolve(*(chunk(b, coords={"y": values}) for b in range(2)))
    np.testing.assert_array_equal(labels.coords[0].values, values)


@pytest.mark.parametrize(
    ("start", "step"),
    [(2**62, 2**62), (0.0, 1e308), (np.datetime64(2**62, "ns"), np.timedelta64(2**62, "ns"))],
)
def test_steps_beyond_what_a_number_can_be_are_refused(start: Any, step: Any) -> None:
    assert len(even_values(start, step, 1)) == 1
    with pytest.raises(OverflowError, match="too large"):
        even_values(start, step, 4)
