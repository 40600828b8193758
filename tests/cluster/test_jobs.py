"""What is handed to a cluster, without one: the name that makes a second submission harmless, what is staged and what
never is, the log of a job as its reader sees it, and addresses and places that a cluster cannot see (P4)."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from product import DIGITS

from cluster import environment, jobs
from cluster.accounting.actor import Accountant
from cluster.accounting.books import Books, Dataset
from cluster.accounting.ledger import Ledger
from cluster.accounting.mechanisms import Charge, DiscreteGaussian, PoissonSubsampledGaussian
from cluster.accounting.remote import RemoteBooks, RemoteLeases
from cluster.errors import PurserError, Refused, UsageError
from cluster.handover import Transcript, end
from cluster.jobs import JobServer, Submission, requirements, staged, submission_id
from training.jobfile import load
from tuning.config import SweepJob
from tuning.submission import submission

STEPS = Charge("d/train", PoissonSubsampledGaussian(0.25, 8.0), 40, 10)
HISTOGRAM = Charge("d/validation", DiscreteGaussian(5.0, 1), 1, 1)
TABLE = ["data.features={a: {range: [0, 1]}}", "data.label={column: b, categories: [x, y]}"]


def test_the_same_work_has_the_same_name_and_other_work_another(monkeypatch):
    words, job = ["tune", "job.json"], {"account": "digits", "training": {"steps": 80}}
    name = submission_id("digits", words, job)
    assert name == submission_id("digits", list(words), dict(reversed(job.items())))
    assert name.startswith("purser-digits-")
    others = [
        submission_id("digits", ["train", "job.json"], job),
        submission_id("digits", words, {**job, "training": {"steps": 81}}),
        submission_id("digits", words, job, "again"),
    ]
    monkeypatch.setattr(jobs, "code_hash", lambda: "other code")
    assert len({name, *others, submission_id("digits", words, job)}) == 5


def test_the_planned_price_goes_along_and_touches_no_data(home):
    job = load(SweepJob, DIGITS, [*TABLE, "data.source=/nowhere/at/all.csv"], elsewhere=True)
    tune, train = submission(job, None, None, ""), submission(job, "train", None, "")
    assert tune.words == ["tune", "job.json", "--name", tune.name]
    assert train.words == ["train", "job.json", "--name", train.name]
    assert tune.name != train.name
    assert all(isinstance(value, str) for value in tune.metadata.values())
    assert tune.metadata["account"] == "digits"
    assert int(tune.metadata["planned_cost"]) > int(train.metadata["planned_cost"]) > 0
    assert not home.exists(), "no ledger of this machine's was made for it"
    with pytest.raises(UsageError, match="--as"):
        submission(job, "trane", None, "")
    with pytest.raises(UsageError, match="--as"):
        submission(None, None, "digits-1", "")
    assert submission(None, "tune", "digits-1", "").words == ["tune", "--resume", "digits-1"]


def test_what_is_staged_runs_by_itself_and_holds_nothing_of_the_users(tmp_path, monkeypatch):
    user = tmp_path / "user"
    user.mkdir()
    (user / "training.py").write_text("raise SystemExit('the user`s own')")
    (user / "secret.csv").write_text("a,b\n1,2\n")
    monkeypatch.chdir(user)
    with staged({"account": "digits"}) as folder:
        assert sorted(path.name for path in folder.iterdir()) == [
            "cluster",
            "job.json",
            "purser.py",
            "training",
            "tuning",
        ]
        assert not list(folder.rglob("__pycache__"))
        # As a job runs it: from the staged folder, which is first on the path.
        code = "from cluster.environment import code_hash; import training; print(training.__file__, code_hash())"
        ended = subprocess.run(
            [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True,
            env={**os.environ, "PYTHONPATH": str(folder)},
        )  # fmt: skip
        where, code = ended.stdout.split()
        assert Path(where).parent.parent == folder
        assert code == environment.code_hash()
    assert not folder.exists()


def test_a_place_beside_the_job_file_is_refused_for_a_cluster():
    beside = [*TABLE, "data.source=people.csv"]
    assert load(SweepJob, DIGITS, beside).data.source == str(DIGITS.parent / "people.csv"), "on this machine it is one"
    with pytest.raises(UsageError, match=r"data\.source: 'people\.csv'.*absolute"):
        load(SweepJob, DIGITS, beside, elsewhere=True)
    for fine in ("/data/people.csv", "s3://bucket/people.csv"):
        assert load(SweepJob, DIGITS, [*TABLE, f"data.source={fine}"], elsewhere=True).data.source == fine
    public = [*TABLE, "data.source=/data/people.csv", "evaluation={on: public, source: ../public.csv}"]
    with pytest.raises(UsageError, match=r"evaluation\.source"):
        load(SweepJob, DIGITS, public, elsewhere=True)


def test_requirements_are_exact(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("# ours\nnumpy==2.1.0\n\npandas[parquet]==2.2.3  # tables\n")
    assert requirements(file) == ["numpy==2.1.0", "pandas[parquet]==2.2.3"]
    for loose in ("numpy", "numpy>=2", "numpy==2.*", "--index-url=http://somewhere", "git+https://somewhere/x"):
        file.write_text(loose)
        with pytest.raises(UsageError, match="exact version"):
            requirements(file)
    with pytest.raises(UsageError, match="cannot be read"):
        requirements(tmp_path / "absent.txt")


@pytest.mark.parametrize("address", ["", "ray://head:10001", "head:8265", "auto", "http://", "http://a b", "file:///x"])
def test_an_address_that_is_no_dashboards_is_refused_before_anything_is_asked(address):
    with pytest.raises(UsageError, match="--address"):
        JobServer(address)


LOG = """2026-11-26 06:00:00,123\tINFO job_manager.py:568 -- Runtime env is setting up.
Ledger postgresql://service@db/books (by the cluster's accountant)
2026-11-26 06:00:09,001 INFO worker.py:1694 -- Connecting to existing Ray cluster
{not an object
{"status": "refused"}
purser: refused: digits/train: 18.5% of the budget was asked, 8.2% remains.
"""


def test_a_jobs_log_is_told_as_if_it_had_run_here():
    said: list[str] = []
    told = Transcript(said.append)
    for line in LOG.splitlines():
        told.take(line)
    assert said == ["Ledger postgresql://service@db/books (by the cluster's accountant)", "{not an object"]
    assert told.result == {"status": "refused"}
    ended = Submission("s", "refused", 3, "")
    with pytest.raises(Refused, match="18.5%"):
        end(ended, told)
    with pytest.raises(UsageError, match="18.5%"):
        end(replace(ended, status="failed", code=2), told)
    with pytest.raises(PurserError, match="PATH"):  # it never came to speak
        end(replace(ended, status="failed", code=127), Transcript(said.append))
    end(Submission("s", "completed", 0, ""), Transcript(said.append))
    assert [Submission("s", "failed", code, "").exit_code for code in (1, 2, 3, None, 127, -9)] == [1, 2, 3, 1, 1, 1]


class Wired:
    """The accountant's class, asked through what an actor's call does to it: the answer travels pickled."""

    def __init__(self, url):
        self.accountant = Accountant(url)

    def __getattr__(self, act):
        from ray import cloudpickle

        method = getattr(self.accountant, act)
        return lambda *said: cloudpickle.loads(cloudpickle.dumps(method(*cloudpickle.loads(cloudpickle.dumps(said)))))


def test_books_and_leases_of_an_accountant_answer_like_the_ledgers_own(home):
    home.mkdir()
    url = f"sqlite:///{home}/ledger.db"
    wired = Wired(url)
    described = wired.describe()
    far = RemoteBooks(wired, described)
    near = Books(Ledger(url))
    assert not far.embedded, "a job never makes an account by itself on a cluster"
    assert far.identity == near.identity
    assert near.place in far.place

    dataset = Dataset("d", "row", 1000, 1, 0.2, ("source",))
    plans = {"d/train": [STEPS], "d/validation": [HISTOGRAM]}
    made = far.create(dataset, 3.0, 1e-4, plans, 4, nonce="mine")
    assert made == [near.show(name) for name in dataset.accounts()]
    # The answer was lost with the actor: the call is made again and knows its own work; another's is refused.
    assert far.create(dataset, 3.0, 1e-4, plans, 4, nonce="mine") == made
    with pytest.raises(UsageError, match="exists already"):
        far.create(dataset, 3.0, 1e-4, plans, 4)

    leases = RemoteLeases(far, wired)
    assert leases.reserve("run", "me", [STEPS, HISTOGRAM]).fits
    epoch = leases.open("run", "nonce", 0).epoch
    assert wired.authorise("run", epoch, "d/train", 1)
    assert far.names() == near.names()
    assert far.show("d/train") == near.show("d/train")
    assert far.resolve("d") == "d/train"
    assert far.check(dataset, 3.0, 1e-4) == near.check(dataset, 3.0, 1e-4)
    assert list(far.history("d/train")) == list(near.history("d/train"))
    assert far.charged("run", "d/train") == near.charged("run", "d/train")
    assert far.last_run("d/train") == near.last_run("d/train") is not None
    assert far.verify("d/train") == near.verify("d/train")
    assert (far.source_key(), far.partition_key("d")) == (near.source_key(), near.partition_key("d"))
    assert (far.exists("d"), far.exists("e"), far.registered("source")) == (True, False, True)
    assert (leases.known("run"), leases.settled("run"), leases.epoch("run")) == (True, False, epoch)
    assert [hold.lease for hold in leases.holds("d/train")] == ["run"]
    leases.close("run", "settle", "completed", epoch)
    assert leases.settled("run")
    assert leases.expire_dead() == []


def test_every_public_act_on_books_and_leases_is_answered_by_the_accountant():
    """One that was forgotten would look for a ledger that is not there."""
    own = {"check", "check_terms", "resolve"}  # of others only
    unread = {"read"}  # inside a transaction
    for near, far in ((Books, RemoteBooks), (RemoteLeases.__mro__[1], RemoteLeases)):
        acts = {name for name in vars(near) if not name.startswith("_")} - own - unread
        assert acts <= set(vars(far)), acts - set(vars(far))


def test_ray_address_decides_where_a_command_works(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert environment.cluster_address() is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert environment.cluster_address() is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert environment.cluster_address() == "10.0.0.1:6379"
    for server in ("http://head:8265", "ray://head:10001"):
        monkeypatch.setenv("RAY_ADDRESS", server)
        with pytest.raises(UsageError, match="purser submit"):
            environment.cluster_address()
