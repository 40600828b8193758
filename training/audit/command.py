"""`purser audit RUN`: from what a finished run saw of its canaries to a verdict.

Reads scores, coins and the ledger; no private record and no model, but for shadow models, which are trained on canaries
and public records. The verdict never says that anything is private: an audit can contradict a claim, or not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from cluster import environment
from cluster.accounting.costs import bound_text
from cluster.errors import UsageError
from cluster.files import write_whole
from cluster.screen import Screen
from cluster.service import open_desk
from training.audit import bounds, membership
from training.audit.canaries import Canaries
from training.audit.plan import SCORES, Plan, charged_plan
from training.audit.power import found_out
from training.config import Job
from training.driver import COMPLETED, STOPPED, Outcome, charged
from training.release import STATEMENT, write_statement
from training.statement import read

AUDIT = "audit.json"  # in a run's folder
METHOD = "one run with canaries under fair coins (Steinke, Nasr and Jagielski 2023)"
HEURISTIC = "Clopper–Pearson intervals, as if canaries of one run were independent runs"
CONTRADICTS = "contradicts the claim"


def audit(run: str, job: Job, screen: Screen, shadows: int = 0) -> dict[str, Any]:
    """Audit the finished `run` of `job`; returns the contract's keys, keeps them in the run's folder, and puts them
    into the statement of what it released.

    Args:
        shadows: how many shadow models to train for the offline likelihood-ratio attack; 0 leaves it out.

    Raises:
        UsageError: it has no canaries, or is not at its end.
    """
    folder = environment.run_folder(run)
    if shadows < 0 or 0 < shadows < 4:
        raise UsageError(f"--shadows: {shadows} was given; write 0, or 4 or more, of which half never saw a canary.")
    if not job.audit.canaries:
        raise UsageError(
            f"RUN: {run} was trained without canaries, so there is nothing to audit it by; write audit: {{canaries: "
            "500}} in its job file and train again, under another charge."
        )
    outcome = Outcome.kept(folder)
    if outcome is None or outcome.status not in (COMPLETED, STOPPED):
        raise UsageError(f"RUN: {run} is not at its end; {environment.going_on('train', run)} goes on with it.")
    seen, sealed = seen_by(folder)
    canaries = Canaries.unsealed(folder, sealed)
    books = open_desk().books
    screen.say(f"Ledger {books.place}")
    facts = canaries.facts
    charges = charged(books, job, run).entries[job.accounts[0]]
    fixed = charged_plan(facts["canaries"], facts["guesses"], facts["confidence"], charges)
    result = assessed(fixed, canaries, seen) | {"run": run, "sealed": sealed}
    result["membership"] = {"loss": None, "lira": None}
    if 0 < canaries.inside.sum() < len(canaries):
        result["membership"]["loss"] = membership.attack(-seen["loss"], canaries.inside).as_json()
        if shadows:
            result["membership"]["lira"] = _lira(job, canaries, seen["loss"], shadows, screen)
    write_whole(folder / AUDIT, json.dumps(result, indent=2, allow_nan=False) + "\n")
    if (folder / "release" / STATEMENT).exists():
        said = read(folder / "release" / STATEMENT, "RUN")
        write_statement(folder / "release", said.model_copy(update={"audits": (result,)}))
    return result


def assessed(fixed: Plan, canaries: Canaries, seen: dict[str, np.ndarray]) -> dict[str, Any]:
    """What the scores say of the claim: every score's bound, the largest of them, and the verdict."""
    inside = canaries.inside
    each: list[dict[str, Any]] = []
    for name in SCORES:
        right = bounds.guessed(seen[name], inside, fixed.guesses)
        low = bounds.one_run(fixed.canaries, fixed.guesses, right, fixed.delta, fixed.beta)
        each.append(
            {
                "score": name,
                "correct": right,
                "epsilon_lower_bound": low,
                "heuristic": _heuristic(fixed, seen[name], inside),
            }
        )
    best = max(each, key=lambda one: (one["epsilon_lower_bound"], one["correct"]))
    shown = fixed.as_json()
    contradicts = best["epsilon_lower_bound"] > fixed.epsilon
    verdict = f"does not contradict it; this audit could have shown at most ε = {bound_text(shown['ceiling'], 2)}"
    return {
        "method": METHOD,
        "score": best["score"],
        **canaries.facts,
        **shown,
        "correct": best["correct"],
        "epsilon_lower_bound": best["epsilon_lower_bound"],
        "verdict": CONTRADICTS if contradicts else verdict,
        "contradicted": contradicts,
        "scores": each,
        "heuristic": _of_heuristic(fixed, inside),
        "exposure": _exposure(canaries, seen["rank"]),
    }


def _heuristic(fixed: Plan, scores: np.ndarray, inside: np.ndarray) -> float:
    """By the guesses "in" alone: how many of those with the highest scores were in, and how many not."""
    top = np.argsort(-scores, kind="stable")[: fixed.guesses // 2]
    true, members = int(inside[top].sum()), int(inside.sum())
    if members in (0, len(inside)):
        return 0.0
    return bounds.heuristic(true, members, len(top) - true, len(inside) - members, fixed.delta, fixed.beta)


def _of_heuristic(fixed: Plan, inside: np.ndarray) -> dict[str, Any]:
    """What it is, the most that it can show, and how often it would find a tenth of the noise out."""
    found = found_out(
        fixed.channel.broken, fixed.canaries, lambda scores, of: _heuristic(fixed, scores, of) > fixed.epsilon
    )
    return {"method": HEURISTIC, "ceiling": _heuristic(fixed, inside.astype(np.float64), inside), "power": found}


def _exposure(canaries: Canaries, ranks: np.ndarray) -> dict[str, float] | None:
    """Of canaries whose last token is one of many: how far it stands out where it was learnt and where not, in bits."""
    if not len(canaries.candidates):
        return None
    found = membership.exposure(ranks, len(canaries.candidates))
    inside = canaries.inside
    return {
        "candidates": len(canaries.candidates),
        "mean_inside": float(found[inside].mean()) if inside.any() else 0.0,
        "mean_outside": float(found[~inside].mean()) if not inside.all() else 0.0,
        "highest_inside": float(found[inside].max(initial=0.0)),
        "highest_outside": float(found[~inside].max(initial=0.0)),
    }


def seen_by(folder: Path) -> tuple[dict[str, np.ndarray], str]:
    """What all ranks of the run in `folder` saw, in the order of the canaries; and the SHA-256 of those.

    Raises:
        UsageError: it is not whole, or not of one set of canaries.
    """
    parts = []
    for path in sorted(folder.glob("canaries-*.npz")):
        with np.load(path, allow_pickle=False) as file:
            parts.append({name: file[name] for name in file.files})
    sealed = {str(part.pop("sealed")) for part in parts}
    numbers = np.concatenate([part["number"] for part in parts]) if parts else np.zeros(0, np.int64)
    if len(sealed) != 1 or not np.array_equal(np.sort(numbers), np.arange(len(numbers))):
        raise UsageError(
            f"RUN: what {folder.name} saw of its canaries is not whole in {folder}; put its files back, or train a new "
            "run."
        )
    order = np.argsort(numbers)
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}, sealed.pop()


def _lira(job: Job, canaries: Canaries, loss: np.ndarray, shadows: int, screen: Screen) -> dict[str, Any]:
    from training.audit.shadows import shadow_losses
    from training.released import in_tenths

    screen.say(f"Training {shadows} shadow models on canaries and public records; nothing is charged.")
    found, had = shadow_losses(job, canaries, shadows, in_tenths(screen, "shadow models"))
    scores = membership.lira(_confidence(loss), _confidence(found), had, fixed_variance=shadows < 64)
    return {"shadows": shadows, **membership.attack(scores, canaries.inside).as_json()}


def _confidence(loss: np.ndarray) -> np.ndarray:
    """log(p / (1 − p)) of p = e^−loss, which over models is nearly Gaussian (Carlini et al. 2022, section VI-A)."""
    some = np.clip(loss, 1e-12, 700.0)
    found: np.ndarray = -some - np.log(-np.expm1(-some))
    return found
