"""Dask's own tests of its arrays, run on our scheduler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# Tests that cannot pass, whatever is right about our scheduler.
NOT_OURS = {
    "test_store_locks_no_lock": "wants to see several threads at once; the local engine has one",
    "test_store_delayed_target": "looks for arrays in the graph of what was persisted, or a `distributed` future",
    "test_store_regions": "the same",
    "test_zarr_risky_shards_warns": "counts on Dask's own pytest configuration, which makes warnings errors",
    "test_nanquantile_all_nan": "the same",
    "test_binary_operator_delegation": "needs pytest-mock",
    "test_from_array_getitem": "counts calls in a variable, of which tasks have a copy",
    "test_store_sources_unoptimized_nocompute": "the same",
}
SLOW = [
    "test_chunk_structure_independence",
    "test_getitem_avoids_large_chunks_missing",
    "test_lu_",
    "test_quantile",
    "test_reductions_1D",
    "test_reductions_2D",
    "test_solve",
    "test_slicing_none_int_ellipes",
    "test_take_large",
    "test_tensordot_more_than_26_dims",
    "test_zarr_sharding_roundtrip",
]


def run_suite(engine: str, files: Sequence[str], without: Sequence[str], tmp_path: Path) -> tuple[int, int]:
    """Run files of Dask's array tests; returns how many passed, and how many graphs were run."""
    configuration = tmp_path / "pytest.ini"
    configuration.write_text("[pytest]\n")
    suite = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "--disable-warnings"),
            *("-c", configuration, "--rootdir", tmp_path, "-p", "no:cacheprovider"),
            *("-p", "tests.scheduler.dask_suite_plugin", "--timeout", "60"),
            *("-k", f"not ({' or '.join(without)})"),
            *("--pyargs", *(f"dask.array.tests.{file}" for file in files)),
        ],
        env=os.environ | {"DASK_SUITE_ENGINE": engine, "PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert suite.returncode == 0, suite.stdout
    passed = re.search(r"(\d+) passed", suite.stdout)
    graphs = re.search(r"graphs run by our scheduler: (\d+)", suite.stdout)
    assert passed and graphs, suite.stdout
    print(suite.stdout.splitlines()[-1])
    return int(passed[1]), int(graphs[1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_on_the_local_engine(tmp_path: Path) -> None:
    files = [
        "test_array_core",
        "test_array_function",
        "test_array_utils",
        "test_atop",
        "test_creation",
        "test_fft",
        "test_gufunc",
        "test_linalg",
        "test_map_blocks",
        "test_masked",
        "test_overlap",
        "test_percentiles",
        "test_random",
        "test_rechunk",
        "test_reductions",
        "test_reshape",
        "test_routines",
        "test_shuffle",
        "test_slicing",
        "test_stats",
        "test_ufunc",
        "test_wrap",
    ]
    passed, graphs = run_suite("local", files, [*NOT_OURS, *SLOW], tmp_path)
    assert passed > 3000
    assert graphs > 10_000


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_on_ray(tmp_path: Path) -> None:
    files = [
        "test_overlap",
        "test_rechunk",
        "test_gufunc",
        "test_percentiles",
        "test_map_blocks",
        "test_masked",
    ]
    passed, graphs = run_suite("ray", files, [*NOT_OURS, *SLOW], tmp_path)
    assert passed > 250
    assert graphs > 500
