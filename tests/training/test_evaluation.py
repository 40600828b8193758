"""An evaluation is one noised histogram (P13): the noise is the discrete Gaussian that was charged (P12, P14), nothing
about the records but the two noised counts comes out, and too little noise is refused before anything is counted. Only
what is of the type of public records is judged without noise."""

from __future__ import annotations

import math

import numpy as np
import opendp.measurements
import pytest
import torch
from scipy import stats
from torch import nn

from cluster.accounting.costs import step_cost
from cluster.accounting.mechanisms import DiscreteGaussian
from cluster.errors import PurserError
from training.engine.sampling import Shard
from training.evaluation import PublicRecords, exact, judged, noised
from training.sections import LOSS_PARTS, Evaluation, Groups

RARE = 2e-9  # the false-alarm rate of each statistical check below
SCALE = 5.0
RIGHT, WRONG = 70, 30
PLAIN = Evaluation()


def model():
    """Calls a record 1 where its only feature is positive, else 0."""
    linear = nn.Linear(1, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        linear.bias.zero_()
    return nn.Sequential(linear)


def shard(right=RIGHT, wrong=WRONG):
    features = torch.ones(right + wrong, 1)
    labels = torch.cat([torch.ones(right, dtype=torch.long), torch.zeros(wrong, dtype=torch.long)])
    return Shard(features, labels, np.arange(right + wrong + 1))


def mechanism(scale=SCALE, sensitivity=1):
    return DiscreteGaussian(scale, sensitivity)


@pytest.fixture(scope="module")
def releases():
    """4,000 releases of the same counts."""
    return [noised(model(), shard(), PLAIN, mechanism()) for _ in range(4000)]


def discrete_gaussian(low, high, scale):
    at = np.arange(low, high + 1)
    mass = np.exp(-(at**2) / (2 * scale**2))
    return mass / np.exp(-(np.arange(-400, 401) ** 2) / (2 * scale**2)).sum()


@pytest.mark.parametrize(("cell", "count"), [("correct", RIGHT), ("wrong", WRONG)])
def test_each_count_carries_discrete_gaussian_noise_of_the_charged_scale(releases, cell, count):
    noise = np.array([release[cell] for release in releases]) - count
    assert noise.dtype.kind == "i"
    n = len(noise)
    assert abs(noise.mean()) < 6 * SCALE / math.sqrt(n)
    # The variance is 25 to 1e-200; six standard errors are 13 %: half the noise, or double, is far outside.
    assert abs(noise.var() / SCALE**2 - 1) < 6 * math.sqrt(2 / n)
    expected = n * discrete_gaussian(-13, 13, SCALE)
    seen = np.array([(noise == k).sum() for k in range(-13, 14)])
    tails = n - expected.sum(), n - seen.sum()
    statistic = ((seen - expected) ** 2 / expected).sum() + (tails[1] - tails[0]) ** 2 / tails[0]
    assert stats.chi2.sf(statistic, 27) > RARE


def test_the_noise_of_both_counts_is_independent(releases):
    counts = np.array([(release["correct"], release["wrong"]) for release in releases])
    assert abs(np.corrcoef(counts.T)[0, 1]) * math.sqrt(len(counts)) < 6


def test_no_two_releases_share_their_noise(releases):
    counts = np.array([release["correct"] for release in releases])
    assert abs(np.corrcoef(counts[:-1], counts[1:])[0, 1]) * math.sqrt(len(counts)) < 6


def test_the_error_bar_is_1_96_deviations_of_what_was_released(releases):
    """Both counts are noised, and both noises are in the bar (P14). Six standard errors of a deviation are 7 %."""
    accuracy = np.array([release["accuracy"] for release in releases])
    bar = np.median([release["accuracy_error"] for release in releases])
    assert bar == pytest.approx(1.96 * accuracy.std(), rel=0.1)
    assert np.mean(np.abs(accuracy - 0.7) < bar) == pytest.approx(0.95, abs=0.03)


def test_only_noised_numbers_come_out(releases):
    """The normaliser is the noised sum, never the number of records."""
    for release in releases[:200]:
        assert set(release) == {"correct", "wrong", "accuracy", "accuracy_error"}
        total = release["correct"] + release["wrong"]
        assert release["accuracy"] == min(1, max(0, release["correct"] / total))
    assert len({release["correct"] + release["wrong"] for release in releases}) > 20


def answering(counts, seen=None):
    """OpenDP's constructor, but that its measurement answers `counts`; a map that promises what is charged."""

    class Release:
        def __init__(self, scale):
            self.scale = scale

        def map(self, sensitivity):
            return sensitivity**2 / (2 * self.scale**2)

        def __call__(self, real):
            if seen is not None:
                seen.append(real)
            return list(counts)

    return lambda *space, scale: Release(scale)


@pytest.mark.parametrize(
    "counts", [(0, 0), (-3, 10), (10, -3), (-5, -7), (1, -1), (1, 0), (0, 1), (-1, 2), (2, -1), (10**6, 1)]
)
def test_accuracy_stays_between_0_and_1_whatever_the_noise(monkeypatch, counts):
    monkeypatch.setattr(opendp.measurements, "make_gaussian", answering(counts))
    got = noised(model(), shard(), PLAIN, mechanism())
    assert (got["correct"], got["wrong"]) == counts
    assert 0 <= got["accuracy"] <= 1
    assert 0 <= got["accuracy_error"] <= 1
    assert all(math.isfinite(value) for value in got.values())


def test_what_goes_into_the_noise_is_right_and_wrong(monkeypatch):
    seen = []
    monkeypatch.setattr(opendp.measurements, "make_gaussian", answering((1, 1), seen))
    noised(model(), shard(), PLAIN, mechanism())
    noised(model(), shard(0, 0), PLAIN, mechanism())
    noised(model(), shard(0, 4), PLAIN, mechanism())
    assert seen == [[70, 30], [0, 0], [0, 4]]


def test_an_empty_partition_is_released_like_any_other():
    """Noise around zero: that nobody is there is not said."""
    empty = Shard(torch.zeros(0, 1), torch.zeros(0, dtype=torch.long), np.zeros(1, dtype=np.int64))
    counts = np.array([noised(model(), empty, PLAIN, mechanism())["correct"] for _ in range(500)])
    assert abs(counts.mean()) < 6 * SCALE / math.sqrt(500)
    assert abs(counts.var() / SCALE**2 - 1) < 6 * math.sqrt(2 / 500)


def test_a_model_gone_to_nan_is_released_like_any_other():
    broken = model()
    with torch.no_grad():
        broken[0].weight.fill_(float("nan"))
    got = noised(broken, shard(), PLAIN, mechanism())
    assert 0 <= got["accuracy"] <= 1


@pytest.mark.parametrize("sensitivity", [1, 3])
@pytest.mark.parametrize("share", [0.5, 0.99, 0.9999])
def test_less_noise_than_was_charged_for_is_refused(monkeypatch, share, sensitivity):
    """OpenDP's own map is asked, and the model is not even run."""
    real = opendp.measurements.make_gaussian
    monkeypatch.setattr(opendp.measurements, "make_gaussian", lambda *space, scale: real(*space, scale=scale * share))

    def run(features):
        raise AssertionError("the model was run")

    plain = model()
    plain.forward = run
    with pytest.raises(PurserError, match=r"^evaluation: .*less noise than was charged.*nothing was released"):
        noised(plain, shard(), PLAIN, mechanism(sensitivity=sensitivity))


def test_a_map_that_answers_nan_is_refused(monkeypatch):
    class Release:
        def map(self, sensitivity):
            return math.nan

    monkeypatch.setattr(opendp.measurements, "make_gaussian", lambda *space, scale: Release())
    with pytest.raises(PurserError, match="nothing was released"):
        noised(model(), shard(), PLAIN, mechanism())


@pytest.mark.parametrize(("scale", "sensitivity"), [(0.1, 1), (5.0, 1), (50.0, 7), (1e5, 1000)])
def test_what_is_charged_is_what_opendp_claims(scale, sensitivity):
    """zCDP ρ = Δ²/2σ² is RDP ρα at every order: the books' cost at order 6 is six times OpenDP's ρ, rounded up."""
    assert 0 <= noised(model(), shard(), PLAIN, mechanism(scale, sensitivity))["accuracy"] <= 1
    rho = sensitivity**2 / (2 * scale**2)
    assert step_cost(mechanism(scale, sensitivity), 6) / 1e36 == pytest.approx(6 * rho, rel=1e-12)


# By declared groups.

BY_SEX = Evaluation(groups=Groups(column="sex", categories=("Female", "Male")))
EACH = {"Female": (400, 100), "Male": (300, 700), "other": (0, 0)}


def grouped():
    """Records of two groups, so many (right, wrong) of each, and none of any other."""
    counts = [count for pair in EACH.values() for count in pair]
    labels = torch.cat([torch.full((count,), 1 - i % 2) for i, count in enumerate(counts)])
    of = torch.cat([torch.full((count,), i // 2) for i, count in enumerate(counts)])
    return Shard(torch.ones(len(labels), 1), labels, np.arange(len(labels) + 1), groups=of)


@pytest.fixture(scope="module")
def by_group():
    """1,500 releases of the same counts."""
    return [noised(model(), grouped(), BY_SEX, mechanism()) for _ in range(1500)]


def test_each_group_has_the_accuracy_of_its_own_counts(by_group):
    assert set(by_group[0]["groups"]) == {"Female", "Male", "other"}
    for name, (right, wrong) in list(EACH.items())[:2]:
        seen = np.array([release["groups"][name]["accuracy"] for release in by_group])
        errors = np.array([release["groups"][name]["accuracy_error"] for release in by_group])
        assert abs(seen.mean() - right / (right + wrong)) < 6 * seen.std() / math.sqrt(len(seen)) + 1e-4
        assert abs(errors.mean() / 1.96 / seen.std() - 1) < 0.13, "the error bar is that of the noise"


def test_the_whole_is_the_sum_of_all_cells_and_carries_their_noise(by_group):
    for cell, count in (("correct", 700), ("wrong", 800)):
        noise = np.array([release[cell] for release in by_group]) - count
        assert abs(noise.mean()) < 6 * SCALE * math.sqrt(3 / len(noise))
        assert abs(noise.var() / (3 * SCALE**2) - 1) < 6 * math.sqrt(2 / len(noise)), "three cells, not one"
    seen = np.array([release["accuracy"] for release in by_group])
    errors = np.array([release["accuracy_error"] for release in by_group])
    assert abs(errors.mean() / 1.96 / seen.std() - 1) < 0.13


def test_an_empty_group_tells_nothing_but_noise(by_group):
    """Its accuracy and error are those of counts around 0: as uncertain as can be in about all releases."""
    assert np.mean([release["groups"]["other"]["accuracy_error"] >= 0.2 for release in by_group]) > 0.95


@pytest.fixture
def given(monkeypatch):
    """The counts that releases are given, in turn, before the noise of OpenDP's own."""
    given = []
    real = opendp.measurements.make_gaussian

    def watched(*args, **named):
        release = real(*args, **named)

        class Watched:
            map = staticmethod(release.map)

            def __call__(self, cells):
                given.append(np.array(cells))
                return release(cells)

        return Watched()

    monkeypatch.setattr(opendp.measurements, "make_gaussian", watched)
    return given


def test_a_unit_with_records_in_several_groups_moves_all_cells_by_no_more_than_is_charged(given):
    """By the counts that the release is given: neighbours by a unit of three records, each of another group."""
    some = grouped()
    more = Shard(
        torch.cat([some.features, torch.ones(3, 1)]),
        torch.cat([some.labels, torch.tensor([1, 0, 1])]),
        np.append(some.offsets, some.offsets[-1] + 3),
        groups=torch.cat([some.groups, torch.tensor([0, 1, 2])]),
    )
    for one in (some, more):
        noised(model(), one, BY_SEX, mechanism(SCALE, 3))
    moved = given[1] - given[0]
    assert moved.tolist() == [1, 0, 0, 1, 1, 0]
    assert np.linalg.norm(moved) <= 3


def test_records_without_groups_are_not_judged_by_them():
    with pytest.raises(PurserError, match="nothing was released"):
        noised(model(), shard(), BY_SEX, mechanism())


# By their units' losses.

BOUND = 4.0
LOSS = Evaluation(metric="loss", loss_bound=BOUND, noise=SCALE)
LOSS_BY_SEX = LOSS.model_copy(update={"groups": BY_SEX.groups})
IN_UNITS = DiscreteGaussian(SCALE * LOSS_PARTS, LOSS_PARTS)


class Loses(nn.Module):
    """Loses on a record, whose label is 0, as much as its only feature says."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, features):
        lost = features.double()
        return torch.cat([-lost, torch.log1p(-torch.exp(-lost))], dim=1)


def losing(*units, groups=None):
    """A shard of units, each the losses of its records."""
    flat = [loss for unit in units for loss in unit]
    offsets = np.cumsum([0, *(len(unit) for unit in units)])
    of = None if groups is None else torch.tensor([group for unit in groups for group in unit], dtype=torch.long)
    return Shard(torch.tensor(flat)[:, None], torch.zeros(len(flat), dtype=torch.long), offsets, groups=of)


def test_a_unit_gives_the_share_of_the_bound_that_its_mean_clipped_loss_comes_to(given):
    cells = {(1.0,): 250, (1.0, 3.0): 500, (2.0, 1e9): 750, (4.0,): 1000, (0.002,): 0, (math.nan,): 1000}
    for unit, lost in cells.items():
        noised(Loses(), losing(unit), LOSS, IN_UNITS)
        assert given.pop() == pytest.approx([LOSS_PARTS - lost, lost], abs=1.01), unit
    noised(Loses(), losing(*cells), LOSS, IN_UNITS)
    assert given.pop().sum() == len(cells) * LOSS_PARTS, "every unit counts alike, however many records it has"


def test_no_unit_moves_the_cells_of_losses_by_more_than_is_charged(given):
    """Neighbours by one unit of any size, of losses that are no numbers too, in groups or none. All other units' parts
    stay what they were."""
    draw = np.random.default_rng(1)

    def unit():
        size = draw.integers(1, 9)
        odd = draw.choice([0.0, 1e-30, math.inf, math.nan, 1e30, BOUND], size)
        return np.where(draw.random(size) < 0.3, odd, draw.exponential(BOUND / 2, size)).tolist()

    for evaluation, count in ((LOSS, 1), (LOSS_BY_SEX, 3)):
        for _ in range(200):
            units = [unit() for _ in range(draw.integers(0, 5))] + [unit()]
            groups = [draw.integers(0, count, len(one)).tolist() for one in units]
            for some in (slice(None), slice(None, -1)):
                noised(Loses(), losing(*units[some], groups=groups[some]), evaluation, IN_UNITS, rows=4)
            more, less = given.pop(-2), given.pop()
            assert (more - less).min() >= 0
            assert np.abs(more - less).sum() <= LOSS_PARTS
    assert not given


def test_parts_that_were_rounded_would_move_more(given):
    """Why they are rounded down: a seventh of 1,000 for each of seven groups, rounded to the nearest, is 1,001."""
    seven = Evaluation(metric="loss", groups=Groups(column="of", categories=tuple("abcdef")))
    noised(Loses(), losing([1.0] * 7, groups=[range(7)]), seven, IN_UNITS)
    assert given.pop().sum() == 7 * (LOSS_PARTS // 7) < LOSS_PARTS < 7 * round(LOSS_PARTS / 7)


@pytest.fixture(scope="module")
def losses():
    """1,500 releases of the same units."""
    return [noised(Loses(), losing(*[[1.0, 2.0]] * 300, *[[6.0]] * 100), LOSS, IN_UNITS) for _ in range(1500)]


def test_the_loss_is_that_of_the_units_and_carries_the_noise_that_is_said(losses):
    assert all(set(release) == {"clipped_loss", "clipped_loss_error"} for release in losses)
    seen = np.array([release["clipped_loss"] for release in losses])
    bar = np.median([release["clipped_loss_error"] for release in losses])
    assert abs(seen.mean() - (300 * 1.5 + 100 * BOUND) / 400) < 6 * seen.std() / math.sqrt(len(seen)) + 1e-3
    assert abs(bar / 1.96 / seen.std() - 1) < 0.13
    # Noise of SCALE units in either count of 400: half as much is far outside.
    assert seen.std() > 0.8 * BOUND * SCALE * math.hypot(0.53, 0.47) / 400


def test_a_model_gone_to_nan_loses_the_bound(given):
    broken = model()
    with torch.no_grad():
        broken[0].weight.fill_(float("nan"))
    noised(broken, shard(), LOSS, IN_UNITS)
    assert given.pop().tolist() == [0, 100 * LOSS_PARTS]


@pytest.mark.parametrize("rows", [1, 7, 99, 100])
def test_how_many_records_go_through_at_once_changes_nothing(given, rows):
    for evaluation in (PLAIN, LOSS):
        for at_once in (rows, 1024):
            noised(model(), shard(), evaluation, IN_UNITS, rows=at_once)
        assert (given.pop() == given.pop()).all()


# Of public records.

PUBLIC = Evaluation(on="public", source="public.csv")


def test_public_records_are_judged_exactly():
    got = exact(model(), PublicRecords(shard()), PUBLIC)
    error = 1.96 * math.sqrt(0.7 * 0.3 / 100)
    assert got == {"correct": 70, "wrong": 30, "accuracy": 0.7, "accuracy_error": pytest.approx(error, rel=0.01)}
    lost = exact(Loses(), PublicRecords(losing([1.0], [3.0])), PUBLIC.model_copy(update=dict(LOSS)))
    assert lost["clipped_loss"] == pytest.approx(2.0, abs=1e-6)
    assert set(lost) == {"clipped_loss", "clipped_loss_error"}


def test_groups_of_public_records_are_judged_exactly():
    got = exact(model(), PublicRecords(grouped()), PUBLIC.model_copy(update={"groups": BY_SEX.groups}))
    assert {name: one["accuracy"] for name, one in got["groups"].items()} == {"Female": 0.8, "Male": 0.3, "other": 0.0}
    assert got["groups"]["other"]["accuracy_error"] == 1.0, "nobody is there"


class AJob:
    """What `judged` reads of a job."""

    def __init__(self, evaluation):
        self.evaluation, self.histogram = evaluation, mechanism()
        self.training = type("Training", (), {"physical_batch_size": 64})


@pytest.mark.parametrize(("records", "evaluation"), [(shard(), PUBLIC), (PublicRecords(shard()), PLAIN)])
def test_records_of_the_other_kind_are_not_judged(given, records, evaluation):
    """Private ones never without noise, whatever a job says of them."""
    with pytest.raises(PurserError, match=r"not the records that the job says; nothing was released"):
        judged(model(), records, AJob(evaluation))
    assert not given


def test_each_kind_is_judged_in_its_way(given):
    assert judged(model(), PublicRecords(shard()), AJob(PUBLIC))["accuracy"] == 0.7
    assert not given
    assert set(judged(model(), shard(), AJob(PLAIN))) == {"correct", "wrong", "accuracy", "accuracy_error"}
    assert given.pop().tolist() == [70, 30]
