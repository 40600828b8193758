"""What tests of the accountant's figures share: Prometheus' own client in the place of `ray.util.metrics`, so that what
was told can be read back without Ray; a database that fails; and the names of figures, wherever they are written."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import prometheus_client
from product import REPOSITORY

DASHBOARD = REPOSITORY / "infra" / "grafana" / "dashboards" / "purser.json"
RULES = REPOSITORY / "infra" / "prometheus" / "rules.yml"


class _Instrument:
    """One of Prometheus' metrics, called as one of Ray's. A tag that was not declared is an error in both."""

    def __init__(self, metric: Any) -> None:
        self._metric = metric

    def _of(self, tags: dict[str, str] | None) -> Any:
        return self._metric.labels(**tags) if tags else self._metric

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self._of(tags).set(value)

    def inc(self, value: float, tags: dict[str, str] | None = None) -> None:
        self._of(tags).inc(value)

    def observe(self, value: float, tags: dict[str, str] | None = None) -> None:
        self._of(tags).observe(value)


class Registry:
    """A registry of its own, with what it holds."""

    def __init__(self) -> None:
        self._kept = prometheus_client.CollectorRegistry()

    def Gauge(self, name, description, tag_keys):
        return _Instrument(prometheus_client.Gauge(name, description, tag_keys, registry=self._kept))

    def Counter(self, name, description, tag_keys):
        return _Instrument(prometheus_client.Counter(name, description, tag_keys, registry=self._kept))

    def Histogram(self, name, description, tag_keys, boundaries):
        return _Instrument(
            prometheus_client.Histogram(name, description, tag_keys, buckets=boundaries, registry=self._kept)
        )

    def said(self, sample: str, **tags: str) -> float | None:
        """The value of one sample; None where nothing was told."""
        return self._kept.get_sample_value(sample, tags)

    def text(self) -> str:
        """All of it, as Prometheus would fetch it."""
        return prometheus_client.generate_latest(self._kept).decode()


@contextmanager
def failing(url: str) -> Iterator[None]:
    """The database of a SQLite ledger refuses every insertion for a while, whoever asks."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as database:
        database.execute("CREATE TRIGGER full BEFORE INSERT ON entries BEGIN SELECT RAISE(ABORT, 'full'); END")
        try:
            yield
        finally:
            database.execute("DROP TRIGGER full")


def named_in(text: str) -> set[str]:
    """The names of figures of ours in a dashboard or in rules."""
    return set(re.findall(r"\bray_purser_\w+", text))
