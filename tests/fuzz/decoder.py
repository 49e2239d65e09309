"""Looks for bytes that crash the decoder of messages, guided by the lines that they make it run.

    python -m tests.fuzz.decoder [options of libFuzzer]
    python -m tests.fuzz.decoder build/crash-...

An input is taken as the body of a message and as a stream of frames. Only `ProtocolError` may come of it; what is
decoded can be encoded again to an equal message; and a stream says the same however it is cut into pieces. Inputs that
break one of these promises are written to ``build/``, and those that make the decoder run new lines to ``build/fuzz/``,
where the next run finds them. Half of the mutations change bytes; the other half replace, repeat and drop parts of what
the bytes mean.
"""

from __future__ import annotations

import dataclasses
import random
import struct
import sys
from pathlib import Path
from typing import Any

import atheris
import numpy as np

with atheris.instrument_imports(
    include=["deisa.ray._transport.codec", "deisa.ray._transport.messages", "deisa.ray._state.layout"]
):
    from deisa.ray._transport.messages import FrameBuffer, Message, decode, encode
    from tests.fuzz.seeds import DTYPES, SEEDS

from deisa.ray.errors import ProtocolError

CORPUS = Path("build/fuzz")


def check_body(body: bytes) -> None:
    """A body is a message that survives being sent on, or is refused."""
    try:
        message = decode(body)
    except ProtocolError:
        return
    again = decode(encode(message)[4:])
    if type(again) is not type(message) or again != message:
        raise AssertionError(f"{message} became {again}")


def said(pieces: list[bytes]) -> tuple[list[Message], str]:
    """Decode a stream, up to what is wrong with it."""
    frames = FrameBuffer()
    received: list[Message] = []
    try:
        for piece in pieces:
            for message in frames.feed(piece):
                received.append(message)
    except ProtocolError as error:
        return received, str(error)
    return received, ""


def check_stream(data: bytes) -> None:
    """However it is cut, a stream says the same."""
    at = sum(data) % (len(data) + 1)
    whole, cut = said([data]), said([data[:at], data[at:]])
    if whole != cut:
        raise AssertionError(f"cut at {at}, {whole} became {cut}")


def test_one_input(data: bytes) -> None:
    """What the fuzzer calls, again and again."""
    check_body(data)
    check_stream(data)


# Mutations of what the bytes mean.


def change(value: Any, source: random.Random) -> Any:
    """Return a value that differs in one place, somewhere inside; of the same type, so that it can be written."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        if not names:
            return source.choice(SEEDS)
        name = source.choice(names)
        return dataclasses.replace(value, **{name: change(getattr(value, name), source)})
    if isinstance(value, tuple):
        items = list(value)
        at = source.randrange(len(items)) if items else 0
        match source.randrange(8):
            case 0:
                del items[at : at + 1]
            case 1:
                items[at:at] = items[at : at + 1] * source.choice([1, 2, 100])
            case _:
                items[at : at + 1] = [change(item, source) for item in items[at : at + 1]]
        return tuple(items)
    if isinstance(value, dict):
        return {change(key, source): change(item, source) for key, item in value.items()}
    if isinstance(value, np.dtype):
        return source.choice(DTYPES)
    if isinstance(value, str):
        return source.choice(["", "\0", value * 2, value[:-1], "x" * 3000, "\N{SNOWMAN}"])
    if isinstance(value, float):
        return source.choice([0.0, -1.0, float("nan"), float("inf")])
    if isinstance(value, int):
        return source.choice([-1, 0, 1, value - 1, value + 1, 2**63 - 1, -(2**63), source.getrandbits(62)])
    return value


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change the meaning of an input, where it has one; else its bytes."""
    source = random.Random(seed)
    framed = source.random() < 0.5
    if source.random() < 0.5:
        try:
            changed = encode(change(decode(data[4:] if framed else data), source))
        except (ProtocolError, ValueError, TypeError, struct.error):  # it means nothing, or cannot be written
            return atheris.Mutate(data, max_size)
        changed = changed if framed else changed[4:]
        if len(changed) <= max_size:
            return changed
    return atheris.Mutate(data, max_size)


def main() -> None:
    """Fuzz, starting from one valid message of each kind and what earlier runs have found; or try the inputs named."""
    inputs = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    if not inputs:
        CORPUS.mkdir(parents=True, exist_ok=True)
        for number, message in enumerate(SEEDS):
            (CORPUS / f"{number}-body").write_bytes(encode(message)[4:])
            (CORPUS / f"{number}-frame").write_bytes(encode(message))
        (CORPUS / "stream").write_bytes(b"".join(map(encode, SEEDS)))
        inputs = [str(CORPUS)]
    options = [argument for argument in sys.argv[1:] if argument.startswith("-")]
    failures = f"-artifact_prefix={CORPUS.parent}/"
    atheris.Setup([sys.argv[0], failures, *options, *inputs], test_one_input, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
