"""Before anything runs: the job against the books. Is this the data and the budget that the owner granted?

Reads the source once on the driver, for its HMAC only. Nothing is charged here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cluster.accounting.books import Account, Books
from cluster.accounting.costs import affordable_steps, least_noise_multiplier, price
from cluster.accounting.leases import Shortage
from cluster.accounting.mechanisms import Charge
from training import data
from training.config import Job


def admit(books: Books, job: Job, plans: Mapping[str, Sequence[Charge]], trials: int) -> tuple[list[Account], bool]:
    """The accounts of `job`, made from it if they are not there (embedded ledgers only); and whether they were made.

    Args:
        plans: account → the charge of each candidate run, from which a new account's order is chosen.

    Raises:
        UsageError: the source or a declared fact is not the account's.
    """
    declared = data.declared(job.data)
    data.image_of(job.model, declared)
    source = data.fingerprint(data.read(declared), books.source_key())
    dataset = job.dataset([source])
    if books.exists(job.account):
        return books.check(dataset, job.privacy.epsilon, job.privacy.delta), False
    return books.create(dataset, job.privacy.epsilon, job.privacy.delta, plans, trials), True


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
    for shortage in shortages:
        account = next(a for a in accounts if a.account == shortage.account)
        charge = next(c for c in job.charges() if c.account == shortage.account)
        if charge.account == job.accounts[1]:
            if account.remaining_cost <= 0:
                return "Nothing fits any more; the account is at its end."
            scale = math.sqrt(price(charge, account.order) / account.remaining_cost) * job.evaluation.noise
            return f"An evaluation with evaluation.noise={math.ceil(scale * 10) / 10:g} or more would fit."
        steps = affordable_steps(charge, account.order, account.remaining_cost)
        sigma = least_noise_multiplier(charge, account.order, account.remaining_cost)
        offers = []
        if sigma is not None:
            offers.append(f"training.noise_multiplier={sigma:g} or more at {charge.steps} steps")
        if steps:
            offers.append(f"training.steps={steps} or fewer at noise_multiplier {job.training.noise_multiplier:g}")
        if offers:
            return f"What would fit: {', or '.join(offers)}."
    return "Nothing fits any more; the account is at its end."
