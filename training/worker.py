"""What runs on each Ray Train worker: check, rehearse, open the attempt, then block by block authorise and train.

Everything here is inside the boundary. What leaves: step counts as planned, noised metrics, noised weights, and errors
that carry our own sentence or a type and a place, never a library's message (P13).
"""

from __future__ import annotations

import functools
import secrets
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from cluster.accounting.actor import AccountantClient, connect
from cluster.accounting.leases import Attempt
from cluster.environment import HOME, code_hash
from cluster.errors import PurserError, UsageError, without_content
from training.audit.canaries import Canaries
from training.config import Job
from training.data import declared
from training.encoding import Encoding
from training.engine.sampling import Shard
from training.engine.trainer import PrivateTrainer
from training.evaluation import PublicRecords, judged
from training.folder import check_shared
from training.jobfile import parse
from training.metrics import only_public
from training.models import rehearsed
from training.preparation import digest
from training.release import keep_rung, write_model
from training.shards import Prepared, beside, public_shard

if TYPE_CHECKING:
    from training.audit.watch import Watch


def train_worker(config: dict[str, Any]) -> None:
    """The training loop function that Ray Train runs on every worker; `config` is public and shows in the dashboard."""
    guarded(_train, config)


def guarded(body: Callable[[dict[str, Any]], None], config: dict[str, Any]) -> None:
    """Run `body`; of an error of a library only a type and a place crosses, of ours its own sentence (P13)."""
    failure: PurserError | None = None
    try:
        body(config)
    except PurserError as error:
        failure = type(error)(*error.args)
    except Exception as error:  # noqa: BLE001 (whatever it is, its message may print records)
        failure = PurserError(f"worker: it failed with {without_content(error)}; what was authorised is spent.")
    if failure is not None:
        raise failure  # out here, so that no other exception is chained to it


@dataclass(frozen=True)
class Rank:
    """One worker of a group that runs the driver's code and speaks to the driver's accountant.

    Args:
        job: what runs, with every column declared.
        key: the dataset's hidden partition key.
    """

    job: Job
    client: AccountantClient
    number: int
    world: int
    key: str

    @staticmethod
    def arrived(config: dict[str, Any]) -> Rank:
        """This worker, after checking that it would run what the driver runs, in the folder that the driver works in;
        no record has been read."""
        context = ray.train.get_context()
        if code_hash() != config["code"]:
            raise UsageError(
                "import: this worker would run other code than the driver (another version, or a file named like one "
                "of our packages); install the same purser on every node. Nothing was charged."
            )
        check_shared(*config["mark"])
        job = parse(Job, config["job"])
        if job.training.device == "gpu":
            torch.cuda.set_device(ray.train.torch.get_device())  # of those on its node, this worker's
        client = connect(config["ledger"])
        return Rank(
            job=job.model_copy(update={"data": declared(job.data)}),
            client=client,
            number=context.get_world_rank(),
            world=context.get_world_size(),
            key=client.partition_key(job.account),
        )

    def records(self, folder: str) -> Prepared:
        """What the driver has prepared in `folder`, after checking that it is of the source that was admitted, and as
        this job says; no record has been read."""
        prepared = Prepared.at(Path(folder))
        if prepared is None:
            raise UsageError(
                f"data.source: {folder} is not there on this node, or not whole; put {HOME} where all nodes see it. "
                "Nothing was charged."
            )
        mark = prepared.manifest["fingerprint"]
        if mark not in self.client.show(self.job.accounts[0]).dataset.sources:
            raise UsageError("data.source: its content changed while the run was starting; nothing was charged.")
        if prepared.manifest["preparation"] != digest(self.job, Encoding.of(self.job), mark, self.key):
            raise UsageError(
                "data.source: what is prepared is not what the job says (another unit, partition, column or "
                "tokenizer); nothing was charged."
            )
        return prepared

    def train_shard(self, prepared: Prepared) -> Shard:
        """The units of the train partition that fall to this rank."""
        return prepared.shard("train", self.number, self.world)

    def canaries(self, config: dict[str, Any]) -> Canaries | None:
        """The canaries that were sealed before the run began; None where the job has none."""
        return Canaries.unsealed(Path(config["folder"]), config["sealed"]) if self.job.audit.canaries else None

    def judged(self, prepared: Prepared) -> Shard | PublicRecords | None:
        """What models are judged on: every unit of the validation partition, or the public file. For rank 0 only."""
        if self.number != 0:
            return None
        if self.job.evaluation.on == "public":
            return PublicRecords(public_shard(self.job))
        return prepared.shard("validation", 0, 1)


def _train(config: dict[str, Any]) -> None:
    rank = Rank.arrived(config)
    job, client, lease = rank.job, rank.client, config["lease"]
    train_account = job.accounts[0]
    trainer, _ = rehearsed(job)
    run = trainer.run
    prepared = rank.records(config["prepared"])
    shard, judges = rank.train_shard(prepared), rank.judged(prepared)
    canaries = rank.canaries(config)
    watch = None
    if canaries is not None:
        from training.audit.watch import Watch

        mine = canaries.part(rank.number, rank.world)
        shard = beside(shard, canaries.shard(job, mine[canaries.inside[mine]]))
        watch = Watch(trainer, canaries.shard(job, mine), canaries.candidates, config["sealed"])

    done = _restore(trainer, watch)
    behind = sum(rung <= done for rung in job.rungs) if len(job.charged) > 1 else 0
    attempt = from_rank_0(lambda: client.open(lease, secrets.token_hex(16), done, behind))
    if attempt.charges != {charge.account: charge for charge in (run.charge(train_account), *job.charges()[1:])}:
        raise PurserError(
            "training: what would run is not what was reserved (another noise_multiplier, batch size, steps or "
            "evaluation.noise); nothing was charged."
        )
    judge = Judge(rank, judges, lease, attempt, Path(config["folder"]))
    block = 0
    ran = done
    while True:
        block += 1
        number = block
        grant = from_rank_0(lambda: client.authorise(lease, attempt.epoch, train_account, number))  # noqa: B023
        if grant is None:
            break
        trainer.steps(shard, grant.stop - grant.start, watch.told if watch is not None else None)
        if watch is not None:
            watch.look()
        before, ran = ran, done + grant.stop
        # With the checkpoint of the same report: an attempt that goes on from it has these rungs behind it.
        metrics = judge.at_rung(trainer, ran) if any(before < rung <= ran for rung in job.rungs) else {}
        _report(trainer, {"steps": ran, "attempt": attempt.attempt, **metrics}, rank.number, watch)

    if watch is not None and ran:
        watch.end(Path(config["folder"]), rank.number, mine)
    metrics = judge.at_end(trainer) if ran else {}
    status = "completed" if ran >= run.steps else "stopped" if ran else "refused"
    # With a checkpoint, even if the last block has left one: Ray Train's result is the newest report that has one.
    _report(trainer, {"steps": ran, "attempt": attempt.attempt, "status": status, **metrics}, rank.number, watch)


class Judge:
    """Judges one attempt's model on its rank 0: at each rung, and at the end. Every time is authorised first (P2), but
    for what is judged on public records.

    What is left of the evaluations that the lease grants is kept for the end: a model without a figure is of no use.

    Args:
        records: what it is judged on; None on other ranks.
    """

    def __init__(
        self, rank: Rank, records: Shard | PublicRecords | None, lease: str, attempt: Attempt, folder: Path
    ) -> None:
        self._rank, self._records, self._lease, self._attempt, self._folder = rank, records, lease, attempt, folder
        self._account = rank.job.accounts[1]
        self._times = 0

    def at_rung(self, trainer: PrivateTrainer, steps: int) -> dict[str, Any]:
        """What is released of the model after `steps` steps, kept beside the weights that have it, so that a run which
        is stopped here has a model to release; empty on other ranks, and where the budget pays for no more than the
        end."""
        granted = self._attempt.steps.get(self._account)
        if self._records is None or (granted is not None and granted - self._times <= 1):
            return {}
        metrics = self._release(trainer, self._records)
        if metrics:
            trainer.check_fixed()
            keep_rung(trainer.model, self._folder, self._rank.job, steps, metrics)
        return metrics

    def at_end(self, trainer: PrivateTrainer) -> dict[str, Any]:
        """What is released of the model that leaves; its weights are written whether or not that could be paid for."""
        if self._records is None:
            return {}
        metrics = self._release(trainer, self._records)
        write_model(trainer.unhook(), self._folder, self._rank.job)
        return metrics

    def _release(self, trainer: PrivateTrainer, records: Shard | PublicRecords) -> dict[str, Any]:
        self._times += 1
        # By what the records are, so that no job says of private ones that they are free.
        free = isinstance(records, PublicRecords)
        if not free and not self._rank.client.authorise(self._lease, self._attempt.epoch, self._account, self._times):
            return {}
        return judged(trainer.model, records, self._rank.job)


def from_rank_0(ask: Any) -> Any:
    """Let rank 0 ask the accountant and every rank hear the answer; a refusal or silence stops all of them."""
    if not dist.is_initialized():
        return ask()
    answer = [ask() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _restore(trainer: PrivateTrainer, watch: Watch | None) -> int:
    """Load the last committed checkpoint, if there is one; returns the steps that are in it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        read = functools.partial(torch.load, weights_only=True, map_location="cpu")
        state = read(Path(folder) / "state.pt")
        mine = Path(folder) / _shard_of(ray.train.get_context().get_world_rank())
        shard = read(mine) if mine.exists() else {}
        seen = shard.pop("canaries", None)
        trainer.load_state_dict(state, shard or None)
        if watch is not None:
            watch.load(seen)
    return int(state["steps"])


def _shard_of(rank: int) -> str:
    return f"shard-{rank}.pt"


def _report(trainer: PrivateTrainer, metrics: dict[str, Any], rank: int, watch: Watch | None) -> None:
    """Report, with a checkpoint: what is whole from rank 0, and from every rank its shard of the optimizer and what it
    has seen of canaries."""
    only_public(metrics)
    shard = trainer.shard_dict() | ({} if watch is None else {"canaries": watch.state()})
    if rank != 0 and not shard:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        if rank == 0:
            torch.save({**trainer.state_dict(), "steps": metrics["steps"]}, Path(folder) / "state.pt")
        if shard:
            torch.save(shard, Path(folder) / _shard_of(rank))
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
