"""`purser report`: what a release says of its privacy, as a page and on the screen; and what a ledger says to that.

Nothing is measured or charged here, no record is near, and a release is read and never changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from cluster.accounting.books import Books
from cluster.accounting.costs import epsilon_text
from cluster.errors import UsageError
from cluster.files import sha256, write_whole
from cluster.screen import Screen
from training.folder import JOB
from training.metrics import in_words
from training.proof import Finding, Proof, prove
from training.release import PAGE, STATEMENT
from training.released import Released, released
from training.rendering import audit, opening, page, share
from training.statement import Statement, read

REPORT = "report.html"  # in the folder of a run or sweep


def report(run: str, screen: Screen) -> dict[str, Any]:
    """Write the page of what `run` released into the run's folder, where a sweep has left one already, and show the
    statement in short; returns the contract's keys.

    Raises:
        UsageError: it released nothing, or its statement is of another schema.
    """
    source = released(run)
    path = source.folder / STATEMENT
    said = read(path, "RUN")
    where = _page_of(source)
    if where.name == REPORT and not (where.exists() and _is_sweep(source)):
        write_whole(where, page(said))
    _show(said, screen)
    screen.say(f"Statement: {path}", markup=False)
    screen.say(f"Report: {where}", markup=False)
    return {"statement": str(path), "report": str(where)}


def _page_of(source: Released) -> Path:
    """Where the page belongs: in the run's folder, or of a release that left it, the one that came with it."""
    home = source.folder.parent
    if (home / JOB).is_file():
        return home / REPORT
    if not (source.folder / PAGE).is_file():
        raise UsageError(f"RUN: {source.folder} holds no {PAGE}; bring the whole release, or name the run.")
    return source.folder / PAGE


def _is_sweep(source: Released) -> bool:
    return "tuning" in json.loads((source.folder.parent / JOB).read_text(encoding="utf-8"))


def _show(said: Statement, screen: Screen) -> None:
    screen.say(opening(said), markup=False)
    for part in said.partitions:
        screen.say(
            f"  {part.account}: ε of this run {epsilon_text(part.epsilon_of_run)}, "
            f"{share(part.spent_cost, part.budget_cost)} of the budget spent by all when it left, "
            f"head {part.head.seq}:{part.head.hash}",
            markup=False,
        )
    if figure := in_words(said.released.metrics):
        screen.say(f"Released: the {said.released.target}, {figure} ({said.evaluation.error}).", markup=False)
    else:
        screen.say(f"Released: the {said.released.target}.", markup=False)
    for one in said.audits:
        screen.say(f"Audit: {audit(one)}", markup=False)
    if not said.audits:
        screen.say("Audits: none.")


def verified(run: str, statement: Path, books: Books, screen: Screen) -> dict[str, Any]:
    """Compare the file `statement`, which is of `run`, with the ledger of `books`; returns the contract's keys.

    Raises:
        UsageError: it is no statement, of another schema, or of another run.
    """
    said = read(statement, "--verify")
    if said.run != run:  # the lease's own name will do, where no release is at hand
        theirs = read(released(run).folder / STATEMENT, "RUN").run
        if said.run != theirs:
            raise UsageError(
                f"--verify: {statement} is of {said.run}, and RUN released {theirs}; name one that belongs."
            )
    proof = prove(said, books)
    proof = replace(proof, findings=(*proof.findings, *_files(said, statement.parent)))
    screen.say(_table(proof))
    word = "[green]holds[/]" if proof.valid else "[red]does not hold[/]"
    count = sum(not one.holds for one in proof.findings)
    screen.say(f"The statement {word}" + (f" in {count} of {len(proof.findings)} checks." if count else "."))
    screen.say("The ledger does not know, and nobody can derive from it: " + ", ".join(proof.not_in_ledger) + ".")
    first = said.partitions[0].account if said.partitions else "ACCOUNT"
    screen.say(f"Next: purser budget history {first}", markup=False)
    return {"statement": str(statement.absolute()), "report": None, **proof.as_json()}


def _files(said: Statement, folder: Path) -> Iterator[Finding]:
    """Whether the model's files that lie beside the statement are those that it names."""
    for name, digest in said.released.sha256.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            yield Finding(f"released: {name}", False, digest, "no file of a release has such a name")
        elif (folder / name).is_file():
            found = sha256(folder / name)
            yield Finding(f"released: {name}, the file beside it", found == digest, digest, found)


def _table(proof: Proof) -> Table:
    table = Table("check", "", "the statement says", "the ledger says")
    for one in proof.findings:
        word = "[green]holds[/]" if one.holds else "[red]does not hold[/]"
        table.add_row(escape(one.check), word, escape(_short(one.statement)), escape(_short(one.ledger)))
    return table


def _short(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping) and "mechanism" in value:
        return f"{value['mechanism'].get('kind')}, {value['steps']} times in blocks of {value['block']}"
    return str(value)
