"""What is prepared is what the promises say: a unit stays where it is whatever else comes or goes, nothing is fitted
(P11), the same whatever the files, and whole or not there. Against a plain loader that handles one record at a time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import stat
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from people import (
    KEY,
    OTHER_KEY,
    SECRET,
    SOURCE_KEY,
    ids,
    job_of,
    placed,
    prepared,
    reference,
    reference_fingerprint,
    table_of,
    text_job,
    whole_chain,
)

from cluster.errors import PurserError, UsageError
from training import preparation
from training.config import Job
from training.data import DIGITS
from training.jobfile import parse
from training.preparation import digest, fingerprint_of, prepare
from training.shards import Prepared
from training.sources import private
from training.tokens import tokenizer_of

NAMES = ("id", "colour", "label", "person")
pytestmark = pytest.mark.usefixtures("home")


def people(count=300):
    chance = random.Random(5)
    return [(i, chance.choice(["red", "green", "blue"]), chance.choice(["no", "yes"])) for i in range(count)]


def visits(count=60):
    """(record id, colour, label, person): 1 to 9 records of each person, scattered over the file."""
    chance = random.Random(3)
    people = [f"person-{chance.randrange(count // 4)}" for _ in range(count)]
    return [(i, "red", "no", person) for i, person in enumerate(people)]


@pytest.fixture
def at(tmp_path):
    """Rows → a job over them, in a file of their own."""
    numbers = itertools.count()

    def write(rows, names=None, suffix=".csv", **facts):
        names = names or NAMES[: len(rows[0])] if rows else NAMES[:3]
        return job_of(table_of(rows, names).write(tmp_path / f"{next(numbers)}{suffix}"), **facts)

    return write


def where(job, **options):
    """Record id → places it is found at, as a list."""
    found = {}
    for place, shard in placed(job, **options).items():
        for i in ids(shard):
            found.setdefault(i, []).append(place)
    return found


def counts(job):
    return {place: Counter(ids(shard)) for place, shard in placed(job).items()}


# -- the same as a plain loader --

cell = st.text(alphabet='ab1.,"\n é', max_size=3)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.tuples(cell, st.sampled_from(["red", "green", "?"]), cell, st.sampled_from("abc")), max_size=20),
    unit=st.sampled_from(["row", "person"]),
    suffix=st.sampled_from([".csv", ".parquet", ".jsonl"]),
    pieces=st.integers(1, 3),
)
def test_it_is_what_a_plain_loader_finds(at, monkeypatch, rows, unit, suffix, pieces):
    """Bit by bit: places, orders and numbers, whatever the file's format; and the fingerprint with them."""
    monkeypatch.setattr(preparation, "LARGE", 0)
    monkeypatch.setattr(preparation, "PIECES", pieces)
    monkeypatch.setattr("training.sources.ROWS", 3)
    rows = rows or [("1", "red", "no", "a")]
    job = at(rows, NAMES, suffix, unit=unit, most=1 if unit == "row" else 2)
    table = table_of(rows, NAMES)
    made = prepared(job)
    assert made.manifest["fingerprint"] == reference_fingerprint(table, SOURCE_KEY)
    for world in (1, 3):
        for partition, rank in itertools.product(("train", "validation"), range(world)):
            features, labels, offsets = reference(job, table, KEY, partition, rank, world)
            shard = made.shard(partition, rank, world)
            assert np.array_equal(shard.features[:].numpy(), features)
            assert shard.labels[:].tolist() == labels
            assert shard.offsets.tolist() == offsets


# -- a unit's place --


def test_every_record_is_in_one_partition_on_one_rank(at):
    job = at(people())
    for world in (1, 2, 3):
        found = where(job, world=world)
        assert sorted(found) == list(range(300))
        assert all(len(places) == 1 for places in found.values())
        assert {place for places in found.values() for place in places} == set(
            itertools.product(("train", "validation"), range(world))
        )


def test_partitions_hold_about_the_declared_fraction(at):
    """3,000 units at 0.2: 600, give or take 131 (six standard deviations, one false alarm in 5e8; the key is fixed).

    Ranks: 1,200 each of the others, give or take 155.
    """
    loaded = placed(at([(i, "red", "no") for i in range(3000)], features={"id": {"range": [0, 3000]}}))
    sizes = {place: len(shard.labels) for place, shard in loaded.items()}
    assert abs(sizes["validation", 0] + sizes["validation", 1] - 600) < 131
    assert abs(sizes["train", 0] - 1200) < 155


def test_one_record_more_or_less_moves_no_other(at):
    """Without it, and with two others, wherever in the file they stand (P11: a unit's place is its own affair)."""
    rows = people()
    full = where(at(rows))
    for gone in (0, 7, 299):
        rest = where(at(rows[:gone] + rows[gone + 1 :]))
        assert rest == {i: place for i, place in full.items() if i != gone}
    more = where(at([(900, "red", "no"), *rows, (901, "blue", "yes")]))
    assert {i: place for i, place in more.items() if i < 900} == full


def test_one_of_equal_rows_moves_no_other(at):
    """Equal rows are units of their own: without one of n there is one less at one place and no other change."""
    rows = [(i % 4, "red", "no") for i in range(40)]
    count = counts(at(rows))
    assert len([p for p in count if count[p][2]]) > 1, "equal rows all fell into one place: nothing is tested"
    for gone in (2, 6, 38):  # three of the ten rows with id 2
        rest = counts(at(rows[:gone] + rows[gone + 1 :]))
        lost = [(p, i) for p in count for i in count[p] if rest[p][i] != count[p][i]]
        assert len(lost) == 1
        ((place, i),) = lost
        assert i == 2
        assert count[place][i] - rest[place][i] == 1


def same(one, other):
    return all(
        np.array_equal(np.asarray(getattr(one, name)[:]), np.asarray(getattr(other, name)[:]))
        for name in ("features", "labels", "offsets")
    )


def test_files_and_their_order_do_not_matter(at, tmp_path):
    rows = people() + people(20)  # with equal rows
    shuffled = rows.copy()
    random.Random(1).shuffle(shuffled)
    folder = tmp_path / "parts"
    folder.mkdir()
    for number in range(3):
        table_of(shuffled[number::3]).write(folder / f"{number}.parquet")
    one, other = placed(at(rows)), placed(job_of(folder))
    assert all(same(one[place], other[place]) for place in one)
    assert prepare(at(rows), SOURCE_KEY, KEY) == prepare(job_of(folder), SOURCE_KEY, KEY), "the same data, made once"


def test_the_key_decides_the_places(at):
    """Who does not know it cannot tell where a record is."""
    job = at(people())
    assert where(job) != where(job, key=OTHER_KEY)


def test_all_records_of_a_unit_stay_together(at):
    """In one partition, on one rank, next to each other (P8: its records are summed before clipping)."""
    rows = visits()
    owner = {row[0]: row[3] for row in rows}
    found, seen = {}, Counter()
    for place, shard in placed(at(rows, unit="person", most=50)).items():
        names = ids(shard)
        assert shard.offsets[0] == 0
        assert shard.offsets[-1] == len(names)
        for first, last in itertools.pairwise(shard.offsets):
            (person,) = {owner[i] for i in names[first:last]}
            assert found.setdefault(person, place) == place
            seen[person] += 1
            assert last - first == sum(row[3] == person for row in rows)
    assert set(seen.values()) == {1}
    assert set(found) == set(owner.values())
    assert len(set(found.values())) > 1


@pytest.mark.parametrize("most", [1, 3])
def test_a_unit_gives_no_more_than_the_declared_records(at, most):
    rows = visits()
    shards = placed(at(rows, unit="person", most=most)).values()
    owner = {row[0]: row[3] for row in rows}
    per_person = Counter(owner[i] for shard in shards for i in ids(shard))
    assert per_person == {p: min(most, n) for p, n in Counter(owner.values()).items()}
    for shard in shards:
        assert ((np.diff(shard.offsets) <= most) & (np.diff(shard.offsets) >= 1)).all()


def test_which_records_are_kept_depends_on_the_unit_alone(at):
    """Not on the order of the file, nor on other people; the key decides, not the values."""
    rows = visits()

    def kept(rows, key=KEY):
        return {p: sorted(ids(shard)) for p, shard in placed(at(rows, unit="person", most=2), key=key).items()}

    shuffled = rows.copy()
    random.Random(2).shuffle(shuffled)
    assert kept(rows) == kept(shuffled)
    gone = rows[0][3]
    owner = {row[0]: row[3] for row in rows}
    without = kept([row for row in rows if row[3] != gone])
    assert without == {place: [i for i in names if owner[i] != gone] for place, names in kept(rows).items()}
    assert sorted(sum(kept(rows).values(), [])) != sorted(sum(kept(rows, OTHER_KEY).values(), []))


def test_equal_records_of_a_unit_are_kept_apart(at):
    kept = placed(at([(1, "red", "no", "ada")] * 5, unit="person", most=3), world=1)
    assert sum(len(shard.labels) for shard in kept.values()) == 3


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_records_without_a_unit_are_left_out(tmp_path, suffix):
    """They are nobody's to whom anything was promised; all together they would be one unit that others change."""
    path = tmp_path / f"people{suffix}"
    if suffix == ".csv":
        path.write_text("id,colour,label,person\n1,red,no,ada\n2,red,no,\n3,red,no,bob\n")
    else:
        rows = [{"id": i, "colour": "red", "label": "no", "person": p} for i, p in ((1, "ada"), (2, None), (3, "bob"))]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": 4, "colour": "red", "label": "no"}]))
    found = placed(job_of(path, unit="person", most=2), world=1)
    assert sorted(i for shard in found.values() for i in ids(shard)) == [1, 3]


def test_digits_are_the_real_ones():
    from sklearn.datasets import load_digits

    real, raw = load_digits(), job_of(DIGITS).model_dump(mode="json")
    raw["data"] = {"source": DIGITS}
    mine = Counter(
        (tuple(features), label)
        for shard in placed(parse(Job, raw)).values()
        for features, label in zip(shard.features[:].numpy().round(4).tolist(), shard.labels[:].tolist(), strict=True)
    )
    pixels = (real.data / 16 - 0.5).astype(np.float32).round(4).tolist()
    theirs = Counter((tuple(features), int(label)) for features, label in zip(pixels, real.target, strict=True))
    assert mine == theirs


# -- made once, whole, and inside --


def test_it_is_made_once(at, monkeypatch):
    job = at(people())
    folder = prepare(job, SOURCE_KEY, KEY)
    monkeypatch.setattr(preparation, "_make", lambda *_: pytest.fail("it is there already"))
    assert prepare(job, SOURCE_KEY, KEY) == folder
    assert prepare(job.with_values({"training.steps": 7}), SOURCE_KEY, KEY) == folder


def test_it_is_the_owner_s_alone_and_holds_no_text(at, home):
    folder = prepare(at([(1, SECRET, "no")] * 20), SOURCE_KEY, KEY)
    for path in [folder, folder.parent, folder.parent.parent]:
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not [path for path in home.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    manifest = (folder / "manifest.json").read_text()
    assert KEY not in manifest
    assert SOURCE_KEY not in manifest


@pytest.mark.parametrize("place", ["take_in", "encode", "_index", "write_whole", "os.rename"])
def test_what_was_interrupted_is_not_taken_for_whole(at, monkeypatch, place):
    """Wherever it ends, the next one begins anew, and finds what it would have found."""
    job = at(people())
    whole = placed(job, key=OTHER_KEY), placed(job)
    wanted = prepare(job, SOURCE_KEY, KEY)
    for path in wanted.iterdir():
        path.unlink()
    wanted.rmdir()

    def dies(*_arguments, **_more):
        raise MemoryError

    with monkeypatch.context() as patch:
        fingerprint_of(private(job), SOURCE_KEY)
        patch.setattr(f"training.preparation.{place}", dies)
        with pytest.raises(MemoryError):
            prepare(job, SOURCE_KEY, KEY)
    assert Prepared.at(wanted) is None
    assert not (wanted.parent / ".draft").exists(), "the text of records would lie in it"
    again = placed(job, key=OTHER_KEY), placed(job)
    assert all(same(one[p], two[p]) for one, two in zip(whole, again, strict=True) for p in one)


def test_a_half_folder_in_its_place_is_made_anew(at):
    job = at(people())
    folder = prepare(job, SOURCE_KEY, KEY)
    (folder / "manifest.json").unlink()
    assert Prepared.at(folder) is None
    assert prepare(job, SOURCE_KEY, KEY) == folder
    assert Prepared.at(folder) is not None


def test_a_source_that_changes_while_it_is_read_is_refused(at, monkeypatch):
    """A remembered fingerprint is not believed of what is read: only the records' own counts."""
    job = at(people())
    monkeypatch.setattr(preparation, "fingerprint_of", lambda *_: "00" * 32)
    with pytest.raises(UsageError, match=r"^data\.source: its content changed while it was read"):
        prepare(job, SOURCE_KEY, KEY)


def test_a_fingerprint_is_remembered_of_files_that_did_not_change(at, monkeypatch):
    """By path, size and time; never of a file so new that a second change would not show."""
    job = at(people())
    source = private(job)
    mark = fingerprint_of(source, SOURCE_KEY)
    monkeypatch.setattr(preparation.identity, "digests", lambda _: pytest.fail("read again"))
    with pytest.raises(pytest.fail.Exception):
        fingerprint_of(source, SOURCE_KEY)  # written just now
    monkeypatch.undo()
    old = dataclasses.replace(source, files=tuple(dataclasses.replace(file, changed=1) for file in source.files))
    assert fingerprint_of(old, SOURCE_KEY) == mark
    monkeypatch.setattr(preparation.identity, "digests", lambda _: pytest.fail("read again"))
    assert fingerprint_of(old, SOURCE_KEY) == mark
    for changes in ({"changed": 2}, {"size": 1}, {"path": "elsewhere"}):
        new = dataclasses.replace(old, files=(dataclasses.replace(old.files[0], **changes),))
        with pytest.raises(pytest.fail.Exception):
            fingerprint_of(new, SOURCE_KEY)


# -- texts --


def notes(tmp_path, suffix=".jsonl"):
    rows = [(f"note {i} " + "x" * (i % 20), ["no", "yes"][i % 2], f"person-{i % 17}") for i in range(100)]
    return table_of(rows, ("note", "label", "person")).write(tmp_path / f"notes{suffix}")


def test_another_tokenizer_is_the_same_dataset(tmp_path, monkeypatch):
    """In the books and in its partitions; what is prepared is another."""
    job = text_job(notes(tmp_path), unit="person", most=3)
    one = prepared(job)

    def other(model):
        tokenizer = tokenizer_of(model)
        tokenizer.add_tokens(["note"])
        return tokenizer

    monkeypatch.setattr("training.tokens.tokenizer_of", other)
    two = prepared(job)
    assert one.folder != two.folder
    assert one.manifest["fingerprint"] == two.manifest["fingerprint"]
    for partition in ("train", "validation"):
        for name in ("order", "offsets", "shares"):
            first, second = (np.load(made.folder / f"{partition}-{name}.npy") for made in (one, two))
            assert np.array_equal(first, second)
    assert (one.shard("train", 0, 1).features[:] != two.shard("train", 0, 1).features[:]).any()


def test_all_that_decides_is_in_the_name(at):
    job = at(visits(), unit="person", most=2)
    encoding = preparation.Encoding.of(job)
    name, colour = {"range": [0, 1000]}, {"categories": ["red", "green"]}
    changes = [
        {},
        {"privacy.max_records_per_unit": 3},
        {"privacy.unit": "colour"},
        {"data.validation_fraction": 0.3},
        {"data.features": {"colour": colour, "id": name}},
        {"data.features": {"id": name, "colour": {"categories": ["green", "red"]}}},
        {"data.features": {"id": name, "colour": colour, "x": {"range": [0, 1]}}},
        {"data.label": {"column": "label", "categories": ["yes", "no"]}},
        {"evaluation.groups": {"column": "person", "categories": ["ada"]}},
    ]
    names = [digest(other, preparation.Encoding.of(other), "00", KEY) for other in map(job.with_values, changes)]
    names += [digest(job, encoding, "11", KEY), digest(job, encoding, "00", OTHER_KEY)]
    assert len(set(names)) == len(names)


def test_numbers_are_made_of_one_partition_at_a_time(at, monkeypatch):
    """What is made of one partition's records has not seen the other's: each account pays for what reads it."""
    monkeypatch.setattr("training.sources.ROWS", 50)
    made, encoded = [], preparation.Encoding.encoded

    def watched(encoding, batch):
        made.append([int(name) for name in batch.column("id").to_pylist()])
        return encoded(encoding, batch)

    monkeypatch.setattr(preparation.Encoding, "encoded", watched)
    found = where(at(people()), world=1)
    assert sorted(sum(made, [])) == list(range(300))
    assert len(made) == 12
    assert all(len({found[i][0] for i in some}) == 1 for some in made)


def test_groups_are_of_the_validation_partition(at):
    job = at(people()).with_values({"evaluation.groups": {"column": "colour", "categories": ["blue"]}})
    made = prepared(job)
    assert made.shard("train", 0, 1).groups is None
    shard = made.shard("validation", 0, 1)
    assert set(shard.groups[:].tolist()) == {0, 1}


# -- in parallel --


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.cluster
def test_ray_data_makes_the_same_byte_by_byte(tmp_path, monkeypatch, ray_session, capfd):
    """And of a piece that fails no more comes back than a sentence."""
    from training.parallel import everywhere

    monkeypatch.setattr(preparation, "LARGE", 0)
    monkeypatch.setattr(preparation, "GREAT", 0)
    monkeypatch.setattr(preparation, "PIECES", 4)
    folder = tmp_path / "parts"
    folder.mkdir()
    rows = [(f"note {i} {SECRET}", "no", f"person-{i % 170}") for i in range(2000)]
    for number in range(2):
        table_of(rows[number::2], ("note", "label", "person")).write(folder / f"{number}.jsonl")
    job = text_job(folder, unit="person", most=3)
    plain = prepare(job, SOURCE_KEY, KEY)
    made = files(plain)
    for path in plain.iterdir():
        path.unlink()
    plain.rmdir()
    assert prepare(job, SOURCE_KEY, KEY, everywhere) == plain
    assert files(plain) == made

    (folder / "1.jsonl").write_text(json.dumps({"note": SECRET, "label": "", "person": ""}) + f"\n{{{SECRET}")
    monkeypatch.setattr(preparation, "fingerprint_of", lambda *_: "00" * 32)
    with pytest.raises(UsageError, match=r"^data\.source: 1\.jsonl cannot be used") as raised:
        prepare(job, SOURCE_KEY, KEY, everywhere)
    assert SECRET not in whole_chain(raised.value)

    def dies(recipe, piece):
        raise ValueError(f"record 17 of {SECRET}")

    monkeypatch.setattr(preparation, "take_in", dies)
    with pytest.raises(PurserError, match=r"its preparation failed with ValueError") as raised:
        prepare(job, SOURCE_KEY, KEY, everywhere)
    assert SECRET not in whole_chain(raised.value)
    assert SECRET not in "".join(capfd.readouterr())
