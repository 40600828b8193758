"""How an audit looks on a terminal and in a sentence. Decides nothing; never says that anything is private."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.table import Column, Table

from cluster.accounting.costs import bound_text, epsilon_text

BITS = "log2 of how many tokens there are, less log2 of its rank"


def audit_table(result: Mapping[str, Any]) -> Iterator[object]:
    """What a person reads of an audit: lines and a table."""
    yield (
        f"Audit of {result['run']}: {result['canaries']} {result['kind']} canaries ({result['distinct']} of them "
        f"differ), {result['guesses']} guesses of each score, fixed before the run began."
    )
    table = Table(
        Column("score"),
        Column("right"),
        Column("ε is at least"),
        Column("heuristic"),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for one in result["scores"]:
        right = f"{one['correct']} of {result['guesses']}"
        mark = " ★" if one["score"] == result["score"] else ""
        table.add_row(one["score"] + mark, right, bound_text(one["epsilon_lower_bound"]), bound_text(one["heuristic"]))
    yield table
    said = result["heuristic"]
    yield (
        f"heuristic: {said['method']}; it could have shown at most ε = {said['ceiling']:.2f}, and finds a tenth of the "
        f"noise out in {said['power']:.0%}. No verdict rests on it."
    )
    needed = result["needed"]
    enough = (
        f"{needed} right guesses would contradict that" if needed else "no number of right guesses contradicts that"
    )
    yield f"Claimed of this run alone: ε ≤ {claim(result)} at δ = {result['delta']:g}; {enough}."
    yield (
        f"With a tenth of its noise the run would be found out in {result['power']:.0%} of such audits, if nothing "
        "else lay along a canary's gradient; less often where records are alike."
    )
    for name, one in result["membership"].items():
        if one is not None:
            yield f"Membership inference, {name}: {attack(one)}."
    if (bits := result["exposure"]) is not None:
        yield (
            f"Exposure ({BITS}): in the mean {bits['mean_inside']:.2f} bits where the canary was learnt, "
            f"{bits['mean_outside']:.2f} where not; at most {bits['highest_inside']:.2f} and "
            f"{bits['highest_outside']:.2f}, of {bits['candidates']} tokens."
        )
    yield f"[bold]{in_words(result)}[/]"


def planned(plan: Mapping[str, Any]) -> str:
    """What an audit will be able to show, of `Plan.as_json`."""
    return (
        f"Audit: {plan['canaries']} canaries, {plan['guesses']} guesses of each score; it could show at most ε = "
        f"{bound_text(plan['ceiling'], 2)}, of ε ≤ {claim(plan)} that one run claims at δ = "
        f"{plan['delta']:g}, and would find a tenth of the noise out in {plan['power']:.0%}."
    )


def in_words(result: Mapping[str, Any]) -> str:
    """The verdict, with what it rests on."""
    return (
        f"At {100 * result['confidence']:g}% confidence ε is at least {bound_text(result['epsilon_lower_bound'])} "
        f"({result['score']}): this {result['verdict']}."
    )


def claim(result: Mapping[str, Any]) -> str:
    """The ε that was claimed, rounded up."""
    epsilon = result["epsilon_claimed"]
    return "∞" if epsilon is None else epsilon_text(epsilon)


def attack(said: Mapping[str, Any]) -> str:
    """How well an attack told members from others."""
    rates = ", ".join(
        f"{one['tpr']:.1%} [{one['low']:.1%}, {one['high']:.1%}] of members at {one['target']:.1%} false alarms"
        for one in said["rates"]
    )
    return f"AUC {said['auc']:.3f} [{said['auc_low']:.3f}, {said['auc_high']:.3f}], {rates}"
