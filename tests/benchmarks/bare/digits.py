"""Softmax regression on scikit-learn's digits as a user of Ray Train writes it, without privacy and without Purser:
`python digits.py WORKERS STEPS FOLDER`. What `tests.benchmarks.cluster` compares with; nothing of ours is imported.

Leaves an empty file in FOLDER at each of its stages: `fit`, `worker` and, as its first step begins, `step`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from sklearn.datasets import load_digits


def mark(folder: str, stage: str) -> None:
    """Say that `stage` has come."""
    (Path(folder) / stage).touch()


def worker(config: dict[str, Any]) -> None:
    """What each worker does: its part of the records, steps of batches of 360 of all, one report with a checkpoint."""
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if rank == 0:
        mark(config["folder"], "worker")
    features, labels = load_digits(return_X_y=True)
    mine = torch.utils.data.TensorDataset(
        torch.tensor(features[rank::world] / 16 - 0.5, dtype=torch.float32), torch.tensor(labels[rank::world])
    )
    batches = torch.utils.data.DataLoader(mine, batch_size=360 // world, shuffle=True)
    model = ray.train.torch.prepare_model(torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    done = 0
    while done < config["steps"]:
        for inputs, wanted in batches:
            if rank == 0 and done == 0:
                mark(config["folder"], "step")
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), wanted).backward()
            optimizer.step()
            done += 1
    if rank != 0:
        ray.train.report({"steps": done})
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model.state_dict(), Path(folder) / "state.pt")
        ray.train.report({"steps": done}, checkpoint=ray.train.Checkpoint.from_directory(folder))


def main(workers: int, steps: int, folder: str) -> None:
    """One run, with the settings that ours has."""
    mark(folder, "fit")
    TorchTrainer(
        worker,
        train_loop_config={"steps": steps, "folder": folder},
        scaling_config=ScalingConfig(num_workers=workers),
        torch_config=TorchConfig(backend="gloo"),
        run_config=RunConfig(
            name="bare",
            storage_path=folder,
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=1, controller_failure_limit=1, max_preemption_failures=2),
        ),
    ).fit()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
