"""What the cluster's own parts cost: `python -m tests.benchmarks.cluster [--quick] [--json]`.

startup_vs_bare_train     a submitted run of the digits job (two workers), over bare Ray Train: from the start of
                          `purser submit` or `ray job submit` to the first training step, through the job server of one
                          real head with a token; medians of rounds in which each side is first in turn
startup_s, bare_s         the medians, seconds
reserve_s, open_s         of ours: until the lease was reserved, until the workers opened it
fit_s, worker_s           of the bare side's: until it called fit, until its workers' function was called
prepare_s                 what a first run of the source takes for preparing it, beside; left out above
authorise_metrics_ratio   durable authorise through an actor that tells its figures, against one that does not: medians
                          of as many calls, the two in turns, and of these ratios the median over rounds
least, most               of these ratios

The bare side is `bare/digits.py`, shipped as a working folder. Ours leaves the moment of its first step in the ledger:
the block's `authorise` entry is durable before it. Both are looked for twenty times a second. One run of each comes
before the first round: it prepares the digits, finds cold caches and is not counted, but with --quick, where it is the
only one, the bare side first: that shows that both sides run, its ratio says little.

What only ours does, then: the job is checked and priced before it is handed over; the source is fingerprinted and
admitted; reserve, open and authorise, each durable; the fingerprint, the hash of our code and the rehearsal on every
worker; Opacus is imported there. What only the bare side does: it imports scikit-learn and reads its digits.
"""

from __future__ import annotations

import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from tests.benchmarks import main
from tests.benchmarks.accountant import TRAIN, accountant, opened, timed  # sets Ray's authentication, before Ray

import ray  # isort: skip

from cluster import environment
from cluster.accounting.actor import Accountant
from cluster.environment import ACCOUNTANT, NAMESPACE
from tests.actors import end_accountant
from tests.cluster.heads import BIN, RAY, Head
from tests.product import DIGITS

BARE = Path(__file__).parent / "bare"
WORKERS, STEPS = 2, 4
FIRST = {"ours": "authorise", "bare": "step"}  # what a side leaves as its first step begins
Seen = Callable[[], set[str]]


class Silent(Accountant):
    """Looks at its ledger for nobody and times nothing."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._beside.close()
        self._meters.timed = nullcontext  # type: ignore[method-assign]


def authorise(folder: Path, served: type[Accountant], calls: int) -> float:
    """Median seconds of one authorise, from one client."""
    ((lease, epoch),) = opened(accountant(folder, served), 1)
    handle = ray.get_actor(ACCOUNTANT, namespace=NAMESPACE)
    times = [
        timed(lambda block=block: ray.get(handle.authorise.remote(lease, epoch, TRAIN, block)))  # type: ignore[misc]
        for block in range(1, calls + 1)
    ]
    return statistics.median(times[calls // 10 :])


def metrics(folder: Path, rounds: int) -> dict[str, float]:
    """See `authorise_metrics_ratio`."""
    ratios = []
    ray.init(address="local", namespace=NAMESPACE, num_cpus=2, include_dashboard=False, logging_level="ERROR")
    try:
        for number in range(rounds):
            order = (Accountant, Silent) if number % 2 else (Silent, Accountant)
            taken = {served: authorise(folder, served, 1500) for served in order}
            ratios.append(taken[Accountant] / taken[Silent])
        end_accountant()
    finally:
        ray.shutdown()
    return {"authorise_metrics_ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


class Cluster:
    """A head, an accountant over a ledger of its own with the digits' accounts, and who submits from beside it."""

    def __init__(self, folder: Path) -> None:
        self._home, self._rounds = folder / "cluster", 0
        self._home.mkdir()
        self._ledger = self._home / "ledger.db"
        self._head = Head(self._home)
        self._afar = {**os.environ, **self._head.from_afar(), environment.HOME: str(folder / "laptop")}
        # More than all rounds need: what is measured is not how much fits.
        self._job = [str(DIGITS), "privacy.epsilon=100", f"training.workers={WORKERS}", f"training.steps={STEPS}"]

    def set_up(self) -> None:
        """What its operator and the owner of the data do."""
        there = {**self._head.on_it(), environment.LEDGER: f"sqlite:///{self._ledger}"}
        for words in (["init"], ["start", "--single-machine"]):
            subprocess.run([BIN / "purser", "accountant", *words], env=there, check=True, capture_output=True)
        create = ["budget", "create", *self._job, "--address", self._head.address]
        subprocess.run([BIN / "purser", *create], env=self._afar, check=True, capture_output=True)

    def ours(self) -> dict[str, float]:
        """Seconds until each kind of entry was in the ledger."""
        self._rounds += 1
        before = self._entries()
        name = f"--name=round-{self._rounds}"
        command = [BIN / "purser", "submit", *self._job, name, "--as=train", "--address", self._head.address, "--json"]
        return self._watched("ours", command, lambda: {k for k, n in self._entries().items() if n > before.get(k, 0)})

    def bare(self) -> dict[str, float]:
        """Seconds until each of its stages."""
        folder = Path(tempfile.mkdtemp(prefix="bare-", dir=self._home))
        script = ["python", "digits.py", str(WORKERS), str(STEPS), str(folder)]
        command = [*RAY, "job", "submit", "--address", self._head.address, "--submission-id", folder.name]
        command += ["--working-dir", str(BARE), "--no-wait", "--", *script]
        return self._watched("bare", command, lambda: {file.name for file in folder.iterdir()})

    def _watched(self, side: str, command: Sequence[str | Path], seen: Seen) -> dict[str, float]:
        known = set(self._jobs())
        began = time.perf_counter()
        stages: dict[str, float] = {}
        with subprocess.Popen(command, env=self._afar, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as handed:
            while FIRST[side] not in stages:
                new = seen()
                for stage in new - set(stages):
                    stages[stage] = time.perf_counter() - began
                if "submitted" not in stages and handed.poll() is not None:
                    stages["submitted"] = time.perf_counter() - began
                    if handed.returncode != 0:
                        raise RuntimeError(handed.communicate()[0].decode()[-2000:])
                if time.perf_counter() - began > 180:
                    raise RuntimeError(f"{side}: no step in three minutes, only {stages}")
                time.sleep(0.05)
            handed.communicate()
        while states := [s for name, s in self._jobs().items() if name not in known and s in ("PENDING", "RUNNING")]:
            time.sleep(0.2)
        if states := [s for name, s in self._jobs().items() if name not in known and s != "SUCCEEDED"]:
            raise RuntimeError(f"{side}: its job ended as {states}")
        return stages

    def _jobs(self) -> dict[str, str]:
        return {job["submission_id"]: job["status"] for job in self._head.get("/api/jobs/") if job["submission_id"]}

    def _entries(self) -> Mapping[str, int]:
        with closing(sqlite3.connect(f"file:{self._ledger}?mode=ro", uri=True)) as database:
            return dict(database.execute("SELECT kind, count(*) FROM entries GROUP BY kind").fetchall())

    def end(self) -> None:
        """End the head and all that runs on it."""
        self._head.end()


def prepare_seconds(folder: Path) -> float:
    """Seconds of the driver for preparing the digits, in this process."""
    from training.jobfile import load
    from training.preparation import prepare
    from tuning.config import SweepJob

    os.environ[environment.HOME] = str(folder / "beside")
    job = load(SweepJob, DIGITS, []).plain
    return timed(lambda: prepare(job, "00" * 32, "00" * 32))


def startup(folder: Path, rounds: int) -> dict[str, float]:
    """See `startup_vs_bare_train`; of no rounds it is that of the one before them."""
    cluster = Cluster(folder)
    stages: dict[str, list[dict[str, float]]] = {"ours": [], "bare": []}
    sides: dict[str, Callable[[], dict[str, float]]] = {"ours": cluster.ours, "bare": cluster.bare}
    try:
        cluster.set_up()
        for number in range(rounds + 1):
            for side in list(sides)[:: 1 if number % 2 else -1]:
                stages[side].append(sides[side]())
                first = stages[side][-1][FIRST[side]]
                print(f"round {number}, {side}: {first:.1f} s, {stages[side][-1]}", file=sys.stderr)
    finally:
        cluster.end()

    def median(side: str, stage: str) -> float:
        return statistics.median(one[stage] for one in stages[side][1 if rounds else 0 :])

    ours, bare = (median(side, first) for side, first in FIRST.items())
    told = {"startup_vs_bare_train": ours / bare, "startup_s": ours, "bare_s": bare}
    told |= {"reserve_s": median("ours", "reserve"), "open_s": median("ours", "open")}
    told |= {"fit_s": median("bare", "fit"), "worker_s": median("bare", "worker")}
    return {**told, "prepare_s": prepare_seconds(folder)}


def measure(quick: bool) -> dict[str, Any]:
    """All of it."""
    with tempfile.TemporaryDirectory() as name:
        return {**startup(Path(name), 0 if quick else 3), **metrics(Path(name), 3 if quick else 9)}


if __name__ == "__main__":
    main(measure, __doc__)
