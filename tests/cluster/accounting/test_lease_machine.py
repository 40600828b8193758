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


BROKEN = (
    *(ForgetsReservations, NoFence, Refunds, ChargesTwice, ForgetsWhoAsked, ExpiresWithoutFence, ClosesLate),
    *(AnswersBeforeCommit, TrustsMemo),
)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_the_machine_catches_a_broken_accountant(broken, tmp_path, monkeypatch):
    kinds = {}
    if issubclass(broken, Draft):
        monkeypatch.setattr(ledger, "Draft", broken)
    else:
        kinds["ledger" if issubclass(broken, Ledger) else "leases"] = broken
    # Which of the machine's rules sees it first is chance; none of them sees anything in the true one, above.
    with pytest.raises(AssertionError):
        run(SqlitePlaces(tmp_path), 400, kinds, derandomize=True, report_multiple_bugs=False)


def test_the_machine_catches_a_broken_accountant_on_postgresql(postgresql_places):
    """One of them, so that what finds them on a file is seen to find them on a server."""
    kept = len(postgresql_places.taken)
    with pytest.raises(AssertionError):
        run(postgresql_places, 400, {"leases": NoFence}, derandomize=True, report_multiple_bugs=False)
    postgresql_places.give_back(kept)
