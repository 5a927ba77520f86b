"""Fixtures of the app's tests: a state folder of their own, a fake backend, quick polling."""

from __future__ import annotations

from pathlib import Path

import pytest

import tui.app
from tests.tui.fake_backend import CHOSEN, FakeBackend
from tui.app import MedmergeApp


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the person's own state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(tui.app, "POLL_SECONDS", 0.02)
    return tmp_path / "state"


@pytest.fixture
def backend() -> FakeBackend:
    return FakeBackend()


@pytest.fixture
def app(backend: FakeBackend) -> MedmergeApp:
    return MedmergeApp(backend, CHOSEN)
