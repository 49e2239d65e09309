"""Settings: what they may be, and where they come from."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from deisa.ray.config import Settings, disabled_by_environment
from deisa.ray.errors import ConfigurationError


def test_environment_and_overrides() -> None:
    environment = {
        "DEISA_RAY_SESSION": "run-7",
        "DEISA_RAY_MAX_SIMULATION_AHEAD": "3",
        "DEISA_RAY_SEND_TIMEOUT_S": "1.5",
        "DEISA_RAY_SOCKET_PATH": "/tmp/x",
        "DEISA_RAY_THREADS_PER_BUNDLE": "2",
        "UNRELATED": "?",
    }
    settings = Settings.from_environment(environment)
    assert settings == Settings(
        session="run-7",
        max_simulation_ahead=3,
        send_timeout_s=1.5,
        socket_path="/tmp/x",
        threads_per_bundle=2,
    )
    assert Settings.from_environment(environment, session="other", memory_fraction=None).session == "other"
    assert Settings.from_environment({}) == Settings()


def test_the_environment_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEISA_RAY_SESSION", "mine")
    assert Settings.from_environment().session == "mine"


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=lambda field: field.name)
def test_every_field_has_a_variable(field: dataclasses.Field[Any]) -> None:
    value = {
        "session": "s",
        "socket_path": "/p",
        "memory_fraction": 0.5,
        "on_analytics_lost": "raise",
        "on_error": "raise",
        "leftover": "deliver",
        "address": "head:6379",
    }.get(field.name, 7)
    settings = Settings.from_environment({"DEISA_RAY_" + field.name.upper(): str(value)})
    assert getattr(settings, field.name) == value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"session": ""}, "session name ''"),
        ({"session": "a b"}, "1 to 64 letters, digits"),
        ({"session": "a/b"}, "session name 'a/b'"),
        ({"session": "x" * 65}, "1 to 64 letters"),
        ({"session": "a\n"}, "session name"),
        ({"max_simulation_ahead": 0}, "max_simulation_ahead is 0; it must be at least 1"),
        ({"memory_fraction": 0}, r"memory_fraction is 0; it must lie in \(0, 1\]"),
        ({"memory_fraction": 1.1}, "memory_fraction is 1.1"),
        ({"memory_fraction": float("nan")}, "memory_fraction is nan"),
        ({"threads_per_bundle": 0}, "threads_per_bundle is 0"),
        ({"on_error": "stop"}, "on_error is 'stop'; it must be one of log, raise"),
        ({"leftover": "keep"}, "leftover is 'keep'; it must be one of drop, deliver"),
        ({"send_timeout_s": 0}, "send_timeout_s is 0; it must be positive"),
        ({"warn_every_s": float("nan")}, "warn_every_s is nan"),
    ],
)
def test_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Settings(**change)


@pytest.mark.parametrize("variable", ["MAX_SIMULATION_AHEAD", "THREADS_PER_BUNDLE"])
def test_a_variable_that_is_no_number(variable: str) -> None:
    with pytest.raises(ConfigurationError, match=f"DEISA_RAY_{variable}='1.5' is not a valid int"):
        Settings.from_environment({f"DEISA_RAY_{variable}": "1.5"})


def test_variables_that_are_no_settings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deisa.ray.config._warned_of", set())
    for variable in (
        "DEISA_RAY_SESION",
        "DEISA_RAY_COLOUR",
        "DEISA_RAY_DISABLED",
        "DEISA_RAY_REQUIRE_NETNS",
    ):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("DEISA_RAY_SESSION", "mine")
    for _ in range(2):
        assert Settings.from_environment().session == "mine"
    assert [record.getMessage() for record in caplog.records] == [
        "DEISA_RAY_COLOUR is set, but there is no such setting: it changes nothing",
        "DEISA_RAY_SESION is set, but there is no such setting: it changes nothing; did you mean DEISA_RAY_SESSION?",
    ]


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().session = "x"  # type: ignore[misc]


def test_replays_have_variables_of_their_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deisa.ray.config._warned_of", set())
    for name in ("", "_ARRAYS", "_TIMESTEPS", "_RANKS", "_TIMESTEP"):
        monkeypatch.setenv(f"DEISA_RAY_REPLAY{name}", "x")
    Settings.from_environment()
    (warning,) = caplog.records
    assert "DEISA_RAY_REPLAY_TIMESTEP is set" in warning.getMessage()
    assert "did you mean DEISA_RAY_REPLAY_TIMESTEPS?" in warning.getMessage()
    assert disabled_by_environment({"DEISA_RAY_REPLAY": "run.zarr"})
    assert not disabled_by_environment({"DEISA_RAY_REPLAY": ""})
