"""What the cluster's own parts cost: `python -m tests.benchmarks.cluster [--quick] [--json]`.

authorise_metrics_ratio   durable authorise through an actor that tells its figures, against one that does not: medians
                          of as many calls, the two in turns, and of these ratios the median over rounds
least, most               of these ratios
"""

from __future__ import annotations

import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path

from tests.benchmarks import main
from tests.benchmarks.accountant import TRAIN, accountant, opened, timed  # sets Ray's authentication, before Ray

import ray  # isort: skip

from cluster.accounting.actor import Accountant
from cluster.environment import ACCOUNTANT, NAMESPACE
from tests.actors import end_accountant


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


def measure(quick: bool) -> dict[str, float]:
    """All of it."""
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        ray.init(address="local", namespace=NAMESPACE, num_cpus=2, include_dashboard=False, logging_level="ERROR")
        try:
            for number in range(3 if quick else 9):
                order = (Accountant, Silent) if number % 2 else (Silent, Accountant)
                taken = {served: authorise(Path(name), served, 1500) for served in order}
                ratios.append(taken[Accountant] / taken[Silent])
            end_accountant()
        finally:
            ray.shutdown()
    return {"authorise_metrics_ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


if __name__ == "__main__":
    main(measure, __doc__)
