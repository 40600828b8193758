"""A Ray cluster of a test's own: real, with token authentication, with several nodes on this machine, on free ports;
ended, or lost, by its process ids."""

from __future__ import annotations

import contextlib
import json
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
RAY = [sys.executable, "-m", "ray.scripts.scripts"]  # an environment may lack the command


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Started:
    """`ray start --block` in a session of processes of its own.

    Args:
        more: variables of whatever runs on this node.
        before: what stands before the command.
    """

    def __init__(self, folder: Path, words: Sequence[str], more: Mapping[str, str], before: Sequence[str] = ()) -> None:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PURSER_", "RAY_", "PYTHONPATH"))}
        self._environment = {
            **kept,
            "PATH": f"{BIN}:{os.environ['PATH']}",  # jobs find `python` and `purser` there, as in an image
            "RAY_AUTH_MODE": "token",
            "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
            **more,
        }
        self._log = folder / f"{secrets.token_hex(4)}.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *before, *RAY, "start", "--block", *words,
                    f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0",
                    "--disable-usage-stats",
                ],
                env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait(self, there: Callable[[], bool]) -> None:
        """Until `there`; raises with what the node said, if that does not come."""
        deadline = time.monotonic() + 120
        while not there():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(self._log.read_text()[-2000:])
            time.sleep(0.2)

    @property
    def started(self) -> bool:
        """Whether all of its servers are up."""
        return "will now block forever" in self._log.read_text()

    def kill(self) -> None:
        """SIGKILL to all of it at once, as when a machine is lost: nobody says goodbye."""
        for one in [*psutil.Process(self._process.pid).children(recursive=True), self._process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self._process.wait()

    def end(self) -> None:
        """End it, and all that it started."""
        if self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self.kill()


class Head(Started):
    """The head node of a cluster, and what a command needs to talk to it."""

    def __init__(self, home: Path, cpus: int = 2, **more: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ph", dir="/tmp"))  # short: sockets lie in it
        self.token = secrets.token_hex(32)
        port, dashboard = free_port(), free_port()
        self.gcs, self.address = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        self._shared = {"RAY_AUTH_TOKEN": self.token, "PURSER_HOME": str(home), **more}
        self._nodes: list[Started] = []
        super().__init__(
            self.folder,
            [
                "--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--num-cpus={cpus}",
                "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={free_port()}",
                f"--temp-dir={self.folder}",
            ],
            self._shared,
        )  # fmt: skip
        self.wait(lambda: self.answer("/api/jobs/", self.token) == 200)

    def add_node(self, before: Sequence[str] = ()) -> Started:
        """One more node, of one CPU and with an address of its own. Two that start at once would take each other's
        sockets."""
        words = [f"--address={self.gcs}", f"--node-ip-address=127.0.0.{2 + len(self._nodes)}", "--num-cpus=1"]
        node = Started(self.folder, words, self._shared, before)
        self._nodes.append(node)
        node.wait(lambda: node.started)
        return node

    def nodes(self, alive: bool = True) -> list[dict[str, Any]]:
        """The nodes of the cluster as its dashboard tells of them, the head among them."""
        said = self.get("/api/v0/nodes?detail=true&limit=1000")["data"]["result"]["result"]
        return [node for node in said if (node["state"] == "ALIVE") == alive]

    def get(self, path: str) -> Any:
        """What the dashboard answers."""
        request = urllib.request.Request(self.address + path, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as response:
            return json.load(response)

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

    def lose(self) -> None:
        """Every process of the cluster is killed at once."""
        for one in (self, *self._nodes):
            if one._process.poll() is None:
                one.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def end(self) -> None:
        """End it, its nodes first."""
        for node in self._nodes:
            node.end()
        super().end()
        shutil.rmtree(self.folder, ignore_errors=True)
