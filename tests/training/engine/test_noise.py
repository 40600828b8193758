"""The noise: standard normal to the far tails, fresh for each parameter, step, trainer and process, out of reach of any
seed, never saved (P9, P10).

Every statistical check below has a false-alarm rate of about 2e-9 (six standard errors of a normal quantity, or that
p-value for an exact test); there are fewer than a hundred of them.
"""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import pickle

import numpy as np
import pytest
import torch
from dpsgd_reference import flat, noise_off, part_of, plan, shard_of
from scipy import stats
from torch import nn

from training.engine import randomness
from training.engine.optimizer import PrivateOptimizer
from training.engine.randomness import Keystream, _process
from training.engine.run import SIGMA_MARGIN
from training.engine.sampling import PoissonSampler
from training.engine.trainer import PrivateTrainer
from training.sections import Optimizer

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")

SIX, RARE = 6.0, 2e-9


def correlated(a, b):
    """Whether two vectors of independent entries correlate beyond six standard errors."""
    return abs(np.corrcoef(a, b)[0, 1]) * math.sqrt(len(a)) > SIX


def trainer_of(run, optimizer=None):
    """A trainer of one wide layer, 90,300 parameters, that starts at zero."""
    model = nn.Sequential(nn.Linear(300, 300))
    for p in model.parameters():
        nn.init.zeros_(p)
    return PrivateTrainer(model, optimizer or Optimizer(learning_rate=2.0), run)


def noise_steps(trainer, count):
    """What each of `count` steps on an empty shard changes: nothing but the noise."""
    empty, steps = part_of(shard_of(), np.arange(0)), []
    for _ in range(count):
        before = flat(trainer.model)
        trainer.steps(empty, 1)
        steps.append((flat(trainer.model) - before).numpy())
    return steps


def bits(values):
    """A stand-in for Keystream.integers that returns `values` over and over."""
    return lambda self, count: np.resize(np.array(values, dtype=np.uint64), count)


def test_a_million_draws_are_standard_normal():
    draws = Keystream().normal(1_000_000)
    assert draws.dtype == np.float64
    assert stats.kstest(draws, "norm").pvalue > RARE
    assert abs(draws.mean()) < SIX / 1e3
    assert abs(draws.var() - 1) < SIX * math.sqrt(2 / 1e6)
    assert abs((draws**3).mean()) < SIX * math.sqrt(15 / 1e6)
    assert abs((draws**4).mean() - 3) < SIX * math.sqrt(96 / 1e6)


def test_tails_are_as_frequent_as_they_should_be():
    """Beyond 4.5: 27 of 4 million. Both exact Poisson tails."""
    draws = np.abs(Keystream().normal(4_000_000))
    for beyond in (3.0, 4.0, 4.5):
        expected = 4e6 * 2 * stats.norm.sf(beyond)
        low, high = stats.poisson.ppf(RARE / 2, expected), stats.poisson.isf(RARE / 2, expected)
        assert low <= (draws > beyond).sum() <= high


def test_the_tail_ends_at_8_57(monkeypatch):
    """Draws beyond 5.8, where fp32 samplers end, are too rare to wait for; so the rarest bits are fed in."""
    monkeypatch.setattr(Keystream, "integers", bits([0]))
    largest = Keystream().normal(2)
    assert largest[0] == pytest.approx(math.sqrt(2 * 53 * math.log(2)), abs=1e-12)
    assert largest[0] > 8.57
    assert largest[1] == 0.0
    for low_bits, beyond in ((2**20, 6.7), (2**26, 5.8)):  # uniforms of about 2^-44 and 2^-38
        monkeypatch.setattr(Keystream, "integers", bits([low_bits]))
        assert Keystream().normal(2)[0] > beyond


def test_the_tail_beyond_5_8_has_the_normal_s_law(monkeypatch):
    """Uniforms below 2^-25 alone: by theirs, half the squared radius less 25·ln 2 is exponential, the angle uniform."""
    real = Keystream.integers

    def rare(self, count):
        bits = real(self, count).copy()
        bits[: count // 2] >>= np.uint64(25)
        return bits

    monkeypatch.setattr(randomness, "_CHUNK", 400_000)
    monkeypatch.setattr(Keystream, "integers", rare)
    x, y = Keystream().normal(400_000).reshape(2, -1)
    beyond = (x**2 + y**2) / 2 - 25 * math.log(2)
    assert beyond.min() >= -1e-9
    assert x.max() > 6
    assert stats.kstest(beyond, "expon").pvalue > RARE
    assert stats.kstest(np.arctan2(y, x) / (2 * math.pi) + 0.5, "uniform").pvalue > RARE


def test_no_bits_make_a_non_finite_draw(monkeypatch):
    """A uniform of 0 would be an infinite radius; a uniform of 1 is the radius 0."""
    for first, second in itertools.product((0, 1, 2**11, 2**63, 2**64 - 1), repeat=2):
        monkeypatch.setattr(Keystream, "integers", bits([first, second]))
        pair = Keystream().normal(2)
        assert np.isfinite(pair).all()
        assert math.hypot(*pair) <= 8.572


def test_each_number_of_draws_is_served(monkeypatch):
    """Odd ones and those across the chunk's end, too; nothing is drawn twice or left as it was."""
    monkeypatch.setattr(randomness, "_CHUNK", 8)
    for count in (0, 1, 2, 7, 8, 9, 16, 25):
        draws = Keystream().normal(count)
        assert draws.shape == (count,)
        assert len(set(draws)) == count
    monkeypatch.setattr(randomness, "_CHUNK", 1000)
    assert stats.kstest(Keystream().normal(100_001), "norm").pvalue > RARE


@pytest.fixture
def threads():
    """torch's number of threads, by which large draws are shared out, as most users have it."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_draws_of_several_threads_are_normal_and_none_comes_twice(threads):
    """Each has a key of its own: with one key for all, chunks would repeat."""
    stream = Keystream()
    draws = np.concatenate([stream.normal(600_001), stream.normal(400_000)])
    assert len(stream._helpers) == threads
    assert len(np.unique(draws)) == len(draws)
    assert stats.kstest(draws, "norm").pvalue > RARE


def test_threads_of_a_forked_child_draw_other_streams(threads):
    """Parent and child have used their helpers before the fork; 200,000 numbers, none in common."""
    stream, count = Keystream(), 200_000
    stream.normal(count)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(stream.normal(count).tobytes())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        theirs = np.frombuffer(pipe.read())
    os.waitpid(child, 0)
    assert len(theirs) == count
    assert len(np.intersect1d(theirs, stream.normal(count))) == 0


def test_draws_are_independent_within_one_call():
    """At small lags, and between the two halves that Box and Muller make from one radius; squares too."""
    draws = Keystream().normal(1_000_000)
    for lag in (1, 2, 3, 64, randomness._CHUNK // 2, randomness._CHUNK, len(draws) // 2):
        assert not correlated(draws[:-lag], draws[lag:])
        assert not correlated(draws[:-lag] ** 2, draws[lag:] ** 2)


def test_the_check_for_independence_bites():
    """Halves that share an angle are not independent, as the check above must see."""
    uniform = np.random.default_rng(0).random((2, 500_000))
    radius, angle = np.sqrt(-2 * np.log(uniform[0])), 2 * np.pi * uniform[1]
    assert correlated((radius * np.cos(angle)) ** 2, (np.sqrt(-2 * np.log(1 - uniform[0])) * np.cos(angle)) ** 2)


def test_a_step_without_units_releases_noise_of_the_right_size():
    """σ = 3, C = 0.5, B = 4, learning rate 2: 0.75 on every parameter, mean 0, normal."""
    run = plan(noise_multiplier=3.0, max_grad_norm=0.5, expected_batch_size=4)
    step = noise_steps(trainer_of(run), 1)[0]
    expected = 3.0 * 0.5 * SIGMA_MARGIN / 4 * 2.0
    assert abs(step.var() / expected**2 - 1) < SIX * math.sqrt(2 / len(step))
    assert abs(step.mean()) < SIX * expected / math.sqrt(len(step))
    assert stats.kstest(step / expected, "norm").pvalue > RARE


def test_noise_reaches_every_number_however_many_are_drawn_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr("training.engine.optimizer.NOISE_AT_ONCE", 7)
    monkeypatch.setattr(Keystream, "normal", lambda self, count: asked.append(count) or np.ones(count))
    run = plan(steps=1, block=1)
    trainer = PrivateTrainer(nn.Sequential(nn.Linear(8, 4)), Optimizer(learning_rate=1.0), run)
    before = flat(trainer.model)
    trainer.steps(part_of(shard_of(), np.arange(0)), 1)
    assert asked == [7, 7, 7, 7, 7, 1]
    moved = before - flat(trainer.model)
    assert moved.numpy() == pytest.approx(np.full(36, run.noise_std / run.expected_batch_size), rel=1e-4)


def test_noise_is_independent_between_parameters_steps_and_trainers():
    """Also where every generator that people seed was seeded alike (H2, H3)."""
    run = plan(noise_multiplier=3.0)
    steps = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        steps += noise_steps(trainer_of(run), 2)
    for a, b in itertools.combinations(steps, 2):
        assert not correlated(a, b)
    for step in steps:
        assert not correlated(step[:-1], step[1:])
        weights, above = step[:90_000].reshape(300, 300), np.triu_indices(300, 1)
        assert not correlated(weights[above], weights.T[above])  # one half against the other: each pair once


def test_momentum_and_adam_get_the_noise_too():
    """The noise is in the gradient that the optimizer sees, not added after it: momentum carries it on."""
    run = plan(noise_multiplier=3.0)
    first, second = noise_steps(trainer_of(run, Optimizer(learning_rate=1.0, momentum=0.9)), 2)
    assert correlated(first, second)
    # 1 + 0.9²; the margin is over ten standard errors.
    assert second.var() / first.var() == pytest.approx(1.81, rel=0.1)
    adam = noise_steps(trainer_of(run, Optimizer(name="adam", learning_rate=0.1)), 1)[0]
    # Adam's first step is the sign of what it saw. One parameter in a million sees 0, a point of the grid, and stays;
    # more than ten of 90,300 do so less often than once in 1e17 runs.
    assert (np.abs(np.abs(adam) - 0.1) > 1e-3).sum() <= 10
    assert abs(np.sign(adam).mean()) < SIX / math.sqrt(len(adam))


def test_no_argument_takes_a_seed():
    with pytest.raises(TypeError):
        Keystream(0)
    with pytest.raises(TypeError):
        PoissonSampler(plan(), 3, generator=torch.Generator())
    with pytest.raises(TypeError):
        PrivateOptimizer(None, plan(), generator=torch.Generator())


def test_every_key_comes_from_the_operating_system(monkeypatch):
    """256 fresh bits for each keystream; the generators of torch, numpy and random are not asked."""
    asked = []

    def urandom(count):
        asked.append(count)
        return real(count)

    real = os.urandom
    monkeypatch.setattr(os, "urandom", urandom)
    for _ in range(3):
        Keystream().integers(4)
    assert asked.count(32) == 3
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    stream = Keystream()
    stream.normal(100)
    stream.bernoulli(100, 0.5)
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()


def test_a_key_that_has_served_its_life_is_replaced(monkeypatch):
    """Before its counter ends; and what follows is not what was before."""
    monkeypatch.setattr(randomness, "_KEY_LIFE", 64)
    stream = Keystream()
    given, real = [], os.urandom
    monkeypatch.setattr(os, "urandom", lambda count: given.append(count) or real(count))
    drawn = np.concatenate([stream.integers(4) for _ in range(8)])
    assert given.count(32) == 3  # 64 bytes are two of the eight draws
    assert len(set(drawn.tolist())) == 32


def test_integers_are_uniform_in_every_bit():
    drawn = np.unpackbits(Keystream().integers(200_000).view(np.uint8)).reshape(-1, 64)
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < SIX * 0.5 / math.sqrt(len(drawn))
    assert len(np.unique(Keystream().integers(100_000))) == 100_000  # a repeat has a chance of 3e-10


def drawn_in_child(stream, pretend=False):
    """The next draws of `stream` in a forked child, which lives for nothing else."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        if pretend:
            stream._owner = _process()
        os.write(writing, stream.integers(8).tobytes())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    os.waitpid(child, 0)
    return content


@pytest.mark.parametrize("used", [False, True])
def test_a_forked_child_draws_another_stream(used):
    """Parent and children would otherwise add the same noise, whose difference is none."""
    stream = Keystream()
    if used:
        stream.integers(5)
    children = [drawn_in_child(stream) for _ in range(2)]
    mine = stream.integers(8).tobytes()
    assert len({mine, *children}) == 3
    assert all(len(content) == 64 for content in children)


def test_a_process_whose_number_was_its_grandparent_s_draws_another_stream(monkeypatch):
    """Numbers of processes are used again."""
    stream, number = Keystream(), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: number)
    assert drawn_in_child(stream) != stream.integers(8).tobytes()


def test_the_check_of_forks_bites():
    """A child that takes itself for the owner draws what its parent draws."""
    stream = Keystream()
    child = drawn_in_child(stream, pretend=True)
    assert child == stream.integers(8).tobytes()


def test_a_keystream_cannot_be_saved_or_copied():
    for attempt in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError):
            attempt(Keystream())


def test_checkpoints_hold_nothing_about_keys(monkeypatch):
    """Every byte that the operating system gave as a key or nonce is looked for in the saved state."""
    real, given = os.urandom, []

    def urandom(count):
        given.append(real(count))
        return given[-1]

    monkeypatch.setattr(os, "urandom", urandom)
    trainer = trainer_of(plan(noise_multiplier=3.0))
    noise_steps(trainer, 2)
    state = trainer.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    assert len(given) >= 4
    for secret in given:
        assert secret not in file.getvalue()
    assert set(state) <= {"model", "optimizer", "schedule", "fixed", "planned"}
    torch.load(io.BytesIO(file.getvalue()), weights_only=True)  # plain tensors and numbers


def test_a_resumed_run_does_not_replay_noise():
    """Two attempts from one checkpoint: were the noise the same, their difference would be free of it (H3)."""
    run = plan(noise_multiplier=3.0)
    first = trainer_of(run)
    noise_steps(first, 1)
    state = copy.deepcopy(first.state_dict())
    on = noise_steps(first, 1)[0]
    again = trainer_of(run)
    again.load_state_dict(state)
    replayed = noise_steps(again, 1)[0]
    assert not correlated(on, replayed)
    assert not np.array_equal(on, replayed)


def test_the_check_of_replayed_noise_bites(monkeypatch):
    """With a key that is the same at each start, two attempts draw one noise."""
    monkeypatch.setattr(os, "urandom", bytes)
    first, again = (noise_steps(trainer_of(plan(noise_multiplier=3.0)), 1)[0] for _ in range(2))
    assert correlated(first, again)
    assert np.array_equal(first, again)


def test_a_resumed_run_goes_on_where_it_was():
    """Weights, momentum and the schedule's place are in the checkpoint: noise-free, two halves are the whole."""
    choice = Optimizer(learning_rate=0.3, momentum=0.9, schedule="linear")
    run = plan(steps=4, block=2)
    shard = shard_of()

    def trainer():
        torch.manual_seed(3)
        return PrivateTrainer(nn.Sequential(nn.Linear(16, 3)), choice, run)

    with noise_off():
        unbroken = trainer()
        unbroken.steps(shard, 4)
        before = trainer()
        before.steps(shard, 2)
        after = trainer()
        after.load_state_dict(copy.deepcopy(before.state_dict()))
        after.steps(shard, 2)
    assert torch.equal(flat(after.model), flat(unbroken.model))


def test_a_keystream_does_not_run_out(monkeypatch):
    """The counter's part of the nonce as the operating system may well give it: all ones, 64 bytes before the end."""
    monkeypatch.setattr(randomness.os, "urandom", lambda count: b"\xff" * count)
    drawn = Keystream().integers(100)
    assert len(np.unique(drawn)) == 100
