"""Recordings on both engines, and the same analytics on them: the same results, to the last bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from deisa.ray import Bridge, Deisa, DeisaArray, WindowSpec
from deisa.ray._replay.simulation import FAILED, Part
from deisa.ray._replay.source import open_source
from deisa.ray.config import ReplaySettings
from deisa.ray.errors import NoCallbacksError, RegistrationError, ReplayError, SaveFormatError
from tests.e2e.simulation import Site, ranks
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.processes import live_processes

SHAPE = (370, 230)  # so large that NumPy adds up a part of a box in another order than a box of its own
BOXES = (  # irregular: the first one is cut into cells that do not lie in one piece
    ((0, 0), (200, 230)),
    ((200, 0), (100, 130)),
    ((300, 0), (70, 130)),
    ((200, 130), (170, 100)),
)
LABELS = {
    "dims": ("y", "x"),
    "coords": {"x": np.linspace(0, 1, SHAPE[1]), "row": ("y", np.arange(SHAPE[0]), {"units": "1"})},
    "attrs": {"units": "K", "long_name": "temperature", "valid_range": [0.0, 500.0]},
}
RANDOM = np.random.default_rng(11)
T = RANDOM.normal(size=(5, *SHAPE)).astype("f4")
P = RANDOM.normal(size=(5, 64))
T_AT, P_AT = (0, 1, 3, 4, 7), (0, 3, 5, 7, 9)


def simulate(site: Site) -> Callable[[], None]:
    """Four boxes of a matrix and sixteen pieces of a vector, which come at different timesteps."""

    def send() -> None:
        described = {
            "T": [
                {"global_shape": SHAPE, "offset": offset, "chunk_shape": shape, "dtype": "f4"} | LABELS
                for offset, shape in BOXES
            ],
            "p": [
                {"global_shape": (64,), "offset": (4 * n,), "chunk_shape": (4,), "dtype": "f8"}
                for n in range(16)
            ],
        }
        with site.bridge(0, 1, described) as bridge:
            for timestep in sorted({*T_AT, *P_AT}):
                if timestep in T_AT:
                    for index, (offset, shape) in enumerate(BOXES):
                        part = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
                        values = T[T_AT.index(timestep)][part]
                        bridge.send("T", values, timestep, time=0.1 * timestep, chunk_index=index)
                if timestep in P_AT:
                    for n, values in enumerate(np.split(P[P_AT.index(timestep)], 16)):
                        bridge.send("p", values, timestep, chunk_index=n)

    return send


Results = dict[str, list[Any]]


def labels_of(array: DeisaArray) -> Any:
    """The labels of an array, as they can be compared."""
    found = array.xarray
    coords = {name: (c.dims, c.values.tolist(), dict(c.attrs)) for name, c in found.coords.items()}
    return found.dims, coords, {name: np.asarray(value).tolist() for name, value in found.attrs.items()}


def analyse(deisa: Deisa) -> Results:
    """Sums of floats, of which the last bits depend on the order in which they are added."""
    results: Results = {"T": [], "both": [], "p": []}

    @deisa.register(WindowSpec("T", 2))
    def of_T(T: list[DeisaArray]) -> None:
        v = T[-1].dask
        values = [v.sum(), v.mean(axis=0), v.std(axis=1), (T[-1] - T[0]).sum(), (v[1:] * v[:-1]).sum()]
        computed = [np.asarray(x.compute()).tobytes() for x in values]
        results["T"].append(([a.t for a in T], [a.time for a in T], v.chunks, labels_of(T[-1]), *computed))

    @deisa.register("T", "p")
    def both(T: list[DeisaArray], p: list[DeisaArray]) -> None:
        results["both"].append((T[-1].t, float(T[-1].sum().compute() * p[-1].sum().compute())))

    @deisa.register("p")
    def of_p(p: list[DeisaArray]) -> None:
        results["p"].append((p[-1].t, p[-1].dask.chunks, p[-1].sum().compute().tobytes()))

    return results


@pytest.mark.parametrize(("merge_chunks_beyond", "processes"), [(32, 2), (1, 1)], ids=["separate", "merged"])
def test_a_recording_gives_the_same_results(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge_chunks_beyond: int, processes: int
) -> None:
    path = tmp_path / "run.zarr"
    deisa = site.deisa(merge_chunks_beyond=merge_chunks_beyond, threads_per_bundle=3)
    results = analyse(deisa)
    deisa.record(path)
    with ranks(simulate(site)):
        deisa.execute_callbacks()
    assert [t for t, *_ in results["both"]] == [0, 3, 7]
    assert [timesteps[-1] for timesteps, *_ in results["T"]] == list(T_AT)

    monkeypatch.setenv("DEISA_RAY_REPLAY", str(path))
    monkeypatch.setenv("DEISA_RAY_REPLAY_RANKS", str(processes))
    again = site.deisa()
    replayed = analyse(again)
    again.record(path)  # the script is the same; what it reads is not written
    report = again.execute_callbacks()
    assert replayed == results
    assert report.timesteps == {"T": 5, "p": 5}
    assert len(report.bridges) == processes


def test_a_data_set_in_place_of_a_simulation(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Times are numbers, as in the file; a simulation of the same name is not met, nor needed."""
    hours = np.datetime64("2020-02-28T12:00", "ns") + np.arange(5) * np.timedelta64(12, "h")
    found = xr.Dataset(
        {"t2m": (("time", "lat", "lon"), T, {"units": "K"}), "sp": (("time", "n"), P)},
        {"time": hours, "lat": np.linspace(-90, 90, SHAPE[0])},
    )
    found.to_netcdf(tmp_path / "era.nc", encoding={"time": {"units": "hours since 2020-02-28"}})
    monkeypatch.setattr("deisa.ray.config._warned_of", set())
    monkeypatch.setenv("DEISA_RAY_REPLAY_ARRAYS", "temperature=t2m")
    monkeypatch.setenv("DEISA_RAY_REPLAY_TIMESTEPS", "1:4")
    live = site.deisa()
    live.register_callback(lambda T: None, "T")
    monkeypatch.setenv("DEISA_RAY_REPLAY", str(tmp_path / "era.nc"))
    deisa = site.deisa()
    means: dict[int, Any] = {}
    deisa.register_callback(
        lambda temperature: means.update({temperature[-1].t: temperature[-1].mean().compute()}), "temperature"
    )
    with Bridge(bridge_id=0, arrays_metadata={}, system_metadata={"world_size": 1}):
        pass  # of a script that is both sides in one: it waits for nobody
    report = deisa.execute_callbacks()
    assert means == {t: T[t].mean() for t in (1, 2, 3)}
    assert report.timesteps == {"temperature": 3}
    assert "DEISA_RAY_REPLAY is set: bridges of this process send nothing" in caplog.text
    said = capsys.readouterr().err
    assert f"{tmp_path / 'era.nc'} is replayed in place of a simulation: 'temperature' at 3 timesteps" in said
    monkeypatch.delenv("DEISA_RAY_REPLAY")
    with ranks(simulate(site)):
        assert live.execute_callbacks().timesteps == {"T": 5}


def test_what_happens_around_an_event_is_recorded(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "event.zarr"
    deisa = site.deisa()
    deisa.record(path, WindowSpec("p", 2), trigger=lambda p: p[-1].t == 5, following=1)
    with ranks(simulate(site)):
        report = deisa.execute_callbacks()
    array = open_source(ReplaySettings(path=str(path))).arrays["p"]
    assert list(array.steps) == [3, 5, 7]
    stored = xr.open_zarr(path / "p", chunks=None)
    assert np.array_equal(stored["p"].values, P[[P_AT.index(t) for t in (3, 5, 7)]])
    assert report.arrays.keys() == {"p"}


@pytest.mark.parametrize("engine", ["local"], indirect=True)
def test_a_recording_goes_on_and_only_what_is_wanted_is_read(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run sends the same timesteps again, in place of those of the first one."""
    path = tmp_path / "run.zarr"
    for names in (["p"], ["T", "p"]):
        deisa = site.deisa()
        deisa.record(path, *names)
        with ranks(simulate(site)):
            deisa.execute_callbacks()
        deisa.close()
    for chunk in (path / "T" / "T" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"nonsense")
    monkeypatch.setenv("DEISA_RAY_REPLAY", str(path))
    deisa = site.deisa()
    seen: dict[int, Any] = {}
    deisa.register_callback(lambda p: seen.update({p[-1].t: p[-1].dask.compute()}), "p")
    deisa.execute_callbacks()
    assert list(seen) == list(P_AT)
    assert all(np.array_equal(seen[t], values) for t, values in zip(P_AT, P, strict=True))


def test_what_cannot_be_recorded(tmp_path: Path, site: Site) -> None:
    deisa = site.deisa()
    with pytest.raises(RegistrationError, match=r"record\(\) needs a path"):
        deisa.record(7)
    with pytest.raises(RegistrationError, match="name the arrays"):
        deisa.record(tmp_path / "a.zarr", trigger=lambda p: True)
    xr.Dataset({"T": ("x", np.zeros(3))}).to_zarr(tmp_path / "other.zarr", consolidated=False)
    with pytest.raises(SaveFormatError, match="holds Zarr data that is no recording"):
        deisa.record(tmp_path / "other.zarr")
    deisa.record(tmp_path / "a.zarr")
    with pytest.raises(NoCallbacksError, match="record"):
        deisa.execute_callbacks()


# Failures.


@pytest.fixture
def recording(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the vector, and about to be replayed."""
    deisa = site.deisa()
    deisa.record(tmp_path / "run.zarr", "p")
    with ranks(simulate(site)):
        deisa.execute_callbacks()
    monkeypatch.setenv("DEISA_RAY_REPLAY", str(tmp_path / "run.zarr"))
    return tmp_path / "run.zarr"


LOCAL = pytest.mark.parametrize("engine", ["local"], indirect=True)


@LOCAL
def test_what_cannot_be_read_is_named(site: Site, recording: Path) -> None:
    for chunk in (recording / "p" / "p" / "c").rglob("*"):
        if chunk.is_file():
            chunk.write_bytes(b"nonsense")
    deisa = site.deisa()
    deisa.register_callback(lambda p: None, "p")
    with pytest.raises(
        ReplayError, match=r"replays .*run\.zarr has failed: ReplayError: array 'p' at timestep 0"
    ):
        deisa.execute_callbacks()


@LOCAL
def test_a_process_that_is_killed(site: Site, recording: Path) -> None:
    deisa = site.deisa()

    @deisa.register("p")
    def kill_it(p: list[DeisaArray]) -> None:
        for pid in replaying(os.getpid()):
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(ReplayError, match=r"has failed: it ended with status -9"):
        deisa.execute_callbacks()
    assert not replaying(os.getpid())


@LOCAL
def test_an_analytics_that_is_done_early(site: Site, recording: Path) -> None:
    deisa = site.deisa()
    deisa.register_callback(lambda p: deisa.close(), "p")
    report = deisa.execute_callbacks()
    assert report.callbacks_run == 1
    assert not replaying(os.getpid())


ANALYTICS = """
import os, sys
from deisa.ray import Deisa

deisa = Deisa(engine="local")

@deisa.register("p")
def stay(p):
    print("here", flush=True)
    sys.stdin.read()

deisa.execute_callbacks()
"""


@LOCAL
def test_it_dies_with_its_analytics(site: Site, recording: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", ANALYTICS], **pipes) as analytics:  # type: ignore[call-overload]
        assert analytics.stdout.readline() == b"here\n"
        (pid,) = replaying(analytics.pid)
        analytics.kill()
    wait_until(lambda: pid not in {process.pid for process in live_processes()}, f"process {pid} has ended")


@LOCAL
def test_it_ends_with_what_holds_it_though_nobody_has_answered(recording: Path, session_name: str) -> None:
    part = Part(ReplaySettings(path=str(recording)), ("p",), 0, 1)
    command = [sys.executable, "-m", "deisa.ray._replay.simulation", part.to_json()]
    variables = {"DEISA_RAY_SESSION": f"nobody-{session_name}"[:64], "DEISA_RAY_CONNECT_TIMEOUT_S": "1e6"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | variables) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(PATIENCE_S) == FAILED


def replaying(parent: int) -> list[int]:
    """The children of a process that replay."""
    children = [process.pid for process in live_processes() if process.parent == parent]
    return [pid for pid in children if b"_replay.simulation" in Path(f"/proc/{pid}/cmdline").read_bytes()]
