"""`purser init` from the command line: its job file plans and rehearses once the marks are filled in, and no record's
value is in the file, in what is printed or in an error (P11, P13)."""

from __future__ import annotations

import pytest
from test_front_door import charged, one_sentence

SECRET = "Zyxomma"
ANSWERS = (
    ('epsilon: "?"', "epsilon: 3.0"),
    ('delta: "?"', "delta: 1.0e-4"),
    (' units: "?"', " units: 240"),
    ('age: {range: ["?", "?"]}', "age: {range: [17, 90]}"),
    ('"marital: state": {range: ["?", "?"]}', '"marital: state": {categories: [married, single]}'),
    ('categories: ["?", "?"]', 'categories: ["no", "yes"]'),
    ('batch_size: "?"', "batch_size: 24"),
)


@pytest.fixture
def census(purser):
    rows = "".join(f"{SECRET}-{i},{20 + i % 50},{SECRET},{'yes' if i % 3 else 'no'}\n" for i in range(240))
    (purser.folder / "census.csv").write_text(f"person,age,marital: state,income\n{rows}")
    return purser


def test_a_first_job_from_init_to_rehearsal(census):
    made = census("init", "census.csv", "--unit", "person", "--label", "income", "--json")
    assert made.code == 0, made.err
    job = census.folder / "job.yaml"
    assert made.json == {"job": str(job)}
    assert len(made.out.strip().splitlines()) == 1, "--json keeps stdout clean"
    text = job.read_text()
    assert SECRET not in text + made.out + made.err
    assert "marital" not in made.out + made.err, "a first line that is a record is not shown"

    one_sentence(census.here("plan", "job.yaml"), 2, "privacy.epsilon: it is still to be filled in")
    for mark, answer in ANSWERS:
        assert mark in text
        text = text.replace(mark, answer)
    assert '"?"' not in text
    job.write_text(text)
    planned = census.here("plan", "job.yaml", "--json")
    assert planned.code == 0, planned.err
    assert planned.json["account"] == "census"
    assert planned.json["trials_that_fit"] >= 1
    rehearsed = census.here("train", "job.yaml", "--rehearse", "--json")
    assert rehearsed.code == 0, rehearsed.err
    assert rehearsed.json["rehearsal"]["largest_norm"] <= 1.00001
    assert census.here("budget", "create", "job.yaml").code == 0
    assert charged(census) == 0

    again = census.here("init", "census.csv", "--label", "income")
    one_sentence(again, 2, "--out", "job.yaml is there already")
    assert job.read_text() == text
    other = census.here("init", "census.csv", "--out", "other.yaml")
    assert other.code == 0
    assert "Next: fill them in, then purser plan other.yaml" in other.out
    assert SECRET not in other.out


def test_what_init_refuses_says_nothing_of_a_record(census):
    (census.folder / "bare.csv").write_text(f"39,77516,{SECRET}\n")
    (census.folder / "bare.txt").write_text(f"39,77516,{SECRET}\n")
    one_sentence(census("init", "absent.csv"), 2, "DATA", "absent.csv does not exist")
    for arguments, words in [
        (["bare.txt"], ["DATA", "bare.txt", ".parquet"]),
        (["bare.csv"], ["DATA", "bare.csv seems to have no header line"]),
        (["census.csv", "--unit", "household"], ["--unit", "census.csv has no column 'household'"]),
        (["census.csv", "--label", "wage"], ["--label", "census.csv has no column 'wage'"]),
        ([], ["DATA"]),
    ]:
        ended = census.here("init", *arguments)
        one_sentence(ended, 2, *words)
        assert not any(word in ended.out + ended.err for word in (SECRET, "77516", "marital"))
    assert not (census.folder / "job.yaml").exists()
