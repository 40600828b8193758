"""Select mode as its user has it: K and the losers change nothing that leaves (P13), the whole is charged once whatever
happens (P1, P3), what cannot be paid for is refused before anything is drawn, and a selection whose driver was killed
goes on with what it had drawn."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from product import DIGITS

from cluster.accounting.books import Books
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import Ledger
from cluster.errors import UsageError
from cluster.screen import Screen
from training.driver import COMPLETED, FAILED, Outcome
from training.jobfile import load
from training.proof import prove
from training.statement import read
from tuning import sealed as module
from tuning import select
from tuning.config import SweepJob
from tuning.sealed import Sealed

SPACE = "tuning.space={training.optimizer.learning_rate: {loguniform: [4, 16]}}"
SELECT = ("tuning.mode=select", "tuning.search=random", SPACE)
ACCOUNTS = ("digits/train", "digits/validation")
METRICS = {"correct": 300, "wrong": 60, "accuracy": 0.8333, "accuracy_error": 0.02}


def ran(accuracies):
    """In place of Ray: pay, and let every candidate come to an accuracy."""

    def run(job, order, desk, lease, name, folder, screen):
        leases = Leases(desk.books)
        epoch = leases.open(lease, "nonce").epoch
        for account in ACCOUNTS:
            assert leases.authorise(lease, epoch, account, 1)
        sealed = Sealed(folder)
        for accuracy in accuracies:
            one = sealed.claim()
            if accuracy is not None:
                (one.folder / "weights.safetensors").write_bytes(b"weights")
                sealed.keep(one, {**METRICS, "accuracy": accuracy})
        assert sealed.claim() is None
        return Outcome(COMPLETED)

    return run


@pytest.fixture
def selected(home, monkeypatch):
    """Run a selection whose K and accuracies are given; returns its result and its sweep's folder."""
    home.mkdir()
    monkeypatch.chdir(home)

    def run(accuracies, *changes, resume=None, name=None):
        monkeypatch.setattr(module, "draw", lambda repetitions: len(accuracies))
        monkeypatch.setattr(select, "_run", ran(accuracies))
        job = load(SweepJob, DIGITS, [*SELECT, *changes])
        result = select.select(job, Screen(as_json=False), resume, name)
        return result, home / "runs" / result["sweep"]

    return run


def outside(result, folder, printed):
    """All that leaves, without what differs from run to run: names, times and hashes."""
    files = [path.read_text() for path in sorted(folder.rglob("*")) if path.suffix in (".md", ".html", ".json")]
    text = "\n".join([json.dumps(result), printed, *files]).replace(result["sweep"], "SWEEP")
    return re.sub(r"[0-9a-f]{16,}|\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d\S*", "", text)


def test_neither_k_nor_the_losers_change_what_leaves(selected, monkeypatch, capsys, tmp_path_factory):
    """The same winner among 1, 3 and 9, some of which crashed: every byte that leaves is the same."""
    seen = []
    monkeypatch.setattr(SweepJob, "solved", lambda job, values, order: {"training.optimizer.learning_rate": 8.5})
    for i, accuracies in enumerate(([0.9], [0.3, 0.9, None], [0.1, None, *[0.2] * 6, 0.9])):
        monkeypatch.setenv("PURSER_HOME", str(tmp_path_factory.mktemp(f"home{i}")))
        folder = Path(os.environ["PURSER_HOME"])
        result, _ = selected(accuracies)
        text = outside(result, folder / "runs" / result["sweep"], capsys.readouterr().out)
        seen.append(text.replace(str(folder), "HOME"))
        assert result["best"]["metrics"]["accuracy"] == 0.9
        assert len(result["trials"]) == 1
    assert seen[0] == seen[1] == seen[2]
    assert "8.5" in seen[0] and "0.3," not in seen[0]  # noqa: PT018


def test_the_winner_is_released_with_the_price_of_all(selected):
    result, folder = selected([0.4, 0.8, 0.6])
    assert result["status"] == "completed"
    assert result["mode"] == "select"
    books = Books(Ledger(f"sqlite:///{folder.parents[1]}/ledger.db"))
    for account in ACCOUNTS:
        shown = books.show(account)
        assert shown.reserved_cost == 0
        (paid,) = books.charged(result["best"]["id"], account)
        assert paid["mechanism"]["kind"] == "repeat_and_select"
        assert paid["cost"] == shown.spent_cost
        assert books.verify(account).valid
    assert result["trials"][0]["cost"] == books.show("digits/train").spent_cost
    said = json.loads((folder / "release" / "statement.json").read_text())
    assert "hidden" in said["tuning"]
    assert said["mode"] == "select"
    proof = prove(read(folder / "release" / "statement.json", "STATEMENT"), books)
    assert proof.valid, [finding for finding in proof.findings if not finding.holds]
    assert said["partitions"][0]["cost_of_run"] == books.show("digits/train").spent_cost
    assert not (folder / "sealed").exists()


def test_nothing_to_release_is_a_result(selected, capsys):
    """K = 0, and all of them crashed, look the same."""
    result, folder = selected([], "tuning.repeats={distribution: poisson}")
    assert (result["status"], result["trials"], result["best"], result["release"]) == ("completed", [], None, None)
    assert "by chance" in capsys.readouterr().out
    assert "Nothing is released" in Path(result["report"]).read_text()
    assert not (folder / "sealed").exists()


def test_what_is_over_is_told_again_and_not_charged_again(selected):
    result, folder = selected([0.4, 0.8])
    books = Books(Ledger(f"sqlite:///{folder.parents[1]}/ledger.db"))
    heads = [books.show(account).head for account in ACCOUNTS]
    again, _ = selected([0.1, 0.1], resume=result["sweep"])
    assert again == result
    assert [books.show(account).head for account in ACCOUNTS] == heads


def test_what_cannot_be_paid_for_is_refused_before_anything_is_drawn(selected):
    result, folder = selected([0.4], "tuning.trials=4000", "training.noise_multiplier=2")
    assert result["status"] == "refused"
    assert "nothing was spent and nothing was drawn" in result["why"]
    assert not (folder / "sealed").exists()
    books = Books(Ledger(f"sqlite:///{folder.parents[1]}/ledger.db"))
    assert [books.show(account).spent_cost for account in ACCOUNTS] == [0, 0]


def test_a_changed_job_does_not_go_on(selected, monkeypatch):
    monkeypatch.setattr(select, "_decide", lambda sealed, folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        selected([0.4, 0.8])
    (folder,) = (Path(os.environ["PURSER_HOME"]) / "runs").iterdir()
    with pytest.raises(UsageError, match="unchanged or not at all"):
        selected([0.4], "training.optimizer.momentum=0.5", resume=folder.name)


def test_nothing_is_drawn_twice_for_one_price(selected, monkeypatch):
    """What was drawn is lost with its folder: the same job under the same name would find itself paid for."""
    with monkeypatch.context() as patch:
        patch.setattr(select, "_decide", lambda sealed, folder: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            selected([0.4, 0.8], name="mine")
    folder = Path(os.environ["PURSER_HOME"]) / "runs" / "mine"
    shutil.move(folder, folder.parent / "kept")
    books = Books(Ledger(f"sqlite:///{folder.parents[1]}/ledger.db"))
    heads = [books.show(account).head for account in ACCOUNTS]
    with pytest.raises(UsageError, match="Nothing is drawn twice for one price"):
        selected([0.9], name="mine")
    assert not (folder / "sealed").exists()
    assert [books.show(account).head for account in ACCOUNTS] == heads
    shutil.rmtree(folder)
    shutil.move(folder.parent / "kept", folder)
    result, _ = selected([], name="mine")
    assert result["best"]["metrics"]["accuracy"] == 0.8


@pytest.mark.parametrize(("count", "paid", "status"), [(2, True, FAILED), (0, False, FAILED), (0, True, COMPLETED)])
def test_groups_that_gave_up_leave_the_rest_for_a_resume(home, monkeypatch, count, paid, status):
    """And say what their driver said, no more. That K was 0 is told only if it was paid for."""
    job = load(SweepJob, DIGITS, SELECT)
    monkeypatch.setattr(module, "draw", lambda repetitions: count)
    home.mkdir()
    Sealed(home).draw(job)

    class Ray:
        """Whatever is asked for comes at once."""

        def remote(self, **options):
            return lambda function: type("Task", (), {"remote": lambda *given: "worker: it failed."})

        def get(self, answer):
            return answer

    monkeypatch.setitem(sys.modules, "ray", Ray())
    outcome = select._groups(job, 8, "ledger", "lease", 1, home, home, lambda: paid)
    assert outcome.status == status
    assert outcome.why == ("worker: it failed" if status == FAILED else "")


@pytest.mark.cluster
def test_a_selection_that_is_killed_goes_on_with_what_it_had_drawn(purser):
    """kill -9 of its driver while a candidate runs. Then nothing is drawn or charged again, what ran is lost, and no
    value of a loser is in what was printed, kept or logged, by us or by Ray."""
    began = time.time()
    job = (DIGITS, *SELECT, "tuning.repeats={distribution: poisson}", "tuning.trials=5", "training.workers=3")
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "purser"), "tune", *map(str, job), "training.steps=30",
         "training.noise_multiplier=20"],
        cwd=purser.folder, env=purser.environment(), stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    sweep = next(line for line in process.stdout if line.startswith("Selection ")).split()[1].rstrip(":")
    folder = purser.home / "runs" / sweep
    while process.poll() is None and not (folder / "sealed" / "0").exists():
        time.sleep(0.1)
    over = process.poll() is not None  # K was 0, of which the chance is e^-5
    if not over:
        os.kill(process.pid, signal.SIGKILL)
    first = process.communicate()[0]
    assert not over or process.returncode == 0
    candidates = [] if over else Sealed(folder).candidates()
    ended = purser("tune", "--resume", sweep, "--json")
    assert ended.code == 0, ended.err
    result = ended.json
    assert result["status"] == "completed"
    for account in ACCOUNTS:
        entries = purser("budget", "history", account, "--json").json["entries"]
        paid = [entry for entry in entries if entry["kind"] == "authorise"]
        assert len(paid) == 1, "the whole is charged once"
        shown = purser("budget", "show", account, "--json").json
        assert (shown["spent_cost"], shown["reserved_cost"]) == (paid[0]["cost"], 0)
        assert purser("budget", "verify", account).code == 0
    rates = [one.values["training.optimizer.learning_rate"] for one in candidates]
    assert not (folder / "sealed").exists()
    mine = result["best"]["config"]["training.optimizer.learning_rate"] if result["best"] else None
    assert mine is None or over or mine in rates
    logs = [path for path in Path("/tmp/ray").glob("session_*/logs/**/*") if path.is_file() and _since(path, began)]
    kept = [path for path in purser.home.rglob("*") if path.is_file()]
    assert logs or over
    everything = b"\n".join([first.encode(), ended.out.encode(), ended.err.encode(), *map(_bytes, [*logs, *kept])])
    assert mine is None or f"{mine}"[:12].encode() in everything, "what is looked for would be found"
    for rate in rates:
        assert rate == mine or f"{rate}"[:12].encode() not in everything


def _since(path, began):
    return path.stat().st_mtime >= began


def _bytes(path):
    return path.read_bytes()
