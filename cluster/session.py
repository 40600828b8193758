"""One command's time with Ray: start it quietly on this machine, with its accountant, and end it.

The process moves to the run's folder first: Ray puts the driver's folder ahead of site-packages on workers, so a
`training.py` in the user's folder would be imported in place of ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.environment import HOME, LEDGER, NAMESPACE, home, ledger_file, ledger_url

CPUS_PER_WORKER = 0.5  # two trials of two workers on two cores; the drivers ask for none


def cpus() -> int:
    """The cores this machine gives us, at least two."""
    return max(2, len(os.sched_getaffinity(0)))


def groups_at_once(workers: int) -> int:
    """How many worker groups of so many workers this machine holds, at least one."""
    return max(1, int(cpus() / (workers * CPUS_PER_WORKER)))


def environment() -> dict[str, str]:
    """Variables that Ray, its workers and our own code on them must agree on."""
    # Ray's dashboard shows these; a server's URL may hold a password, and only the accountant needs it.
    embedded = {LEDGER: ledger_url()} if ledger_file() else {}
    return {
        HOME: str(home()),
        **embedded,
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # runs show in the dashboard's Train tab
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # schedulers hear an accuracy at rungs, not in every report
        "PYTHONWARNINGS": "ignore",
        "GLOG_minloglevel": "2",
    }


@contextmanager
def local_ray(folder: Path) -> Iterator[str]:
    """Ray on this machine for the length of the block; yields the dashboard's address.

    Token authentication is on (see `environment.secure_ray`) and the dashboard listens on loopback only. It must be
    on: without it a stopped trial's workers are never freed.
    """
    os.chdir(folder)
    os.environ.update(environment())
    import ray

    context = ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=cpus(),
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        logging_level="ERROR",
        runtime_env={"env_vars": environment()},
    )
    try:
        yield str(context.dashboard_url)
    finally:
        ray.shutdown()
