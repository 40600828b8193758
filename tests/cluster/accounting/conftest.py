"""Both databases for every test of the books: what holds on SQLite must hold on PostgreSQL."""

from __future__ import annotations

import pytest
from bookkeeping import KINDS, Desk, evaluation, run_attempt, training
from crashes import Faults
from places import Place, Places, PostgresqlPlaces, SqlitePlaces
from sharing import NAMES

from cluster.accounting import databases


@pytest.fixture(scope="session")
def postgresql_places(postgresql):
    """Databases of the session's server."""
    places = PostgresqlPlaces(postgresql)
    yield places
    places.end()


@pytest.fixture(scope="module", params=KINDS)
def database(request) -> str:
    """Which database."""
    return request.param


@pytest.fixture(scope="module")
def module_places(database, request, tmp_path_factory) -> Places:
    """Places for as long as a module's tests run."""
    if database == "sqlite":
        places: Places = SqlitePlaces(tmp_path_factory.mktemp("ledgers"))
    else:
        places = request.getfixturevalue("postgresql_places")
    kept = len(places.taken)
    yield places
    places.give_back(kept)


@pytest.fixture
def places(module_places) -> Places:
    """Places for one test."""
    kept = len(module_places.taken)
    yield module_places
    module_places.give_back(kept)


@pytest.fixture
def place(places) -> Place:
    """A ledger that holds the accounts of `digits` and nothing else, on either database."""
    return places.digits()


@pytest.fixture
def desk(place) -> Desk:
    """An accountant on it."""
    return place.desk()


@pytest.fixture
def started(place) -> Desk:
    """An accountant on a ledger with some spending in it."""
    desk = place.desk()
    desk.leases.reserve("lease", "run", [training(), evaluation()])
    run_attempt(desk, "lease", "nonce", 1)
    return desk


@pytest.fixture
def leases(desk):
    """The accountant's leases."""
    return desk.leases


@pytest.fixture
def impatient(monkeypatch):
    """Accountants that sit down from now on wait a second for a writer, not a minute."""
    monkeypatch.setattr(databases, "PATIENCE", 1)


@pytest.fixture
def faults(desk):
    """What befalls its next commits."""
    return Faults(desk)


@pytest.fixture
def running(desk):
    """Eight leases with an attempt each; returns their epochs."""
    for name in NAMES:
        assert desk.leases.reserve(name, name, [training(40), evaluation()]).fits
    return {name: desk.leases.open(name, name).epoch for name in NAMES}
