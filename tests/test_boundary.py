"""Nothing computed from private records crosses the boundary un-noised (P13): secrets and counts are planted in a
table, a run over it is made, and every sink is searched: stdout, stderr, the log, Ray's own session logs, the ledger's
bytes, the run's folder but for its owner-only checkpoints, the release and its statement."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.cluster

PEOPLE, SECRET = 11_873, "Zyxomma"  # the job declares 15,000 units; how many there really are is private


def sinks(purser, ended, session):
    """name → bytes of everything that is outside, or that people copy outside. What is prepared is inside."""
    found = {"stdout": ended.out.encode(), "stderr": ended.err.encode()}
    for root, inside in ((purser.home, ("storage", "holders", "prepared")), (session, ())):
        for path in root.rglob("*"):
            if path.is_file() and not path.is_symlink() and not set(path.relative_to(root).parts) & set(inside):
                found[str(path)] = path.read_bytes()
    return found


def counts_in(content):
    """Whole numbers that stand alone in a text, as a log or a metric would print a count; process numbers are none."""
    return {int(number) for number in re.findall(rb"(?<![\w.:-])\d{4,5}(?![\w.:-])", content.replace(b"pid=", b"pid"))}


def leaks(found, numbers):
    """Where a planted string or one of the private `numbers` shows, with the kind of sink."""
    seen = [name for name, content in found.items() if SECRET.encode() in content]
    # Ray's own settings hold many numbers; counts are looked for where workers and drivers of ours write.
    ours = {n: c for n, c in found.items() if not n.endswith("_dashboard.json") and b"\0" not in c}
    return seen + [name for name, content in ours.items() if counts_in(content) & numbers]


def test_planted_secrets_and_counts_stay_inside(purser, monkeypatch):
    rows = [(f"{SECRET}-{i}", 18 + i % 60, "yes" if i % 3 else "no", f"{SECRET} note {i}") for i in range(PEOPLE)]
    text = "person,age,answer,note\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    (purser.folder / "people.csv").write_text(text)
    job = {
        "account": "people",
        "privacy": {"epsilon": 2.0, "delta": 5e-5, "units": 15000, "unit": "person", "max_records_per_unit": 1},
        "data": {
            "source": "people.csv",
            "features": {"age": {"range": [17, 90]}, "note": {"categories": ["a", "b"]}},
            "label": {"column": "answer", "categories": ["no", "yes"]},
        },
        "model": {"kind": "linear"},
        # Every unit joins every step, so that each batch is as large as the train partition: a count to look for.
        "training": {"expected_batch_size": 12000, "steps": 6, "block": 2, "noise_multiplier": 20.0, "workers": 2},
    }
    (purser.folder / "people.yaml").write_text(yaml.safe_dump(job))
    with tempfile.TemporaryDirectory(prefix="ps", dir="/tmp") as session:  # short: Ray's sockets live there
        ended = purser("train", "people.yaml", "--json", RAY_TMPDIR=session)
        assert ended.code == 0, ended.err
        found = sinks(purser, ended, Path(session))
    assert any("worker" in name for name in found), "Ray's worker logs are among the sinks"

    train, validation = partition_sizes(purser, monkeypatch)
    assert train + validation == PEOPLE
    numbers = {PEOPLE, train, validation}
    assert leaks(found, numbers) == []

    # The same search finds a leak that is made on purpose, in each way a count or a record could be printed.
    assert leaks({"stdout": f'{{"batch_size": {train}}}'.encode()}, numbers)
    assert leaks({"stderr": f"epoch over {PEOPLE} rows".encode()}, numbers)
    assert leaks({"/tmp/worker.err": f"cannot parse '{SECRET}-7'".encode()}, numbers)

    text = "\n".join(content.decode(errors="replace") for name, content in found.items() if "site-packages" not in name)
    assert not re.search(r"(?i)\b(loss|grad_norm|gradient norm|clip_fraction)\b\W{1,4}\d", text)


def partition_sizes(purser, monkeypatch):
    """What only the owner can know: the sizes of the partitions."""
    from cluster.accounting.books import Books
    from cluster.accounting.ledger import Ledger
    from training.jobfile import load
    from training.preparation import prepare
    from training.shards import Prepared
    from tuning.config import SweepJob

    job = load(SweepJob, purser.folder / "people.yaml")
    books = Books(Ledger(f"sqlite:///{purser.home}/ledger.db"))
    monkeypatch.setenv("PURSER_HOME", str(purser.home))
    monkeypatch.chdir(purser.folder)
    prepared = Prepared.at(prepare(job, books.source_key(), books.partition_key("people")))
    return tuple(len(prepared.shard(part, 0, 1).labels) for part in ("train", "validation"))
