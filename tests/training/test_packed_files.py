"""Who shares a row, from a file on: records of one unit where they fit, and each is an example of its own (P8)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from people import prepared, table_of, text_job

from cluster.errors import UsageError
from training.preparation import packed


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=6), max_size=8), st.randoms())
def test_a_row_is_one_unit_s_and_a_unit_s_rows_are_its_own_affair(units, chance):
    lengths = np.array([length for unit in units for length in unit], np.int64)
    offsets = np.cumsum([0, *map(len, units)])
    order, rows, ends = packed(lengths, offsets, 12)
    owner = np.repeat(np.arange(len(units)), np.diff(offsets))
    assert sorted(order.tolist()) == list(range(len(lengths)))
    for u, (first, last) in enumerate(itertools.pairwise(ends.tolist())):
        held = order[rows[first] : rows[last]]
        assert (owner[held] == u).all()
        assert last - first <= len(units[u])
        (alone, alone_rows, _) = packed(np.array(units[u]), np.array([0, len(units[u])]), 12)
        assert (alone + offsets[u]).tolist() == held.tolist()
        assert (np.diff(alone_rows) == np.diff(rows[first : last + 1])).all()
    for begin, end in itertools.pairwise(rows.tolist()):
        assert 0 < lengths[order[begin:end]].sum() <= 12


# -- from a file to rows --


def notes(count=40):
    return [(f"p{i % 11}", "x" * (i * 7 % 17) + str(i)) for i in range(count)]


def read(shard):
    """Each unit's records as (tokens, what of them is predicted), in no order."""
    found = []
    for first, last in itertools.pairwise(shard.offsets.tolist()):
        mine = []
        rows = slice(first, last)
        places = torch.arange(12).expand(last - first, -1) if shard.positions is None else shard.positions[rows]
        for ids, labels, mask, at in zip(
            shard.features[rows], shard.labels[rows], shard.mask[rows], places, strict=True
        ):
            there = mask.bool()
            begins = torch.nonzero(at[there] == 0).flatten().tolist()
            for a, b in itertools.pairwise([*begins, int(there.sum())]):
                assert at[a:b].tolist() == list(range(b - a))
                mine.append((ids[a:b].tolist(), labels[a:b].tolist()))
        found.append(sorted(mine))
    return found


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("world", [1, 3])
def test_what_is_prepared_packed_holds_the_same_records(tmp_path, world):
    path = table_of(notes(), ("person", "note")).write(tmp_path / "notes.csv")
    jobs = [text_job(path, unit="person", most=3, packing=packing) for packing in ("none", "unit")]
    plain, shared = map(prepared, jobs)
    assert plain.folder != shared.folder
    assert plain.manifest["fingerprint"] == shared.manifest["fingerprint"]
    saved = 0
    for rank in range(world):
        ours, theirs = shared.shard("train", rank, world), plain.shard("train", rank, world)
        assert read(ours) == read(theirs)
        assert all(len(ids) <= 12 for unit in read(ours) for ids, _ in unit), "cut, as without"
        saved += len(theirs.labels) - len(ours.labels)
    assert saved > 0
    assert shared.shard("validation", 0, 1).positions is None
    assert read(shared.shard("validation", 0, 1)) == read(plain.shard("validation", 0, 1))


# -- what is refused --


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        ({"kind": "sequence-classification", "unit": "person", "most": 3}, "unit is for causal-lm"),
        ({}, "max_records_per_unit is 1"),
        ({"unit": "person", "most": 1}, "max_records_per_unit is 1"),
    ],
)
def test_packing_is_refused_where_nothing_can_be_packed(facts, why):
    with pytest.raises(UsageError, match=rf"data\.text\.packing: .*{why}"):
        text_job("nowhere.csv", packing="unit", **facts)
