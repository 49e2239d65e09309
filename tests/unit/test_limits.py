"""What ranks may touch under the memory limits of their control groups, of either version."""

from __future__ import annotations

from pathlib import Path

import pytest

from deisa.ray._handoff import _native
from deisa.ray._transport.limits import MemoryLimit, check_limits
from deisa.ray.errors import MemoryBoundError
from tests.oracle import limits as oracle

MIB = 2**20


def own_limits(memberships: str, root: Path) -> tuple[MemoryLimit, ...]:
    """The limits that a rank finds, on which both clients agree."""
    found = tuple(MemoryLimit(*limit) for limit in _native.own_limits(memberships, str(root)))
    assert found == oracle.own_limits(memberships, root)
    return found


def group(path: Path, limit: str, used: int, cached: int, version: int) -> Path:
    """Write the files of a control group."""
    path.mkdir(parents=True, exist_ok=True)
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    for name, text in zip(names, (limit, str(used)), strict=True):
        (path / name).write_text(f"{text}\n")
    total = "total_" if version == 1 else ""
    (path / "memory.stat").write_text(f"anon 17\n{total}inactive_file {cached}\n")
    return path


def test_version_2(tmp_path: Path) -> None:
    step = group(tmp_path / "job" / "step", str(100 * MIB), 40 * MIB, 10 * MIB, 2)
    group(tmp_path / "job" / "step" / "task", "max", 1, 0, 2)
    job = group(tmp_path / "job", str(90 * MIB), 50 * MIB, 0, 2)
    found = own_limits("0::/job/step/task\n", tmp_path)
    assert [(limit.path, limit.limit, limit.available) for limit in found] == [
        (str(step), 100 * MIB, 70 * MIB),
        (str(job), 90 * MIB, 40 * MIB),
    ]
    assert len({limit.group for limit in found}) == 2


@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
def test_version_1(tmp_path: Path, controllers: str) -> None:
    own = group(tmp_path / "memory" / "job", str(100 * MIB), 40 * MIB, 0, 1)
    group(tmp_path / "memory", str(2**63 - 4096), 10**9, 0, 1)
    found = own_limits(f"7:cpuset:/elsewhere\n4:{controllers}:/job\n0::/\n", tmp_path)
    assert [(limit.path, limit.available) for limit in found] == [(str(own), 60 * MIB)]


def test_in_a_container_that_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    group(tmp_path / "memory", str(100 * MIB), 40 * MIB, 0, 1)
    found = own_limits("4:memory:/docker/0123\n", tmp_path)
    assert [limit.available for limit in found] == [60 * MIB]


def test_more_used_than_the_limit(tmp_path: Path) -> None:
    group(tmp_path / "job", str(100 * MIB), 140 * MIB, 0, 2)
    assert [limit.available for limit in own_limits("0::/job\n", tmp_path)] == [0]


def test_the_limits_of_this_process() -> None:
    native = [limit[:3] for limit in _native.own_limits()]  # what is available changes at any time
    assert native == [(limit.group, limit.path, limit.limit) for limit in oracle.own_limits()]


@pytest.mark.parametrize("memberships", ["", "0::/no/such/group\n", "3:name=systemd:/\n"])
def test_no_limits(tmp_path: Path, memberships: str) -> None:
    assert own_limits(memberships, tmp_path) == ()


def limit(group: int, available: int, limit: int = 100 * MIB) -> MemoryLimit:
    return MemoryLimit(group, f"/job/{group}", limit, available)


def test_ranks_under_one_limit_are_counted_together() -> None:
    ranks = [(rank, 10 * MIB, (limit(1, 30 * MIB),)) for rank in range(2)]
    check_limits(ranks, 0.8)
    with pytest.raises(MemoryBoundError) as caught:
        check_limits(
            [*ranks, (2, 10 * MIB, (limit(1, 25 * MIB),)), (3, 0, (limit(1, 0),))], 0.8, "session 'x': "
        )
    assert str(caught.value) == (
        "session 'x': bridges 0, 1 and 2 of this node would take 30.0 MiB of chunk memory, but may use 20.0 MiB (80% "
        "of the 25.0 MiB that are free under the memory limit of 100.0 MiB of their control group /job/1); give the "
        "simulation more memory (srun --mem), or use smaller windows, a smaller max_simulation_ahead, fewer ranks per "
        "node, or raise memory_fraction"
    )


def test_ranks_under_limits_of_their_own() -> None:
    check_limits([(rank, 10 * MIB, (limit(rank, 15 * MIB),)) for rank in range(9)], 0.8)
    with pytest.raises(MemoryBoundError, match=r"bridge 1 of this node would take 13\.0 MiB"):
        check_limits([(rank, (12 + rank) * MIB, (limit(rank, 15 * MIB),)) for rank in range(2)], 0.8)


def test_a_limit_above_those_of_the_ranks() -> None:
    ranks = [(rank, 10 * MIB, (limit(rank, 50 * MIB), limit(99, 15 * MIB))) for rank in range(2)]
    with pytest.raises(
        MemoryBoundError, match=r"bridges 0 and 1 of this node would take .* control group /job/99"
    ):
        check_limits(ranks, 1.0)
