"""A Ray head of a test's own: real, with token authentication, on free ports, ended by its process id."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

BIN = Path(sys.executable).parent
RAY = [sys.executable, "-m", "ray.scripts.scripts"]  # an environment may lack the command


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Head:
    """`ray start --head --block` and what a command needs to talk to it."""

    def __init__(self, home: Path, cpus: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ph", dir="/tmp"))  # short: sockets lie in it
        self.token = secrets.token_hex(32)
        port, dashboard = free_port(), free_port()
        self.gcs, self.address = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PURSER_", "RAY_", "PYTHONPATH"))}
        self._environment = {
            **kept,
            "PATH": f"{BIN}:{os.environ['PATH']}",  # jobs find `python` and `purser` there, as in an image
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            "PURSER_HOME": str(home),
        }
        log = open(self.folder / "head.log", "wb")  # noqa: SIM115 (the process has it)
        self._process = subprocess.Popen(
            [
                *RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
                f"--num-cpus={cpus}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
                f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}",
                "--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={self.folder}", "--disable-usage-stats",
            ],
            env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        log.close()
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + 120
        while self.answer("/api/jobs/", self.token) != 200:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.folder / "head.log").read_text()[-2000:])
            time.sleep(0.5)

    def answer(self, path: str, token: str = "") -> int:
        """The HTTP status that the dashboard answers with; 0 where nothing does."""
        request = urllib.request.Request(self.address + path)
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def on_it(self) -> dict[str, str]:
        """The environment of a shell on the head node."""
        return {**self._environment, "RAY_ADDRESS": self.gcs}

    def from_afar(self) -> dict[str, str]:
        """What a laptop has of the cluster."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def end(self) -> None:
        """End it, and all that it started: they are one session of processes."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
