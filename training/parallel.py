"""Pieces of preparation on all cores that Ray has, by Ray Data. Inside the boundary, but for what Ray itself shows.

Records do not go through Ray: a piece's work reads and writes files, and Ray hands around its number alone. Ray Data
counts rows and bytes, and shows them in its logs, its metrics and its dashboard: what it can count here is a public
number of pieces, whatever the data are. How long they take shows, as it does everywhere.
"""

from __future__ import annotations

import functools
from typing import Any

from cluster.errors import PurserError, UsageError, without_content
from training.preparation import Recipe, Work


def everywhere(work: Work, recipe: Recipe, count: int) -> None:
    """All pieces of `work`, on every core of the Ray that this process is connected to.

    Raises:
        UsageError: a piece failed; the first one's sentence.
        PurserError: Ray Data gave up.
    """
    import ray
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = context.enable_auto_log_stats = False
    # By reference: Ray Data may write down what a function is given.
    pieces = ray.data.from_items([{"id": piece} for piece in range(count)], override_num_blocks=count).map_batches(
        _done, fn_kwargs={"work": work, "common": ray.put(recipe)}, batch_size=1, num_cpus=1
    )
    failures, gave_up = [], ""
    try:
        failures = [row["failure"] for row in pieces.iter_rows() if row["failure"]]
    except Exception as error:  # noqa: BLE001 (its message may hold anything)
        gave_up = without_content(error)
    if gave_up:
        raise PurserError(f"data.source: its preparation failed, Ray Data gave up ({gave_up}); nothing was charged.")
    if failures:
        raise UsageError(failures[0])


def _done(pieces: dict[str, Any], work: Work, common: Any) -> dict[str, Any]:
    """What went wrong with each piece: empty, or a sentence that may cross (P13)."""
    return {"failure": [_tried(work, _fetched(common), int(piece)) for piece in pieces["id"]]}


def _tried(work: Work, recipe: Recipe, piece: int) -> str:
    try:
        work(recipe, piece)
    except UsageError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 (whatever it is, its message may print records)
        return f"data.source: its preparation failed with {without_content(error)}; nothing was charged."
    return ""


@functools.lru_cache(maxsize=1)
def _fetched(common: Any) -> Recipe:
    """The recipe, once in each process: a tokenizer takes a while to be made."""
    import ray

    recipe: Recipe = ray.get(common)
    return recipe
