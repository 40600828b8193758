"""A selection's sealed state: what is drawn is never drawn again, each candidate runs at most once, a crash is a loss,
and the law of what wins is the one that is charged for (P3, P6, P10, P14). On a toy mechanism whose outputs can be
enumerated, the exact distribution of the output on neighbouring inputs stays within the charged (ε, δ)."""

from __future__ import annotations

import itertools
import json
import random
import stat

import mpmath
import pytest
from product import DIGITS
from scipy.stats import chi2

from cluster.accounting.costs import FINE, UNIT, covers, epsilon_of, step_cost
from cluster.accounting.mechanisms import (
    Composition,
    DiscreteGaussian,
    PoissonSubsampledGaussian,
    RepeatAndSelect,
)
from cluster.accounting.selection import POISSON, masses, repetitions_of
from cluster.errors import UsageError
from training.jobfile import load
from tuning import sealed as module
from tuning.config import SweepJob
from tuning.sealed import Sealed

SELECTION = ("tuning.mode=select", "tuning.search=random")
SELECT = load(SweepJob, DIGITS, [*SELECTION, "tuning.space={training.max_grad_norm: {uniform: [0.5, 2]}}"])


@pytest.fixture
def sealed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "draw", lambda repetitions: 4)
    made = Sealed(tmp_path)
    made.draw(SELECT)
    return made


def ended(sealed, candidate, accuracy):
    """As a worker group leaves it."""
    (candidate.folder / "weights.safetensors").write_text(f"weights of {candidate.tag}")
    sealed.keep(candidate, {"accuracy": accuracy, "accuracy_error": 0.0})


def test_only_its_owner_sees_it(sealed):
    assert stat.S_IMODE(sealed.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(sealed.claim().folder.stat().st_mode) == 0o700


def test_k_and_the_candidates_are_those_that_were_drawn(sealed):
    values = [candidate.values["training.max_grad_norm"] for candidate in sealed.candidates()]
    assert len(set(values)) == 4
    assert all(0.5 <= value < 2 for value in values)
    again = Sealed(sealed.folder.parent)
    assert again.drawn_for(SELECT)
    assert again.candidates() == sealed.candidates()
    assert len({candidate.tag for candidate in sealed.candidates()}) == 4


def test_another_job_does_not_go_on_with_it(sealed):
    changed = load(SweepJob, DIGITS, ["tuning.mode=select", "training.optimizer.learning_rate=1"])
    with pytest.raises(UsageError, match="unchanged or not at all"):
        sealed.drawn_for(changed)


def test_each_candidate_is_claimed_once_however_many_groups_ask(sealed):
    groups = [Sealed(sealed.folder.parent) for _ in range(3)]
    claimed = [groups[i % 3].claim() for i in range(5)]
    assert [one.tag for one in claimed[:4]] == [one.tag for one in sealed.candidates()]
    assert claimed[4] is None
    assert not sealed.left


def test_two_groups_that_see_the_same_queue_do_not_run_the_same_candidate(sealed, monkeypatch):
    """One is halted between its look and its claim, while the other claims."""
    other, candidates = Sealed(sealed.folder.parent), Sealed.candidates
    taken = []

    def late(self):
        seen = candidates(self)
        if self is sealed and not taken:
            taken.append(other.claim())
        return seen

    monkeypatch.setattr(Sealed, "candidates", late)
    mine = sealed.claim()
    assert taken[0].tag != mine.tag


def test_the_best_wins_and_only_its_weights_stay(sealed):
    for accuracy in (0.5, 0.9, 0.7):
        ended(sealed, sealed.claim(), accuracy)
    best = sealed.best()
    assert best.outcome.metrics["accuracy"] == 0.9
    kept = [path.read_text() for path in sealed.folder.rglob("weights.safetensors")]
    assert kept == [f"weights of {best.tag}"]


def test_a_candidate_that_crashed_is_lost_and_not_run_again(sealed):
    """A group that dies leaves its claim behind; whoever goes on passes over it, and it never wins."""
    crashed = sealed.claim()
    rest = list(iter(sealed.claim, None))
    assert crashed.tag not in {one.tag for one in rest}
    for one in rest:
        ended(sealed, one, 0.0)
    assert sealed.best().tag != crashed.tag


def test_of_equal_scores_the_drawn_tag_decides_and_not_the_order_in_which_they_ended(sealed):
    order = [sealed.claim() for _ in range(4)]
    for one in reversed(order):
        ended(sealed, one, 0.8)
    assert sealed.best().tag == max(one.tag for one in order)


def test_no_candidate_at_all_is_a_result(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "draw", lambda repetitions: 0)
    nothing = Sealed(tmp_path)
    nothing.draw(SELECT)
    assert nothing.claim() is None
    assert nothing.best() is None
    assert not nothing.left


def test_nothing_is_left_when_it_is_destroyed(sealed):
    ended(sealed, sealed.claim(), 0.5)
    sealed.destroy()
    assert not sealed.folder.exists()


def test_k_is_drawn_from_what_is_charged_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "draw", lambda repetitions: asked.append(repetitions) or 1)
    Sealed(tmp_path).draw(SELECT)
    assert asked == [charge.mechanism.repetitions for charge in SELECT.selection()][:1]
    assert len({charge.mechanism.repetitions for charge in SELECT.selection()}) == 1


def test_every_candidate_of_a_space_is_covered_by_its_corners():
    """The pointwise maximum over the corners is that over the space; one step more, or less noise, is not covered."""
    space = "{training.noise_multiplier: {loguniform: [4, 16]}, training.steps: {int: [40, 90]}}"
    job = load(SweepJob, DIGITS, [*SELECTION, f"tuning.space={space}"])
    selection = job.selection()[0].mechanism
    for _ in range(20):
        run = job.candidate(job.tuning.drawn()).charges()[0]
        assert covers(selection, Composition(((run.mechanism, run.steps),)))
    step = PoissonSubsampledGaussian(job.run().sample_rate, 4.0)
    assert covers(selection, Composition(((step, 90),)))
    assert not covers(selection, Composition(((step, 91),)))
    assert not covers(selection, Composition(((PoissonSubsampledGaussian(step.sample_rate, 3.99), 90),)))


# The toy: a candidate counts, and releases which of two it is and the count with discrete Gaussian noise of its own
# scale. The unit's presence moves the count by 1.

SCALES = (3.0, 4.0)
COUNTS = range(-60, 62)
TOYS = [repetitions_of(8, 0.5), repetitions_of(8, 0.0), repetitions_of(8, 1.0), repetitions_of(8, POISSON)]
FEW = [repetitions_of(3, 0.5), repetitions_of(3, POISSON)]


def noised(count, scale):
    """count → probability, at 50 digits; what is left out at both ends is below 1e-50."""
    weights = {y: mpmath.exp(-mpmath.mpf((y - count) ** 2) / (2 * scale**2)) for y in COUNTS}
    whole = mpmath.fsum(weights.values())
    return {y: weight / whole for y, weight in weights.items()}


def of_the_best(count, repetitions):
    """(candidate, noised count) → its probability of being what the selection releases; None: that nothing is."""
    alone = [noised(count, scale) for scale in SCALES]
    mixed = {y: mpmath.fsum(one[y] for one in alone) / len(SCALES) for y in COUNTS}
    table = [mpmath.mpf(str(mass)) for mass in itertools.islice(masses(repetitions), 1500)]
    below, share, law = table[0], mpmath.mpf(0), {None: table[0]}
    for y in COUNTS:  # the best is at most y where all K are: the generating function of K at the share of one
        share += mixed[y]
        at_most = mpmath.polyval(table[::-1], min(share, mpmath.mpf(1)))
        for i, one in enumerate(alone):  # equal counts have equal chances
            law[i, y] = (at_most - below) * one[y] / len(SCALES) / mixed[y]
        below = at_most
    return law


def hockey_stick(p, q, epsilon):
    return mpmath.fsum(max(p[y] - mpmath.exp(epsilon) * q[y], 0) for y in p)


def divergence(p, q, order):
    """Rényi's, of an integer order; without tails that are next to nothing even 20 times over."""
    some = [y for y in p if min(p[y], q[y]) > mpmath.mpf(10) ** -35]
    return mpmath.log(mpmath.fsum(p[y] ** order / q[y] ** (order - 1) for y in some)) / (order - 1)


@pytest.mark.parametrize("repetitions", TOYS, ids=str)
def test_the_exact_output_distribution_stays_within_the_charge(repetitions):
    """Both directions, at several (order, δ), and so does its divergence. The charge of one run would be too low."""
    with mpmath.workdps(50):
        present, absent = of_the_best(1, repetitions), of_the_best(0, repetitions)
        assert mpmath.fsum(present.values()) == pytest.approx(1, abs=1e-12)
        run = tuple(DiscreteGaussian(scale, 1) for scale in SCALES)
        for order in (3, 8, 20):
            charge, alone = (-(-step_cost(one, order) // FINE) for one in (RepeatAndSelect(run, repetitions), run[0]))
            both = [(present, absent), (absent, present)]
            worst = max(divergence(p, q, order) for p, q in both)
            assert worst <= charge / UNIT
            assert worst > alone / UNIT or repetitions == TOYS[1], "its K is mostly 1"
            for (p, q), delta in itertools.product(both, (1e-1, 1e-3, 1e-6)):
                assert hockey_stick(p, q, epsilon_of(charge, delta, order)) <= delta


@pytest.mark.parametrize("repetitions", FEW, ids=str)
def test_what_wins_is_distributed_so(repetitions, tmp_path, monkeypatch):
    """The real draw, queue and choice, 300 times, against the exact law: chi-square over classes of who wins with
    which count, false alarm below 1e-7. A choice of the last that ended is seen."""
    monkeypatch.setattr(SweepJob, "selection", lambda job: [type("C", (), {"mechanism": toy})])
    toy = RepeatAndSelect(tuple(DiscreteGaussian(scale, 1) for scale in SCALES), repetitions)
    space = "tuning.space={training.noise_multiplier: {choice: [3, 4]}}"
    job = load(SweepJob, DIGITS, ["tuning.mode=select", space])
    laws = [{y: float(mass) for y, mass in noised(0, scale).items()} for scale in SCALES]
    rng, draws = random.Random(), 300
    best, last = [], []
    for i in range(draws):
        (tmp_path / f"{i}").mkdir()
        one = Sealed(tmp_path / f"{i}")
        one.draw(job)
        for candidate in iter(one.claim, None):
            law = laws[SCALES.index(candidate.values["training.noise_multiplier"])]
            count = rng.choices(list(law), list(law.values()))[0]
            one.keep(candidate, {"accuracy": count, "accuracy_error": 0.0})
        winner, over = one.best(), one.candidates()
        best.append(winner and (winner.values["training.noise_multiplier"], winner.outcome.metrics["accuracy"]))
        last.append(best[-1] and (over[-1].values["training.noise_multiplier"], over[-1].outcome.metrics["accuracy"]))
        one.destroy()
    exact = of_the_best(0, repetitions)

    def statistic(seen):
        classes = {None: 0}
        shares = {None: float(exact[None])}
        for i, scale in enumerate(SCALES):
            for low, high in ((-99, 0), (1, 3), (4, 99)):
                key = (i, low)
                classes[key] = sum(1 for one in seen if one and one[0] == scale and low <= one[1] <= high)
                shares[key] = float(sum(exact[i, y] for y in COUNTS if low <= y <= high))
        classes[None] = sum(1 for one in seen if one is None)
        return sum(
            (classes[key] - draws * share) ** 2 / (draws * share) for key, share in shares.items() if share > 1e-9
        )

    limit = chi2.isf(1e-7, 6)
    assert statistic(best) < limit
    assert statistic(last) > limit


def test_the_queue_says_nothing_to_whoever_lists_the_folder_of_the_sweep(sealed):
    assert [path.name for path in sealed.folder.parent.iterdir()] == ["sealed"]
    assert len(json.loads((sealed.folder / "queue.json").read_text())["candidates"]) == 4
