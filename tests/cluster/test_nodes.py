"""A cluster of several nodes over one PostgreSQL, and what it loses (P2, P3, P4): storage that a node does not share is
found before anything is charged; a sweep over two nodes loses the node of a worker in the middle of a run, and the
ledger's charge is what all attempts executed; then every process of the cluster is lost, and the same job, submitted to
a new one over the same ledger, goes on where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from heads import BIN, Head
from postgresql import OWNER
from product import DIGITS, Ended, Purser

from cluster.accounting.books import Books
from cluster.accounting.ledger import Ledger

pytestmark = pytest.mark.cluster

WATCHED = Path(__file__).parent / "watched"
STEPS, BLOCK, LOST_AT = 30, 3, 18
SWEEP = [
    *("training.workers=2", f"training.steps={STEPS}", f"training.block={BLOCK}", "tuning.search=grid"),
    # The run that loses a node goes on from the shards that both of its workers left.
    "tuning.space={training.backend: {choice: [deepspeed, torch]}}",
    *("training.noise_multiplier=11", "training.optimizer.momentum=0.5"),
]
RUN = ["--as", "train", "training.workers=1", "training.noise_multiplier=90"]
LONG = [
    *("training.workers=1", "training.steps=2000", "training.block=50", "tuning.trials=2", "tuning.search=random"),
    "tuning.space={training.noise_multiplier: {uniform: [90, 120]}}",
]


class Cluster:
    """A head without work, its nodes, the ledger that outlives them, and a laptop."""

    def __init__(self, root: Path, postgresql) -> None:
        self.root, self.home, self.watched = root, root / "shared", root / "watched"
        for folder in (self.home, self.watched, root / "laptop"):
            folder.mkdir()
        (self.watched / "stop").write_text("")
        (self.watched / "executed").write_text("")
        self.laptop = Purser(root / "home", root / "laptop")
        self.database = postgresql.create()
        self.owner, self.url = postgresql.url(self.database, OWNER), postgresql.url(self.database)
        self.head = self.started()

    def started(self) -> Head:
        return Head(self.home, cpus=0, WATCHED=str(self.watched), PYTHONPATH=str(WATCHED))

    def shell(self, *words: object, ledger: str) -> Ended:
        """A command on the head node, by its operator."""
        environment = {**self.head.on_it(), "COLUMNS": "200", "PURSER_LEDGER": ledger}
        command = [BIN / "purser", *map(str, words)]
        ended = subprocess.run(
            command, cwd=self.home, env=environment, capture_output=True, text=True, timeout=200, check=False
        )
        assert ended.returncode == 0, ended.stderr
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def __call__(self, *words: object) -> Ended:
        """A command on the laptop."""
        return self.laptop(*words, "--address", self.head.address, **self.head.from_afar())

    def submitted(self, *words: object) -> str:
        """Hand a job over; its submission's id."""
        ended = self("submit", DIGITS, *words, "--json")
        assert ended.code == 0, ended.err
        return str(ended.json["submission_id"])

    def entries(self, kind: str, lease: str = "") -> list[dict]:
        """What the ledger itself says of the train account."""
        rows = Books(Ledger(self.url)).history("digits/train")
        return [row for row in rows if row["kind"] == kind and (row["lease"] or "").startswith(lease)]

    def steps(self, lease: str) -> int:
        """The steps that `lease` was charged for."""
        return sum(row["steps"] for row in self.entries("authorise", lease))

    def executed(self, lease: str) -> list[int]:
        """The steps that workers of `lease` executed, as they wrote them down themselves."""
        lines = map(json.loads, (self.watched / "executed").read_text().splitlines())
        return [line["step"] for line in lines if line["lease"].startswith(lease)]


def eventually(there, seconds: float = 200):
    """What `there` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := there()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, postgresql):
    made = Cluster(tmp_path_factory.mktemp("nodes"), postgresql)
    yield made
    made.head.lose()


def test_storage_that_is_not_shared_is_found_before_anything_is_charged(cluster):
    """The one node there is has a folder of its own where the others have PURSER_HOME: it lives in another mount
    namespace."""
    cluster.shell("accountant", "init", "--service", "service", ledger=cluster.owner)
    cluster.shell("accountant", "start", ledger=cluster.url)
    made = cluster("budget", "create", DIGITS)
    assert made.code == 0, made.err
    apart = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {cluster.home} && exec "$@"', "sh"]
    if subprocess.run([*apart, "true"], check=False).returncode != 0:
        pytest.skip("this process may not make a mount namespace")
    node = cluster.head.add_node(apart)
    ended = cluster("submit", DIGITS, *RUN, "--name", "apart", "--entrypoint-num-cpus", 0, "--follow", "--json")
    assert ended.code == 1, ended.out + ended.err
    assert "put PURSER_HOME on storage that all of them share" in ended.err
    assert cluster.entries("authorise") == []
    node.kill()


def test_a_sweep_loses_a_node_and_is_charged_for_what_all_attempts_executed(cluster):
    for _ in range(3):
        cluster.head.add_node()
    name = cluster.submitted(*SWEEP, "--entrypoint-num-cpus", 0)
    (cluster.watched / "stop").write_text(f"{name}-01 {LOST_AT}")
    raylet = int(
        eventually(lambda: (cluster.watched / "stopped").exists() and (cluster.watched / "stopped").read_text())
    )
    os.kill(raylet, signal.SIGKILL)
    ended = cluster("logs", name, "--follow", "--json")
    assert ended.code == 0, ended.err
    assert cluster.executed(f"{name}-01") == [*range(1, LOST_AT + 1), *range(LOST_AT - BLOCK + 1, STEPS + 1)]
    assert cluster.steps(f"{name}-01") == len(cluster.executed(f"{name}-01")) == STEPS + BLOCK
    assert cluster.steps(f"{name}-02") == len(cluster.executed(f"{name}-02")) == STEPS
    trials = {trial["id"]: trial for trial in ended.json["result"]["trials"]}
    assert [(t["status"], t["authorised_steps"]) for t in trials.values()] == [("completed", 33), ("completed", 30)]
    # As Ray's dashboard shows it: both trials, each group of workers over two nodes.
    runs = cluster.head.get("/api/train/v2/runs/v1")["train_runs"]
    shown = {run["name"]: run for run in runs if run["name"].startswith(name)}
    assert shown.keys() == trials.keys()
    groups = [attempt["workers"] for run in shown.values() for attempt in run["attempts"]]
    assert [len({worker["node_id"] for worker in group}) for group in groups] == [2, 2, 2]


def test_a_lost_cluster_is_followed_by_another_over_the_same_ledger(cluster):
    """What was over is neither run nor charged again, what was under way goes on, the candidates are those that were
    drawn."""
    name = cluster.submitted(*LONG)
    eventually(lambda: cluster.steps(name) >= 100)
    cluster.head.lose()
    candidates = (cluster.home / "runs" / name / "candidates.json").read_bytes()
    before = {row["key"] for row in cluster.entries("authorise", name)}
    cluster.head = cluster.started()
    for _ in range(2):
        cluster.head.add_node()
    cluster.shell("accountant", "start", ledger=cluster.url)
    assert cluster.submitted(*LONG) == name
    ended = cluster("logs", name, "--follow", "--json")
    assert ended.code == 0, ended.err
    result = ended.json["result"]
    assert result["sweep"] == name
    assert (cluster.home / "runs" / name / "candidates.json").read_bytes() == candidates
    assert [trial["config"] for trial in result["trials"]] == json.loads(candidates)
    attempts = []
    for trial in result["trials"]:
        lease = trial["id"]
        assert trial["status"] == "completed"
        assert trial["authorised_steps"] == cluster.steps(lease) >= len(cluster.executed(lease)) >= 2000
        opened = cluster.entries("open", lease)
        last = [row for row in cluster.entries("authorise", lease) if row["attempt"] == opened[-1]["attempt"]]
        assert sum(row["steps"] for row in last) == 2000 - opened[-1]["body"]["done"]
        assert len(cluster.entries("settle", lease)) == 1
        attempts.append(len(opened))
    assert max(attempts) == 2, "it was lost in the middle of a run"
    assert before <= {row["key"] for row in cluster.entries("authorise", name)}, "nothing was taken back"
    books = Books(Ledger(cluster.url))
    assert books.verify("digits/train").valid
    assert books.show("digits/train").reserved_cost == 0
