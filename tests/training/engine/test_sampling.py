"""Sampling is Poisson at the declared rate: each unit a coin of its own at each step, by 64-bit integers (P7).

Micro-batches hold whole units, each that joined once, and never more records than fit (section 5 of the design).

Statistical checks: a false-alarm rate of 2e-9 each unless said otherwise, fewer than fifty of them.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from dpsgd_reference import plan
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cluster.errors import PurserError, UsageError
from training.engine.randomness import Keystream
from training.engine.sampling import PoissonSampler, Shard, micro_batches

SIX, RARE = 6.0, 2e-9


def within(successes, trials, rate):
    """Whether a count of successes lies between both exact binomial tails of RARE / 2."""
    law = stats.binom(trials, rate)
    return law.ppf(RARE / 2) <= successes <= law.isf(RARE / 2)


def test_coins_at_a_quarter():
    assert within(Keystream().bernoulli(4_000_000, 0.25).sum(), 4_000_000, 0.25)


def test_coins_at_three_in_ten_million():
    """60 of 2e8, give or take 45. That fp32 uniforms give 71 is beyond counting here: the next test is exact."""
    stream = Keystream()
    heads = sum(int(stream.bernoulli(4_000_000, 3e-7).sum()) for _ in range(50))
    assert within(heads, 200_000_000, 3e-7)


@pytest.mark.parametrize("rate", [1e-9, 3e-7, 0.1, 0.25, 1 / 3, 1 - 2.0**-53])
def test_a_coin_is_an_integer_below_the_rate_s_share_of_all(monkeypatch, rate):
    """Exactly ⌊rate·2^64⌋ of the 2^64 integers are heads: never above the rate that is charged for."""
    threshold = math.floor(rate * 2**64)
    edge = np.array([0, threshold - 1, threshold, 2**64 - 1], dtype=np.uint64)
    monkeypatch.setattr(Keystream, "integers", lambda self, count: np.resize(edge, count))
    assert Keystream().bernoulli(4, rate).tolist() == [True, True, False, False]


def test_a_rate_of_one_takes_every_unit():
    assert Keystream().bernoulli(1000, 1.0).all()
    assert PoissonSampler(plan(sample_rate=1.0), 7).draw().tolist() == list(range(7))


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0000001, math.nan, math.inf, 1e-10, True, "0.5"])
def test_a_rate_that_cannot_be_charged_cannot_be_sampled(rate):
    with pytest.raises(UsageError, match="sample_rate"):
        plan(sample_rate=rate)


RATE, UNITS, STEPS = 0.3, 200, 4000


def suspicions(joined):
    """What is not Poisson about a history of batches; bool [steps, units].

    Each kind of check has a false-alarm rate below 1e-8 (the last two look at 40,000 correlations with a bound of
    seven standard errors, 2.6e-12 each).
    """
    found = []
    steps, units = joined.shape
    z = (joined - RATE) / math.sqrt(RATE * (1 - RATE))
    if stats.chi2.sf((z.sum(axis=0) ** 2 / steps).sum(), units) < RARE:
        found.append("units join at unlike rates")
    sizes = z.sum(axis=1) / math.sqrt(units)
    if abs(sizes.mean()) * math.sqrt(steps) > SIX:
        found.append("the rate is another")
    if abs((sizes**2).mean() - 1) * math.sqrt(steps / 2) > SIX:
        found.append("batch sizes do not vary as coins do")
    between = z.T @ z / steps
    if np.abs(between[~np.eye(units, dtype=bool)]).max() * math.sqrt(steps) > 7:
        found.append("units join together")
    after = z[:-1].T @ z[1:] / (steps - 1)
    if np.abs(after).max() * math.sqrt(steps - 1) > 7:
        found.append("a step depends on the one before")
    return found


def test_batches_are_poisson():
    sampler = PoissonSampler(plan(sample_rate=RATE), UNITS)
    joined = np.zeros((STEPS, UNITS), dtype=bool)
    for step in joined:
        units = sampler.draw()
        assert (np.diff(units) > 0).all()
        step[units] = True
    assert suspicions(joined) == []


def test_the_checks_of_poisson_bite():
    """What others call sampling: batches of one size, a shuffled round, one seed on two ranks, a rate in fp32 habit."""
    random = np.random.default_rng(0)
    coins = random.random((STEPS, UNITS)) < RATE
    fixed = random.random((STEPS, UNITS)).argsort(axis=1) < RATE * UNITS
    shuffled = np.concatenate(
        [random.permutation(UNITS)[:, None] % 4 == np.arange(4) for _ in range(STEPS // 4)], axis=1
    ).T
    two_ranks = np.tile(random.random((STEPS, UNITS // 2)) < RATE, 2)
    higher = random.random((STEPS, UNITS)) < 1.19 * RATE
    assert suspicions(coins) == []
    assert "batch sizes do not vary as coins do" in suspicions(fixed)
    assert "a step depends on the one before" in suspicions(shuffled)
    assert "units join together" in suspicions(two_ranks)
    assert "the rate is another" in suspicions(higher)


def test_no_seed_reaches_the_coins():
    """Two ranks that seed everything alike; 64 coins would agree by chance once in 2^64 (H2)."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(42)
        np.random.seed(42)
        drawn.append(PoissonSampler(plan(sample_rate=0.5), 64).draw().tolist())
    assert drawn[0] != drawn[1]


def test_a_sampler_at_three_in_ten_million(monkeypatch):
    """Integers of 44 bits in place of 64 make the rate 2^20 times as high, which can be counted; on two ranks."""
    real = Keystream.integers
    monkeypatch.setattr(Keystream, "integers", lambda self, count: real(self, count) >> np.uint64(20))
    run, units = plan(sample_rate=3e-7), 200_000
    joined = [PoissonSampler(run, units).draw() for _ in range(2)]
    rate = 3e-7 * 2**20
    for found in joined:
        assert stats.binomtest(len(found), units, rate).pvalue > 1e-7
    assert stats.binomtest(len(np.intersect1d(*joined)), units, rate**2).pvalue > 1e-7


def test_a_rank_without_units_draws_empty_batches():
    sampler = PoissonSampler(plan(sample_rate=0.5), 0)
    assert all(len(sampler.draw()) == 0 for _ in range(3))
    nothing = Shard(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), np.zeros(1, dtype=np.int64))
    assert nothing.units == 0
    assert list(micro_batches(nothing, sampler.draw(), 4)) == []


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_micro_batches_hold_each_joined_unit_whole_and_once(data):
    sizes = np.array(data.draw(st.lists(st.integers(1, 5), max_size=12)), dtype=np.int64)
    physical = data.draw(st.integers(max(sizes, default=1), 20))
    chosen = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    joined = np.flatnonzero(np.array(chosen, dtype=bool))
    records = int(sizes.sum())
    # Features name their record, labels its unit: so that what arrives can be traced back.
    owner = np.repeat(np.arange(len(sizes)), sizes)
    shard = Shard(
        torch.arange(records).float()[:, None], torch.from_numpy(owner), np.concatenate([[0], sizes.cumsum()])
    )
    batches = list(micro_batches(shard, joined, physical))
    seen = []
    for batch in batches:
        records = len(batch.unit)
        assert 1 <= records == len(batch.labels) == len(batch.features) <= physical
        padded = batch.padded(physical)
        assert len(padded.labels) == len(padded.features) == physical
        assert torch.equal(padded.features[:records], batch.features)
        assert not padded.features[records:].any()  # padding is made of nothing
        assert not padded.labels[records:].any()
        assert batch.units == len(set(batch.labels[:records].tolist())) == int(batch.unit.max()) + 1
        for u in range(batch.units):
            mine = (batch.unit == u).nonzero()[:, 0]
            (name,) = set(batch.labels[mine].tolist())
            first, last = shard.offsets[name], shard.offsets[name + 1]
            assert batch.features[mine].flatten().tolist() == list(range(first, last))
            seen.append(name)
    assert seen == joined.tolist()
    # A micro-batch is closed only because the next unit would not fit.
    for batch, following in zip(batches, batches[1:], strict=False):
        assert len(batch.unit) + int((following.unit == 0).sum()) > physical


def test_a_unit_that_does_not_fit_is_never_cut():
    """The run refuses such a plan; were a shard wrong all the same, nothing would be trained on it."""
    with pytest.raises(UsageError, match=r"training\.physical_batch_size.*privacy\.max_records_per_unit"):
        plan(physical_batch_size=2, max_records_per_unit=3)
    shard = Shard(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), np.array([0, 3]))
    with pytest.raises(PurserError, match=r"training\.physical_batch_size"):
        list(micro_batches(shard, np.array([0]), 2))
