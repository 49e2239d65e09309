"""The tree of errors is as drawn."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from deisa.ray import errors
from deisa.ray.errors import DeisaError, named_error

CLASSES = {
    name: cls for name, cls in vars(errors).items() if inspect.isclass(cls) and issubclass(cls, DeisaError)
}


def drawn() -> dict[str, tuple[str, ...]]:
    """Base classes of every error, from the drawing in the module's docstring."""
    bases: dict[str, tuple[str, ...]] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([│├└─ ]*)([A-Z]\w+Error)(?: \((\w+)\))?(?:\s|$)", line)
        if match is None:
            continue
        indent, name, beside = match.groups()
        depth = len(indent) // 4
        path[depth:] = [name]
        bases[name] = tuple(b for b in (path[depth - 1] if depth else "Exception", beside) if b)
    return bases


def test_the_drawing_shows_every_error() -> None:
    assert set(drawn()) == set(CLASSES)
    assert len(CLASSES) > 25


@pytest.mark.parametrize("name", CLASSES)
def test_bases_are_as_drawn(name: str) -> None:
    assert tuple(base.__name__ for base in CLASSES[name].__bases__) == drawn()[name]


@pytest.mark.parametrize("name", CLASSES)
def test_a_message_survives(name: str) -> None:
    error = CLASSES[name]('it\'s "broken"')
    assert str(error) == 'it\'s "broken"'
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), str(error))
    received = named_error(name, "as told")
    assert (type(received), str(received)) == (CLASSES[name], "as told")


@pytest.mark.parametrize("kind", ["NoSuchError", "annotations", "named_error", "", "Exception"])
def test_an_unknown_kind_is_still_an_error_of_ours(kind: str) -> None:
    error = named_error(kind, "text")
    assert type(error) is DeisaError
    assert str(error) == "text"
