"""What runs on each Ray Train worker: check, rehearse, open the attempt, then block by block authorise and train.

Everything here is inside the boundary. What leaves: step counts as planned, noised metrics, noised weights, and errors
that carry our own sentence or a type and a place, never a library's message (P13).
"""

from __future__ import annotations

import secrets
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from cluster.accounting.actor import connect
from cluster.accounting.mechanisms import DiscreteGaussian
from cluster.environment import code_hash
from cluster.errors import PurserError, UsageError, without_content
from training import data
from training.config import Job, parse
from training.engine.sampling import Shard
from training.engine.trainer import PrivateTrainer
from training.evaluation import noised_accuracy
from training.models import rehearsed
from training.release import write_weights


def train_worker(config: dict[str, Any]) -> None:
    """The training loop function that Ray Train runs on every worker; `config` is public and shows in the dashboard."""
    failure: PurserError | None = None
    try:
        _train(config)
    except PurserError as error:
        failure = type(error)(*error.args)
    except Exception as error:  # noqa: BLE001 (whatever it is, its message may print records)
        failure = PurserError(f"worker: it failed with {without_content(error)}; what was authorised is spent.")
    if failure is not None:
        raise failure  # out here, so that no other exception is chained to it


def _train(config: dict[str, Any]) -> None:
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if code_hash() != config["code"]:
        raise UsageError(
            "import: this worker would run other code than the driver (another version, or a file named like one of "
            "our packages); install the same purser on every node. Nothing was charged."
        )
    job = parse(Job, config["job"])
    lease, folder = config["lease"], Path(config["folder"])
    train_account, validation_account = job.accounts
    client = connect(config["ledger"])
    key = client.partition_key(job.account)
    job = job.model_copy(update={"data": data.declared(job.data)})
    trainer, _ = rehearsed(job)
    run = trainer.run

    table = data.read(job.data, job.privacy.unit)
    if data.fingerprint(table, client.source_key()) not in client.show(train_account).dataset.sources:
        raise UsageError("data.source: its content changed while the run was starting; nothing was charged.")
    shard = _shard(data.load(job, table, key, "train", rank, world))

    done = _restore(trainer)
    attempt = _from_rank_0(lambda: client.open(lease, secrets.token_hex(16), done))
    if attempt.charges != {charge.account: charge for charge in (run.charge(train_account), job.charges()[1])}:
        raise PurserError(
            "training: what would run is not what was reserved (another noise_multiplier, batch size, steps or "
            "evaluation.noise); nothing was charged."
        )
    block = 0
    ran = done
    while True:
        block += 1
        number = block
        grant = _from_rank_0(lambda: client.authorise(lease, attempt.epoch, train_account, number))  # noqa: B023
        if grant is None:
            break
        trainer.steps(shard, grant.stop - grant.start)
        ran = done + grant.stop
        _report(trainer, {"steps": ran, "attempt": attempt.attempt}, rank)

    metrics: dict[str, Any] = {}
    if rank == 0:
        if ran and client.authorise(lease, attempt.epoch, validation_account, 1):
            histogram = job.charges()[1].mechanism
            assert isinstance(histogram, DiscreteGaussian)
            metrics = noised_accuracy(trainer.model, _shard(data.load(job, table, key, "validation", 0, 1)), histogram)
        if ran:
            write_weights(trainer.unhook(), folder)
    status = "completed" if ran >= run.steps else "stopped" if ran else "refused"
    # With a checkpoint, even if the last block has left one: Ray Train's result is the newest report that has one.
    _report(trainer, {"steps": ran, "attempt": attempt.attempt, "status": status, **metrics}, rank)


def _shard(encoded: data.Encoded) -> Shard:
    return Shard(torch.from_numpy(encoded.features), torch.from_numpy(encoded.labels), encoded.offsets)


def _from_rank_0(ask: Any) -> Any:
    """Let rank 0 ask the accountant and every rank hear the answer; a refusal or silence stops all of them."""
    if not dist.is_initialized():
        return ask()
    answer = [ask() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _restore(trainer: PrivateTrainer) -> int:
    """Load the last committed checkpoint, if there is one; returns the steps that are in it."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return 0
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder) / "state.pt", weights_only=True)
    trainer.load_state_dict(state)
    return int(state["steps"])


def _report(trainer: PrivateTrainer, metrics: dict[str, Any], rank: int) -> None:
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save({**trainer.state_dict(), "steps": metrics["steps"]}, Path(folder) / "state.pt")
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
