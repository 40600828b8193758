"""The loop of a selection's worker group against real books, without Ray: the whole selection is paid for once and
before the first step (P2, P3), nothing runs that it was not priced for (P4, P6), a candidate that crashes is lost, and
no word of a candidate is reported, printed or in an error (P13). Ray Train's calls are replaced; ledger, data and
engine are real."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import ray.train
import torch
from product import DIGITS

from cluster.accounting.books import Books
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import Ledger
from cluster.environment import code_hash
from cluster.errors import PurserError
from training import worker
from training.admission import admit
from training.config import Job
from training.engine.trainer import PrivateTrainer
from training.folder import marked
from training.jobfile import load
from training.preparation import prepare
from tuning import group
from tuning import sealed as module
from tuning.config import SweepJob
from tuning.plan import planned
from tuning.sealed import Sealed

ACCOUNTS = ("digits/train", "digits/validation")
SPACE = "{training.optimizer.learning_rate: {loguniform: [1, 16]}, training.steps: {choice: [3, 5]}}"


class Desk:
    """A selection that is reserved, opened and drawn, and a record of what its worker does."""

    def __init__(self, home, monkeypatch, count=3, more=()):
        torch.set_num_threads(1)
        self.ledger = Ledger(f"sqlite:///{home}/ledger.db")
        self.books = Books(self.ledger)
        self.leases = Leases(self.books)
        values = ["tuning.mode=select", "tuning.search=random", f"tuning.space={SPACE}", "training.workers=1"]
        self.job = load(SweepJob, DIGITS, [*values, *more])
        accounts, _ = admit(self.books, self.job.plain, planned(self.job), 8)
        self.order = accounts[0].order
        monkeypatch.setattr(module, "draw", lambda repetitions: count)
        self.sealed = Sealed(home)
        self.sealed.draw(self.job, self.order)
        assert self.leases.reserve("selection", "sweep", self.job.selection(self.order)).fits
        self.epoch = self.leases.open("selection", "nonce").epoch
        self.events: list[str] = []
        self.home = home
        context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
        monkeypatch.setattr(ray.train, "get_context", lambda: context)
        monkeypatch.setattr(ray.train, "report", lambda *given, **named: self.events.append("report"))
        client = SimpleNamespace(
            authorise=self._authorise,
            charged=self.books.charged,
            show=self.books.show,
            partition_key=self.books.partition_key,
            source_key=self.books.source_key,
        )
        monkeypatch.setattr(worker, "connect", lambda ledger: client)
        steps = PrivateTrainer.steps

        def watched(trainer, shard, number):
            self.events.append(f"run {number}")
            steps(trainer, shard, number)

        monkeypatch.setattr(PrivateTrainer, "steps", watched)

    def _authorise(self, lease, epoch, account, block):
        grant = self.leases.authorise(lease, epoch, account, block)
        self.events.append(f"pay {account.partition('/')[2]}")
        return grant

    def work(self, **changes):
        """What Ray Train would run on a worker."""
        group.group_worker(
            {
                "job": self.job.model_dump(mode="json", include=set(Job.model_fields)),
                "sweep": self.job.model_dump(mode="json"),
                "lease": "selection",
                "epoch": self.epoch,
                "order": self.order,
                "ledger": self.ledger.identity,
                "folder": str(self.home),
                "mark": marked(self.home),
                "prepared": str(prepare(self.job.plain, self.books.source_key(), self.books.partition_key("digits"))),
                "code": code_hash(),
                **changes,
            }
        )

    def charges(self):
        """Of each account, what was authorised."""
        return [[entry["cost"] for entry in self.books.charged("selection", account)] for account in ACCOUNTS]

    def secrets(self):
        """What may be seen nowhere: each candidate's learning rate."""
        return [f"{one.values['training.optimizer.learning_rate']}" for one in self.sealed.candidates()]


@pytest.fixture
def desk(home, monkeypatch):
    home.mkdir()
    return Desk(home, monkeypatch)


def prices(desk):
    return [[desk.books.show(charge.account).price(charge)] for charge in desk.job.selection(desk.order)]


def test_all_of_it_is_paid_for_once_before_the_first_step(desk, capfd):
    desk.work()
    assert desk.events[:2] == ["pay train", "pay validation"]
    assert [event.split()[0] for event in desk.events[2:]] == ["run"] * 3, "and nothing is reported"
    assert desk.charges() == prices(desk)
    assert all(one.outcome.metrics["accuracy_error"] > 0 for one in desk.sealed.candidates())
    best = desk.sealed.best()
    assert [path.parent for path in desk.sealed.folder.rglob("weights.safetensors")] == [best.folder]
    seen = "".join(capfd.readouterr())
    assert not any(secret in seen for secret in desk.secrets())


def test_a_group_that_starts_again_or_later_pays_nothing_more(desk):
    desk.work()
    spent = desk.charges()
    desk.events.clear()
    desk.work()
    assert desk.events == ["pay train", "pay validation"], "asked again, and answered the same"
    assert desk.charges() == spent


def test_nothing_runs_under_a_lease_that_is_over(desk):
    desk.leases.close("selection", "release", "its driver died")
    with pytest.raises(PurserError, match="attempt is over"):
        desk.work()
    assert desk.charges() == [[], []]
    assert desk.sealed.left
    assert not any("run" in event for event in desk.events)


def test_a_candidate_that_crashes_is_lost_and_tells_nothing(desk, monkeypatch, capfd):
    """Not even by our own sentence, which would name its values."""
    steps = PrivateTrainer.steps

    def crashing(trainer, shard, number):
        if len(desk.events) == 3:
            raise PurserError(f"learning rate {desk.secrets()[1]} is too large for the record 'Ada Lovelace'")
        steps(trainer, shard, number)

    monkeypatch.setattr(PrivateTrainer, "steps", crashing)
    with pytest.raises(PurserError) as raised:
        desk.work()
    error = raised.value
    assert "(PurserError at " in str(error)
    assert error.__cause__ is None and error.__context__ is None  # noqa: PT018
    said = str(error) + "".join(capfd.readouterr())
    assert "Ada" not in said
    assert not any(secret in said for secret in desk.secrets())
    desk.work()  # Ray Train starts the group again
    crashed = desk.sealed.candidates()[1]
    assert crashed.outcome is None
    assert [one.outcome is not None for one in desk.sealed.candidates()] == [True, False, True]
    assert desk.sealed.best().tag != crashed.tag
    assert desk.charges() == prices(desk)


def test_what_was_not_priced_does_not_run(desk):
    """One step more than the space allows: a sealed queue that was tampered with, or prices that are wrong."""
    queue = desk.sealed.folder / "queue.json"
    queue.write_text(
        queue.read_text()
        .replace('"training.steps": 5', '"training.steps": 6')
        .replace('"training.steps": 3', '"training.steps": 6')
    )
    with pytest.raises(PurserError, match="PurserError at group.py"):
        desk.work()
    assert not any("run" in event for event in desk.events)


def test_another_selection_than_the_one_that_was_reserved_does_not_run(desk):
    changed = desk.job.model_dump(mode="json")
    changed["evaluation"]["noise"] = 4.0
    with pytest.raises(PurserError, match="not what was reserved"):
        desk.work(sweep=changed)
    assert not any("run" in event for event in desk.events)


def test_no_candidate_is_no_error(home, monkeypatch):
    home.mkdir()
    desk = Desk(home, monkeypatch, count=0)
    desk.work()
    assert desk.events == ["pay train", "pay validation"]
    assert desk.charges() == prices(desk), "that nothing was drawn is paid for like everything else"
    assert desk.sealed.best() is None


def test_a_group_that_paid_afterwards_would_be_seen(desk, monkeypatch):
    monkeypatch.setattr(group, "_pay", lambda *given: None)
    desk.work()
    assert desk.events[0].startswith("run")


def test_what_is_judged_on_public_records_pays_on_train_alone(home, monkeypatch):
    """The selection's price is that of training; the validation account is not touched."""
    home.mkdir()
    rows = [[*(f"pixel_{i}" for i in range(64)), "digit"], *([*["8"] * 64, str(digit)] for digit in range(10))]
    (home / "public.csv").write_text("\n".join(map(",".join, rows)))
    public = ["evaluation.on=public", f"evaluation.source={home / 'public.csv'}"]
    desk = Desk(home, monkeypatch, more=public)
    assert [charge.account for charge in desk.job.selection(desk.order)] == ["digits/train"]
    desk.work()
    assert desk.charges() == [*prices(desk), []]
    assert desk.sealed.best().outcome.metrics["correct"] == 1, "of ten records that are alike, exactly"
