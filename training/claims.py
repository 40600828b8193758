"""The fixed sentences of a privacy statement: what is trusted, withheld, counted how, checked, and not covered.

Each must be true of every release. Whoever changes what this house does before something leaves, changes it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from training.config import Job

Mode = Literal["none", "filter", "select"]
Layer = Literal["guarantee", "algorithm and code", "data and trust"]
Result = Literal["passed", "not checked", "excluded"]

ADJACENCY = "one unit with all of its records added or removed"
SCOPE = "everything ever released from this dataset through this ledger, tuning and evaluation included"
SETTING = {
    "model": "central differential privacy: records are read as they are, and noise is added before anything leaves",
    "trusted": "the data's owner, this machine and the cluster's operators",
    "sees": "whoever is given what is released: all of it, for ever",
}
METHOD = (
    "Rényi filter at one fixed integer order per account (Feldman and Zrnic 2021); costs are integers of 1e-12 RDP, "
    "rounded up, and durable before the step that they are for"
)
CONVERSION = (
    "ε = RDP + log(1 − 1/α) − (log δ + log α)/(α − 1) (Canonne, Kamath and Steinke 2020), once per account; budgets "
    "are rounded down"
)
NOISE = (
    "53-bit Gaussian by a ChaCha20 keystream from OS entropy, added on one rank before the sums are reduced, 1 + 2^-10 "
    "times what is charged for"
)
EXCLUDED = (
    "timing, memory use, crashes and out-of-memory stops are side channels outside the guarantee",
    "the guarantee is for idealised real arithmetic with computationally secure randomness; floating-point effects are "
    "mitigated (53-bit noise, a public rounding grid, a margin in the noise) but not proven harmless",
    "the data's owner, this machine and the cluster's operators are trusted; whoever sees only what leaves is not",
    "the books bound what this ledger saw: the same people in another file or another ledger are charged there",
)
_WITHHELD = (
    "the records, what was prepared from them, and how many there are",
    "losses, norms of gradients, clipped shares, sizes of batches: they are not noised, and not shown or logged",
    "checkpoints and the optimizer's states",
    "keys of noise and sampling: they were in memory only",
)
_OTHERS = {
    "none": (),
    "filter": ("the models of all other trials",),
    "select": ("how many candidates there were, and everything of all but the best",),
}
_CHECKS: dict[Layer, tuple[tuple[str, Result, str], ...]] = {
    "guarantee": (
        (
            "one (ε, δ), one unit and one bound on its records for everything",
            "passed",
            "a job that says otherwise than its account does not start",
        ),
        ("δ is below 1/units as declared", "passed", "else no account is made; the number is its owner's word"),
        (
            "every number that the ledger knows follows from it",
            "not checked",
            "purser report RUN --verify does, for whoever may read the ledger",
        ),
    ),
    "algorithm and code": (
        (
            "each block was charged, within the budget, before it ran",
            "passed",
            "the accountant's answer is durable before the workers go on",
        ),
        (
            "what ran is what was reserved",
            "passed",
            "{reserved}",
        ),
        (
            "one unit contributes at most max_grad_norm, whatever its companions",
            "passed",
            "rehearsed by every worker, on synthetic inputs, before the first charge",
        ),
        (
            "noise and samples as they were drawn",
            "not checked",
            "nobody sees them; Purser's tests look at the code that draws them",
        ),
        ("floating point, timing, memory, crashes", "excluded", "see what is not covered"),
    ),
    "data and trust": (
        (
            "the records are those that the accounts were made for",
            "passed",
            "an HMAC over all of them, compared before the first charge",
        ),
        (
            "ranges, categories and what was searched owe nothing to a look at the records",
            "not checked",
            "whoever looked has spent what no ledger saw",
        ),
        ("what is called public is nobody's secret", "not checked", "{public}"),
        ("how the records were collected, and who else has them", "not checked", "their owner's affair"),
    ),
}


def sampling(workers: int) -> str:
    """How units were drawn."""
    own = f"each of {workers} workers draws among units of its own, " if workers > 1 else ""
    return (
        "Poisson over units at sample_rate, as accounted, by a ChaCha20 keystream from OS entropy; "
        f"{own}a step that drew nobody is a step like others"
    )


def withheld(mode: Mode) -> tuple[str, ...]:
    """What does not leave, of a run that was searched for in this `mode`."""
    return (*_WITHHELD, *_OTHERS[mode])


def checks(job: Job, mode: Mode) -> Iterator[tuple[Layer, str, Result, str]]:
    """What was checked before anything of `job` left, by layers of NIST SP 800-226's pyramid."""
    public = []
    if job.evaluation.source is not None or job.audit.source is not None:
        public.append("a file is declared to be; no whole source of this ledger is")
    if not job.model.made_here:
        public.append("what the pretrained model has seen is its maker's word")
    reserved = "σ, q, steps and the evaluation's noise, compared before the first charge"
    if mode == "select":
        reserved = "no candidate costs more than was reserved for, at any order; compared before it ran"
    for layer, rows in _CHECKS.items():
        for check, result, how in rows:
            yield layer, check, result, how.format(public="; ".join(public) or "nothing is", reserved=reserved)
