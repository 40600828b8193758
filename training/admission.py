"""Before anything runs: the job against the books. Is this the data and the budget that the owner granted?

Reads the source on the driver, for its HMAC only. Nothing is charged here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cluster.accounting.answers import Shortage
from cluster.accounting.books import Account, Books
from cluster.accounting.costs import affordable_steps, least_noise_multiplier
from cluster.accounting.mechanisms import Charge, DiscreteGaussian
from cluster.errors import UsageError
from training.config import Job
from training.data import declared, image_of


def admit(books: Books, job: Job, plans: Mapping[str, Sequence[Charge]], trials: int) -> tuple[list[Account], bool]:
    """The accounts of `job`, made from it if they are not there (embedded ledgers only); and whether they were made.

    Args:
        plans: account → the charge of each candidate run, from which a new account's order is chosen.

    Raises:
        UsageError: the source or a declared fact is not the account's.
    """
    dataset = job.dataset([source_of(books, job)])
    if books.exists(job.account):
        return books.check(dataset, job.privacy.epsilon, job.privacy.delta), False
    if not books.embedded:
        raise UsageError(
            f"account: {job.account} is not in {books.place}; on a shared ledger its owner makes it first, with "
            "`purser budget create JOB`, on a cluster with --address. Nothing was charged."
        )
    return books.create(dataset, job.privacy.epsilon, job.privacy.delta, plans, trials), True


def source_of(books: Books, job: Job) -> str:
    """The HMAC of the job's source, after checking that every column that the job names is where it is needed, and that
    what it declares public is no private source.

    Raises:
        UsageError: one of these does not hold.
    """
    from training import identity, sources
    from training.preparation import fingerprint_of

    found, key = sources.private(job), books.source_key()
    image_of(job.model, declared(job.data))
    source = fingerprint_of(found, key)
    otherwise = {"evaluation": "write evaluation.on: validation", "audit": "leave it out"}
    for section, what in otherwise.items():
        if getattr(job, section).source is None:
            continue
        beside = sources.public(job, section)
        digests = identity.digests(beside)
        beside.check_records(len(digests))
        public = identity.fingerprint(digests, identity.in_order(digests)[0], key)
        # No more than this can be checked: an answer about single records would tell who is in the data.
        if public == source or books.registered(public):
            raise UsageError(
                f"{section}.source: it is the source of a dataset in this ledger, so it is not public; name a file of "
                f"other people's records, or {what}."
            )
    return source


def plans_of(charges: Sequence[Sequence[Charge]]) -> dict[str, list[Charge]]:
    """account → the different charges that candidate runs (each a list of charges) may ask of it."""
    plans: dict[str, list[Charge]] = {}
    for candidate in charges:
        for charge in candidate:
            known = plans.setdefault(charge.account, [])
            if charge not in known:
                known.append(charge)
    return plans


def what_would_fit(job: Job, accounts: Sequence[Account], shortages: Sequence[Shortage]) -> str:
    """One sentence on what the remaining budget would pay for, for a run that it cannot pay for."""
    nothing = "Nothing fits any more; the account is at its end."
    clauses = []
    for shortage in shortages:
        account = next(a for a in accounts if a.account == shortage.account)
        charge = next(c for c in job.charges() if c.account == shortage.account)
        left = account.remaining_cost
        if isinstance(charge.mechanism, DiscreteGaussian):
            # RDP falls with the square of the noise.
            noise = math.sqrt(account.price(charge) / left) * job.evaluation.noise if left > 0 else math.inf
            if noise > 0.999 * job.evaluation.most_noise:
                return nothing
            clauses.append(f"evaluation.noise={math.ceil(noise * 10) / 10:g} or more")
            continue
        sigma = least_noise_multiplier(charge, account.order, left)
        steps = affordable_steps(charge, account.order, left)
        offers = []
        if sigma is not None:
            offers.append(f"training.noise_multiplier={sigma:g} or more at {charge.steps} steps")
        if steps:
            offers.append(f"training.steps={steps} or fewer at noise_multiplier {job.training.noise_multiplier:g}")
        if not offers:
            return nothing
        clauses.append(", or ".join(offers))
    return f"What would fit: {'; together with '.join(clauses)}." if clauses else nothing
