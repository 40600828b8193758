"""What is handed to a cluster for one job: the command, the name under which it is the same job, and its planned price.

Nothing heavy is imported, no data touched, and nobody is asked: a plan needs no account.
"""

from __future__ import annotations

import tempfile

from cluster.accounting.books import Books
from cluster.accounting.ledger import Ledger
from cluster.errors import UsageError
from cluster.handover import Work
from cluster.jobs import JOB, submission_id
from tuning.config import SweepJob
from tuning.plan import make

COMMANDS = ("train", "tune")


def submission(job: SweepJob | None, command: str | None, resume: str | None, name: str) -> Work:
    """The work of `purser submit`: of a job, or (None) to go on with the run or sweep called `resume`.

    Args:
        command: train or tune; by default tune where the job has a space to search.
        name: tells two submissions of the same job apart.

    Raises:
        UsageError: another command, or none where none can be guessed.
    """
    if command not in (None, *COMMANDS):
        raise UsageError(f"--as: {command!r} was given; it is train or tune.")
    if job is None:
        assert resume is not None
        if command is None:
            raise UsageError("--as: write --as train or --as tune beside --resume.")
        return Work([command, "--resume", resume], None, None, {"purser": command, "resume": resume})
    command = command or ("tune" if job.tuning.space else "train")
    if command == "tune":
        job.check_swept()
        job.corners()
    shipped = job.model_dump(mode="json")
    words = [command, JOB]
    made = submission_id(job.account, words, shipped, name)
    # Under this name it goes on, should the cluster have lost the job but not the ledger.
    return Work([*words, "--name", made], shipped, made, _metadata(job, command))


def _metadata(job: SweepJob, command: str) -> dict[str, str]:
    """For Ray's dashboard: public facts, all of them text."""
    with tempfile.TemporaryDirectory(prefix="purser-") as folder:  # books without accounts: a plan is all they are for
        ledger = Ledger(f"sqlite:///{folder}/plan.db")
        plan = make(Books(ledger), job).as_json()
        ledger.close()
    cost = plan["trial_cost"] if command == "train" else plan[f"{job.tuning.mode}_cost"]
    return {
        "purser": command,
        "account": job.account,
        "planned_cost": str(cost),
        "order": str(plan["order"]),
        "planned_steps": str(job.training.steps),
    }
