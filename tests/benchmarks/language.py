"""What language models cost more where they are private: `python -m tests.benchmarks.language [--quick] [--json]`.

prepare_vs_bare     records per second of `preparation.prepare` on Ray Data, over those of a bare Ray Data pipeline:
                    medians over rounds of both, in one Ray session, in which each side is first in turn
admitted_vs_bare    the same with the fingerprint before it, which the driver takes of a source that it has not seen yet
prepare_s, fingerprint_s, bare_s   the medians, in seconds
lora_memory_vs_nonprivate  peak memory of a process that takes LoRA steps, over plain torch's (see `engine`)

One million short records (the text of a review in some 60 letters, a label) in 20 Parquet files; --quick takes 200,000
and one round.

Ours reads the source, hashes each record twice, draws its partition, makes tokens of it, writes uncompressed Arrow
files for each partition, and an index of each. The bare side is what one would write without us: read_parquet, the
same function from texts to tokens in map_batches, and write_parquet of the same columns, which Ray Data fuses into one
task for each file.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster import environment
from cluster.screen import Screen
from cluster.session import local_ray
from tests.benchmarks import main
from tests.benchmarks.engine import memory
from training.config import Job
from training.encoding import Encoding
from training.jobfile import parse
from training.parallel import everywhere
from training.preparation import fingerprint_of, prepare
from training.sources import private

RECORDS, FILES, LENGTH = 1_000_000, 20, 64
KEY = "00" * 32
WORDS = ("the", "a", "this", "film", "plot", "cast", "was", "seems", "not", "very", "rather", "good", "bad", "slow")


def written(folder: Path, records: int) -> Path:
    """A folder of made-up reviews."""
    draw = random.Random(7)
    (folder / "notes").mkdir()
    notes = [" ".join(draw.choices(WORDS, k=12)) for _ in range(10_000)]
    numbers = np.arange(records)
    texts = pa.array([f"{notes[i % len(notes)]} {i}" for i in numbers.tolist()])
    labels = pa.array(np.where(numbers % 3 == 0, "bad", "good"))
    table, each = pa.table({"note": texts, "label": labels}), records // FILES
    for i in range(FILES):
        pq.write_table(table.slice(i * each, each), folder / "notes" / f"{i:02d}.parquet")
    return folder / "notes"


def job_of(source: Path, records: int) -> Job:
    """A classifier over them, by the tokenizer of bytes."""
    return parse(
        Job,
        {
            "account": "notes",
            "privacy": {"epsilon": 3.0, "delta": 1e-8, "units": records},
            "data": {
                "source": str(source),
                "text": {"column": "note", "max_length": LENGTH},
                "label": {"column": "label", "categories": ["bad", "good"]},
            },
            "model": {"kind": "sequence-classification", "path": "tiny:bert"},
        },
    )


def tokenize(batch: pa.Table, encoding: Encoding) -> pa.Table:
    """The bare side's function: texts and labels as numbers."""
    return pa.Table.from_batches([encoding.encoded(one) for one in batch.combine_chunks().to_batches()])


def bare(job: Job, folder: Path) -> float:
    """Seconds of a pipeline without us."""
    import ray

    began = time.perf_counter()
    ray.data.read_parquet(job.data.source).map_batches(
        tokenize, fn_kwargs={"encoding": Encoding.of(job)}, batch_format="pyarrow", batch_size=16_384
    ).write_parquet(str(folder / "bare"))
    took = time.perf_counter() - began
    shutil.rmtree(folder / "bare")
    return took


def ours(job: Job, home: Path) -> tuple[float, float]:
    """Seconds of the fingerprint, and of preparation after it."""
    shutil.rmtree(home / "prepared", ignore_errors=True)
    began = time.perf_counter()
    fingerprint_of(private(job), KEY)
    marked = time.perf_counter()
    prepare(job, KEY, KEY, everywhere)
    return marked - began, time.perf_counter() - marked


def measure(quick: bool) -> dict[str, float]:
    """Both sides in one Ray session."""
    records, rounds = (RECORDS // 5, 1) if quick else (RECORDS, 3)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        os.environ[environment.HOME] = name
        os.environ.pop(environment.LEDGER, None)
        environment.secure_ray()
        job = job_of(written(home, records), records)
        time.sleep(2.5)  # so that the file is old enough for its fingerprint to be remembered
        screen = Screen(as_json=True)
        with screen.quiet(home / "log.txt"), local_ray(home):
            import ray

            ray.data.DataContext.get_current().enable_progress_bars = False
            times: dict[str, list[float]] = {"fingerprint": [], "prepare": [], "bare": []}

            def private_side() -> None:
                mark, rest = ours(job, home)
                times["fingerprint"].append(mark)
                times["prepare"].append(rest)

            sides: list[Callable[[], None]] = [private_side, lambda: times["bare"].append(bare(job, home))]
            for number in range(rounds):
                for side in sides[:: -1 if number % 2 else 1]:
                    side()
                screen.say(f"round {number}: " + ", ".join(f"{key} {some[-1]:.1f} s" for key, some in times.items()))
        os.chdir("/")
    mark, mine, theirs = (statistics.median(times[key]) for key in ("fingerprint", "prepare", "bare"))
    return {
        "prepare_vs_bare": theirs / mine,
        "admitted_vs_bare": theirs / (mark + mine),
        "prepare_s": mine,
        "fingerprint_s": mark,
        "bare_s": theirs,
        "lora_memory_vs_nonprivate": memory(lora=True),
    }


if __name__ == "__main__":
    main(measure, __doc__)
