"""`purser init`: the text of a first job file, from declared columns alone.

Whatever the owner must decide is left as a marked line: no range, category or count is ever learnt from data (P11),
and no value may come into the file.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.errors import UsageError
from training.columns import READERS, Column, columns_of
from training.jobfile import MARK

WIDTH = 32  # where comments begin, if what stands before them is short enough
FILL = "<- fill in: "
ASK = f'"{MARK}"'
ROW = "row"
NO_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf")  # to some reader of YAML


@dataclass(frozen=True)
class Wanted:
    """What the caller says of the columns: whom a record belongs to, what to predict, what a language model reads."""

    unit: str = ROW
    label: str | None = None
    text: str | None = None
    prompt: str | None = None

    def named(self) -> dict[str, str]:
        """option → the column that it names."""
        said = {"--unit": None if self.unit == ROW else self.unit, "--label": self.label}
        said |= {"--text": self.text, "--prompt": self.prompt}
        return {option: column for option, column in said.items() if column is not None}


def write_job(data: Path, wanted: Wanted, out: Path) -> int:
    """Write a job file over `data` to `out`; returns how many lines are left to be filled in.

    Raises:
        UsageError: the data declares no such columns, or `out` is there already.
    """
    if wanted.prompt is not None and (wanted.text is None or wanted.label is not None):
        raise UsageError(
            "--prompt: it stands before the text that a causal model learns to write; give --text, and no --label."
        )
    if out.exists():
        raise UsageError(f"--out: {out} is there already, and nothing is overwritten; name another file.")
    named = wanted.named()
    columns = columns_of(data, list(named.values()))
    _check_named(data, named, [column.name for column in columns])
    text = job_text(account_of(data), source_of(data, out), columns, wanted, out)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(
            f"--out: {out} cannot be written ({error.strerror}); name a file in a folder that is there."
        ) from None
    return text.count(FILL)


def _check_named(data: Path, named: dict[str, str], there: Sequence[str]) -> None:
    taken: dict[str, str] = {}
    for option, column in named.items():
        if column not in there:  # those that it has are not said: the first line of a file may be a record
            raise UsageError(f"{option}: {data.name} has no column {column!r}; check its header line or schema.")
        if column in taken:
            raise UsageError(f"{option}: {column!r} was given, which is {taken[column]} already; name another column.")
        taken[column] = option


def account_of(data: Path) -> str:
    """A name for the dataset, as the books allow it, from the name of its file."""
    name = Path(data.absolute().name)
    name = Path(name.stem) if name.suffix.lower() == ".gz" else name
    plain = (
        unicodedata.normalize("NFKD", name.stem if name.suffix.lower() in READERS else name.name)
        .encode("ascii", "ignore")
        .decode()
    )
    return re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("._-")[:63] or "data"


def source_of(data: Path, out: Path) -> str:
    """The path of `data` as a job file at `out` names it: relative where it lies below, so that both may move.

    Raises:
        UsageError: there is a `:` in it, which a source's name may not have.
    """
    folder, there = out.absolute().parent.resolve(), data.resolve()
    path = os.path.relpath(there, folder) if there.is_relative_to(folder) else str(there)
    path = str(there) if path.startswith("~") else path
    if ":" in path:
        raise UsageError(f"DATA: {path} was given; a ':' may not stand in a source's path, rename what has one.")
    return path


def quoted(word: str) -> str:
    """`word` as YAML reads it back, by the rules of 1.1 and of 1.2, on one line."""
    if re.fullmatch(r"[A-Za-z_/][A-Za-z0-9_./-]*", word) and word.lower() not in NO_WORDS:
        return word
    return str(yaml.dump(word, default_style='"', allow_unicode=True, width=10**9)).rstrip("\n")


def job_text(account: str, source: str, columns: Sequence[Column], wanted: Wanted, out: Path) -> str:
    """The job file.

    Raises:
        UsageError: no column is left to learn from.
    """
    parts = [_head(source, out), _privacy(account, wanted), _data(source, columns, wanted)]
    return "\n".join([*parts, _language(wanted) if wanted.text is not None else TABLE, _rest(wanted)])


def _line(indent: int, content: str, comment: str = "") -> str:
    content = " " * indent + content
    if not comment:
        return f"{content}\n"
    return f"{content.ljust(WIDTH - 2)}  # {comment}\n"


def _head(source: str, out: Path) -> str:
    job = quoted(out.name)
    return f"""\
# A private job over {quoted(Path(source).name)}, begun by `purser init` from the names of columns; no record was read.
# Lines marked "<- fill in" are yours to decide, from what you know of such records and never by looking at these: a
# range or a count that is taken from the data tells of the people in it.
#
#     purser plan {job}                what it would cost; touches no data, spends nothing
#     purser train {job} --rehearse    clipping and memory, on synthetic inputs
#     purser train {job}               one run; `purser tune {job}` is a sweep
"""


def _privacy(account: str, wanted: Wanted) -> str:
    of = "each record is protected" if wanted.unit == ROW else "all records of one of these are protected together"
    lines = [
        _line(0, f"account: {quoted(account)}", "the dataset's name in the books: one name for these people, for ever")
        + "\n",
        _line(0, "privacy:", "what the owner of the data grants, for everything that ever happens to it"),
        _line(2, f"epsilon: {ASK}", FILL + "the most that may ever be spent; 1 is strong, above 10 weak"),
        _line(2, f"delta: {ASK}", FILL + "the chance that epsilon does not hold; a tenth of 1 / units is usual"),
        _line(2, f"unit: {quoted(wanted.unit)}", of),
        _line(2, f"units: {ASK}", FILL + "about how many there are; declare it, do not count"),
    ]
    if wanted.unit != ROW:
        lines.append(_line(2, "max_records_per_unit: 1", "of a unit with more records so many are used"))
    return "".join(lines)


def _data(source: str, columns: Sequence[Column], wanted: Wanted) -> str:
    lines = [
        "data:\n",
        _line(2, f"source: {quoted(source)}", "relative to this file"),
        _line(2, "validation_fraction: 0.2", "a unit falls into one partition, by a keyed hash of itself"),
    ]
    if wanted.text is None:
        lines += _features(columns, wanted)
    else:
        lines += _text(wanted)
    if wanted.text is None or wanted.label is not None:
        name = ASK if wanted.label is None else quoted(wanted.label)
        which = "what to predict (then no feature) and " if wanted.label is None else ""
        ask = f"{FILL}{which}its values; others count as first"
        lines.append(_line(2, f"label: {{column: {name}, categories: [{ASK}, {ASK}]}}", ask))
    return "".join(lines)


def _features(columns: Sequence[Column], wanted: Wanted) -> list[str]:
    left = [column for column in columns if column.name not in wanted.named().values()]
    if not any(column.kind != "neither" for column in left):
        raise UsageError(
            "DATA: beside --unit and --label it declares no column of numbers or words to learn from; name a file with "
            "more columns, or --text for a language model."
        )
    lines = [_line(2, "features:", "learnt from; delete the lines of columns that are not to be")]
    if any(column.kind == "unknown" for column in left):
        lines.append(_line(4, "# a column of words instead of numbers: {categories: [all, its, values]}"))
    for column in left:
        name = quoted(column.name)
        if column.kind == "neither":
            lines.append(_line(4, f"# {name}", "neither a number nor a word: it cannot be learnt from"))
        elif column.kind == "word":
            ask = FILL + "its values; others become zeros"
            lines.append(_line(4, f"{name}: {{categories: [{ASK}, {ASK}]}}", ask))
        else:
            ask = f"{FILL}least and most" + ("" if column.kind == "number" else ", or categories")
            lines.append(_line(4, f"{name}: {{range: [{ASK}, {ASK}]}}", ask))
    return lines


def _text(wanted: Wanted) -> list[str]:
    assert wanted.text is not None
    lines = ["  text:\n", _line(4, f"column: {quoted(wanted.text)}", "what the model reads")]
    if wanted.prompt is not None:
        lines.append(
            _line(4, f"prompt: {quoted(wanted.prompt)}", "stands before it; the model does not learn to say it")
        )
    return [*lines, _line(4, "max_length: 128", "tokens; what is longer is cut, and memory grows with it")]


def _language(wanted: Wanted) -> str:
    kind, tiny, layers = ("causal-lm", "tiny:llama", "q_proj, v_proj")
    if wanted.label is not None:
        kind, tiny, layers = ("sequence-classification", "tiny:bert", "query, value")
    path = "a toy of random weights, to try it; replace it by a model's folder or hub id"
    lora = "adapters alone are trained: remove the # for a real model"
    return "".join(
        [
            _line(0, "model:"),
            _line(2, f"kind: {kind}"),
            _line(2, f"path: {tiny}", path),
            _line(2, f"# lora: {{r: 8, target_modules: [{layers}]}}", lora),
        ]
    )


TABLE = """\
model:
  kind: linear                  # or mlp, with hidden: 64
"""


def _rest(wanted: Wanted) -> str:
    """How it is trained, judged and tuned."""
    reads = wanted.text is not None
    causal = reads and wanted.label is None
    rate, name, low, high = (1e-3, "adam", "3.0e-4", "3.0e-3") if reads else (4.0, "sgd", "1.0", "16.0")
    batch = FILL + "units in a step, on average; about a tenth of units"
    noise = "standard deviation of the noise on the counts of right and wrong answers"
    metric = ""
    if causal:
        metric = _line(2, "metric: loss", "each record's loss is clipped to loss_bound nats")
        metric += _line(2, "loss_bound: 10")
        noise = "standard deviation of the noise on the sum of the units' losses, in units"
    of = "records in memory at a time; changes no result"
    return "".join(
        [
            _line(0, "training:"),
            _line(2, "workers: 2"),
            _line(2, "device: cpu", "gpu: each worker has one of its own"),
            _line(2, "steps: 100"),
            _line(2, f"expected_batch_size: {ASK}", batch),
            _line(2, f"physical_batch_size: {16 if reads else 256}", of),
            _line(2, "block: 20", "steps are paid for so many at a time, before they run"),
            _line(2, "noise_multiplier: 8.0", "less is dearer and more accurate; `purser plan` says how many runs fit"),
            _line(2, "max_grad_norm: 1.0", "a unit's gradient is clipped to this"),
            _line(2, f"optimizer: {{name: {name}, learning_rate: {rate}, schedule: linear}}") + "\n",
            _line(0, "evaluation:"),
            _line(2, "on: validation", "noised and charged; see README for records that are public"),
            metric,
            _line(2, "noise: 5.0", noise) + "\n",
            _line(0, "tuning:", "for `purser tune`"),
            _line(2, "mode: filter", "every trial is charged and visible; select shows the best alone"),
            _line(2, "search: random"),
            _line(2, "trials: 4"),
            _line(2, "space:"),
            _line(4, f"training.optimizer.learning_rate: {{loguniform: [{low}, {high}]}}") + "\n",
            _line(0, "release:"),
            _line(
                2,
                "target: weights",
                "what leaves, beside a privacy statement" + ("; with lora write adapter" if reads else ""),
            ),
        ]
    )
