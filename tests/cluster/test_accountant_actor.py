"""The accountant as a real Ray actor: named and detached, killed between commit and reply, over a database that goes
away and comes back (P1: duplicates change nothing; P2; P3), and a client that fails closed (P4)."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from actors import end_accountant
from ray import cloudpickle

from cluster.accounting import actor as actor_module
from cluster.accounting.actor import Accountant, AccountantClient, connect, start, stop
from cluster.accounting.books import Books, Dataset
from cluster.accounting.leases import PROTOCOL
from cluster.accounting.ledger import Ledger, init
from cluster.accounting.mechanisms import Charge, DiscreteGaussian, PoissonSubsampledGaussian
from cluster.environment import ACCOUNTANT, NAMESPACE
from cluster.errors import PurserError, Unreachable, UsageError

pytestmark = pytest.mark.cluster
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test's module

STEPS = Charge("d/train", PoissonSubsampledGaussian(0.25, 8.0), 40, 10)
HISTOGRAM = Charge("d/validation", DiscreteGaussian(5.0, 1), 1, 1)


class DiesAfterCommit(Accountant):
    """Is killed when its first authorisation is on disk, before anybody hears of it."""

    def __init__(self, url: str, marker: str) -> None:
        super().__init__(url)
        self._marker = Path(marker)

    def authorise(self, lease, epoch, account, block):
        grant = super().authorise(lease, epoch, account, block)
        if not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return grant


class DiesBeforeCommit(Accountant):
    """Is killed in its first authorisation, when the entry is written but not committed."""

    def __init__(self, url: str, marker: str) -> None:
        super().__init__(url)
        self._marker = Path(marker)
        self._dialect = self._books.ledger._engine.dialect
        self._commit = self._dialect.do_commit

    def authorise(self, lease, epoch, account, block):
        def die(connection):
            if not self._marker.exists():
                self._marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            self._commit(connection)

        self._dialect.do_commit = die
        return super().authorise(lease, epoch, account, block)


class Known(Accountant):
    """Says which process it is."""

    def pid(self):
        return os.getpid()


def make(url):
    books = Books(Ledger(url))
    dataset = Dataset("d", "row", 1000, 1, 0.2, ("source",))
    books.create(dataset, 3.0, 1e-4, {"d/train": [STEPS], "d/validation": [HISTOGRAM]}, 4)
    return books


@pytest.fixture
def sqlite(home, ray_session):
    """A ledger in a file, with one dataset; its accountant is gone after the test."""
    home.mkdir()
    url = f"sqlite:///{home}/ledger.db"
    make(url)
    yield url
    end_accountant()


@pytest.fixture
def database(postgresql, home, ray_session):
    """The same in PostgreSQL, served by a role that may only read and append; yields its name."""
    name = postgresql.create()
    init(postgresql.url(name, "owner"), "service")
    make(postgresql.url(name)).ledger.close()
    yield name
    end_accountant()
    postgresql.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger(request):
    """Either."""
    if request.param == "sqlite":
        return request.getfixturevalue("sqlite")
    database = request.getfixturevalue("database")
    return request.getfixturevalue("postgresql").url(database)


def entries(url, kind):
    books = Books(Ledger(url))
    assert books.verify("d/train").valid
    return [row for row in books.history("d/train") if row["kind"] == kind]


def test_a_lease_through_the_actor_and_its_deaths(ledger, ray_session):
    client = start(ledger)
    handle = ray_session.get_actor(ACCOUNTANT, namespace=NAMESPACE)
    assert client.fits([STEPS, HISTOGRAM]).fits
    assert client.reserve("run", "me", [STEPS, HISTOGRAM]).fits
    attempt = client.open("run", "nonce", 0)
    grant = client.authorise("run", attempt.epoch, "d/train", 1)

    ray_session.kill(handle, no_restart=False)
    # The answer may have been lost with the actor: the same call again must return the same grant, charged once.
    assert client.authorise("run", attempt.epoch, "d/train", 1) == grant
    assert client.show("d/train").spent_cost == grant.cost
    with pytest.raises(PurserError, match="out of turn"):
        client.authorise("run", attempt.epoch, "d/train", 3)
    assert client.close("run", "settle", "completed")["d/train"] == grant.cost
    assert client.show("d/train").reserved_cost == 0
    assert [row["cost"] for row in client.charged("run", "d/train")] == [grant.cost]


@pytest.mark.parametrize("served", [DiesAfterCommit, DiesBeforeCommit])
def test_an_accountant_killed_around_its_commit_charges_once_and_the_caller_gets_its_answer(
    served, ledger, ray_session, tmp_path
):
    marker = tmp_path / "died"
    client = start(ledger, served, marker=str(marker))
    assert client.reserve("run", "me", [STEPS, HISTOGRAM]).fits
    epoch = client.open("run", "nonce", 0).epoch
    grant = client.authorise("run", epoch, "d/train", 1)
    assert marker.exists(), "it was not killed: nothing was shown"
    assert (grant.start, grant.stop) == (0, 10)
    assert [row["cost"] for row in entries(ledger, "authorise")] == [grant.cost]
    assert client.authorise("run", epoch, "d/train", 2).start == 10


def test_a_worker_killed_in_a_block_burns_it_and_frees_the_rest_when_its_holder_is_gone(
    database, postgresql, ray_session, monkeypatch
):
    """P3. The worker group's processes die; the command that holds the lease goes on, then goes silent too."""
    monkeypatch.setattr(actor_module, "BEAT", 0.1)
    url = postgresql.url(database)
    client = start(url, grace=3.0)

    @ray_session.remote(max_retries=0, num_cpus=0)
    def worker(ledger, lease):
        served = connect(ledger)
        epoch = served.open(lease, "drawn by the worker", 0).epoch
        served.authorise(lease, epoch, "d/train", 1)
        os.kill(os.getpid(), signal.SIGKILL)

    books = Books(Ledger(url))
    plan = books.show("d/train").price(STEPS)
    with client.holding("command"):
        assert client.reserve("run", "command", [STEPS, HISTOGRAM]).fits
        with pytest.raises(ray_session.exceptions.WorkerCrashedError):
            ray_session.get(worker.remote(books.ledger.identity, "run"))
        burnt = books.show("d/train").spent_cost
        assert burnt > 0
        time.sleep(4.0)  # longer than the grace: heartbeats keep the reservation
        assert books.show("d/train").reserved_cost == plan - burnt
        again = client.open("run", "another worker group", 0)
        assert client.authorise("run", again.epoch, "d/train", 1).cost == burnt
    deadline = time.monotonic() + 60
    with client.holding("somebody else"):  # whose heartbeats find the dead
        while books.show("d/train").reserved_cost and time.monotonic() < deadline:
            time.sleep(0.1)
    assert [row["body"]["status"] for row in entries(url, "expire")] == ["its holder died"]
    account = books.show("d/train")
    assert (account.spent_cost, account.reserved_cost) == (2 * burnt, 0), "what was authorised is never refunded"
    with pytest.raises(PurserError, match="is over"):
        client.authorise("run", again.epoch, "d/train", 2)


def test_a_database_that_stops_and_starts_loses_no_call(database, postgresql, ray_session):
    url = postgresql.url(database)
    client = start(url)
    assert client.reserve("run", "me", [STEPS, HISTOGRAM]).fits
    epoch = client.open("run", "nonce", 0).epoch
    first = client.authorise("run", epoch, "d/train", 1)
    postgresql.stop("immediate")
    try:
        impatient = AccountantClient(ray_session.get_actor(ACCOUNTANT, namespace=NAMESPACE), patience=0.5)
        with pytest.raises(Unreachable, match="nothing is granted"):
            impatient.authorise("run", epoch, "d/train", 2)
        # An accountant that restarts meanwhile must not die of it: it would never be made again.
        ray_session.kill(ray_session.get_actor(ACCOUNTANT, namespace=NAMESPACE), no_restart=False)
        with pytest.raises(Unreachable):
            impatient.describe()
    finally:
        postgresql.start()
    assert client.authorise("run", epoch, "d/train", 1) == first
    assert client.authorise("run", epoch, "d/train", 2).start == 10
    assert len(entries(url, "authorise")) == 2


def test_the_wrong_ledger_or_protocol_is_refused(sqlite, ray_session, tmp_path, monkeypatch):
    start(sqlite)
    with pytest.raises(UsageError, match="Nothing was charged"):
        start(f"sqlite:///{tmp_path}/other.db")  # get_if_exists hands back the one that is there
    monkeypatch.setattr("cluster.accounting.actor.PROTOCOL", PROTOCOL + 1)
    with pytest.raises(UsageError, match=f"protocol {PROTOCOL + 1}"):
        connect(Ledger(sqlite).identity)


def test_nothing_but_what_is_listed_can_be_asked_for(sqlite, ray_session):
    client = start(sqlite)
    assert client.books("names") == ["d/train", "d/validation"]
    for ask in (client.books, client.leases):
        for act in ("ledger", "__class__", "__init__", "reserve", "close_all"):
            with pytest.raises(UsageError, match=f"no act '{act}'"):
                ask(act)


def test_an_accountant_that_is_replaced_is_followed(sqlite, ray_session):
    """By who holds a lease (P4): to the new one, if it keeps the same ledger in the same words, and to no other."""
    client, books = start(sqlite), Books(Ledger(sqlite))
    assert client.reserve("run", "run", [STEPS]).fits
    attempt = client.open("run", "nonce", 0)
    assert client.authorise("run", attempt.epoch, "d/train", 1)
    assert stop()
    start(sqlite)
    assert client.authorise("run", attempt.epoch, "d/train", 2)
    assert [row["block"] for row in books.history("d/train") if row["kind"] == "authorise"] == [1, 2]
    other = sqlite.replace("ledger", "other")
    init(other)
    assert stop()
    start(other)
    hasty = AccountantClient(client._handle, patience=2.0)
    hasty.described = client.described
    with pytest.raises(Unreachable):
        hasty.authorise("run", attempt.epoch, "d/train", 3)
    assert len([row for row in books.history("d/train") if row["kind"] == "authorise"]) == 2


def test_no_accountant_no_training(sqlite, ray_session):
    with pytest.raises(UsageError, match="none runs"):
        connect(Ledger(sqlite).identity)


def test_a_silent_accountant_fails_closed(ray_session):
    @ray_session.remote
    class Silent:
        def authorise(self, *_arguments):
            time.sleep(60)

    client = AccountantClient(Silent.remote(), patience=1.0)
    with pytest.raises(Unreachable, match="not charged"):
        client.authorise("run", 1, "d/train", 1)


def test_an_accountant_without_its_ledger_grants_nothing(sqlite, ray_session, home):
    client = start(sqlite, Known)
    handle = ray_session.get_actor(ACCOUNTANT, namespace=NAMESPACE)
    process = ray_session.get(handle.pid.remote())
    (home / "ledger.db").unlink()
    for left in home.glob("ledger.db-*"):
        left.unlink()
    ray_session.kill(handle, no_restart=False)
    while Path(f"/proc/{process}").exists():  # it has the file open still
        time.sleep(0.05)
    with pytest.raises(PurserError):
        client.reserve("run", "me", [STEPS, HISTOGRAM])


def test_a_delayed_close_leaves_a_newer_attempt_alone(sqlite, ray_session):
    """The command timed out on `close`, was started again with --resume, and only then the call arrived."""
    client = start(sqlite)
    handle = ray_session.get_actor(ACCOUNTANT, namespace=NAMESPACE)
    assert client.reserve("run", "me", [STEPS, HISTOGRAM]).fits
    decided = client.open("run", "first", 0).epoch
    newer = client.open("run", "second", 0).epoch
    ray_session.get(handle.close.remote("run", "release", "stopped", decided))
    assert client.authorise("run", newer, "d/train", 1)
    client.close("run", "release", "stopped")
    with pytest.raises(PurserError, match="is over"):
        client.authorise("run", newer, "d/train", 2)


def test_the_class_itself_needs_no_ray(home):
    home.mkdir()
    plain = Accountant(f"sqlite:///{home}/ledger.db")
    assert plain.describe()["protocol"] == PROTOCOL
    assert repr(plain) == "Accountant(purser)"
