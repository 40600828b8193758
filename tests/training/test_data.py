"""Reading and partitioning records: a unit stays where it is whatever else comes or goes, nothing is fitted (P11), no
error holds a cell (P13), a fingerprint knows its data by content alone (P4)."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import math
import random
import traceback
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import UsageError
from training import data
from training.config import Data, Job
from training.data import DIGITS, Table
from training.jobfile import parse

KEY, OTHER_KEY = "11" * 32, "22" * 32
SECRET = "Ada-Lovelace-HIV"


def job_of(source=__file__, *, unit="row", most=1, fraction=0.2, features=None):
    """A job over columns id (0 to 1000, which names a record), colour and label. Its source must be there, no more."""
    return parse(
        Job,
        {
            "account": "people",
            "privacy": {"epsilon": 3.0, "delta": 1e-6, "unit": unit, "units": 1000, "max_records_per_unit": most},
            "data": {
                "source": str(source),
                "validation_fraction": fraction,
                "features": features or {"id": {"range": [0, 1000]}, "colour": {"categories": ["red", "green"]}},
                "label": {"column": "label", "categories": ["no", "yes"]},
            },
            "model": {"kind": "linear"},
            "training": {"expected_batch_size": 50},
        },
    )


def table_of(rows, names=("id", "colour", "label")):
    return Table(tuple(names), tuple([str(row[i]) for row in rows] for i in range(len(names))))


def people(count=300):
    chance = random.Random(5)
    return [(i, chance.choice(["red", "green", "blue"]), chance.choice(["no", "yes"])) for i in range(count)]


def placed(job, table, world=2, key=KEY):
    """(partition, rank) → what was loaded there."""
    places = itertools.product(("train", "validation"), range(world))
    return {(partition, rank): data.load(job, table, key, partition, rank, world) for partition, rank in places}


def ids(encoded):
    return np.rint((encoded.features[:, 0] + 0.5) * 1000).astype(int).tolist()


def where(job, table, **options):
    """Record id → places it is found at, as a list."""
    found = {}
    for place, encoded in placed(job, table, **options).items():
        for i in ids(encoded):
            found.setdefault(i, []).append(place)
    return found


def test_every_record_is_in_one_partition_on_one_rank():
    for world in (1, 2, 3):
        found = where(job_of(), table_of(people()), world=world)
        assert sorted(found) == list(range(300))
        assert all(len(places) == 1 for places in found.values())
        assert {place for places in found.values() for place in places} == set(
            itertools.product(("train", "validation"), range(world))
        )


def test_partitions_hold_about_the_declared_fraction():
    """3,000 units at 0.2: 600, give or take 131 (six standard deviations, one false alarm in 5e8; the key is fixed).

    Ranks: 1,200 each of the others, give or take 155.
    """
    features = {"id": {"range": [0, 3000]}}
    rows = [(i, "red", "no") for i in range(3000)]
    loaded = placed(job_of(features=features), table_of(rows))
    sizes = {place: len(encoded.labels) for place, encoded in loaded.items()}
    assert abs(sizes["validation", 0] + sizes["validation", 1] - 600) < 131
    assert abs(sizes["train", 0] - 1200) < 155


def test_one_record_more_or_less_moves_no_other():
    """Without it, and with two others, wherever in the file they stand (P11: a unit's place is its own affair)."""
    rows = people()
    full = where(job_of(), table_of(rows))
    for gone in (0, 7, 299):
        rest = where(job_of(), table_of(rows[:gone] + rows[gone + 1 :]))
        assert rest == {i: place for i, place in full.items() if i != gone}
    more = where(job_of(), table_of([(900, "red", "no"), *rows, (901, "blue", "yes")]))
    assert {i: place for i, place in more.items() if i < 900} == full


def test_one_of_equal_rows_moves_no_other():
    """Equal rows are units of their own: without one of n there is one less at one place and no other change."""
    rows = [(i % 4, "red", "no") for i in range(40)]
    count = {p: Counter(ids(e)) for p, e in placed(job_of(), table_of(rows)).items()}
    assert len([p for p in count if count[p][2]]) > 1, "equal rows all fell into one place: nothing is tested"
    for gone in (2, 6, 38):  # three of the ten rows with id 2
        rest = {p: Counter(ids(e)) for p, e in placed(job_of(), table_of(rows[:gone] + rows[gone + 1 :])).items()}
        lost = [(p, i) for p in count for i in count[p] if rest[p][i] != count[p][i]]
        assert len(lost) == 1
        ((place, i),) = lost
        assert i == 2
        assert count[place][i] - rest[place][i] == 1


def test_the_order_of_the_file_does_not_matter():
    rows = people() + people(20)  # with equal rows
    shuffled = rows.copy()
    random.Random(1).shuffle(shuffled)
    one, other = placed(job_of(), table_of(rows)), placed(job_of(), table_of(shuffled))
    for place in one:
        for field in dataclasses.fields(one[place]):
            assert np.array_equal(getattr(one[place], field.name), getattr(other[place], field.name))


def test_the_key_decides_the_places():
    """Who does not know it cannot tell where a record is."""
    table = table_of(people())
    assert where(job_of(), table) != where(job_of(), table, key=OTHER_KEY)


def visits(count=60):
    """(record id, colour, label, person): 1 to 9 records of each person, scattered over the file."""
    chance = random.Random(3)
    people = [f"person-{chance.randrange(count // 4)}" for _ in range(count)]
    return [(i, "red", "no", person) for i, person in enumerate(people)]


NAMES = ("id", "colour", "label", "person")


def test_all_records_of_a_unit_stay_together():
    """In one partition, on one rank, next to each other (P8: its records are summed before clipping)."""
    rows = visits()
    owner = {row[0]: row[3] for row in rows}
    at, seen = {}, Counter()
    for place, encoded in placed(job_of(unit="person", most=50), table_of(rows, NAMES)).items():
        names = ids(encoded)
        assert encoded.offsets[0] == 0
        assert encoded.offsets[-1] == len(names)
        for first, last in itertools.pairwise(encoded.offsets):
            (person,) = {owner[i] for i in names[first:last]}
            assert at.setdefault(person, place) == place
            seen[person] += 1
            assert last - first == sum(row[3] == person for row in rows)
    assert set(seen.values()) == {1}
    assert set(at) == set(owner.values())
    assert len(set(at.values())) > 1


@pytest.mark.parametrize("most", [1, 3])
def test_a_unit_gives_no_more_than_the_declared_records(most):
    rows = visits()
    job = job_of(unit="person", most=most)
    kept = {place: ids(e) for place, e in placed(job, table_of(rows, NAMES)).items()}
    owner = {row[0]: row[3] for row in rows}
    per_person = Counter(owner[i] for names in kept.values() for i in names)
    assert per_person == {p: min(most, n) for p, n in Counter(owner.values()).items()}
    for encoded in placed(job, table_of(rows, NAMES)).values():
        assert (np.diff(encoded.offsets) <= most).all()
        assert (np.diff(encoded.offsets) >= 1).all()


def test_which_records_are_kept_depends_on_the_unit_alone():
    """Not on the order of the file, nor on other people; the key decides, not the values."""
    rows = visits()
    job = job_of(unit="person", most=2)

    def kept(rows, key=KEY):
        return {place: sorted(ids(e)) for place, e in placed(job, table_of(rows, NAMES), key=key).items()}

    shuffled = rows.copy()
    random.Random(2).shuffle(shuffled)
    assert kept(rows) == kept(shuffled)
    gone = rows[0][3]
    owner = {row[0]: row[3] for row in rows}
    without = kept([row for row in rows if row[3] != gone])
    assert without == {place: [i for i in names if owner[i] != gone] for place, names in kept(rows).items()}
    assert sorted(sum(kept(rows).values(), [])) != sorted(sum(kept(rows, OTHER_KEY).values(), []))


def test_equal_records_of_a_unit_are_kept_apart():
    rows = [(1, "red", "no", "ada")] * 5
    kept = placed(job_of(unit="person", most=3), table_of(rows, NAMES), world=1)
    assert sum(len(e.labels) for e in kept.values()) == 3


def encoded(cells, feature, labels=None):
    """One column's cells as numbers, in their order; another column says which is which."""
    rows = [(i, cell, (labels or ["no"] * len(cells))[i]) for i, cell in enumerate(cells)]
    job = job_of(features={"id": {"range": [0, 1000]}, "x": feature})
    got = {}
    for part in placed(job, table_of(rows, ("id", "x", "label")), world=1).values():
        got |= dict(zip(ids(part), zip(part.features[:, 1:].tolist(), part.labels.tolist(), strict=True), strict=True))
    return [got[i][0] for i in range(len(cells))], [got[i][1] for i in range(len(cells))]


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("10", -0.5),
        ("20", 0.0),
        (" 25 ", 0.25),
        ("1e1", -0.5),
        ("-5", -0.5),
        ("31", 0.5),
        ("1e999", 0.5),
        ("inf", 0.5),
        ("-Infinity", -0.5),
        ("", 0.0),
        ("nan", 0.0),
        ("NaN", 0.0),
        ("?", 0.0),
        (SECRET, 0.0),
        ("12,5", 0.0),
        ("0x10", 0.0),
    ],
)
def test_numbers_are_clipped_to_the_declared_range(cell, number):
    """What is no number counts as the middle, silently: an error would tell (P13)."""
    assert encoded([cell], {"range": [10, 30]})[0] == [[number]]


def test_categories_are_the_declared_ones_in_their_order():
    """One-hot; what was not declared is all zeros."""
    got, _ = encoded(["b", "a", " c ", "A", "", SECRET], {"categories": ["a", "b", "c"]})
    assert got == [[0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_a_label_that_was_not_declared_counts_as_the_first():
    assert encoded(["1"] * 4, {"range": [0, 2]}, ["yes", "no", "maybe", " yes "])[1] == [1, 0, 0, 1]


def test_no_record_s_encoding_depends_on_another():
    """Nothing is fitted: alone, or among records that are a million times larger, it is the same (P11)."""
    alone, _ = encoded(["3"], {"range": [0, 10]})
    among, _ = encoded(["3", "1e6", "-1e6", "nan", "7"], {"range": [0, 10]})
    assert among[0] == alone[0]


def test_arrays_have_the_declared_shapes():
    for world in (1, 5):
        for part in placed(job_of(), table_of(people(6)), world=world).values():  # some of them are empty
            records = len(part.labels)
            assert part.features.shape == (records, 3)
            assert (part.features.dtype, part.labels.dtype, part.offsets.dtype) == (np.float32, np.int64, np.int64)
            assert part.offsets[-1] == records
            assert job_of().data.width == 3


def test_a_fingerprint_is_of_the_records_whatever_their_order():
    rows = people(30)
    one = data.fingerprint(table_of(rows), KEY)
    assert one == data.fingerprint(table_of(rows[::-1]), KEY)
    assert one != data.fingerprint(table_of(rows), OTHER_KEY)
    assert len(bytes.fromhex(one)) == 32


def test_a_fingerprint_changes_with_any_cell_and_any_row():
    rows = [(1, "red", "no"), (1, "red", "no"), (2, "green", "yes")]
    seen = {data.fingerprint(table_of(rows), KEY)}
    for i, j in itertools.product(range(3), range(3)):
        changed = [list(row) for row in rows]
        changed[i][j] = f"{changed[i][j]}x"
        seen.add(data.fingerprint(table_of(changed), KEY))
    seen |= {data.fingerprint(table_of(rows[:n]), KEY) for n in (0, 1, 2)}
    seen.add(data.fingerprint(table_of([*rows, rows[0]]), KEY))
    seen.add(data.fingerprint(table_of([(row[1], row[0], row[2]) for row in rows]), KEY))
    # Rows 0 and 1 are equal, so that changing either is the same multiset of records: 6 different changes.
    assert len(seen) == 1 + 6 + 3 + 1 + 1


@pytest.mark.parametrize("mark", ["", ",", ":", "1:", "2:", "\x1f", "\x1e0", "\0", "\n"])
def test_a_fingerprint_knows_where_a_cell_ends(mark):
    """Whatever stands in the cells: what separates them in the canonical bytes could stand there too."""
    tables = [Table(("a", "b"), ([f"x{mark}y"], ["z"])), Table(("a", "b"), (["x"], [f"y{mark}z"]))]
    assert len({data.fingerprint(table, KEY) for table in tables}) == 2


@settings(deadline=None)
@given(text=st.text(alphabet=",:1\x1f\x1e", min_size=2, max_size=5), choose=st.data())
def test_no_two_rows_are_the_same_bytes(text, choose):
    """A row's bytes are also its identity as a unit. Two rows are cut from one text, with one character for the cut."""
    cuts = choose.draw(st.tuples(*[st.integers(0, len(text) - 1)] * 2))
    rows = [(text[:cut], text[cut + 1 :]) for cut in cuts]
    assert len(set(table_of(rows, ("a", "b")).rows())) == len(set(rows))


# Files and their errors.


def write(folder, content, name="people.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path):
    return data.read(data.declared(job_of(path).data))


GOOD = "id,colour,label\n1,red,no\n2,green,yes\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", GOOD),
        ("a.csv", GOOD.rstrip("\n")),
        ("a.csv", GOOD.replace("\n", "\r\n")),
        ("a.csv", "\ufeff" + GOOD),
        ("a.csv", GOOD.replace("red", '"red"')),
        ("a.tsv", GOOD.replace(",", "\t")),
        ("a.csv.gz", gzip.compress(GOOD.encode())),
        ("a.tsv.gz", gzip.compress(GOOD.replace(",", "\t").encode())),
    ],
)
def test_tables_are_read_as_text(tmp_path, name, content):
    table = read(write(tmp_path, content, name))
    assert table.names == ("id", "colour", "label")
    assert [list(column) for column in table.columns] == [["1", "2"], ["red", "green"], ["no", "yes"]]


def test_cells_stay_as_they_are_written(tmp_path):
    """No type is guessed, no word means null: the fingerprint is of the text."""
    cells = ["007", "NA", "null", "", "1.0", "true", "2001-01-01", " x", "naïve", '"a,b"']
    table = read(write(tmp_path, "id,colour,label\n" + "".join(f"{cell},red,no\n" for cell in cells)))
    assert list(table.columns[0]) == [*cells[:-1], "a,b"]


def test_a_table_without_rows_is_a_table(tmp_path):
    """That it is empty would be a fact about people."""
    table = read(write(tmp_path, "id,colour,label\n"))
    for part in placed(job_of(), table).values():
        assert part.features.shape == (0, 3)
        assert part.offsets.tolist() == [0]


def whole_chain(error):
    """Everything that a logger could print of an error: every message, argument and chained exception."""
    said, rest = "", [error]
    while rest:
        e = rest.pop()
        said += f"{e!s} {e!r} {e.args!r} " + "".join(traceback.format_exception(e, chain=False))
        rest += [chained for chained in (e.__cause__, e.__context__) if chained is not None]
    return said


S = SECRET
RAGGED = f"id,colour,label\n1,{S},no\n2,{S},no,{S}\n"
UNREADABLE = {
    "a cell too many": RAGGED,
    "a cell too few": f"id,colour,label\n1,{S},no\n{S}\n",
    "a cell too many, late": "id,colour,label\n" + "1,red,no\n" * 200_000 + f"1,{S},no,{S}\n",
    "not UTF-8": f"id,colour,label\n1,{S}\xff,no\n".encode("latin-1"),
    "not UTF-8 in the header": f"id,colou\xff,label\n1,{S},no\n".encode("latin-1"),
    "UTF-16": f"id,colour,label\n1,{S},no\n".encode("utf-16"),
    "an open quote": f'id,colour,label\n1,"{S},no\n2,red,yes\n',
    "two columns of one name": f"id,colour,label,id\n1,{S},no,{S}\n",
    "no byte at all": "",
    "one empty line": "\n",
    "a header line that does not end": "id,colour,label",
    "no gzip": b"\x1f\x8b" + S.encode(),
    "a cut gzip": gzip.compress((GOOD * 1000 + S).encode())[:-20],
}


@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_file_that_is_no_table_is_refused_without_a_word_of_it(tmp_path, what, suffix):
    """pyarrow's own messages print cells: neither they nor the exceptions that carry them may follow (P13)."""
    content = UNREADABLE[what]
    if suffix == ".tsv" and isinstance(content, str):
        content = content.replace(",", "\t")
    path = write(tmp_path, content, "people" + suffix + (".gz" if "gzip" in what else ""))
    with pytest.raises(UsageError, match=r"^data\.source: ") as raised:
        read(path)
    assert SECRET not in whole_chain(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None
    assert path.name in str(raised.value)


def test_the_check_of_chains_bites(tmp_path):
    """What pyarrow says of the same file holds the cell; wrapped in the usual way it would still be there."""
    import pyarrow.csv as pacsv

    path = write(tmp_path, RAGGED)

    def usual():
        try:
            pacsv.read_csv(path)
        except Exception as error:
            raise UsageError("data.source: cannot be used.") from error

    with pytest.raises(UsageError) as raised:
        usual()
    assert SECRET in whole_chain(raised.value)


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ("id,color,label", r"data\.features\.colour"),
        ("ident,colour,label", r"data\.features\.id"),
        ("id,colour,labels", r"data\.label\.column"),
    ],
)
def test_a_missing_column_is_named(tmp_path, header, field):
    with pytest.raises(UsageError, match=rf"^{field}: .*no column") as raised:
        read(write(tmp_path, f"{header}\n1,{SECRET},no\n"))
    assert SECRET not in whole_chain(raised.value)
    assert header.split(",")[0] not in str(raised.value), "the first line may be a record"


def test_a_file_without_a_header_line_does_not_show_its_first_record(tmp_path):
    with pytest.raises(UsageError) as raised:
        read(write(tmp_path, f"39,{SECRET},no\n40,red,yes\n"))
    assert SECRET not in whole_chain(raised.value)


def test_an_empty_line_before_the_header_is_no_record(tmp_path):
    table = read(write(tmp_path, "\n" + GOOD))
    assert list(table.columns[0]) == ["1", "2"]


@pytest.mark.parametrize("source", ["nowhere.csv", "folder"])
def test_a_missing_file_is_named(tmp_path, source):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match=r"^data\.source: .*does not exist or is no file"):
        read(tmp_path / source)


def test_a_missing_unit_column_is_named():
    with pytest.raises(UsageError, match=r"^privacy\.unit: .*no column 'person'") as raised:
        data.load(job_of(unit="person"), table_of([(1, SECRET, "no")]), KEY, "train", 0, 1)
    assert SECRET not in whole_chain(raised.value)


def declared(**facts):
    return data.declared(Data(**{"source": __file__, **facts}))


def test_features_and_label_must_be_declared():
    label = {"column": "label", "categories": ("no", "yes")}
    with pytest.raises(UsageError, match=r"^data\.features: "):
        declared(label=label)
    with pytest.raises(UsageError, match=r"^data\.label: "):
        declared(features={"x": {"range": (0, 1)}})
    with pytest.raises(UsageError, match=r"^data\.source: .*hf:adult"):
        declared(source="hf:adult", label=label)


@pytest.mark.parametrize("image", [None, (1, 2, 2), (1, 8, 7), (1, 3, 4)])
def test_a_cnn_needs_an_image_of_the_record_s_width(image):
    job = job_of(features={f"p{i}": {"range": [0, 1]} for i in range(12 if image == (1, 3, 4) else 64)})
    model = job.model.model_copy(update={"kind": "cnn", "image": image})
    with pytest.raises(UsageError, match=r"^model\.image: "):
        data.image_of(model, job.data)
    assert data.image_of(job.model, job.data) is None


@pytest.fixture(scope="module")
def digits():
    raw = job_of(DIGITS).model_dump(mode="json")
    raw["data"] = {"source": DIGITS}
    raw["privacy"]["units"] = 1797
    job = parse(Job, raw)
    return job, data.read(data.declared(job.data))


def test_digits_come_with_their_declarations(digits):
    job, table = digits
    parts = placed(job, table).values()
    assert sum(len(part.labels) for part in parts) == 1797
    assert {part.features.shape[1] for part in parts} == {64}
    for part in parts:
        assert part.features.min() >= -0.5
        assert part.features.max() <= 0.5
        assert set(part.labels.tolist()) == set(range(10))
        assert (np.diff(part.offsets) == 1).all()
    validation = sum(len(e.labels) for (partition, _), e in placed(job, table).items() if partition == "validation")
    assert abs(validation - 0.2 * 1797) < 6 * math.sqrt(1797 * 0.16)  # a false alarm in 5e8
    assert data.image_of(job.model.model_copy(update={"kind": "cnn"}), data.declared(job.data)) == (1, 8, 8)


def test_digits_are_the_real_ones(digits):
    from sklearn.datasets import load_digits

    real = load_digits()
    job, table = digits
    mine = Counter(
        (tuple(features.round(4)), int(label))
        for part in placed(job, table).values()
        for features, label in zip(part.features, part.labels, strict=True)
    )
    theirs = Counter(
        (tuple((pixels / 16 - 0.5).astype(np.float32).round(4)), int(label))
        for pixels, label in zip(real.data, real.target, strict=True)
    )
    assert mine == theirs
