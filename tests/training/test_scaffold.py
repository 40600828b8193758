"""A first job file comes from names of columns alone (P11): whatever they are called, it is YAML that reads them back,
no value is in it, and unfilled it is refused by the first field that waits for a person."""

from __future__ import annotations

import gzip
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UsageError
from training import yaml12
from training.columns import columns_of
from training.config import Job
from training.jobfile import load, parse
from training.scaffold import Wanted, account_of, quoted, write_job
from tuning.config import SweepJob

SECRET = "Zyxomma"
ODD = [
    "yes",
    "no",
    "on",
    "null",
    "2020",
    "a: b",
    "it's",
    'say "x"',
    "größe",
    "漢字",
    "# x",
    "- y",
    "a, b",
    "{z}",
    "?",
    "~",
    " pad ",
]
ANSWERS = {  # the line's beginning → what a person writes there
    "epsilon": "3.0",
    "delta": "1.0e-4",
    "units": "200",
    "expected_batch_size": "32",
}


def filled(text, columns=None):
    """The job file with every mark replaced, as its owner would; `columns` of words → their categories."""
    lines = []
    for line in text.splitlines():
        field = line.split(":")[0].strip()
        if field in ANSWERS:
            line = line.replace('"?"', ANSWERS[field])
        for name, categories in (columns or {}).items():
            if field == name:
                line = re.sub(r"\{.*?\}", f"{{categories: {categories}}}", line)
        line = line.replace('range: ["?", "?"]', "range: [0, 100]")
        line = line.replace('column: "?"', "column: c").replace('categories: ["?", "?"]', "categories: [low, high]")
        lines.append(line)
    return "\n".join(lines) + "\n"


def written(folder, name, header, **wanted):
    """The job file over a CSV or TSV with this header and one row of secrets."""
    mark = "\t" if name.endswith(".tsv") else ","
    cells = [header, [SECRET] * len(header)]
    text = "".join(mark.join('"' + cell.replace('"', '""') + '"' for cell in row) + "\n" for row in cells)
    (folder / name).write_text(text, encoding="utf-8")
    out = folder / "job.yaml"
    write_job(folder / name, Wanted(**wanted), out)
    return out


def test_every_column_but_unit_and_label_is_a_feature(tmp_path):
    out = written(tmp_path, "people.csv", ["person", "age", "wage", "income"], unit="person", label="income")
    raw = yaml12.read(out.read_text())
    assert list(raw) == ["account", "privacy", "data", "model", "training", "evaluation", "tuning", "release"]
    assert raw["account"] == "people"
    assert raw["privacy"]["unit"] == "person"
    assert list(raw["data"]["features"]) == ["age", "wage"]
    assert raw["data"]["label"]["column"] == "income"
    assert raw["data"]["source"] == "people.csv"
    assert SECRET not in out.read_text()

    out.write_text(filled(out.read_text()))
    job = load(SweepJob, out)
    assert job.privacy.epsilon == 3.0
    assert job.data.features["age"].range == (0, 100)
    assert job.data.source == str(tmp_path / "people.csv")
    job.corners()


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_odd_names_are_read_back_as_they_are(tmp_path, ending):
    out = written(tmp_path, f"odd.{ending}", [*ODD, "label"], label="label")
    text = out.read_text(encoding="utf-8")
    for read in (yaml12.read, yaml.safe_load):
        assert list(read(text)["data"]["features"]) == ODD
    out.write_text(filled(text), encoding="utf-8")
    assert list(load(SweepJob, out).data.features) == ODD


@given(st.text(min_size=1, max_size=30))
def test_any_word_is_quoted_so_that_yaml_reads_it_back(word):
    content = f"features:\n  {quoted(word)}: {{range: [1, 2]}}  # a comment\n"
    if any("\ud800" <= letter <= "\udfff" for letter in word):
        return
    assert content.count("\n") == 2
    for read in (yaml12.read, yaml.safe_load):
        assert list(read(content)["features"]) == [word]


def test_a_parquet_schema_says_what_is_a_number(tmp_path):
    columns = {
        "age": pa.array([1], pa.int32()),
        "wage": pa.array([1.5]),
        "town": pa.array([SECRET]),
        "kind": pa.array([SECRET]).dictionary_encode(),
        "when\nnow": pa.array([0], pa.timestamp("s")),
        "income": pa.array([SECRET]),
    }
    (tmp_path / "people").mkdir()
    for part in ("b", "a"):
        pq.write_table(pa.table(columns), tmp_path / "people" / f"{part}.parquet")
    (tmp_path / "people" / "_SUCCESS").touch()
    for data in (tmp_path / "people", tmp_path / "people" / "a.parquet"):
        out = tmp_path / f"{data.name}.yaml"
        write_job(data, Wanted(label="income"), out)
        text = out.read_text()
        assert SECRET not in text
        assert {name: list(one) for name, one in yaml12.read(text)["data"]["features"].items()} == {
            "age": ["range"],
            "wage": ["range"],
            "town": ["categories"],
            "kind": ["categories"],
        }
        assert '# "when\\nnow"' in text
        out.write_text(filled(text))
        assert load(SweepJob, out).data.features["town"].categories == ("low", "high")


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_what_is_gzipped_is_read_and_what_is_cut_off_is_not(tmp_path, ending):
    header = "age,income\n" if ending == "csv" else '{"age": 1, "income": 2}\n'
    (tmp_path / f"people.{ending}.gz").write_bytes(gzip.compress(header.encode()))
    data = tmp_path / f"people.{ending}.gz"
    assert [column.name for column in columns_of(data)] == ["age", "income"]
    assert account_of(data) == "people"
    for broken in (data.read_bytes()[:14], b"no gzip", data.read_bytes()[:10] + b"\xff" * 20):
        data.write_bytes(broken)
        with pytest.raises(UsageError, match="^DATA: .* cannot be read"):
            columns_of(data)
    (tmp_path / "people.parquet.gz").touch()
    with pytest.raises(UsageError, match="its name must end in"):
        columns_of(tmp_path / "people.parquet.gz")


def test_the_keys_of_the_first_line_are_the_columns(tmp_path):
    records = [{"age": 3, "note": SECRET}, {"age": 4, "note": SECRET, SECRET: 1}]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    write_job(tmp_path / "people.jsonl", Wanted(label="note"), tmp_path / "job.yaml")
    text = (tmp_path / "job.yaml").read_text()
    assert list(yaml12.read(text)["data"]["features"]) == ["age"]
    assert SECRET not in text


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [
        ({"text": "note"}, "causal-lm"),
        ({"text": "note", "prompt": "question"}, "causal-lm"),
        ({"text": "note", "label": "mood"}, "sequence-classification"),
    ],
)
def test_a_language_model_reads_its_text(tmp_path, wanted, kind):
    out = written(tmp_path, "notes.csv", ["question", "note", "mood"], **wanted)
    out.write_text(filled(out.read_text()))
    job = load(SweepJob, out)
    assert job.model.kind == kind
    assert job.model.path.startswith("tiny:")
    assert job.data.text.column == "note"
    assert job.data.text.prompt == wanted.get("prompt")
    assert (job.data.label is None) == (kind == "causal-lm")
    adapted = out.read_text().replace("# lora:", "lora:")
    out.write_text(adapted)
    assert load(SweepJob, out).model.lora.r == 8


def test_what_waits_for_a_person_is_named(tmp_path):
    out = written(tmp_path, "people.csv", ["age", "income"])
    for field, mark, answer in [
        ("privacy.epsilon", 'epsilon: "?"', "epsilon: 3"),
        ("privacy.delta", 'delta: "?"', "delta: 1e-4"),
        ("privacy.units", 'units: "?"', "units: 200"),
        ("data.features.age.range", 'age: {range: ["?", "?"]}', 'age: {range: [3, "?"]}'),
        ("data.features.age.range", 'age: {range: [3, "?"]}', "age: {range: [3, 4]}"),
        ("data.features.income.range", 'income: {range: ["?", "?"]}', "income: {range: [3, 4]}"),
        ("data.label.column", 'column: "?"', "column: income"),
        ("data.label.categories", 'categories: ["?", "?"]', 'categories: ["?", low, high]'),
        ("training.expected_batch_size", 'size: "?"', "size: 32"),
    ]:
        with pytest.raises(UsageError, match=f'^{field}: it is still to be filled in, "\\?" stands there;'):
            load(SweepJob, out)
        assert mark in out.read_text()
        out.write_text(out.read_text().replace(mark, answer))
    assert load(SweepJob, out).data.label.categories == ("?", "low", "high"), (
        "the census has a category that is so called"
    )


def test_an_override_fills_in_too(tmp_path):
    out = written(tmp_path, "people.csv", ["age", "income"], label="income")
    answers = ["privacy.epsilon=3", "privacy.delta=1e-4", "privacy.units=200", "training.expected_batch_size=32"]
    more = ["data.features.age.range=[0, 9]", "data.label.categories=[a, b]"]
    assert load(SweepJob, out, [*answers, *more]).privacy.units == 200


NO_HEADER = {
    "numbers": f"39,77516,13\n{SECRET},1,2\n",
    "numbers and a date": "39,2020-01-01,+3.5\n",
    "a record of words and numbers": f"39,{SECRET},77516,Bachelors\n",
    "a date among words": f"{SECRET},2020-01-01\n",
    "an empty name": f"{SECRET},\n",
    "a name twice": f"{SECRET},{SECRET}\n",
    "nothing": "",
    "an empty line": f"\n{SECRET}\n",
    "an open quote": f'"{SECRET},age\n',
    "bytes": f"{SECRET}\0,age\n",
}


@pytest.mark.parametrize("case", NO_HEADER)
def test_a_file_without_a_header_is_refused_and_nothing_of_it_said(tmp_path, case):
    (tmp_path / "people.csv").write_text(NO_HEADER[case])
    with pytest.raises(UsageError, match=r"^DATA: people.csv") as caught:
        write_job(tmp_path / "people.csv", Wanted(), tmp_path / "job.yaml")
    said = str(caught.value)
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
    for cell in (SECRET, "39", "77516", "Bachelors", "2020"):
        assert cell not in said
    assert not (tmp_path / "job.yaml").exists()


def test_a_number_may_be_a_name_where_a_column_is_named(tmp_path):
    (tmp_path / "people.csv").write_text("2019,2020,income\n1,2,3\n")
    assert [column.name for column in columns_of(tmp_path / "people.csv", ["income"])] == ["2019", "2020", "income"]
    with pytest.raises(UsageError, match="no header"):
        columns_of(tmp_path / "people.csv", ["age"])
    (tmp_path / "people.csv").write_text("2019,2020\n1,2\n")
    with pytest.raises(UsageError, match="no header"):
        columns_of(tmp_path / "people.csv", ["2019"])


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_what_is_no_such_file_is_refused_without_its_content(tmp_path, ending):
    (tmp_path / f"x.{ending}").write_bytes(b"\xff\xfe" + SECRET.encode() + b"\xc3\n[1]")
    with pytest.raises(UsageError, match=rf"^DATA: x.{ending}") as caught:
        columns_of(tmp_path / f"x.{ending}")
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None
    (tmp_path / "x.jsonl").write_text(f'["{SECRET}"]\n')
    with pytest.raises(UsageError, match="no JSON object"):
        columns_of(tmp_path / "x.jsonl")


def test_a_folder_holds_one_format(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UsageError, match="the folder data"):
        columns_of(tmp_path / "data")
    for name in ("b.csv", ".hidden.txt"):
        (tmp_path / "data" / name).write_text("age,income\n")
    assert [column.name for column in columns_of(tmp_path / "data")] == ["age", "income"]
    (tmp_path / "data" / "c.tsv").write_text("age\tincome\n")
    with pytest.raises(UsageError, match="one format"):
        columns_of(tmp_path / "data")


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"unit": "nobody"}, "--unit: people.csv has no column 'nobody'"),
        ({"label": "nothing"}, "--label: people.csv has no column 'nothing'"),
        ({"text": "nothing"}, "--text: people.csv has no column 'nothing'"),
        ({"text": "age", "prompt": "nothing"}, "--prompt: people.csv has no column 'nothing'"),
        ({"unit": "age", "label": "age"}, "--label: 'age' was given, which is --unit already"),
        ({"prompt": "age"}, "--prompt: it stands before the text"),
        ({"text": "age", "label": "income", "prompt": "town"}, "--prompt: it stands before the text"),
    ],
)
def test_columns_that_are_not_there_are_refused_and_none_is_listed(tmp_path, wanted, words):
    with pytest.raises(UsageError, match="^" + re.escape(words)) as caught:
        written(tmp_path, "people.csv", [SECRET, "age", "income", "town"], **wanted)
    assert SECRET not in str(caught.value)
    assert not (tmp_path / "job.yaml").exists()


def test_no_column_is_left_to_learn_from(tmp_path):
    with pytest.raises(UsageError, match="no column of numbers or words"):
        written(tmp_path, "people.csv", ["person", "income"], unit="person", label="income")


@pytest.mark.parametrize(
    ("name", "account"),
    [
        ("census.csv", "census"),
        ("My café 2.csv", "My-cafe-2"),
        ("_x_.csv", "x"),
        ("漢字.csv", "data"),
        ("v1.2 census.tsv", "v1.2-census"),
        ("a" * 90 + ".csv", "a" * 63),
    ],
)
def test_the_account_is_a_name_that_the_books_allow(tmp_path, name, account):
    assert account_of(tmp_path / name) == account
    out = written(tmp_path, name, ["age", "income"], label="income")
    out.write_text(filled(out.read_text()))
    assert load(SweepJob, out).data.source == str(tmp_path / name)


def test_a_source_elsewhere_is_named_whole(tmp_path):
    for folder in ("data", "jobs", "od: d"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "people.csv").write_text("age,income\n")
    out = tmp_path / "jobs" / "job.yaml"
    write_job(tmp_path / "data" / "people.csv", Wanted(), out)
    assert yaml12.read(out.read_text())["data"]["source"] == str(tmp_path / "data" / "people.csv")
    with pytest.raises(UsageError, match="':' may not stand"):
        write_job(tmp_path / "od: d" / "people.csv", Wanted(), tmp_path / "other.yaml")


def test_nothing_is_overwritten(tmp_path):
    out = written(tmp_path, "people.csv", ["age", "income"])
    before = out.read_text()
    with pytest.raises(UsageError, match="--out: .* is there already"):
        written(tmp_path, "people.csv", ["age", "income", "more"])
    assert out.read_text() == before
    with pytest.raises(UsageError, match="--out: .* cannot be written"):
        write_job(tmp_path / "people.csv", Wanted(), tmp_path / "absent" / "job.yaml")


def test_a_mark_is_refused_before_anything_else():
    with pytest.raises(UsageError, match=r"^account: it is still to be filled in"):
        parse(Job, {"account": "?", "privacy": {"epsilon": -1}})
