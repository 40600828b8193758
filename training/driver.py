"""One private run from the driver's side: reserve, fit on Ray Train's workers, close the lease, write the release.

No per-step work happens here. Records come here only to be prepared, where they are not yet.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.accounting.actor import AccountantClient
from cluster.accounting.answers import explain
from cluster.accounting.books import Account, Books
from cluster.environment import code_hash
from cluster.errors import PurserError, without_content
from cluster.files import write_whole
from cluster.session import cpus_per_worker
from training.audit.canaries import digest
from training.config import Job
from training.metrics import RELEASED
from training.release import left, rung_folder

if TYPE_CHECKING:
    from training.preparation import Everywhere

COMPLETED, STOPPED, REFUSED, FAILED = "completed", "stopped", "refused", "failed"
OUTCOME = "outcome.json"  # in a run's folder


@dataclass(frozen=True)
class Outcome:
    """How a run ended: one of the four status words, its noised metrics, and a sentence where it did not complete.

    `rung`: where a scheduler stopped it, the steps after which it was what `metrics` say; 0 for a run that ended by
    itself. What is released is then what it was at that rung, however much further its workers came before the stop
    reached them.
    """

    status: str
    metrics: dict[str, Any] = field(default_factory=dict)
    why: str = ""
    rung: int = 0

    @property
    def closing(self) -> str:
        """How its lease ends: settled for good, or released, so that it may be resumed."""
        return "settle" if self.status == COMPLETED or self.rung else "release"

    def weights(self, folder: Path) -> Path:
        """What the run in `folder` left of the model that has these metrics: see `release.left`."""
        return left(rung_folder(folder, self.rung) if self.rung else folder)

    def keep(self, folder: Path) -> Outcome:
        """Write it to the run's folder, whole or not at all; returns what stands there. A stop at a rung is the last
        word: what becomes of a driver that is being killed is no outcome of its run."""
        if (said := Outcome.kept(folder)) and said.rung:
            return said
        write_whole(folder / OUTCOME, json.dumps(asdict(self)))
        return self

    @staticmethod
    def kept(folder: Path) -> Outcome | None:
        """How the run in `folder` ended, or None where it did not."""
        try:
            return Outcome(**json.loads((folder / OUTCOME).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None


def train(
    client: AccountantClient,
    ledger: str,
    job: Job,
    lease: str,
    by: str,
    folder: Path,
    mark: tuple[str, str],
    callbacks: Sequence[Any] = (),
    everywhere: Everywhere | None = None,
) -> Outcome:
    """Run `job` under `lease`, held by the command `by`; weights and checkpoints go to `folder`. See `prepared_for`.

    Args:
        mark: of the command's own folder, see `folder.check_shared`.

    The lease is closed whatever happens: settled when the run completed, else released, so that it may be resumed.
    """
    answer = client.reserve(lease, by, job.charges())
    if not answer.fits:
        accounts = [client.show(account) for account in job.accounts]
        return Outcome(REFUSED, why=explain(answer.shortages, accounts)).keep(folder)
    outcome = Outcome(FAILED, why="it was interrupted; what was authorised is spent")
    try:
        # Kept before the lease is settled: whoever goes on must know.
        prepared = prepared_for(client, job, everywhere)
        outcome = _fit(ledger, job, lease, folder, mark, prepared, callbacks).keep(folder)
    finally:
        client.close(lease, outcome.closing, outcome.status)
    return outcome


def prepared_for(client: AccountantClient, job: Job, everywhere: Everywhere | None = None) -> Path:
    """The folder with the job's records as its model reads them, made where it is not there yet.

    Args:
        everywhere: `parallel.everywhere`, while no worker holds a core; without it, in this process.
    """
    from training.preparation import one_by_one, prepare

    keys = client.source_key(), client.partition_key(job.account)
    return prepare(job, *keys, everywhere or one_by_one)


def train_worker(config: dict[str, Any]) -> None:
    """The loop that every worker runs. It goes there by this name, so that no driver imports what only workers use."""
    from training.worker import train_worker as loop

    loop(config)


def _fit(
    ledger: str, job: Job, lease: str, folder: Path, mark: tuple[str, str], prepared: Path, callbacks: Sequence[Any]
) -> Outcome:
    from ray.train.v2.api.exceptions import TrainingFailedError

    config = {
        "job": job.model_dump(mode="json", include=set(Job.model_fields)),
        "lease": lease,
        "ledger": ledger,
        "folder": str(folder),
        "mark": mark,
        "prepared": str(prepared),
        "sealed": digest(folder),
        "code": code_hash(),
    }
    try:
        result = group_trainer(train_worker, config, lease, folder / "storage", callbacks).fit()
    except TrainingFailedError as error:
        return Outcome(FAILED, why=reason(error))
    metrics = dict(result.metrics or {})
    status = metrics.pop("status", FAILED)
    kept = {name: metrics[name] for name in RELEASED if name in metrics}
    why = "" if status == COMPLETED else "the budget could not pay for all of its steps"
    return Outcome(status, kept, why)


def group_trainer(
    loop: Callable[[dict[str, Any]], None],
    config: Mapping[str, Any],
    name: str,
    storage: Path,
    callbacks: Sequence[Any] = (),
    crashes: int = 1,
) -> Any:
    """The Ray Train trainer of one worker group for the job in `config`, which is public and shows in the dashboard.

    Args:
        name: of the Train run, which is its identity: the same name goes on from its last checkpoint.
        crashes: how often the group is started again. Every retry is charged again, so all limits are finite.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    training = config["job"]["training"]
    gpu = training["device"] == "gpu"
    return TorchTrainer(
        loop,
        train_loop_config=dict(config),
        scaling_config=ScalingConfig(
            num_workers=training["workers"],
            resources_per_worker={"CPU": cpus_per_worker()},
            use_gpu=gpu,  # one each
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=300),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            callbacks=list(callbacks),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=crashes, controller_failure_limit=1, max_preemption_failures=2),
        ),
    )


def reason(error: BaseException) -> str:
    """Why a worker group ended, out of Ray Train's wrapping: our own sentence; a library's is dropped for its type."""
    failures = getattr(error, "worker_failures", None) or {}
    for inner in (*failures.values(), error.__cause__, error):
        for candidate in (inner, getattr(inner, "cause", None), getattr(inner, "__cause__", None)):
            if isinstance(candidate, PurserError):
                return str(candidate)
    return f"Ray Train gave up ({without_content(error)})"


@dataclass(frozen=True)
class Charged:
    """What a run was charged: per account its `authorise` entries, and the accounts as they stand."""

    accounts: list[Account]
    entries: dict[str, list[dict[str, Any]]]

    @property
    def steps(self) -> int:
        """Training steps that were authorised, re-executed ones included."""
        return sum(entry["steps"] for entry in self.entries[self.accounts[0].account])

    @property
    def cost(self) -> int:
        """Their cost on the train account."""
        return sum(entry["cost"] for entry in self.entries[self.accounts[0].account])

    @property
    def epsilon(self) -> float:
        """The ε that the books charge for the run alone, on the train account."""
        return self.accounts[0].epsilon_of(self.cost)


def charged(client: AccountantClient | Books, job: Job, lease: str) -> Charged:
    """Read from the ledger what `lease` was charged."""
    accounts = [client.show(account) for account in job.accounts]
    return Charged(accounts, {a.account: client.charged(lease, a.account) for a in accounts})
