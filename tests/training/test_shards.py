"""Prepared records behind what looks like tensors: the same numbers, read when they are asked for and no others; what
was changed is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from people import job_of, prepared, table_of, text_job

from cluster.errors import UsageError
from training import preparation
from training.engine.objective import IGNORED
from training.engine.run import DPSGDRun
from training.engine.sampling import PoissonSampler, Shard, micro_batches
from training.engine.trainer import PrivateTrainer
from training.evaluation import judged
from training.sections import Optimizer
from training.shards import Mapped, Prepared, public_shard

pytestmark = pytest.mark.usefixtures("home")


def mapped(sizes, order, width=3):
    """A column whose row n holds n in every place, in pieces of these sizes."""
    whole = np.repeat(np.arange(sum(sizes), dtype=np.float32)[:, None], width, axis=1)
    starts = np.cumsum([0, *sizes])
    pieces = [whole[first:last] for first, last in zip(starts[:-1], starts[1:], strict=True)]
    return Mapped(pieces, starts, np.array(order, np.int64), width, np.dtype(np.float32))


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 4), max_size=6), choose=st.data())
def test_rows_are_those_that_were_asked_for(sizes, choose):
    """Wherever a piece begins, empty ones included; by index or by slice, as a tensor would give them."""
    order = choose.draw(st.permutations(range(sum(sizes))))
    column, whole = mapped(sizes, order), torch.tensor(order, dtype=torch.float32)[:, None].expand(-1, 3)
    assert len(column) == len(order)
    some = choose.draw(st.lists(st.integers(0, len(order) - 1), max_size=8)) if order else []
    index = torch.tensor(some, dtype=torch.long)
    assert torch.equal(column[index], whole[index])
    first, last = choose.draw(st.integers(0, 8)), choose.draw(st.integers(0, 8))
    assert torch.equal(column[first:last], whole[first:last])


class Counted:
    """A piece that tells which rows are read of it; all others might as well lie on a broken disk."""

    def __init__(self, array):
        self.array, self.read = array, []

    def __getitem__(self, which):
        self.read += np.asarray(which).tolist()
        return self.array[which]


def counted(shard):
    """The shard, with each of its pieces counted."""
    pieces = []
    for column in (shard.features, shard.labels):
        column._pieces = [Counted(piece) for piece in column._pieces]
        pieces.append(column._pieces)
    return pieces


def rows(count):
    return [(i % 1000, ["red", "green"][i % 2], ["no", "yes"][i % 3 == 0]) for i in range(count)]


def test_training_reads_the_rows_that_it_samples_and_no_others(tmp_path, monkeypatch):
    """A corpus larger than memory trains: opening reads nothing, a step reads its batch."""
    monkeypatch.setattr("training.sources.ROWS", 100)
    shard = prepared(job_of(table_of(rows(2000)).write(tmp_path / "people.csv"))).shard("train", 0, 1)
    features, labels = counted(shard)
    assert len(features) > 10
    run = DPSGDRun(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=20 / shard.units,
        expected_batch_size=20,
        steps=3,
        block=1,
        physical_batch_size=8,
        max_records_per_unit=1,
    )
    drawn = []
    draw = PoissonSampler.draw
    monkeypatch.setattr(PoissonSampler, "draw", lambda sampler: drawn.append(draw(sampler)) or drawn[-1])
    trainer = PrivateTrainer(torch.nn.Sequential(torch.nn.Linear(3, 2)), Optimizer(), run)
    trainer.steps(shard, 3)
    wanted = sum(map(len, drawn))
    assert 0 < wanted < shard.units / 4
    assert sum(len(piece.read) for piece in features) == wanted
    assert sum(len(piece.read) for piece in labels) == wanted


def test_evaluation_reads_every_row_once(tmp_path):
    job = job_of(table_of(rows(500)).write(tmp_path / "people.csv"))
    shard = prepared(job).shard("validation", 0, 1)
    features, labels = counted(shard)
    judged(torch.nn.Sequential(torch.nn.Linear(3, 2)), shard, job)
    for pieces in (features, labels):
        assert sorted(row for piece in pieces for row in piece.read) == list(range(shard.units))


def test_pages_are_mapped_and_not_copied(tmp_path):
    shard = prepared(job_of(table_of(rows(200)).write(tmp_path / "people.csv"))).shard("train", 0, 1)
    for piece in (*shard.features._pieces, *shard.labels._pieces):
        assert not piece.flags.owndata
        assert not piece.flags.writeable


def test_micro_batches_are_those_of_tensors(tmp_path):
    path = table_of([(*row, f"p{i % 37}") for i, row in enumerate(rows(300))], ("id", "colour", "label", "person"))
    shard = prepared(job_of(path.write(tmp_path / "people.csv"), unit="person", most=4)).shard("train", 0, 1)
    tensors = Shard(shard.features[:], shard.labels[:], shard.offsets)
    joined = np.arange(0, shard.units, 2)
    for one, other in zip(micro_batches(shard, joined, 10), micro_batches(tensors, joined, 10), strict=True):
        assert torch.equal(one.features, other.features)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.unit, other.unit)


def text_rows(count):
    return [(f"ask {i}", f"text {i}" + "x" * (i % 9), ["no", "yes"][i % 2]) for i in range(count)]


def texts(tmp_path, count=60):
    return table_of(text_rows(count), ("asked", "note", "label")).write(tmp_path / "notes.parquet")


def test_masks_and_labels_of_texts_are_made_at_each_access(tmp_path):
    """Of a causal model every token is a label but prompt and padding; padding stands at the end."""
    for prompt in (None, "asked"):
        made = prepared(text_job(texts(tmp_path), prompt=prompt, max_length=24))
        shard = made.shard("train", 0, 1)
        index = torch.tensor([3, 0, 5])
        ids, labels, mask = shard.features[index], shard.labels[index], shard.mask[index]
        assert ids.dtype == labels.dtype == mask.dtype == torch.long
        assert not (mask[:, 1:] > mask[:, :-1]).any()
        wanted = labels != IGNORED
        assert torch.equal(labels[wanted], ids[wanted])
        assert not (wanted & (mask == 0)).any()
        skipped = ((mask == 1) & ~wanted).sum(1)
        assert (skipped > 0).all() if prompt else (skipped == 0).all()
        assert torch.equal(mask.sum(1), shard.mask[:].sum(1)[index])


def test_classes_of_texts_are_labels(tmp_path):
    shard = prepared(text_job(texts(tmp_path), kind="sequence-classification")).shard("train", 0, 1)
    assert shard.labels[:].dim() == 1
    assert set(shard.labels[:].tolist()) == {0, 1}
    assert shard.mask[:2].shape == (2, 12)


def test_a_public_file_is_encoded_alike(tmp_path):
    """Tables and texts, in memory, each record a unit of its own."""
    everything = table_of(rows(40)).write(tmp_path / "people.csv")
    job = job_of(everything).with_values({"evaluation": {"on": "public", "source": str(everything)}})
    public, made = public_shard(job), prepared(job)
    private = torch.cat([made.shard(partition, 0, 1).features[:] for partition in ("train", "validation")])
    assert sorted(public.features[:].tolist()) == sorted(private.tolist())
    assert public.offsets.tolist() == list(range(41))
    path = texts(tmp_path)
    job = text_job(path, prompt="asked").with_values({"evaluation.on": "public", "evaluation.source": str(path)})
    public = public_shard(job)
    assert public.units == 60
    assert public.labels[:].shape == public.features[:].shape == public.mask[:].shape


@pytest.mark.parametrize("most", [0, 1])
def test_empty_partitions_are_shards(tmp_path, most):
    path = table_of(rows(most)).write(tmp_path / "people.csv")
    for world in (1, 3):
        for partition in ("train", "validation"):
            for rank in range(world):
                shard = prepared(job_of(path)).shard(partition, rank, world)
                assert shard.units == len(shard.labels) <= most
                assert shard.features[:].shape == (shard.units, 3)
                assert shard.labels[:].dtype == torch.long
    shard = prepared(text_job(table_of([], ["note"]).write(tmp_path / "notes.csv"))).shard("train", 0, 1)
    assert shard.labels[:].shape == (0, 12)


def test_files_that_are_not_those_of_the_manifest_are_refused(tmp_path):
    job = job_of(table_of(rows(200)).write(tmp_path / "people.csv"))
    other = prepared(job_of(table_of(rows(300)).write(tmp_path / "others.csv")))
    made = prepared(job)
    (made.folder / "train-0.arrow").write_bytes((other.folder / "train-0.arrow").read_bytes())
    with pytest.raises(UsageError, match=r"^data\.source: its prepared form .* was changed"):
        made.shard("train", 0, 1)
    assert Prepared.at(tmp_path) is None
    assert preparation.prepare(job, "33" * 32, "11" * 32) == made.folder
