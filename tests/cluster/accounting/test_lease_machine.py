"""Random lives of leases, with crashes before and after every commit, repeated, late and reordered calls, shared
commits, expiry and three accountants on one ledger, never spend past the budget, never charge less than an observer
outside saw granted, and never refund (P1, P2, P3, P5); and the same machine finds accountants broken on purpose."""

from __future__ import annotations

import pytest
from broken import (
    AnswersBeforeCommit,
    ChargesTwice,
    ClosesLate,
    ExpiresWithoutFence,
    ForgetsReservations,
    ForgetsWhoAsked,
    NoFence,
    Refunds,
    TrustsMemo,
)
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from lease_machine import LeaseMachine
from places import SqlitePlaces

from cluster.accounting import ledger
from cluster.accounting.ledger import Ledger
from cluster.accounting.views import Draft

EXAMPLES = {"sqlite": 80, "postgresql": 20}
SOAK = 10_000

LIGHT = settings(
    stateful_step_count=20,
    deadline=None,
    phases=[Phase.generate],  # shrinking twenty acts on a real database takes minutes; the printed ones can be replayed
    suppress_health_check=list(HealthCheck),
    database=None,
)


def run(places, examples, kinds=None, **more):
    machine = type("Machine", (LeaseMachine,), {"places": places, "kinds": kinds or {}, "engines": {}})
    run_state_machine_as_test(machine, settings=settings(LIGHT, max_examples=examples, **more))


def test_random_lives_of_leases(module_places, soak):
    run(module_places, SOAK if soak else EXAMPLES[module_places.kind])


BROKEN = {
    ForgetsReservations: "more is spent and reserved than was granted",
    NoFence: "an attempt that is over was granted a block",
    Refunds: "refunded|totals of entry",
    ChargesTwice: "totals of entry",
    ForgetsWhoAsked: "one epoch was given to two processes",
    ExpiresWithoutFence: "an attempt that is over was granted a block",
    ClosesLate: "a late word closed a newer attempt",
    AnswersBeforeCommit: "granted, and not written|it was not closed|a block that was paid for was refused",
    TrustsMemo: "a late word closed a newer attempt",  # and would do worse, had the machine gone on
}


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_the_machine_catches_a_broken_accountant(broken, tmp_path, monkeypatch):
    kinds = {}
    if issubclass(broken, Draft):
        monkeypatch.setattr(ledger, "Draft", broken)
    else:
        kinds["ledger" if issubclass(broken, Ledger) else "leases"] = broken
    with pytest.raises(AssertionError, match=BROKEN[broken]):
        run(SqlitePlaces(tmp_path), 400, kinds, derandomize=True, report_multiple_bugs=False)


def test_the_machine_catches_a_broken_accountant_on_postgresql(postgresql_places):
    """One of them, so that what finds them on a file is seen to find them on a server."""
    kept = len(postgresql_places.taken)
    with pytest.raises(AssertionError, match=BROKEN[NoFence]):
        run(postgresql_places, 400, {"leases": NoFence}, derandomize=True, report_multiple_bugs=False)
    postgresql_places.give_back(kept)
