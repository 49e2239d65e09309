"""A file that HDF5 changes in one step, whatever moment its writer is killed at."""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deisa.ray._files.journal import PAGE, GrowingFile, journal_of, recover

OLD = bytes(range(256)) * 40  # 2.5 pages

writes = st.lists(
    st.tuples(st.integers(0, len(OLD) + 2 * PAGE), st.binary(min_size=1, max_size=PAGE + 100)), max_size=8
)
ALL_IN_ONE_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@ALL_IN_ONE_FOLDER
@given(writes, st.booleans())
def test_it_is_a_file_like_any_other(tmp_path: Path, writes: list[tuple[int, bytes]], commits: bool) -> None:
    path = tmp_path / "file"
    path.write_bytes(OLD)
    file, plain = GrowingFile(path), io.BytesIO(OLD)
    for offset, data in writes:
        for one in (file, plain):
            one.seek(offset)
            assert one.write(data) == len(data)
        for start, size in ((0, 3 * len(OLD)), (max(0, offset - 10), len(data) + 20)):
            read = []
            for one in (file, plain):
                one.seek(start)
                read.append(one.read(size))
            assert read[0] == read[1]
        assert file.seek(0, os.SEEK_END) == len(plain.getvalue())
        assert path.read_bytes()[: len(OLD)] == OLD
    if commits:
        file.commit()
    file.close()
    assert path.read_bytes() == (plain.getvalue() if commits else OLD)
    assert list(tmp_path.iterdir()) == [path]


class KilledError(BaseException):
    pass


def dies_at(number: int, patch: pytest.MonkeyPatch) -> None:
    """Raise before the call of that number to the operating system; then nothing is cleared away."""
    calls = itertools.count()

    def dying(call: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                patch.setattr(GrowingFile, "close", lambda file: file._file.close())
                raise KilledError
            return call(*args, **kwargs)

        return wrapped

    for name in ("pwrite", "truncate"):
        patch.setattr(os, name, dying(getattr(os, name)))
    for name in ("replace", "write_bytes", "unlink"):
        patch.setattr(Path, name, dying(getattr(Path, name)))


def change(path: Path) -> None:
    file = GrowingFile(path)
    file.seek(100)
    file.write(b"new" * 2000)
    file.seek(len(OLD) - 3)
    file.write(b"end" * 10)
    file.commit()
    file.close()


def test_a_change_is_made_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before each of its calls to the operating system, and then recovered."""
    path = tmp_path / "whole"
    path.write_bytes(OLD)
    change(path)
    new = path.read_bytes()
    assert new != OLD
    outcomes = []
    for number in range(100):
        path = tmp_path / f"{number}" / "file"
        path.parent.mkdir()
        path.write_bytes(OLD)
        with monkeypatch.context() as patch:
            dies_at(number, patch)
            try:
                change(path)
                died = False
            except KilledError:
                died = True
        broken = path.read_bytes()
        assert broken[: len(OLD)] == OLD or broken == new or journal_of(path).exists()
        recover(path)
        outcomes.append(path.read_bytes())
        assert outcomes[-1] in (OLD, new)
        assert not journal_of(path).exists()
        if not died:
            break
    assert {*outcomes} == {OLD, new}
    assert outcomes == sorted(outcomes, key=lambda found: found == new)  # never back
    assert len(outcomes) > 8
