"""A source is known by its records alone, whatever its files, their format and their order (P4); equal rows are told
apart."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from people import KEY, OTHER_KEY, SECRET, reference_fingerprint, reference_rows, table_of

from training import identity, sources


def people(count):
    return [(i % 7, ["red", "green", "blue"][i % 3], ["no", "yes"][i % 2]) for i in range(count)]


def batch_of(rows):
    columns = [pa.array(column, pa.string()) for column in zip(*rows, strict=True)]
    return pa.RecordBatch.from_arrays(columns, names=[f"c{i}" for i in range(len(columns))])


def fingerprint(rows, key=KEY):
    found = [np.zeros((0, 32), np.uint8)] + ([identity.digests_of(batch_of(rows))] if rows else [])
    digests = np.concatenate(found)
    return identity.fingerprint(digests, identity.in_order(digests)[0], key)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_fingerprint_is_of_the_records_whatever_their_files_and_order(tmp_path, suffix):
    """And it is what it was before there were other formats than CSV: accounts are bound to it."""
    rows = people(30)
    folder = tmp_path / "people"
    folder.mkdir()
    table_of(rows[20:]).write(folder / f"1{suffix}")
    table_of(rows[:20][::-1]).write(folder / f"2{suffix}")
    digests = identity.digests(sources.find(str(folder)))
    assert identity.fingerprint(digests, identity.in_order(digests)[0], KEY) == reference_fingerprint(
        table_of(rows), KEY
    )


def test_a_fingerprint_is_keyed():
    assert fingerprint([(SECRET,)]) != fingerprint([(SECRET,)], OTHER_KEY)
    assert len(bytes.fromhex(fingerprint([]))) == 32


def test_a_fingerprint_changes_with_any_cell_and_any_row():
    rows = [("1", "red", "no"), ("1", "red", "no"), ("2", "green", "yes")]
    seen = {fingerprint(rows)}
    for i, j, other in itertools.product(range(3), range(3), ("x", None)):
        changed = [list(row) for row in rows]
        changed[i][j] = other
        seen.add(fingerprint(changed))
    seen |= {fingerprint(rows[:n]) for n in (0, 1, 2)}
    seen.add(fingerprint([*rows, rows[0]]))
    seen.add(fingerprint([(row[1], row[0], row[2]) for row in rows]))
    # Rows 0 and 1 are equal, so that changing either is the same multiset of records: 12 different changes.
    assert len(seen) == 1 + 12 + 3 + 1 + 1


@pytest.mark.parametrize("mark", ["", ",", ":", "1:", "2:", "-:", "\x1f", "\x1e0", "\0", "\n"])
def test_a_fingerprint_knows_where_a_cell_ends(mark):
    """Whatever stands in the cells: what separates them in the canonical bytes could stand there too."""
    assert fingerprint([(f"x{mark}y", "z")]) != fingerprint([("x", f"y{mark}z")])


cells = st.one_of(st.none(), st.text(alphabet=",:1-\x1f\x1eé", max_size=4))


@settings(deadline=None)
@given(rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=8))
def test_no_two_rows_are_the_same_bytes(rows):
    """A row's bytes are also its identity as a unit."""
    made = identity.rows_of(batch_of(rows))
    assert len(set(made)) == len(set(rows))
    whole = [row for row in rows if None not in row]
    assert [made[i] for i, row in enumerate(rows) if None not in row] == list(
        reference_rows(table_of(whole, ["a", "b"]))
    )


@settings(deadline=None)
@given(names=st.lists(st.integers(0, 5), max_size=30))
def test_equal_rows_are_numbered_in_their_order(names):
    """Also those whose digests begin alike: a collision in a part of it is no equality."""
    digests = np.full((len(names), 32), 7, np.uint8)
    digests[:, 31] = names
    order, ordinals = identity.in_order(digests)
    assert ordinals.tolist() == [names[:i].count(name) for i, name in enumerate(names)]
    assert digests[order, 31].tolist() == sorted(names)
