"""What a cell becomes hangs on the declarations and on itself: nothing is fitted (P11), nothing is an error (P13)."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from people import SECRET, job_of, text_job

from cluster.errors import UsageError
from training.encoding import Encoding


def batch_of(**columns):
    return pa.RecordBatch.from_pydict({name: pa.array(cells, pa.string()) for name, cells in columns.items()})


def encoded(cells, feature, labels=None):
    """One column's cells as numbers, and the labels."""
    encoding = Encoding.of(job_of(features={"x": feature}))
    made = encoding.arrays(batch_of(x=cells, label=labels or ["no"] * len(cells)))
    return made["features"].tolist(), made["label"].tolist()


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("10", -0.5),
        ("20", 0.0),
        (" 25 ", 0.25),
        ("1e1", -0.5),
        ("1_0", -0.5),
        ("-5", -0.5),
        ("31", 0.5),
        ("1e999", 0.5),
        ("inf", 0.5),
        ("-Infinity", -0.5),
        ("", 0.0),
        (None, 0.0),
        ("nan", 0.0),
        ("NaN", 0.0),
        ("?", 0.0),
        (SECRET, 0.0),
        ("12,5", 0.0),
        ("0x10", 0.0),
        ("1" * 10_000, 0.5),
    ],
)
def test_numbers_are_clamped_to_the_declared_range(cell, number):
    """What is no number counts as the middle, silently."""
    assert encoded([cell], {"range": [10, 30]})[0] == [[number]]
    assert encoded([cell, "15"], {"range": [10, 30]})[0] == [[number], [-0.25]]


def test_categories_are_the_declared_ones_in_their_order():
    """One-hot; what was not declared is all zeros."""
    got, _ = encoded(["b", "a", " c ", "A", "", None, SECRET], {"categories": ["a", "b", "c"]})
    assert got == [[0, 1, 0], [1, 0, 0], [0, 0, 1], *[[0, 0, 0]] * 4]


def test_a_label_that_was_not_declared_counts_as_the_first():
    assert encoded(["1"] * 5, {"range": [0, 2]}, ["yes", "no", "maybe", " yes ", None])[1] == [1, 0, 0, 1, 0]


@settings(deadline=None)
@given(cells=st.lists(st.one_of(st.none(), st.text(max_size=6), st.floats().map(str)), min_size=1, max_size=6))
def test_no_record_s_encoding_depends_on_another(cells):
    """Alone or among any others, it is the same."""
    for feature in ({"range": [-1, 1]}, {"categories": ["0", "1", "nan"]}):
        together, _ = encoded(cells, feature)
        assert together == [encoded([cell], feature)[0][0] for cell in cells]


def test_groups_are_places_of_declared_names():
    job = job_of(evaluation={"groups": {"column": "colour", "categories": ["green", "red"]}})
    made = Encoding.of(job).arrays(batch_of(id=["1"] * 4, colour=["red", "blue", None, " green"], label=["no"] * 4))
    assert made["group"].tolist() == [1, 2, 2, 0]


@pytest.mark.parametrize("kind", ["causal-lm", "sequence-classification"])
def test_texts_are_cut_and_padded_in_silence(kind, caplog, capfd):
    """A record that is longer than the model reads is cut; that there was one is told to nobody."""
    encoding = Encoding.of(text_job("notes.csv", kind=kind))
    with caplog.at_level(logging.DEBUG):
        made = encoding.arrays(batch_of(note=["hello", SECRET * 10_000, "", None], label=["yes", "no", None, "?"]))
    assert made["ids"].shape == (4, 12)
    assert made["length"].tolist() == [7, 12, 2, 2]
    assert made["ids"][2].tolist() == made["ids"][3].tolist()
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    if kind == "causal-lm":
        assert "label" not in made
    else:
        assert made["label"].tolist() == [1, 0, 0, 0]


def test_prompts_stand_before_texts():
    encoding = Encoding.of(text_job("notes.csv", prompt="asked"))
    made = encoding.arrays(batch_of(note=["yes", "x" * 100, None], asked=["ok?", None, "y" * 100]))
    assert made["prompt"].tolist() == [4, 1, 12]
    assert made["length"].tolist() == [8, 12, 12]


def test_columns_hold_what_arrays_hold():
    for encoding, batch in (
        (Encoding.of(job_of()), batch_of(id=["1", "2"], colour=["red", "x"], label=["yes", "no"])),
        (Encoding.of(text_job("notes.csv")), batch_of(note=["one", "two"])),
    ):
        for some in (batch, batch.slice(0, 0)):
            columns = encoding.encoded(some)
            assert columns.schema == encoding.schema
            for name, array in encoding.arrays(some).items():
                assert np.array_equal(np.array(columns.column(name).to_pylist()).reshape(array.shape), array)


def test_a_classifier_needs_its_label():
    with pytest.raises(UsageError, match=r"^data\.label: "):
        Encoding.of(text_job("notes.csv", kind="sequence-classification", label=False))
