"""Forty trials under real Ray Tune, its ASHA, the real accountant's actor and the real gate; only the training is left
out. Never over budget (P1), nothing refunded that was authorised (P3), every refusal explained once, and what a trial
may not report stays outside (P13): recomputed from the ledger."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from actors import end_accountant
from product import DIGITS
from ray import cloudpickle, tune

from cluster.accounting.actor import Accountant, connect, start
from cluster.accounting.books import Books
from cluster.accounting.costs import block_cost
from cluster.accounting.ledger import Ledger
from cluster.accounting.mechanisms import from_json
from cluster.environment import HOME, Alive
from training.driver import COMPLETED, FAILED, REFUSED, STOPPED, Outcome
from training.jobfile import load, parse
from training.metrics import ACCURACY
from tuning.config import SweepJob
from tuning.plan import planned
from tuning.search import proposals
from tuning.sweep import Sweep, _outcome, told
from tuning.trials import keep_candidates, lease_of, trial_folder, trials_of

pytestmark = pytest.mark.cluster
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test's module

TRIALS, LEAKY, SECRET = 40, 3, 0.123456789
SPACE = "tuning.space={training.noise_multiplier: {uniform: [3.0, 16.0]}}"


class AtHome(Accountant):
    """The accountant, in a Ray that knew no home when it started: where the locks of living holders are."""

    def __init__(self, url, home):
        os.environ[HOME] = home
        super().__init__(url)


class Trainable(tune.Trainable):
    """Pays for its blocks and trains nothing; Tune keeps its process for the trials that follow."""

    def setup(self, config, job, sweep, folder, mark, ledger):
        self._given = job, sweep, folder, ledger
        self.begin(config)

    def reset_config(self, new_config):
        self.begin(new_config)
        return True

    def save_checkpoint(self, checkpoint_dir):
        """Tune asks for one at the end."""

    def begin(self, config):
        job, sweep, self._folder, ledger = self._given
        self._number = config["number"]
        self._folder = Path(self._folder)
        self._job = parse(SweepJob, job).candidate(config["values"])
        self._lease, self._client = lease_of(sweep, self._number), connect(ledger)
        self._epoch, self._block, self._judged = None, 0, 0

    def pay(self, account, block):
        return self._client.authorise(self._lease, self._epoch, account, block)

    def judge(self):
        self._judged += 1
        assert self.pay(self._job.accounts[1], self._judged)
        accuracy = (self._number * 23 % 40) / 40
        return dict.fromkeys(ACCURACY, 0) | {"accuracy": accuracy, "accuracy_error": 0.02}

    def step(self):
        if self._epoch is None:
            self._epoch = self._client.open(self._lease, f"{self._lease}-{self.trial_id}", 0).epoch
        self._block += 1
        grant = self.pay(self._job.accounts[0], self._block)
        if grant is None:
            outcome = Outcome(COMPLETED, self.judge())
            outcome.keep(trial_folder(self._folder, self._number))
            self._client.close(self._lease, "settle", COMPLETED)
            return _outcome(outcome)
        report = {"steps": grant.stop}
        if self._number == LEAKY:
            report["val_loss"] = SECRET
        if grant.stop in self._job.rungs:
            report |= self.judge()
        return told(report)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, ray_session):
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("forty")
        patch.setenv(HOME, str(root))
        patch.setenv("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
        patch.setenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        patch.setenv("RAY_AIR_NEW_OUTPUT", "0")
        job = load(SweepJob, DIGITS, [f"tuning.trials={TRIALS}", "tuning.search=random", "tuning.scheduler=asha", SPACE,
                                      "evaluation.noise=40", "training.workers=1"])  # fmt: skip
        ledger = Ledger(f"sqlite:///{root}/ledger.db")
        books = Books(ledger)
        dataset = job.dataset(["source"])
        books.create(dataset, job.privacy.epsilon, job.privacy.delta, planned(job), TRIALS)
        keep_candidates(root, list(proposals(job)))
        trials, lines = trials_of(job, "sweep", root), []
        client, alive = start(ledger.url, AtHome, home=str(root)), Alive("sweep")
        try:
            Sweep(client, ledger.identity, job, "sweep", root, trials, set(), lines.append, Trainable).run()
        finally:
            end_accountant()
            alive.release()
        rows = {name: list(books.history(name)) for name in job.accounts}
        yield books, rows, trials, lines, root


def test_the_ledger_was_never_over_its_budget(sweep):
    books, rows, trials, _, _ = sweep
    for name, entries in rows.items():
        account = books.show(name)
        spent = reserved = 0
        per_attempt = Counter()
        for entry in entries:
            if entry["kind"] == "authorise":
                mechanism, before = from_json(entry["body"]["mechanism"]), per_attempt[entry["lease"]]
                per_attempt[entry["lease"]] += entry["steps"]
                assert entry["cost"] == block_cost(mechanism, account.order, before, before + entry["steps"])
                spent, reserved = spent + entry["cost"], reserved - entry["cost"]
            elif entry["kind"] in ("reserve", "open"):
                reserved += entry["cost"]
            elif entry["kind"] in ("settle", "release", "expire"):
                reserved -= entry["cost"]
            assert (entry["spent_after"], entry["reserved_after"]) == (spent, reserved)
            assert 0 <= reserved <= spent + reserved <= account.budget_cost
        assert reserved == 0, "nothing is held when the sweep is over"
        assert books.verify(name).valid
    train = books.show("digits/train")
    assert train.spent_cost > 0.8 * train.budget_cost, "it was short, as it was meant to be"


def test_every_trial_is_over_and_charged_for_what_ran(sweep):
    books, rows, trials, _, root = sweep
    assert len(trials) == TRIALS
    counts = Counter(trial.outcome.status for trial in trials)
    assert counts[REFUSED] > 0
    assert counts[STOPPED] > 0
    assert counts[COMPLETED] > 0
    assert counts[FAILED] == 1
    for trial in trials:
        steps = sum(entry["steps"] for entry in books.charged(trial.lease, "digits/train"))
        whole = {COMPLETED: steps == 80, STOPPED: trial.outcome.rung <= steps <= 80, REFUSED: steps == 0, FAILED: True}
        assert whole[trial.outcome.status]
        if trial.outcome.status == STOPPED:
            assert trial.outcome.rung in trial.job.rungs
            assert trial.outcome.why == f"stopped early by ASHA at {trial.outcome.rung} of 80 steps"
            closing = [e["kind"] for e in rows["digits/train"] if e["lease"] == trial.lease][-1]
            assert closing == "settle"
        if trial.outcome.status != FAILED:
            assert Outcome.kept(trial_folder(root, trial.number)) == trial.outcome, "a resumed sweep knows it"


def test_every_refusal_is_explained_once(sweep):
    _, rows, trials, lines, _ = sweep
    refused = [trial for trial in trials if trial.outcome.status == REFUSED]
    entries = Counter(e["lease"] for entries in rows.values() for e in entries if e["kind"] == "refuse")
    ends = [line for line in lines if "nothing in the space can be paid any more" in line]
    assert len(ends) <= 1
    for trial in refused:
        mine = [line for line in lines if line.startswith(f"trial {trial.number:2d} ") and "refused" in line]
        if "nothing in the space" in trial.outcome.why:
            assert ends
            assert trial.outcome.why in ends[0]
            assert (len(mine), entries[trial.lease]) == (0, 0)
        else:
            assert (len(mine), entries[trial.lease]) == (1, 1)
            assert "of the budget was asked" in mine[0]
    assert sum(entries.values()) == len([t for t in refused if "nothing in the space" not in t.outcome.why])


def test_a_raw_metric_ends_its_trial_and_reaches_no_file(sweep):
    _, _, trials, lines, root = sweep
    outcome = trials[LEAKY - 1].outcome
    assert outcome.status == FAILED
    assert "'val_loss', which is neither public nor noised" in outcome.why
    assert not outcome.metrics
    written = [path for path in root.rglob("*") if path.is_file() and path.name != "ledger.db"]
    assert any("experiment_state" in path.name for path in written), "what Tune keeps is among them"
    assert not [path for path in written if str(SECRET).encode() in path.read_bytes()]
    assert str(SECRET) not in json.dumps(lines)
