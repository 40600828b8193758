"""Fixtures that all rooms share: a home of its own for each test, the real command, one local Ray for the session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from postgresql import Postgres

REPOSITORY = Path(__file__).resolve().parent.parent
DIGITS = REPOSITORY / "infra" / "jobs" / "digits.yaml"

SOAK = os.environ.get("PURSER_SOAK") == "1"  # `make soak`: hours of random lives, kills and restarts

os.environ["RAY_AUTH_MODE"] = "disabled"  # in-process Ray only; commands turn it on themselves
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The one object that --json prints as the last line of stdout."""
        return json.loads(self.out.strip().splitlines()[-1])


@dataclass(frozen=True)
class Purser:
    """The real command over a home of its own, run from a folder of the user's."""

    home: Path
    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        """What the command sees."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PURSER_", "RAY_", "PYTHONPATH"))}
        return {**kept, "PURSER_HOME": str(self.home), "COLUMNS": "200", **more}

    def __call__(self, *arguments: object, timeout: float = 300, **more: str) -> Ended:
        """Run `purser ARGUMENTS` to its end."""
        command = [str(Path(sys.executable).parent / "purser"), *map(str, arguments)]
        ended = subprocess.run(
            command, cwd=self.folder, env=self.environment(**more), capture_output=True, text=True, timeout=timeout
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)


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
