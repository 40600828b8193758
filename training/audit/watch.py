"""Watching canaries while a model trains: how their losses change, and how far each noised update goes along their
gradients. In the worker's process, inside the boundary; no Ray.

It sees what is released, which is noised, and canaries, which are nobody's, and changes neither model nor sampling. So
whatever it computes is post-processing of a private run, and costs nothing (P13). It knows no coin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.errors import PurserError
from training.audit.canaries import write_arrays
from training.audit.plan import SCORES
from training.engine.objective import IGNORED, logits_of, record_losses
from training.engine.sampling import MicroBatch, Shard, micro_batches
from training.engine.trainer import PrivateTrainer
from training.evaluation import asked

NUMBERS = 1 << 22  # of an update, its last ones: so many are looked at, or at least the last tensor that trains
KEPT = 1 << 26  # numbers of updates that are kept at once, 256 MiB
WINDOW = 20  # updates for which one gradient stands, at most


class Watch:
    """Of the canaries `mine`, what one rank sees of them.

    Black-box: the loss before training less that after it. White-box: the inner product of a canary's gradient, clipped
    as it would be if it took part, with each noised update, added up over all steps (a canary that took part in a
    share of them is in their sum with its own length; Nasr et al. 2023). White-box, changes: the squared differences of
    such products of successive steps, each over the gradient's length: whoever takes part in some steps and not in
    others is in the differences, also where noise does not differ from step to step.

    A gradient is that of the model after the last step of a block, or of `WINDOW` steps, for all of them: one backward
    pass instead of one for each step.

    Args:
        candidates: the tokens among which the last one of a canary that is text has its rank; empty for other canaries.
        sealed: the SHA-256 of the file that the canaries are from: what was seen is of their coins and of no others.
    """

    def __init__(self, trainer: PrivateTrainer, mine: Shard, candidates: np.ndarray, sealed: str) -> None:
        self._trainer, self._mine, self._sealed = trainer, mine, sealed
        self._candidates = torch.from_numpy(candidates)
        self._numbers = trainer.last_numbers(NUMBERS)
        self._window = max(1, min(WINDOW, KEPT // self._numbers))
        self._updates: list[torch.Tensor] = []
        self._before: list[torch.Tensor] = []  # the last one looked at
        zeros = np.zeros(mine.units)
        self._state = {"start": self._losses(), "sum": zeros, "changes": zeros.copy()}

    def told(self, update: torch.Tensor) -> None:
        """One noised update, fp64 [parameters], about to be applied."""
        if len(self._updates) == self._window:
            self.look()
        self._updates.append(update[-self._numbers :].float())

    def look(self) -> None:
        """At the updates since the last look; at the end of a block, before a checkpoint."""
        if not self._updates:
            return
        carried = len(self._before)
        updates = torch.stack([*self._before, *self._updates])
        self._before, self._updates = self._updates[-1:], []
        done = 0
        for batch in micro_batches(self._mine, np.arange(self._mine.units), self._trainer.rows):
            lengths, along = self._trainer.along(batch, updates)
            some = slice(done, done + batch.units)
            self._state["sum"][some] += (lengths[:, None] * along[:, carried:]).sum(1).numpy()
            self._state["changes"][some] += along.diff(dim=1).square().sum(1).numpy()
            done = some.stop

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, after a look."""
        return {"sealed": self._sealed, **{name: torch.from_numpy(array) for name, array in self._state.items()}}

    def load(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint.

        Raises:
            PurserError: it has none of this, or of other canaries.
        """
        if state is None or state["sealed"] != self._sealed or len(state["sum"]) != self._mine.units:
            raise PurserError(
                "checkpoint: what was seen of the audit's canaries is not in it, or is of others; put them back, or "
                "start a new run."
            )
        self._state = {name: state[name].numpy().copy() for name in self._state}

    def end(self, folder: Path, rank: int, which: np.ndarray) -> None:
        """Write all that was seen to the run's `folder`.

        Args:
            which: the numbers of the canaries. [mine]
        """
        end = self._losses()
        scores = zip(SCORES, (self._state["start"] - end, self._state["sum"], self._state["changes"]), strict=True)
        found = {"number": which, "loss": end, "rank": self._ranks(), "sealed": np.array(self._sealed)}
        write_arrays(folder / f"canaries-{rank}.npz", {**dict(scores), **found})

    def _losses(self) -> np.ndarray:
        return losses(self._trainer.model, self._mine, self._trainer.rows)

    def _ranks(self) -> np.ndarray:
        """Of each canary that is text to be said, how many tokens the model holds likelier than its last one, and 1."""
        if not len(self._candidates):
            return np.zeros(self._mine.units, np.int64)
        return asked(self._trainer.model, self._mine, self._trainer.rows, self._rank).long().numpy()

    def _rank(self, batch: MicroBatch) -> torch.Tensor:
        count = len(batch.unit)
        labels = batch.labels[:count]
        last = (labels != IGNORED).long().cumsum(1).argmax(1)
        each = torch.arange(count, device=labels.device)
        logits = logits_of(self._trainer.model, batch)[each, last - 1].float()
        others = logits[:, self._candidates.to(logits.device)]
        return 1 + (others > logits[each, labels[each, last]][:, None]).sum(1)


def losses(model: torch.nn.Module, shard: Shard, rows: int) -> np.ndarray:
    """The loss of each record, in nats; where it is no number, the largest there is. Array: float64 [records]."""
    found = asked(model, shard, rows, lambda batch: record_losses(model, batch))
    return found.nan_to_num(nan=1e9, posinf=1e9).numpy()
