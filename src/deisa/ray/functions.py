"""Functions that a script registers: what may be one, and how windows reach it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from deisa.ray.errors import RegistrationError
from deisa.ray.types import DeisaArray, Timesteps

_NEVER_RUN: tuple[tuple[Callable[[Any], bool], str], ...] = (
    (inspect.iscoroutinefunction, "a coroutine function (async def)"),
    (inspect.isasyncgenfunction, "an asynchronous generator function"),
    (inspect.isgeneratorfunction, "a generator function (it has yield)"),
)
_NAMED = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, or what stands for it."""
    return getattr(function, "__name__", None) or repr(function)


def values_of(function: FunctionType) -> list[int]:
    """What a function has of the place where it was made, by identity: its defaults, and what it refers to there."""
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            values.append(cell.cell_contents)
    return [id(value) for value in values]


def check_runs(function: Any, role: str) -> None:
    """Check that calling a function runs it.

    Raises
    ------
    RegistrationError
    """
    if not callable(function):
        raise RegistrationError(f"{role} must be callable, got {function!r}")
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if isinstance(inner, type):
        raise RegistrationError(
            f"{role} {inner.__name__!r} is a class, and calling it only makes an instance; give a function, a method "
            f"of an instance, or an instance that can be called: {inner.__name__}(...)"
        )
    called = inner if inspect.isroutine(inner) else type(inner).__call__
    for is_one, what in _NEVER_RUN:
        if is_one(inner) or is_one(called):
            raise RegistrationError(
                f"{role} {name_of(function)!r} is {what}: calling it would run nothing of it; make it a plain function"
            )


def check_has_run(returned: Any, name: str) -> None:
    """Check that a function did not return something which would still have to be run.

    Raises
    ------
    RegistrationError
    """
    if inspect.iscoroutine(returned) or inspect.isgenerator(returned) or inspect.isasyncgen(returned):
        if inspect.iscoroutine(returned):
            returned.close()  # lest Python warns that nobody awaited it
        raise RegistrationError(
            f"{name!r} returned {returned!r}, which nobody runs; it must do its work itself, as a plain function does"
        )


def check_takes_one(handler: Callable[..., Any]) -> None:
    """Check that an exception handler takes one argument.

    Raises
    ------
    RegistrationError
    """
    signature = _signature(handler)
    try:
        if signature is not None:
            signature.bind(None)
    except TypeError as exc:
        raise RegistrationError(
            f"exception_handler {name_of(handler)!r} takes {signature}, but is called with one argument, "
            f"the exception ({exc})"
        ) from exc


@dataclass(frozen=True, slots=True)
class Binding:
    """A function, and how it takes windows.

    Attributes
    ----------
    function : callable
    arrays : tuple of str
        The array of each window, in the order of the windows.
    by_name : bool
        Whether it takes its windows by the names of their arrays.
    called : tuple of str
        What the function calls each window.
    """

    function: Callable[..., Any]
    arrays: tuple[str, ...]
    by_name: bool
    called: tuple[str, ...]

    @classmethod
    def of(cls, function: Any, arrays: Sequence[str], role: str) -> Binding:
        """Check whether a function can be called on windows of arrays, and how.

        Raises
        ------
        RegistrationError
        """
        check_runs(function, role)
        by_name, called = _bind(function, arrays, role)
        return cls(function, tuple(arrays), by_name, called)

    @property
    def name(self) -> str:
        """The function's name."""
        return name_of(self.function)

    def call(self, windows: Sequence[Sequence[DeisaArray]]) -> Any:
        """Call the function.

        It gets copies: what it assigns to an array of its own shows nowhere else, nor at the next timestep.
        """
        arguments = [
            Timesteps([array.copy() for array in window], name)
            for window, name in zip(windows, self.called, strict=True)
        ]
        if self.by_name:
            returned = self.function(**dict(zip(self.arrays, arguments, strict=True)))
        else:
            returned = self.function(*arguments)
        check_has_run(returned, self.name)
        return returned


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """The parameters of a function, where Python knows them: not of some builtins."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def _bind(function: Callable[..., Any], names: Sequence[str], role: str) -> tuple[bool, tuple[str, ...]]:
    """Whether a function takes its windows by the names of their arrays, and what it calls each of them."""
    called = tuple(name if name.isidentifier() else "window" for name in names)
    signature = _signature(function)
    if signature is None:
        return False, called
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    named = {p.name for p in signature.parameters.values() if p.kind in _NAMED}
    by_name = set(names) <= named or (
        inspect.Parameter.VAR_KEYWORD in kinds
        and inspect.Parameter.VAR_POSITIONAL not in kinds
        and _takes_names(signature, names)
    )
    try:
        if by_name:
            signature.bind(**dict.fromkeys(names))
            return True, called
        bound = signature.bind(*names)
    except TypeError as exc:
        raise RegistrationError(
            f"{role} {name_of(function)!r} takes {signature}, but is registered on "
            f"{len(names)} windows: {', '.join(names)} ({exc})"
        ) from exc
    given = {parameter: name for parameter, name in bound.arguments.items() if isinstance(name, str)}
    for parameter, name in given.items():
        if parameter in names and parameter != name:
            raise RegistrationError(
                f"{role} {name_of(function)!r} takes {signature}: not every array has a parameter of its name, so "
                f"that windows {', '.join(names)} go by position, and {parameter!r} would get array {name!r}; name all "
                "parameters after the arrays, or none"
            )
    by_array = {name: parameter for parameter, name in given.items()}
    return False, tuple(by_array.get(name, what) for name, what in zip(names, called, strict=True))


def _takes_names(signature: inspect.Signature, names: Sequence[str]) -> bool:
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError:
        return False
    return True
