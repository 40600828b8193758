"""The accountant as a real Ray actor: named and detached, rebuilt from the ledger when it dies between commit and reply
(P1: duplicates change nothing), and a client that fails closed (P4)."""

from __future__ import annotations

import time

import pytest

from cluster.accounting.actor import Accountant, AccountantClient, connect, start
from cluster.accounting.books import Books, Dataset
from cluster.accounting.ledger import Ledger
from cluster.accounting.mechanisms import Charge, DiscreteGaussian, PoissonSubsampledGaussian
from cluster.environment import ACCOUNTANT, NAMESPACE
from cluster.errors import PurserError, Unreachable, UsageError

pytestmark = pytest.mark.cluster

STEPS = Charge("d/train", PoissonSubsampledGaussian(0.25, 8.0), 40, 10)
HISTOGRAM = Charge("d/validation", DiscreteGaussian(5.0, 1), 1, 1)


@pytest.fixture
def ledger(home, ray_session):
    """A ledger with one dataset; its accountant is gone after the test."""
    home.mkdir()
    url = f"sqlite:///{home}/ledger.db"
    books = Books(Ledger(url))
    dataset = Dataset("d", "row", 1000, 1, 0.2, ("source",))
    books.create(dataset, 3.0, 1e-4, {"d/train": [STEPS], "d/validation": [HISTOGRAM]}, 4)
    yield url
    for name in ray_session.util.list_named_actors(all_namespaces=True):
        if name["name"] == ACCOUNTANT:
            ray_session.kill(ray_session.get_actor(ACCOUNTANT, namespace=NAMESPACE))
            while any(n["name"] == ACCOUNTANT for n in ray_session.util.list_named_actors(all_namespaces=True)):
                time.sleep(0.05)


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


def test_the_wrong_ledger_or_protocol_is_refused(ledger, ray_session, tmp_path, monkeypatch):
    start(ledger)
    with pytest.raises(UsageError, match="Nothing was charged"):
        start(f"sqlite:///{tmp_path}/other.db")  # get_if_exists hands back the one that is there
    monkeypatch.setattr("cluster.accounting.actor.PROTOCOL", 2)
    with pytest.raises(UsageError, match="protocol 2"):
        connect(Ledger(ledger).identity)


def test_no_accountant_no_training(ledger, ray_session):
    with pytest.raises(UsageError, match="none runs"):
        connect(Ledger(ledger).identity)


def test_a_silent_accountant_fails_closed(ray_session):
    @ray_session.remote
    class Silent:
        def authorise(self, *_arguments):
            time.sleep(60)

    client = AccountantClient(Silent.remote(), patience=1.0)
    with pytest.raises(Unreachable, match="not charged"):
        client.authorise("run", 1, "d/train", 1)


def test_an_accountant_without_its_ledger_grants_nothing(ledger, ray_session, home):
    client = start(ledger)
    (home / "ledger.db").unlink()
    for left in home.glob("ledger.db-*"):
        left.unlink()
    ray_session.kill(ray_session.get_actor(ACCOUNTANT, namespace=NAMESPACE), no_restart=False)
    with pytest.raises(PurserError):
        client.reserve("run", "me", [STEPS, HISTOGRAM])


def test_the_class_itself_needs_no_ray(home):
    home.mkdir()
    plain = Accountant(f"sqlite:///{home}/ledger.db")
    assert plain.describe()["protocol"] == 1
    assert repr(plain) == "Accountant(purser)"
