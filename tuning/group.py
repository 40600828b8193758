"""What runs on each worker of a selection's groups: check, rehearse, have the whole selection paid for, then train one
candidate after the other from the sealed queue.

Everything here is inside the boundary, and which candidate runs, how many have run and what they came to stays in it:
nothing is reported to Ray Train or printed, and an error says no more than its type and place (P13).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.accounting.costs import covers
from cluster.accounting.mechanisms import Charge, Composition, RepeatAndSelect, to_json
from cluster.errors import PurserError, without_content
from training.config import Job
from training.engine.sampling import Shard
from training.evaluation import PublicRecords, judged
from training.jobfile import parse
from training.models import rehearsed
from training.release import write_model
from training.worker import Rank, from_rank_0, guarded
from tuning.config import SweepJob
from tuning.sealed import Candidate, Sealed


def group_worker(config: dict[str, Any]) -> None:
    """The training loop function that Ray Train runs on every worker; `config` is public and shows in the dashboard."""
    guarded(_select, config)


def _select(config: dict[str, Any]) -> None:
    rank = Rank.arrived(config)
    job = parse(SweepJob, config["sweep"])
    for run in _to_rehearse(job, config["order"]):
        tried, _ = rehearsed(run.model_copy(update={"data": rank.job.data}))
        tried.unhook()
    prepared = rank.records(config["prepared"])
    train, judges = rank.train_shard(prepared), rank.judged(prepared)
    charges = job.selection(config["order"])
    from_rank_0(lambda: _pay(rank, charges, config["lease"], config["epoch"]))
    sealed = Sealed(Path(config["folder"]))
    while (candidate := from_rank_0(sealed.claim)) is not None:
        failure = None
        try:
            _run(rank, charges, candidate, sealed, train, judges)
        except Exception as error:  # noqa: BLE001 (even our own sentences would tell what the candidate was)
            failure = without_content(error)
        if failure is not None:
            raise PurserError(f"select: a worker failed while it trained ({failure}); what was authorised is spent.")


def _to_rehearse(job: SweepJob, order: int) -> list[Job]:
    """One corner of the space for each model and each way to run it: whatever else differs, the same is rehearsed."""
    alike = {"noise_multiplier", "max_grad_norm", "steps", "block", "optimizer"}
    runs = {}
    for run in job.corners(order):
        how = run.training.model_dump(mode="json", exclude=alike) | {"optimizer": run.training.optimizer.name}
        runs[str((run.model.model_dump(mode="json"), how))] = run
    return list(runs.values())


def _pay(rank: Rank, charges: Sequence[Charge], lease: str, epoch: int) -> None:
    """Have the one block of each account authorised; the same again for every group and every start changes nothing.

    Raises:
        PurserError: the lease is over, or what it holds is not this job's selection; nothing runs.
    """
    for charge in charges:
        grant = rank.client.authorise(lease, epoch, charge.account, 1)
        paid = [entry["mechanism"] for entry in rank.client.charged(lease, charge.account)]
        if grant is None or any(mechanism != to_json(charge.mechanism) for mechanism in paid):
            raise PurserError("select: what would run is not what was reserved; nothing runs.")


def _run(
    rank: Rank,
    charges: Sequence[Charge],
    candidate: Candidate,
    sealed: Sealed,
    train: Shard,
    judges: Shard | PublicRecords | None,
) -> None:
    run = rank.job.with_values(candidate.values)
    trainer, _ = rehearsed(run)
    alone = trainer.run.charge(run.accounts[0]), *run.charges()[1:]
    for whole, one in zip(charges, alone, strict=True):
        assert isinstance(whole.mechanism, RepeatAndSelect)
        if not covers(whole.mechanism, Composition(((one.mechanism, one.steps),))):
            raise PurserError("select: a candidate costs more than the selection was priced for.")
    trainer.steps(train, trainer.run.steps)
    model = trainer.unhook()  # on every rank: with DeepSpeed's hooks on it, no candidate's model would ever be freed
    if judges is not None:
        metrics = judged(model, judges, run)
        write_model(model, candidate.folder, run)
        sealed.keep(candidate, metrics)
