"""What every process of a test's cluster imports at its start (PYTHONPATH): where a worker trains, each step that it
executed is written down, and one worker waits after a certain step until its node is killed.

Beside the product, not in it: what runs is ours, line by line. Who counts steps here asks no ledger.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import os
import sys
import time
from pathlib import Path


class Watched(importlib.abc.MetaPathFinder):
    """Finds `training.worker` as it is found without us, and watches it once it is there."""

    def find_spec(self, name, path, target=None):
        if name != "training.worker":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            watch(module, Path(os.environ["WATCHED"]))

        spec.loader.exec_module = exec_module
        return spec


def watch(worker, folder):
    """Write a line for every step of rank 0's, and let the last rank stop where `folder`/stop says."""
    train, steps = worker._train, worker.PrivateTrainer.steps
    run = {}

    def _train(config):
        run.update(lease=config["lease"], done=0)
        train(config)

    def _steps(trainer, shard, count, *told):
        context = worker.ray.train.get_context()
        for _ in range(count):
            steps(trainer, shard, 1, *told)
            if context.get_world_rank() == 0:
                with (folder / "executed").open("a") as file:
                    line = {"lease": run["lease"], "step": trainer._schedule.last_epoch, "node": os.getppid()}
                    file.write(json.dumps(line) + "\n")
        last = context.get_world_rank() == context.get_world_size() - 1
        once = last and not (folder / "stopped").exists()
        if once and (folder / "stop").read_text() == f"{run['lease']} {trainer._schedule.last_epoch}":
            (folder / "stopped").write_text(str(os.getppid()))  # a worker's parent is its raylet
            time.sleep(3600)

    worker._train, worker.PrivateTrainer.steps = _train, _steps


if "WATCHED" in os.environ:
    sys.meta_path.insert(0, Watched())
