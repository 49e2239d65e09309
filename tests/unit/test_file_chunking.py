"""Which chunks an array gets in a file, and which timestep goes where in a series."""

from __future__ import annotations

import math
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deisa.ray._files import chunking
from deisa.ray._files.chunking import LARGEST_BYTES, chunk_shape, fits
from deisa.ray._files.continuing import Progress
from deisa.ray.errors import SaveFormatError, SaveOrderError

sizes = st.lists(st.integers(0, 60), min_size=1, max_size=5).filter(any)
blocks = st.lists(sizes, min_size=1, max_size=3)


def owners(blocks: list[int], chunk: int) -> list[set[int]]:
    """For each chunk along a dimension, the blocks that reach into it."""
    starts = list(accumulate(blocks, initial=0))
    return [
        {
            number
            for number, n in enumerate(blocks)
            if n and starts[number] < at + chunk and starts[number] + n > at
        }
        for at in range(0, sum(blocks), chunk)
    ]


@given(blocks, st.sampled_from([1, 8, 2**12, 2**20]))
def test_blocks_that_fit_share_no_chunk(blocks: list[list[int]], itemsize: int) -> None:
    chunks = chunk_shape(blocks, itemsize)
    assert all(chunk >= 1 for chunk in chunks)
    alone = all(
        len(of_chunk) <= 1
        for along, chunk in zip(blocks, chunks, strict=True)
        for of_chunk in owners(along, chunk)
    )
    if fits(blocks, chunks):
        assert alone


@pytest.mark.parametrize(
    ("blocks", "itemsize", "chunks", "fitting"),
    [
        ([(64, 64), (64, 64)], 8, (64, 64), True),
        ([(64, 64, 10)], 8, (64,), True),  # a short one at the end
        ([(2**17, 2**18, 2**17)], 8, (2**17,), True),
        ([(34, 33, 33), (8,)], 8, (34, 8), False),  # only 1 divides the borders
        ([(100,), (8,)], 8, (100, 8), True),
        ([(2**14, 2**14)], 2**20, (64,), True),  # 16 GiB each: cut
        ([(), ()], 8, (1, 1), True),
        ([(0,)], 8, (1,), True),
    ],
)
def test_chunks_of_common_layouts(
    blocks: list[tuple[int, ...]], itemsize: int, chunks: tuple[int, ...], fitting: bool
) -> None:
    assert chunk_shape(blocks, itemsize) == chunks
    assert fits(blocks, chunks) is fitting
    assert math.prod(chunks) * itemsize <= LARGEST_BYTES


def test_a_chunk_is_no_larger_than_a_reader_can_bear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "LARGEST_BYTES", 1000)
    assert chunk_shape([(97,), (97,)], 8) == (7, 13)
    assert fits([(97,), (97,)], (7, 13))


# Which timestep goes where.


class Series:
    """What a series would hold, by the plainest means."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int]] = []  # timestep, run

    def runs(self, timesteps: list[int], run: int) -> None:
        progress = Progress("out.zarr", [timestep for timestep, _ in self.entries])
        for timestep in timesteps:
            index = progress.place(timestep)
            self.entries[index:] = [(timestep, run)]
            progress.note(index, timestep)
        assert progress.stored == [timestep for timestep, _ in self.entries]


@given(st.lists(st.lists(st.integers(0, 20), unique=True, max_size=8).map(sorted), max_size=5))
def test_no_timestep_comes_twice_and_none_of_a_run_is_missing(runs: list[list[int]]) -> None:
    series = Series()
    for run, timesteps in enumerate(runs):
        before = list(series.entries)
        series.runs(timesteps, run)
        if timesteps:
            kept = [entry for entry in before if entry[0] < timesteps[0]]
            assert series.entries == [*kept, *((timestep, run) for timestep in timesteps)]


def test_a_run_does_not_go_back() -> None:
    progress = Progress("out.zarr", [0, 1, 2, 3])
    progress.note(progress.place(2), 2)
    progress.note(progress.place(4), 4)
    progress.note(progress.place(4), 4)  # the same again
    assert progress.stored == [0, 1, 2, 4]
    with pytest.raises(
        SaveOrderError, match=r"out.zarr: timestep 3 comes after timestep 4, which this run has saved"
    ):
        progress.place(3)
    assert progress.has_own(2)
    assert not progress.has_own(1)


def test_timesteps_that_are_no_series() -> None:
    with pytest.raises(SaveFormatError, match=r"not increasing, 3 comes before 3"):
        Progress("out.zarr", [1, 3, 3])
