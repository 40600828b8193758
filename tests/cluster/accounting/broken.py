"""Accountants that are broken on purpose, one way each: the tests beside this file must find every one of them."""

from __future__ import annotations

from dataclasses import replace

import sqlalchemy as sa
from bookkeeping import TRAIN

from cluster.accounting import databases
from cluster.accounting.answers import Answer, Shortage
from cluster.accounting.leases import Leases
from cluster.accounting.ledger import Ledger
from cluster.accounting.views import Draft
from cluster.errors import PurserError


class ForgetsReservations(Leases):
    """Admits against what is spent only, as a budget without leases would."""

    def _fits(self, view, charges):
        short = []
        for charge in charges:
            account = self.books.read(view, charge.account)
            left = account.budget_cost - account.spent_cost
            if account.price(charge) > left:
                short.append(Shortage(account.account, account.price(charge), left, 0))
        return Answer(not short, tuple(short))


class NoFence(Leases):
    """Lets any process that knows the lease authorise, whatever its epoch."""

    def _authorise(self, draft, lease, epoch, account, block):
        now = self._state(draft, lease, account).epoch
        return super()._authorise(draft, lease, now, account, block)


class Refunds(Leases):
    """Gives back the last block when a lease is closed, on the holder's word that it never ran."""

    def _close(self, draft, lease, kind, status, epoch=None):
        before = draft.appended
        spent = super()._close(draft, lease, kind, status, epoch)
        if spent.get(TRAIN) and draft.appended != before and not draft.by_key(f"refund:{lease}"):
            draft.append(account=TRAIN, kind="release", key=f"refund:{lease}", spent=-1, body={"epoch": 0})
        return spent


class ChargesTwice(Leases):
    """Has no idempotency: a repeated call, sent because an answer was lost, pays once more."""

    def authorise(self, lease, epoch, account, block):
        grant = super().authorise(lease, epoch, account, block)

        def again(draft):
            last = draft.last(account)
            if grant and last["kind"] == "authorise" and last["reserved_after"] >= grant.cost:
                draft.append(
                    account=account,
                    kind="authorise",
                    key=f"again:{last['seq']}",
                    cost=grant.cost,
                    spent=grant.cost,
                    reserved=-grant.cost,
                    lease=lease,
                    lease_reserved=max(0, last["lease_reserved_after"] - grant.cost),
                    body={"epoch": epoch, "by": "", "mechanism": None, "steps": 0},
                    attempt=last["attempt"],
                    block=0,
                )

        self.ledger.write(again)
        return grant


class ForgetsWhoAsked(Leases):
    """Gives every process that opens a lease the attempt that is there, whatever its nonce."""

    def _open(self, draft, lease, nonce, done, judged):
        return super()._open(draft, lease, "the same for all", done, judged)


class ExpiresWithoutFence(Leases):
    """Releases what a dead holder had reserved, but leaves its epoch be: the holder was only slow, and goes on."""

    def _close(self, draft, lease, kind, status, epoch=None):
        if kind != "expire":
            return super()._close(draft, lease, kind, status, epoch)
        before = {name: self._state(draft, lease, name) for name in draft.accounts_of_lease(lease)}
        spent = super()._close(draft, lease, kind, status, epoch)
        for name, state in before.items():
            draft.memo(name)[lease] = replace(state)
        return spent


class ClosesLate(Leases):
    """Closes whatever is there, also on the word of a holder that meant an earlier attempt."""

    def _close(self, draft, lease, kind, status, epoch=None):
        return super()._close(draft, lease, kind, status, None)


class TrustsMemo(Draft):
    """Remembers what it knew of a lease, without a look at whether somebody else has written since."""

    def memo(self, account):
        head, known = self._memos.get(account, ("", {}))
        self._memos[account] = (head, known)
        return known


class WithoutLock(Ledger):
    """Relies on the server's transactions alone."""

    def __init__(self, url):
        super().__init__(url)
        for begin in (databases._begin_postgresql, databases._begin_sqlite):
            if sa.event.contains(self._engine, "begin", begin):
                sa.event.remove(self._engine, "begin", begin)
        if self.embedded:
            sa.event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN DEFERRED"))


class AnswersBeforeCommit(Ledger):
    """Answers as soon as it has decided: a commit that fails afterwards is nobody's business any more."""

    def _serve(self, requests):
        try:
            super()._serve(requests)
        finally:
            for request in requests:
                if hasattr(request, "_answer"):
                    request._error = None


class FailsTogether(Ledger):
    """Lets whoever shares a commit share its failure, too."""

    def _serve(self, requests):
        try:
            self._commit(requests)
        except Exception as error:  # noqa: BLE001
            self._memos.clear()
            for request in requests:
                request.fail(PurserError(f"ledger: {type(error).__name__}"))
        else:
            for request in requests:
                request.ended = True
