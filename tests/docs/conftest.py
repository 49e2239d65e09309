"""What the tests of snippets share."""

import pytest

from tests.support.patience import PATIENCE_S


@pytest.fixture(autouse=True)
def session_of_its_own(session_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snippets name no session: the environment keeps those of different tests apart."""
    monkeypatch.setenv("DEISA_RAY_SESSION", session_name)
    for wait in ("CONNECT", "START", "SEND", "DATA"):
        monkeypatch.setenv(f"DEISA_RAY_{wait}_TIMEOUT_S", f"{PATIENCE_S:g}")
