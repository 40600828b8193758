"""What is read out of released metrics: a figure by name or nothing, compared in one way, and no other key let through
(P13)."""

from __future__ import annotations

import math

import pytest

from cluster.errors import PurserError
from training.metrics import LOSS, PUBLIC, by_group, figure, in_words, only_public, score

RIGHT = {"accuracy": 0.8125, "accuracy_error": 0.02, "correct": 65, "wrong": 15}
LOST = {"clipped_loss": 1.25, "clipped_loss_error": 0.5}


def test_a_figure_is_the_accuracy_or_the_loss():
    assert figure(RIGHT) == ("accuracy", 0.8125, 0.02)
    assert figure(LOST) == ("clipped loss", 1.25, 0.5)
    assert (in_words(RIGHT), in_words(LOST)) == ("accuracy 0.812 ± 0.020", "clipped loss 1.250 ± 0.500")
    assert by_group({**RIGHT, "groups": {"Female": LOST}}) == ["Female: clipped loss 1.250 ± 0.500"]
    assert by_group(RIGHT) == []


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"accuracy": 0.8},
        {"accuracy_error": 0.8},
        {"accuracy": "0.8", "accuracy_error": 0.1},
        {"accuracy": math.nan, "accuracy_error": 0.1},
        {"accuracy": 0.8, "accuracy_error": math.inf},
        {"loss": 0.8, "loss_error": 0.1},
    ],
)
def test_without_a_figure_there_is_nothing(metrics):
    assert figure(metrics) is None
    assert in_words(metrics) == ""
    with pytest.raises(PurserError, match="neither an accuracy nor a clipped loss"):
        score(metrics)


def test_more_is_better_of_an_accuracy_and_less_of_a_loss():
    assert score(RIGHT) > score({**RIGHT, "accuracy": 0.8})
    assert score(LOST) > score({**LOST, "clipped_loss": 1.3})


def test_a_report_carries_what_is_public_or_released_by_name():
    only_public(dict.fromkeys(PUBLIC, 1))
    for raw in ("loss", "val_loss", "train_loss", "clipped", "norm", "batch_size"):
        assert raw not in LOSS
        with pytest.raises(PurserError, match=f"reported '{raw}', which is neither public nor noised") as raised:
            only_public({"steps": 20, raw: 0.123456})
        assert "0.123456" not in str(raised.value)
