"""Canaries are made of what a job declares and of nothing else, each under a fair coin of its own, sealed before the
run (P10, P11); what they are in each kind of job, and which jobs may not have any."""

from __future__ import annotations

import stat

import numpy as np
import pytest
import torch
from people import job_of, table_of, text_job
from product import DIGITS

from cluster.accounting.books import Books
from cluster.accounting.ledger import Ledger
from cluster.errors import UsageError
from training import tokens
from training.admission import source_of
from training.audit.canaries import Canaries, draw
from training.engine.objective import IGNORED
from training.jobfile import load
from training.shards import beside
from tuning.config import SweepJob


def digits(**audit):
    return load(SweepJob, DIGITS).plain.with_values({f"audit.{key}": value for key, value in audit.items()})


def test_coins_are_fair_and_each_its_own():
    """Of 20,000: their number and the number of changes from one to the next, each within six deviations (2e-9)."""
    coins = np.concatenate([draw(digits(canaries=500), 10).inside for _ in range(40)])
    deviation = np.sqrt(len(coins)) / 2
    assert abs(coins.sum() - len(coins) / 2) < 6 * deviation
    assert abs((coins[1:] != coins[:-1]).sum() - (len(coins) - 1) / 2) < 6 * deviation
    assert len({draw(digits(canaries=100), 10).inside.tobytes() for _ in range(5)}) == 5


def test_a_mislabelled_canary_is_at_the_ends_of_what_is_declared():
    """Numbers at one end or the other, one of the categories, and a label that they do not decide."""
    job = job_of(features={"age": {"range": [0, 120]}, "colour": {"categories": ["red", "green", "blue"]}})
    made = draw(job.with_values({"audit.canaries": 300}), 10)
    features, labels = made.arrays["features"], made.arrays["label"]
    assert features.dtype == np.float32
    assert set(features[:, 0].tolist()) == {-0.5, 0.5}
    assert (features[:, 1:].sum(1) == 1).all()
    assert set(features[:, 1:].flatten().tolist()) == {0.0, 1.0}
    assert set(labels.tolist()) == {0, 1}
    assert made.facts == {"kind": "mislabelled", "canaries": 300, "distinct": 12, "guesses": 10, "confidence": 0.95}


def test_a_blank_canary_has_one_value():
    features = draw(digits(canaries=50, kind="blank"), 10).arrays["features"]
    assert ((features != 0).sum(1) == 1).all()


def test_what_is_sealed_is_the_owner_s_alone_and_whole(tmp_path):
    made = draw(digits(canaries=30), 12)
    digest = made.seal(tmp_path)
    assert stat.S_IMODE((tmp_path / "canaries.npz").stat().st_mode) == 0o600
    again = Canaries.unsealed(tmp_path, digest)
    assert np.array_equal(again.inside, made.inside)
    assert all(np.array_equal(again.arrays[name], array) for name, array in made.arrays.items())
    assert again.facts == made.facts
    with pytest.raises(UsageError, match=r"^audit\.canaries: those that the run was begun with are not in"):
        Canaries.unsealed(tmp_path, "0" * 64)


def test_parts_of_ranks_are_all_of_them_once():
    made = draw(digits(canaries=31), 10)
    parts = np.concatenate([made.part(rank, 3) for rank in range(3)])
    assert sorted(parts.tolist()) == list(range(31))


def test_the_sample_rate_is_that_of_a_partition_with_canaries():
    """Half of them are expected there, so that a batch is as large as is declared."""
    job = digits(canaries=1000)
    run, without = job.run(), digits().run()
    units = 1797 * 0.8
    assert run.sample_rate == pytest.approx(360 / (units + 500))
    assert run.expected_batch_size == without.expected_batch_size == 360
    assert run.charge("digits/train").mechanism.sample_rate == run.sample_rate < without.sample_rate


@pytest.mark.parametrize("packing", ["none", "unit"])
@pytest.mark.parametrize("prompt", [None, "label"])
def test_a_rare_token_is_all_that_is_to_be_said(packing, prompt):
    """Of a causal canary the last token is predicted and no other, whatever the job's prompt."""
    job = text_job("notes.csv", label=False, unit="id", most=3, packing=packing, prompt=prompt)
    job = job.with_values({"audit.canaries": 40})
    made = draw(job, 10)
    shard = made.shard(job, np.arange(40))
    tokenizer = tokens.tokenizer_of(job.model)
    assert made.facts["kind"] == "rare-token"
    assert len(made.candidates) == len(tokenizer.get_vocab()) - len(set(tokenizer.all_special_ids))
    wanted = shard.labels[:] != IGNORED
    assert (wanted.sum(1) == 1).all()
    length = torch.from_numpy(made.arrays["length"]).long()
    assert torch.equal(wanted.long().argmax(1), length - 1)
    targets = shard.features[:][torch.arange(40), length - 1]
    assert set(targets.tolist()) <= set(made.candidates.tolist())
    assert torch.equal(shard.labels[:][wanted], targets)
    assert shard.units == 40
    assert (shard.positions is not None) == (packing == "unit")


def test_a_text_to_be_classified_is_random_tokens_between_those_that_every_text_has():
    job = text_job("notes.csv", kind="sequence-classification").with_values({"audit.canaries": 20})
    made = draw(job, 10)
    begin, end = tokens.around(tokens.tokenizer_of(job.model), causal=False)
    for ids, length in zip(made.arrays["ids"], made.arrays["length"], strict=True):
        assert ids[: len(begin)].tolist() == begin
        assert ids[length - len(end) : length].tolist() == end
        assert length > len(begin) + len(end)
    assert not len(made.candidates)


@pytest.fixture
def public(tmp_path):
    """60 records, whose names are their numbers."""
    return table_of([(i, "red", ["no", "yes"][i % 2]) for i in range(60)]).write(tmp_path / "public.csv")


@pytest.mark.parametrize("kind", ["public", "mislabelled"])
def test_canaries_of_a_public_file_are_its_records(public, kind):
    """As they are, or each with another label than its own; none twice."""
    made = draw(job_of().with_values({"audit": {"canaries": 40, "source": str(public), "kind": kind}}), 10)
    names = np.rint((made.arrays["features"][:, 0] + 0.5) * 1000).astype(int)
    assert len(set(names.tolist())) == 40
    right = made.arrays["label"] == names % 2
    assert right.all() if kind == "public" else not right.any()


def test_groups_of_an_evaluation_are_none_of_a_canary_s(public):
    """Neither need a public file have their column, nor are its records in any: those that a model learns from are
    not."""
    for column in ("sex", "colour"):
        groups = {"column": column, "categories": ["red"]}
        job = job_of(evaluation={"groups": groups}, audit={"canaries": 40, "source": str(public)})
        assert set(draw(job, 10).arrays) == {"features", "label"}


def test_more_canaries_than_a_file_has_records_are_refused(public):
    with pytest.raises(UsageError, match=r"^audit\.canaries: 61 was given, and public\.csv has 60 records"):
        draw(job_of().with_values({"audit": {"canaries": 61, "source": str(public), "kind": "public"}}), 10)


def test_a_private_source_is_no_source_of_canaries(public, tmp_path):
    books = Books(Ledger(f"sqlite:///{tmp_path}/ledger.db"))
    job = job_of(public)
    source_of(books, job)
    with pytest.raises(UsageError, match=r"^audit\.source: it is the source of a dataset in this ledger"):
        source_of(books, job.with_values({"audit": {"canaries": 20, "source": str(public)}}))


def test_canaries_and_records_are_one_shard(public):
    """In this order, whichever rows are asked for; a slice, too."""
    job = job_of()
    made = draw(job.with_values({"audit.canaries": 30}), 10)
    first, second = made.shard(job, np.arange(20)), made.shard(job, np.arange(20, 30))
    both, whole = beside(first, second), made.shard(job, np.arange(30))
    which = torch.tensor([25, 3, 29, 0, 20, 19])
    for rows in (which, slice(15, 25), slice(None), torch.arange(0)):
        assert torch.equal(both.features[rows], whole.features[rows])
        assert torch.equal(both.labels[rows], whole.labels[rows])
    assert np.array_equal(both.offsets, whole.offsets)
    none = made.shard(job, np.arange(0))
    assert torch.equal(beside(none, second).features[:], second.features[:])
    assert torch.equal(beside(first, none).features[:], first.features[:])


REFUSED = {
    "audit.canaries: 5 was given": {"canaries": 5},
    "audit.canaries: it is 0, and the rest is for audits only": {"kind": "blank"},
    "audit.guesses: 41 was given": {"canaries": 40, "guesses": 41},
    "audit.source: it is missing": {"canaries": 40, "kind": "public"},
    "audit.source: it is for kind: public and mislabelled": {"canaries": 40, "kind": "blank", "source": "x.csv"},
    "audit.kind: rare-token was given": {"canaries": 40, "kind": "rare-token"},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_an_audit_that_cannot_be_is_refused_by_its_field(sentence):
    with pytest.raises(UsageError) as caught:
        job_of(audit=REFUSED[sentence])
    assert str(caught.value).startswith(sentence)


def test_a_sweep_has_no_canaries():
    """Which of its runs is released follows from their figures."""
    job = load(SweepJob, DIGITS, ["audit.canaries=100"])
    with pytest.raises(UsageError, match=r"^audit\.canaries: 100 was given, and a sweep is not audited"):
        job.check_swept()
    load(SweepJob, DIGITS).check_swept()
