"""Which releases of Dask there may be, and what is said of others."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from deisa.ray._graph._dask import BEYOND, OLDEST, check_release
from deisa.ray.errors import ConfigurationError, UntestedDaskError
from tests.support.patience import PATIENCE_S

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
WAY_OUT = "pip install 'dask[array]>=2026.1,<2026.9'"


def test_the_bounds_are_those_of_the_package() -> None:
    (required,) = [
        r for r in tomllib.loads(PROJECT.read_text())["project"]["dependencies"] if r.startswith("dask")
    ]
    bounds = re.fullmatch(r"dask\[array\]>=(\d+)\.(\d+)\.0,<(\d+)\.(\d+)", required)
    assert bounds is not None
    assert tuple(map(int, bounds.groups())) == (*OLDEST, *BEYOND)


@pytest.mark.parametrize("installed", ["2026.1.0", "2026.8.0", "2026.8.1", "2026.8.0+3.g1234567"])
def test_releases_that_were_tested(installed: str) -> None:
    check_release(installed)


@pytest.mark.parametrize("installed", ["2025.12.0", "2026.9.0", "2026.10.1", "2027.1.0", "0+unknown"])
def test_releases_that_were_not(installed: str) -> None:
    with pytest.raises(UntestedDaskError) as caught:
        check_release(installed)
    assert isinstance(caught.value, ConfigurationError)
    assert isinstance(caught.value, ImportError)
    assert f"Dask {installed} is installed" in str(caught.value)
    assert WAY_OUT in str(caught.value)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("import dask; dask.__version__ = '2027.1.0'", "Dask 2027.1.0 is installed"),
        ("import dask._task_spec as s; del s.NestedContainer", "cannot import name 'NestedContainer'"),
        ("import dask.graph_manipulation as g; del g.chunks.bind", "'bind'"),
    ],
    ids=["newer", "name", "attribute"],
)
@pytest.mark.parametrize("module", ["window_handler", "types"])
def test_another_dask_is_refused_in_one_line(other: str, said: str, module: str) -> None:
    code = f"{other}; import deisa.ray.{module}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode != 0
    line = done.stderr.splitlines()[-1]
    assert line.startswith("deisa.ray.errors.UntestedDaskError: Dask ")
    assert said in line
    assert WAY_OUT in line
