"""A privacy statement for people: in Markdown, and as an HTML page. Both are made of the same pieces.

A pure function of the statement: nothing is added, recomputed or left out, but that metrics are shown by name (P13).
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from cluster.accounting.costs import bound_text, epsilon_text
from training.metrics import by_group, in_words
from training.page import Markup, definitions, items, plain, table, tag, whole
from training.statement import Partition, Statement


class Code(str):
    """Text that is copied rather than read: a hash."""


@dataclass(frozen=True)
class Heading:
    """A heading within the statement."""

    text: str


@dataclass(frozen=True)
class Facts:
    """Names and what they stand for."""

    pairs: Sequence[tuple[str, object]]


@dataclass(frozen=True)
class Table:
    """Rows under heads."""

    heads: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True)
class Lines:
    """A list."""

    lines: Sequence[str]


Piece: TypeAlias = str | Heading | Facts | Table | Lines


def markdown(said: Statement) -> str:
    """The statement as a file that anything shows."""
    lines = [f"# {_line(_title(said))}", ""]
    for piece in (*_pieces(said), *_ending(said)):
        match piece:
            case Heading():
                lines.append(f"## {_line(piece.text)}")
            case Facts():
                lines += [f"- {_line(name)}: {_line(value)}" for name, value in piece.pairs]
            case Table():
                rows = [piece.heads, ["---"] * len(piece.heads), *piece.rows]
                lines += ["| " + " | ".join(_line(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
            case Lines():
                lines += [f"- {_line(line)}" for line in piece.lines]
            case _:
                lines.append(_line(piece))
        lines.append("")
    return "\n".join(lines)


def page(said: Statement) -> str:
    """The statement as a page of its own."""
    return whole(_title(said), *section(said), *_tags(_ending(said)))


def section(said: Statement) -> list[Markup]:
    """The statement as a part of a page which tells by itself what is not covered, and by which libraries."""
    return list(_tags(_pieces(said), inner=True))


def _tags(pieces: Iterator[Piece], inner: bool = False) -> Iterator[Markup]:
    for piece in pieces:
        match piece:
            case Heading():
                yield tag("h3" if inner else "h2", piece.text)
            case Facts():
                yield definitions(piece.pairs)
            case Table():
                rows = [[tag("code", cell) if isinstance(cell, Code) else cell for cell in row] for row in piece.rows]
                yield table(piece.heads, rows)
            case Lines():
                yield items(piece.lines)
            case _:
                yield tag("p", piece)


def _line(value: object) -> str:
    """`value` on one line of Markdown, in which nothing is markup."""
    return html.escape(plain(value), quote=False)


def _title(said: Statement) -> str:
    return f"Privacy statement of {said.run}"


def opening(said: Statement) -> str:
    """The promise, in a sentence."""
    protected, guarantee = said.protected, said.guarantee
    return (
        f"Each {unit_of(protected.unit)} of the dataset {protected.dataset} is protected by "
        f"({exact(guarantee.epsilon)}, {exact(guarantee.delta)})-differential privacy for {guarantee.scope}."
    )


def _pieces(said: Statement) -> Iterator[Piece]:
    yield opening(said)
    yield Facts(list(_facts(said)))
    yield Heading("The budget")
    yield Table(
        ["account", "budget ε", "δ", "order", "ε of this run", "spent of the budget", "ledger head"],
        [[*_budget(part), Code(f"{part.head.seq}:{part.head.hash}")] for part in said.partitions],
    )
    yield (
        "A unit is in one partition only, so the guarantee of the two accounts together is that of one. The ε of this "
        "run alone may not be added to that of others: the budget is what bounds them all."
    )
    yield Heading("Charges of this run")
    yield Table(
        ["account", "entry", "steps", "cost (1e-12 RDP)", "hash"],
        [
            [part.account, charge.seq, charge.steps, f"{charge.cost:,}", Code(f"{charge.hash[:16]}…")]
            for part in said.partitions
            for charge in part.charges
        ],
    )
    yield Heading("What was reserved for it")
    yield Table(
        ["on", "mechanism", "times", "in blocks of", "authorised, repeated ones included"],
        [
            [part.account, mechanism(plan.mechanism), plan.steps, plan.block, part.authorised_steps]
            for part in said.partitions
            if (plan := part.planned)
        ],
    )
    if figure := in_words(metrics := said.released.metrics):
        yield Heading(f"Metrics: {said.evaluation.figure}")
        yield f"{figure} ({said.evaluation.error}).".capitalize()
        if groups := by_group(metrics):
            yield Lines(groups)
    yield Heading("What was checked")
    yield Table(["layer", "check", "result", "how"], [[c.layer, c.check, c.result, c.how] for c in said.checks])
    yield Heading("Audits")
    yield Lines([audit(one) for one in said.audits]) if said.audits else "No audit was made of this release."
    yield Heading("Withheld")
    yield Lines(said.withheld)
    for name, made in (("Generated", said.generated), ("Embedded", said.embedded)):
        if made:
            yield Heading(f"{name} with it")
            yield Facts([(key.replace("_", " "), words(value)) for key, value in made.items()])


def _ending(said: Statement) -> Iterator[Piece]:
    yield Heading("Not covered")
    yield Lines([f"{line}." for line in said.excluded])
    yield Heading("Libraries")
    yield f"{words(said.accounting.libraries)}."


def _facts(said: Statement) -> Iterator[tuple[str, object]]:
    protected, released = said.protected, said.released
    yield "run", said.run
    yield "made at", said.made_at
    yield "setting", said.setting.model
    yield "trusted", said.setting.trusted
    yield "who sees what leaves", said.setting.sees
    yield "neighbouring datasets", f"differ by {protected.adjacency}"
    yield "records of a unit", f"at most {protected.max_records_per_unit} are used"
    yield "units declared", protected.declared_units
    yield "δ below 1/units", words(protected.delta_below_one_over_units)
    yield "released", f"the {released.target} in {released.file}"
    for name, digest in released.sha256.items():
        yield f"SHA-256 of {name}", digest
    yield "judged by", f"{said.evaluation.figure} ({said.evaluation.error})"
    yield "tuning", said.tuning
    yield "mode of tuning", said.mode
    for key, value in said.accounting:
        if key != "libraries":
            yield f"accounting: {key.replace('_', ' ')}", value
    for key, value in said.training:
        if value is not None:
            yield key.replace("_", " "), words(value)
    yield "public data", said.public_data
    yield "schema", said.schema_


def _budget(part: Partition) -> list[object]:
    return [
        part.account,
        exact(part.epsilon),
        exact(part.delta),
        part.order,
        epsilon_text(part.epsilon_of_run),
        share(part.spent_cost, part.budget_cost),
    ]


def audit(one: Mapping[str, Any]) -> str:
    """One audit in a sentence: what was guessed, what it proves, what was claimed. A low bound proves nothing."""
    named = ("method", "score", "canaries", "guesses", "correct", "confidence", "delta", "epsilon_lower_bound")
    if any(key not in one for key in (*named, "ceiling", "epsilon_claimed", "verdict")):
        return words(one)
    least, most = bound_text(one["epsilon_lower_bound"]), bound_text(one["ceiling"])
    claimed = "no bound" if one["epsilon_claimed"] is None else f"≤ {epsilon_text(one['epsilon_claimed'])}"
    return (
        f"{one['method']}, {one['score']}: {one['canaries']} canaries, {one['guesses']} guesses, "
        f"{one['correct']} right: ε ≥ {least} at {100 * one['confidence']:g} %, of {most} that it could have shown "
        f"(claimed {claimed} at δ' = {exact(one['delta'])}): {one['verdict']}"
    )


def mechanism(form: Mapping[str, Any]) -> str:
    """A mechanism's JSON form in words."""
    facts = {key: f"{len(v)} different" if isinstance(v, list) else v for key, v in form.items() if key != "version"}
    kind = str(facts.pop("kind", "unknown")).replace("_", " ")
    return f"{kind}: {words({k: mechanism(v) if isinstance(v, Mapping) else v for k, v in facts.items()})}"


def unit_of(unit: str) -> str:
    """What a privacy unit is called."""
    return "record (row)" if unit == "row" else unit


def words(value: object) -> str:
    """A value of a job or a statement, in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {words(one)}" for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return "; ".join(map(words, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def exact(number: float) -> str:
    """A granted ε or δ, to the last digit: rounding could understate it."""
    return repr(number).removesuffix(".0")


def share(cost: int, budget: int) -> str:
    """What part of a budget a cost is."""
    return "<0.1%" if 0 < cost / budget < 0.0005 else f"{cost / budget:.1%}"
