"""Is a privacy statement what the ledger says? Every number of it that the ledger knows is computed again from the
ledger's entries alone: the account's first, what was reserved, each attempt and each charge up to the statement's head.

Nothing is taken from what made the statement. What the ledger cannot know is listed by name, so that nobody takes it
for proven. No Ray, no records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.accounting.books import PARTITIONS, Books
from cluster.accounting.costs import block_cost, budget_cost, covers, epsilon_of
from cluster.accounting.mechanisms import Charge, Composition, PoissonSubsampledGaussian, RepeatAndSelect, to_json
from cluster.errors import UsageError
from training.statement import Entry, Partition, Statement, Trained

# Of the statement's parts those that no entry of the ledger tells of, whoever holds it.
NOT_IN_LEDGER = (
    *("made_at", "setting", "protected.adjacency", "guarantee.scope", "released", "withheld", "accounting"),
    *("training.mechanism", "training.max_grad_norm", "training.model", "training.labels", "training.optimizer"),
    *("training.precision", "training.backend", "training.zero_stage", "tuning", "evaluation", "public_data"),
    *("audits", "checks", "excluded", "generated", "embedded"),
)
# Who changes both is not found: the ledger knows the sample rate that they make.
TOGETHER = "training.expected_batch_size together with training.canaries"
# Which candidate of a selection won is in no ledger either: only that its price covers the one that is named.
OF_A_CANDIDATE = ("training.noise_multiplier", "training.sample_rate", "training.planned_steps")
_CHARGING = ("reserve", "open", "authorise")
_ODD = (AttributeError, KeyError, TypeError, ValueError)  # of a body that is JSON of another shape, or none


@dataclass(frozen=True)
class Finding:
    """One check: what the statement says, and what the ledger says or makes of it."""

    check: str
    holds: bool
    statement: Any
    ledger: Any


@dataclass(frozen=True)
class Proof:
    """Every check of one statement, and the names of its parts that nobody can check by the ledger."""

    findings: tuple[Finding, ...]
    not_in_ledger: tuple[str, ...]

    @property
    def valid(self) -> bool:
        """Whether every check holds."""
        return all(finding.holds for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """The contract's keys."""
        checks = [asdict(finding) for finding in self.findings]
        return {"valid": self.valid, "checks": checks, "not_in_ledger": list(self.not_in_ledger)}


@dataclass
class _Lease:
    """What was reserved, how many steps each attempt was granted, and the last block that each was charged for."""

    charge: Charge | None = None
    granted: dict[int, int] = field(default_factory=dict)
    paid: dict[int, int] = field(default_factory=dict)


@dataclass
class _Told:
    """What the entries of one account say up to a head: of the account, and of one run.

    `charges`: the run's, as entries say; `derived`: as they must be by what was reserved, the attempt and the block;
    `later`: entries of the run after the head that reserve or charge.
    `spent`: by all charges of the account, as they must be; `wrong`: the first that is not so.
    """

    made: Mapping[str, Any]
    spent: int = 0
    count: int = 0
    wrong: str = ""
    charge: Charge | None = None
    charges: list[dict[str, Any]] = field(default_factory=list)
    derived: list[dict[str, Any]] = field(default_factory=list)
    later: list[int] = field(default_factory=list)


def prove(said: Statement, books: Books) -> Proof:
    """Compare `said` with the ledger of `books`, entry by entry."""
    findings, told = [], {}
    for part in said.partitions:
        head = part.head.seq, part.head.hash
        verdict = books.verify(part.account, head)
        holds = verdict.valid and len(head[1]) == 64  # a chain is valid for the first digits of a hash as well
        findings.append(Finding(f"{part.account}: chain and head", holds, "{}:{}".format(*head), verdict.why))
        if not holds:
            continue
        try:
            told[part.account] = _told(books.history(part.account), head[0], said.run)
            findings += _of_account(part, told[part.account])
        except (UsageError, *_ODD) as error:  # hashed as it should be, and yet no entry of ours
            why = f"they are not what an accountant writes ({type(error).__name__})"
            findings.append(Finding(f"{part.account}: entries", False, None, why))
    findings += _of_all(said, told)
    return Proof(tuple(findings), _unknown(said))


def _told(entries: Iterable[Mapping[str, Any]], until: int, run: str) -> _Told:
    rows = list(entries)
    told, leases = _Told(rows[0]["body"]), defaultdict[str, _Lease](_Lease)
    # A head of before the run's end would hide what it was charged from there on.
    told.later = [row["seq"] for row in rows if row["seq"] > until and row["lease"] == run and row["kind"] in _CHARGING]
    for row in rows[:until]:
        kind, body, lease = row["kind"], row["body"], leases[row["lease"]]
        if kind == "reserve":
            lease.charge = Charge.from_json({key: body[key] for key in ("account", "mechanism", "steps", "block")})
        elif kind == "open":
            lease.granted[row["attempt"]] = body["granted"]
        elif kind == "authorise":
            charged = {key: row[key] for key in Entry.model_fields}
            due = charged | _due(lease, row["attempt"], row["block"], told.made["order"])
            told.spent, told.count = told.spent + due["cost"], told.count + 1
            if charged != due and not told.wrong:
                told.wrong = f"entry {row['seq']}: cost {row['cost']}, where {due['cost']} is due"
            if row["lease"] == run:
                told.charges.append(charged)
                told.derived.append(due)
    told.charge = leases[run].charge
    return told


def _due(lease: _Lease, attempt: int, block: int, order: int) -> dict[str, Any]:
    """What block `block` of `attempt` must have been, and must have cost."""
    charge, granted = lease.charge, lease.granted[attempt]
    if charge is None or granted > charge.steps or block != lease.paid.get(attempt, 0) + 1:
        raise UsageError("entries: a charge that nothing was reserved for, or a block out of turn.")
    lease.paid[attempt] = block
    start, stop = (block - 1) * charge.block, min(block * charge.block, granted)
    if start >= stop:
        raise UsageError("entries: a block beyond what was granted.")
    cost = block_cost(charge.mechanism, order, start, stop)
    return {"mechanism": to_json(charge.mechanism), "steps": stop - start, "cost": cost}


def _of_account(part: Partition, told: _Told) -> Iterator[Finding]:
    made, name = told.made, part.account

    def same(field: str, ledger: Any) -> Finding:
        given = getattr(part, field)
        return Finding(f"{name}: {field}", given == ledger, given, ledger)

    for field_ in ("epsilon", "delta", "order"):
        yield same(field_, made[field_])
    budget = budget_cost(made["epsilon"], made["delta"], made["order"])
    yield same("budget_cost", budget)
    if budget != made["budget_cost"]:
        yield Finding(f"{name}: the account's own budget_cost", False, made["budget_cost"], budget)
    yield same("spent_cost", told.spent)
    charge = told.charge
    reserved = charge and {"mechanism": to_json(charge.mechanism), "steps": charge.steps, "block": charge.block}
    planned = part.planned and part.planned.model_dump()
    yield Finding(f"{name}: planned", planned == reserved, planned, reserved)
    yield Finding(f"{name}: nothing of the run after the head", not told.later, [], told.later)
    charges = [charge.model_dump() for charge in part.charges]
    yield _listed(f"{name}: charges", charges, told.charges)
    yield _listed(f"{name}: cost of each charge", charges, told.derived)
    counted = told.wrong or f"{told.count} of this and other runs cost what they must"
    yield Finding(f"{name}: every charge before the head", not told.wrong, None, counted)
    cost = sum(one["cost"] for one in told.derived)
    yield same("authorised_steps", sum(one["steps"] for one in told.derived))
    yield same("cost_of_run", cost)
    yield same("epsilon_of_run", epsilon_of(cost, made["delta"], made["order"]))


def _listed(check: str, given: Sequence[Mapping[str, Any]], ledger: Sequence[Mapping[str, Any]]) -> Finding:
    """Whether two lists of charges are the same; else the first place where they are not."""
    for i in range(max(len(given), len(ledger))):
        ours, theirs = (rows[i] if i < len(rows) else None for rows in (given, ledger))
        if ours is None or theirs is None:
            return Finding(check, False, _entry(ours), _entry(theirs))
        for key in ours:
            if ours[key] != theirs[key]:
                where = f"entry {theirs['seq']}: {key}"
                return Finding(check, False, f"{where} {ours[key]}", f"{where} {theirs[key]}")
    return Finding(check, True, len(given), len(ledger))


def _entry(row: Mapping[str, Any] | None) -> str:
    return "no such charge" if row is None else f"entry {row['seq']} with hash {row['hash']}"


def _of_all(said: Statement, told: Mapping[str, _Told]) -> Iterator[Finding]:
    """What is the same for all accounts, and what was trained."""
    protected, guarantee = said.protected, said.guarantee
    names = [f"{protected.dataset}/{partition}" for partition in PARTITIONS]
    given = [part.account for part in said.partitions]
    yield Finding("partitions", given == names, given, names)
    made = [one.made for one in told.values()]
    facts: list[tuple[str, Any, list[Any]]] = [
        ("protected.dataset", protected.dataset, [one["dataset"]["name"] for one in made]),
        ("protected.unit", protected.unit, [one["dataset"]["unit"] for one in made]),
        ("protected.declared_units", protected.declared_units, [one["dataset"]["units"] for one in made]),
        (
            "protected.max_records_per_unit",
            protected.max_records_per_unit,
            [one["dataset"]["max_records_per_unit"] for one in made],
        ),
        (
            "protected.delta_below_one_over_units",
            protected.delta_below_one_over_units,
            [one["delta"] * one["dataset"]["units"] < 1 for one in made],
        ),
        ("guarantee.epsilon", guarantee.epsilon, [one["epsilon"] for one in made]),
        ("guarantee.delta", guarantee.delta, [one["delta"] for one in made]),
    ]
    for name, value, found in facts:
        one = found[0] if found and all(other == found[0] for other in found) else found
        yield Finding(name, value == one, value, one)
    yield from _trained(said, told.get(names[0]))


def _trained(said: Statement, told: _Told | None) -> Iterator[Finding]:
    """Whether what was trained is what was reserved on the train account, or is covered by the selection that was."""
    training = said.training
    if told is None or told.charge is None:
        yield Finding("training", False, "a run", "nothing was reserved for it on the train account")
        return
    data, charge = told.made["dataset"], told.charge
    selects = isinstance(charge.mechanism, RepeatAndSelect)
    yield Finding("mode", (said.mode == "select") == selects, said.mode, "select" if selects else "none or filter")
    units = data["units"] * (1 - data["validation_fraction"]) + (training.canaries or 0) / 2
    rate = training.expected_batch_size / units
    if isinstance(charge.mechanism, RepeatAndSelect):
        covered = _covered(charge.mechanism, training)
        ran = f"{training.planned_steps} steps at σ = {training.noise_multiplier}, q = {training.sample_rate}"
        yield Finding("training: covered by the selection", covered, ran, "no dearer at any order" if covered else "no")
        yield Finding("training.expected_batch_size", rate == training.sample_rate, rate, training.sample_rate)
        return
    step = charge.mechanism
    if not isinstance(step, PoissonSubsampledGaussian):
        yield Finding("training", False, training.mechanism, step.kind)
        return
    for name, ledger in (
        ("noise_multiplier", step.noise_multiplier),
        ("sample_rate", step.sample_rate),
        ("planned_steps", charge.steps),
    ):
        given = getattr(training, name)
        yield Finding(f"training.{name}", given == ledger, given, ledger)
    batch = round(step.sample_rate * units, 6)
    yield Finding("training.expected_batch_size", rate == step.sample_rate, training.expected_batch_size, batch)


def _covered(selection: RepeatAndSelect, training: Trained) -> bool:
    try:
        step = PoissonSubsampledGaussian(training.sample_rate, training.noise_multiplier)
        return covers(selection, Composition(((step, training.planned_steps),)))
    except UsageError:  # no run has such numbers
        return False


def _unknown(said: Statement) -> tuple[str, ...]:
    """The names of what no ledger knows, of what this statement has."""
    there = said.as_json()
    names = (*NOT_IN_LEDGER, *(OF_A_CANDIDATE if said.mode == "select" else ("mode",)))
    return (*(name for name in names if _has(there, name)), TOGETHER)


def _has(value: Any, name: str) -> bool:
    for key in name.split("."):
        if key not in value:
            return False
        value = value[key]
    return True
