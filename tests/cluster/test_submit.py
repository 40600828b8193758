"""A job on a real Ray head with token authentication, from a machine that has the dashboard's address and the token and
nothing else: no accountant no run, one charge for the same job submitted twice, bad jobs end with our sentence in their
log, the books from afar are the ledger's (P1, P4), and an accountant of another version is replaced under a run."""

from __future__ import annotations

import json
import os
import subprocess
import time

import psutil
import pytest
from heads import BIN, RAY, Head
from product import DIGITS, Ended, Purser

from cluster.accounting.books import Books
from cluster.accounting.ledger import Ledger

pytestmark = pytest.mark.cluster

TINY = ["training.workers=1", "training.steps=4", "training.block=2"]
JOB = ["submit", DIGITS, *TINY, "--as", "train", "--json"]


class Cluster:
    """A head, its ledger, and a laptop."""

    def __init__(self, root) -> None:
        self.home = root / "cluster"
        self.home.mkdir()
        (root / "laptop").mkdir()
        # A file that would break every job, were the user's folder shipped.
        (root / "laptop" / "training.py").write_text("raise SystemExit('the user`s own')")
        self.url = f"sqlite:///{self.home}/ledger.db"
        self.laptop = Purser(root / "home", root / "laptop")
        self.head = Head(self.home)

    def shell(self, *words: object, **more: str) -> Ended:
        """A command on the head node, by its operator."""
        environment = {**self.head.on_it(), "COLUMNS": "200", **more}
        ended = subprocess.run(
            [BIN / "purser", *map(str, words)],
            cwd=self.home,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def __call__(self, *words: object, **more: str) -> Ended:
        """A command on the laptop."""
        return self.laptop(*words, "--address", self.head.address, **{**self.head.from_afar(), **more})

    def entries(self, kind: str) -> list[dict]:
        """What the ledger itself says of the train account."""
        return [row for row in Books(Ledger(self.url)).history("digits/train") if row["kind"] == kind]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.head.end()


def drivers(name: str) -> list[int]:
    """The processes of a submission's command, and of a shell before it."""
    said = {one.pid: " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])}
    return [pid for pid, words in said.items() if "-m purser " in words and name in words]


def sentence(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code, (ended.out, ended.err)
    assert "Traceback" not in ended.out + ended.err
    said = [line for line in ended.err.splitlines() if line.startswith("purser: ")]
    assert len(said) == 1, (ended.out, ended.err)
    for word in words:
        assert word in said[0], said[0]


def test_without_the_token_nothing_is_answered(cluster):
    assert cluster.head.answer("/api/jobs/") == 401
    assert cluster.head.answer("/api/jobs/", "0" * 64) in (401, 403)
    assert cluster.head.answer("/api/jobs/", cluster.head.token) == 200
    wrong = cluster("status", "purser-digits-0", RAY_AUTH_TOKEN="0" * 64)
    sentence(wrong, 2, "token", "RAY_AUTH_TOKEN")
    sentence(cluster("status", "purser-digits-0"), 2, "SUBMISSION", "purser-digits-0")
    closed = cluster.laptop("status", "x", "--address", "http://127.0.0.1:9", **cluster.head.from_afar())
    sentence(closed, 2, "--address", "nothing answers")


def test_a_cluster_without_an_accountant_says_what_to_do(cluster):
    sentence(cluster("accountant", "status"), 2, "none runs", "purser accountant start")
    # The operator must mean it: a file on a cluster, and one that is not there.
    sentence(cluster.shell("accountant", "start", PURSER_LEDGER=cluster.url), 2, "--single-machine")
    absent = cluster.shell("accountant", "start", "--single-machine", PURSER_LEDGER=cluster.url)
    sentence(absent, 2, "is not there", "purser accountant init")


def test_the_accountant_is_started_once_and_says_what_it_keeps(cluster):
    assert cluster.shell("accountant", "init", PURSER_LEDGER=cluster.url).code == 0
    started = cluster.shell("accountant", "start", "--single-machine", "--json", PURSER_LEDGER=cluster.url)
    assert started.code == 0, started.err
    assert started.json["ledger"] == Ledger(cluster.url).identity
    assert started.json["accounts"] == []
    assert cluster.shell("accountant", "start", "--single-machine", PURSER_LEDGER=cluster.url).code == 0, "harmless"
    other = f"sqlite:///{cluster.home}/other.db"
    assert cluster.shell("accountant", "init", PURSER_LEDGER=other).code == 0
    sentence(cluster.shell("accountant", "start", "--single-machine", PURSER_LEDGER=other), 2, "accountant stop")


def test_a_bad_job_ends_here_and_one_without_an_account_there(cluster):
    sentence(cluster("submit", DIGITS, "training.noise_multiplier=-1"), 2, "training.noise_multiplier")
    missing = cluster(*JOB, "--follow")
    sentence(missing, 2, "digits is not in", "purser budget create")
    name = missing.json["submission_id"]
    assert missing.json["status"] == "failed"
    log = cluster("logs", name)
    sentence(log, 2, "digits is not in")
    assert Books(Ledger(cluster.url)).names() == [], "no account is made by a job"


def test_the_same_job_submitted_twice_is_charged_once_and_the_books_from_afar_are_the_ledgers(cluster):
    made = cluster("budget", "create", DIGITS, "--json")
    assert made.code == 0, made.err
    first = cluster(*JOB)
    assert first.code == 0, first.err
    assert "ended failed; it goes on" in first.err, "it came too soon before"
    second = cluster(*JOB, "--follow")
    assert second.code == 0, (second.out, second.err)
    assert second.json["submission_id"] == first.json["submission_id"]
    assert "handed over before" in second.err
    result = second.json["result"]
    assert (result["status"], result["authorised_steps"]) == ("completed", 4)
    assert [row["steps"] for row in cluster.entries("authorise")] == [2, 2]
    assert {row["lease"] for row in cluster.entries("authorise")} == {result["run"]}
    third = cluster(*JOB, "--follow")
    assert third.json["result"] == result
    assert len(cluster.entries("authorise")) == 2
    assert cluster("status", first.json["submission_id"], "--json").json["status"] == "completed"

    books = Books(Ledger(cluster.url))
    shown = cluster("budget", "show", "digits", "--json")
    assert shown.code == 0, shown.err
    assert {k: shown.json[k] for k in books.show("digits/train").as_json()} == books.show("digits/train").as_json()
    told = cluster("budget", "history", "digits/train", "--json").json["entries"]
    assert told == json.loads(json.dumps(list(books.history("digits/train"))))
    forged = cluster("budget", "verify", "digits", "--head", f"1:{'0' * 64}", "--json")
    assert (forged.code, forged.json["valid"]) == (1, False)

    poor = cluster(
        "submit", DIGITS, *TINY, "--as", "train", "training.noise_multiplier=0.6", "training.steps=400", "--follow"
    )
    sentence(poor, 3, "refused", "digits/train")


def test_a_job_is_stopped_and_keeps_what_it_has_not_used(cluster):
    before = Books(Ledger(cluster.url)).show("digits/train")
    name = cluster(*JOB, "--name", "to be stopped").json["submission_id"]
    while not (commands := drivers(name)):
        time.sleep(0.1)
    # No shell stands before the command: Ray ends what it sees below one, and what that starts later would run on.
    assert [os.getpgid(pid) for pid in commands] == commands
    ended = cluster("stop", name, "--json")
    assert (ended.code, ended.json) == (0, {"submission_id": name, "status": "stopped"}), ended.err
    assert cluster("stop", name).code == 0, "harmless"
    assert drivers(name) == []
    sentence(cluster("logs", name, "--follow"), 1, "was stopped")
    assert Books(Ledger(cluster.url)).show("digits/train").spent_cost == before.spent_cost


def test_a_plain_ray_job_submit_works_too_and_an_older_accountant_is_replaced(cluster):
    """An accountant of other code: the operator's `start` puts this one in its place, jobs find it, nothing is lost."""
    before = Books(Ledger(cluster.url)).show("digits/train")
    aged = cluster.home / "aged"
    aged.mkdir()
    script = (
        "import ray; from cluster.session import join; from cluster.accounting import actor\n"
        "join('auto'); actor.stop()\n"
        "class Old(actor.Accountant):\n"
        "    def describe(self): return {**super().describe(), 'protocol': 1, 'code': 'old'}\n"
        "ray.remote(Old).options(name='accountant', namespace='purser', lifetime='detached', num_cpus=0).remote"
        f"({cluster.url!r}); print(ray.get(actor.found().describe.remote())['protocol'])\n"
    )
    ended = subprocess.run(
        [BIN / "python", "-c", script], cwd=aged, env=cluster.head.on_it(), capture_output=True, text=True, timeout=120
    )
    assert ended.stdout.strip() == "1", ended.stderr
    stale = cluster("budget", "show", "digits")
    sentence(stale, 2, "protocol 1", "purser accountant start")
    replaced = cluster.shell("accountant", "start", "--single-machine", "--json", PURSER_LEDGER=cluster.url)
    assert replaced.code == 0, replaced.err
    assert Books(Ledger(cluster.url)).show("digits/train") == before

    folder = cluster.laptop.folder / "jobs"
    folder.mkdir()
    (folder / "digits.yaml").write_text(DIGITS.read_text())
    command = [*RAY, "job", "submit", "--address", cluster.head.address, "--working-dir", folder, "--"]

    def plain() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "purser", "train", "digits.yaml", *TINY, "--json"],
            cwd=folder,
            env=cluster.laptop.environment(**cluster.head.from_afar()),
            capture_output=True,
            text=True,
            timeout=300,
        )

    shadow = folder / "training.py"
    shadow.write_text("raise SystemExit('the user`s own')")
    shadowed = plain()
    assert shadowed.returncode != 0
    assert "purser: working_dir: training.py" in shadowed.stdout
    assert len(cluster.entries("authorise")) == 2
    shadow.unlink()
    done = plain()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(cluster.entries("authorise")) == 4
    assert Books(Ledger(cluster.url)).verify("digits/train").valid

    assert cluster("accountant", "stop").code == 0
    sentence(cluster("accountant", "status"), 2, "none runs")
