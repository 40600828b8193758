"""Fixtures that all rooms share: a home of its own for each test, the real command, one local Ray for the session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from postgresql import Postgres
from product import Purser

SOAK = os.environ.get("PURSER_SOAK") == "1"  # `make soak`: hours of random lives, kills and restarts

os.environ["RAY_AUTH_MODE"] = "disabled"  # in-process Ray only; commands turn it on themselves
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A `$PURSER_HOME` that nothing else uses."""
    folder = tmp_path / "home"
    monkeypatch.setenv("PURSER_HOME", str(folder))
    monkeypatch.delenv("PURSER_LEDGER", raising=False)
    return folder


@pytest.fixture
def purser(tmp_path) -> Purser:
    """The command, with books of its own."""
    folder = tmp_path / "user"
    folder.mkdir()
    return Purser(tmp_path / "home", folder)


@pytest.fixture(scope="session")
def soak() -> bool:
    """Whether large counts run instead of a few of each."""
    return SOAK


@pytest.fixture(scope="session")
def postgresql():
    """One PostgreSQL for the session, started from its binaries; skips where they are not installed."""
    server = Postgres()
    yield server
    server.end()


@pytest.fixture(scope="session")
def ray_session():
    """One local Ray for all tests that need one in this process."""
    import ray

    ray.init(address="local", namespace="purser", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
