"""A real Prometheus for tests, from its binaries: a free port, a folder of its own, ended by its process."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml


def tool(name: str) -> str:
    """`prometheus` or `promtool`; skips where it is not installed."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed; `apt-get install prometheus` makes this test run")
    return found


class Prometheus:
    """One server that scrapes `targets` every second and evaluates `rules` as often."""

    def __init__(self, folder: Path, targets: Sequence[str], rules: Path) -> None:
        binary = tool("prometheus")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": list(targets)}]}],
        }
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [binary, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        with open(folder / "log", "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*command, f"--web.listen-address={self.url.removeprefix('http://')}"], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 60
        while not self._ready():
            assert self._process.poll() is None, (folder / "log").read_text(encoding="utf-8")
            assert time.monotonic() < deadline, "Prometheus did not begin"
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as answer:
                return answer.status == 200
        except urllib.error.URLError:
            return False

    def end(self) -> None:
        """Its data stays in its folder."""
        self._process.terminate()
        self._process.wait(60)

    def ask(self, path: str, **parameters: str) -> Any:
        """The data that its HTTP API answers with; an error is the caller's."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as answer:
            said = json.load(answer)
        assert said["status"] == "success", said
        return said["data"]

    def series(self, query: str) -> list[tuple[dict[str, str], float]]:
        """What an expression gives now, as (labels, value)."""
        return [(one["metric"], float(one["value"][1])) for one in self.ask("query", query=query)["result"]]

    def value(self, query: str) -> float | None:
        """The value of the one series that an expression gives now; None where there is none."""
        values = [value for _, value in self.series(query)]
        assert len(values) < 2, f"{query}: {values}"
        return values[0] if values else None

    def alerts(self) -> dict[str, str]:
        """alert → pending or firing."""
        return {alert["labels"]["alertname"]: alert["state"] for alert in self.ask("alerts")["alerts"]}
