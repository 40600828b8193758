"""One command's time with Ray: start it quietly on this machine and end it, or join the cluster that is there.

The process moves to the run's folder first: Ray puts the driver's folder ahead of site-packages on workers, so a
`training.py` in the user's folder would be imported in place of ours.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cluster.environment import CPUS, HOME, LEDGER, NAMESPACE, ROOTS, cluster_address, home, ledger_file, ledger_url
from cluster.errors import UsageError

PATIENCE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"  # Ray's own, by default a minute; its group is tried twice


def cpus() -> int:
    """The cores this machine gives us, at least two."""
    return max(2, len(os.sched_getaffinity(0)))


def cpus_per_worker() -> float:
    """What one worker asks Ray for: a core of a cluster; on this machine half of one, so that two trials of two workers
    run on two cores. The small drivers ask for none.

    Raises:
        UsageError: PURSER_CPUS_PER_WORKER says otherwise, and is no number of cores.
    """
    said = os.environ.get(CPUS)
    if not said:
        return 0.5 if cluster_address() is None else 1.0
    if not re.fullmatch(r"\d{1,3}(\.\d{1,4})?", said) or not float(said):
        raise UsageError(f"{CPUS}: {said!r} was given; write a number of cores, as 4 or 0.5.")
    return float(said)


def groups_at_once(workers: int, device: str) -> int:
    """How many worker groups of so many workers this Ray has room for now, at least one.

    Raises:
        UsageError: see `check_gpus`.
    """
    check_gpus(workers, device)
    held: Mapping[str, float] = {"CPU": cpus()}
    if cluster_address() is not None or device == "gpu":
        import ray

        held = ray.available_resources()
    groups = held.get("CPU", 0.0) / (workers * cpus_per_worker())
    if device == "gpu":
        groups = min(groups, held.get("GPU", 0.0) / workers)
    return max(1, int(groups))


def check_gpus(workers: int, device: str) -> None:
    """Once Ray runs: has this machine a GPU for each worker? A cluster's may be yet to come.

    Raises:
        UsageError: it has not.
    """
    if device != "gpu" or cluster_address() is not None:
        return
    import ray

    gpus = ray.cluster_resources().get("GPU", 0.0)
    if gpus < workers:
        raise UsageError(
            f"training.device: {workers} workers need a GPU each, this machine has {gpus:g}; write fewer workers, or "
            "cpu. Nothing was charged."
        )


def environment() -> dict[str, str]:
    """Variables that Ray, its workers and our own code on them must agree on."""
    # Ray's dashboard shows these; a server's URL may hold a password, and only the accountant needs it.
    embedded = {LEDGER: ledger_url()} if ledger_file() else {}
    return {
        HOME: str(home()),
        CPUS: f"{cpus_per_worker():g}",
        **embedded,
        "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # runs show in the dashboard's Train tab
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # schedulers hear an accuracy at rungs, not in every report
        "PYTHONWARNINGS": "ignore",
        "GLOG_minloglevel": "2",
    }


def join(address: str) -> str:
    """Join the Ray cluster at `address` for the rest of this process; returns the dashboard's address.

    What workers print is in Ray's own logs and in its dashboard, and not here: a command's last line is its own.

    Raises:
        UsageError: there is none, it does not answer, or it wants a token that this process does not have.
    """
    _check_working_folder()
    variables = {name: value for name, value in environment().items() if name != LEDGER}
    variables[PATIENCE] = os.environ.get(PATIENCE, "1800")  # for nodes that are yet to come, or others' to leave
    os.environ.update(variables, RAY_OVERRIDE_JOB_RUNTIME_ENV="1")  # a job may have been sent with some of these
    import ray

    folder, failure = Path.cwd(), ""
    os.chdir(home())
    try:
        context = ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level="ERROR",
            ignore_reinit_error=True,
            runtime_env={"env_vars": variables},
        )
    except Exception as error:  # noqa: BLE001 (Ray has many ways to say so)
        failure = type(error).__name__
    finally:
        os.chdir(folder)
    if failure:
        raise UsageError(
            f"RAY_ADDRESS: no Ray cluster could be joined at {address} ({failure}); run this on a node of it, with the "
            "cluster's token (RAY_AUTH_MODE, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH), or give --address "
            "http://HEAD:8265 where the command takes it."
        )
    return str(context.dashboard_url)


def _check_working_folder() -> None:
    """Ray puts a job's working folder ahead of site-packages on its workers."""
    folder = Path.cwd()
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ or Path(__file__).resolve().parent.parent == folder.resolve():
        return
    for root in ROOTS:
        for name in (f"{root}.py", f"{root}/__init__.py"):
            if (folder / name).exists():
                raise UsageError(
                    f"working_dir: {name} in the job's working folder would be imported in place of ours on every "
                    "worker; rename it, or hand the job over with purser submit. Nothing was charged."
                )


@contextmanager
def local_ray(folder: Path) -> Iterator[str]:
    """Ray on this machine for the length of the block; yields the dashboard's address.

    Token authentication is on (see `environment.secure_ray`) and the dashboard listens on loopback only. It must be
    on: without it a stopped trial's workers are never freed.
    """
    os.chdir(folder)
    # Nobody calls this machine back, so that no worker group needs a process that watches for it.
    variables = {**environment(), "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    os.environ.update(variables)
    import ray

    context = ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=cpus(),
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        logging_level="ERROR",
        runtime_env={"env_vars": variables},
    )
    try:
        yield str(context.dashboard_url)
    finally:
        ray.shutdown()
