"""Reading records as text from files of every format: cells stay what they are, what is no table is refused in one
sentence, and no error holds a cell or a library's message (P13)."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from people import SECRET, job_of, table_of, text_job, whole_chain

from cluster.errors import UsageError
from training import sources
from training.data import DIGITS

GOOD = "id,colour,label\n1,red,no\n2,green,yes\n"
JSON = '{"id": "1", "colour": "red", "label": "no"}\n{"id": "2", "colour": "green", "label": "yes"}\n'


def write(folder, content, name="people.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def cells(path):
    """All that is read of a source: its columns' names, and each column."""
    source = sources.find(str(path))
    batches = [batch for number in range(len(source.files)) for batch in source.batches(number)]
    return source.names, [[cell for b in batches for cell in b.column(i).to_pylist()] for i in range(len(source.names))]


def parquet(folder, columns, name="people.parquet"):
    pq.write_table(pa.table(columns), folder / name)
    return folder / name


PLAIN = [["1", "2"], ["red", "green"], ["no", "yes"]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", GOOD),
        ("a.csv", GOOD.rstrip("\n")),
        ("a.csv", GOOD.replace("\n", "\r\n")),
        ("a.csv", "\ufeff" + GOOD),
        ("a.csv", "\n" + GOOD),
        ("a.csv", GOOD.replace("red", '"red"')),
        ("a.tsv", GOOD.replace(",", "\t")),
        ("a.csv.gz", gzip.compress(GOOD.encode())),
        ("a.tsv.gz", gzip.compress(GOOD.replace(",", "\t").encode())),
        ("a.jsonl", JSON),
        ("a.jsonl", JSON.rstrip("\n")),
        ("a.ndjson", JSON.replace("\n", "\r\n")),
        ("a.json", "\ufeff\n" + JSON + "\n\n"),
        ("a.json", JSON.replace('"1"', "1")),
        ("a.jsonl.gz", gzip.compress(JSON.encode())),
    ],
)
def test_files_are_read_as_text(tmp_path, name, content):
    assert cells(write(tmp_path, content, name)) == (("id", "colour", "label"), PLAIN)


def test_parquet_is_read_as_text(tmp_path):
    path = parquet(
        tmp_path, {"id": [1, 2], "colour": pa.array(["red", "green"]).dictionary_encode(), "label": PLAIN[2]}
    )
    assert cells(path) == (("id", "colour", "label"), PLAIN)


def test_a_folder_and_a_url_are_sources(tmp_path):
    """Files in the order of their names; columns in the order of the first; hidden files are passed over."""
    folder = tmp_path / "people"
    folder.mkdir()
    write(folder, GOOD, "a.csv")
    write(folder, "colour,label,id\nblue,no,3\n", "b.csv")
    write(folder, b"", "_SUCCESS")
    write(folder, SECRET, ".hidden")
    both = (("id", "colour", "label"), [["1", "2", "3"], ["red", "green", "blue"], ["no", "yes", "no"]])
    assert cells(folder) == both
    assert cells(folder.as_uri()) == both
    assert cells((folder / "a.csv").as_uri())[1] == PLAIN


def test_cells_stay_as_they_are_written(tmp_path):
    """No type is guessed, no word means null: the fingerprint is of the text."""
    written = ["007", "NA", "null", "", "1.0", "true", "2001-01-01", " x", "naïve", '"a,b"', '"a\nb"', '5" disc']
    path = write(tmp_path, "id,colour,label\n" + "".join(f"{cell},red,no\n" for cell in written))
    assert cells(path)[1][0] == [*written[:-3], "a,b", "a\nb", '5" disc']


def test_values_of_other_formats_become_text(tmp_path):
    first = '{"a": 1.50, "b": null, "c": [1, {"x": "y"}]}'
    lines = [first, '{"a": true, "c": "\\ud800", "b": NaN}', '{"a": 12345678901234567890}']
    names, columns = cells(write(tmp_path, "\n".join(lines), "a.jsonl"))
    assert names == ("a", "b", "c")
    assert columns[0] == ["1.50", "true", "12345678901234567890"]
    assert columns[1] == [None, "NaN", None]
    assert columns[2][0] == '["1", {"x": "y"}]'
    assert set(columns[2][1]) == {"\ufffd"}
    path = parquet(
        tmp_path,
        {
            "a": [1.5, None],
            "b": [datetime.date(2001, 2, 3)] * 2,
            "c": [decimal.Decimal("1.20")] * 2,
            "d": [b"x", b"\xff"],
            "e": [[1, 2], None],
            "f": pa.array(["x", None]).dictionary_encode(),
        },
    )
    assert cells(path)[1] == [
        ["1.5", None], ["2001-02-03"] * 2, ["1.20"] * 2, ["x", "\ufffd"], ["[1, 2]", None], ["x", None],
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_bytes_that_are_no_utf8_are_replaced(tmp_path, suffix):
    """An error would tell that somebody's record holds them."""
    bad = SECRET.encode() + b"\xff"
    if suffix == ".parquet":
        column = pa.StringArray.from_buffers(2, *pa.array([bad, b"red"], pa.binary()).buffers()[1:])
        path = parquet(tmp_path, {"id": ["1", "2"], "colour": column, "label": ["no", "yes"]})
    else:
        text = (GOOD if suffix == ".csv" else JSON).encode().replace(b"red", bad)
        path = write(tmp_path, text, f"people{suffix}")
    assert f"{SECRET}\ufffd" in cells(path)[1][1]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_without_rows_is_a_table(tmp_path, suffix):
    """That it is empty would be a fact about people."""
    assert cells(table_of([]).write(tmp_path / f"people{suffix}"))[1] == [[], [], []]


def test_long_sources_come_in_batches(tmp_path):
    """Of no more than so many rows or bytes, and together what there is."""
    path = table_of([(i, "x" * 1000, "no") for i in range(20_000)]).write(tmp_path / "people.parquet")
    for suffix in (".parquet", ".csv", ".jsonl"):
        path = table_of([(i, "x" * 1000, "no") for i in range(20_000)]).write(tmp_path / f"people{suffix}")
        batches = list(sources.find(str(path)).batches(0))
        assert max(batch.num_rows for batch in batches) < 2000
        assert [i for batch in batches for i in batch.column(0).to_pylist()] == [str(i) for i in range(20_000)]


# What is no table.

S = SECRET
RAGGED = f"id,colour,label\n1,{S},no\n2,{S},no,{S}\n"
UNREADABLE = {
    "a cell too many": RAGGED,
    "a cell too few": f"id,colour,label\n1,{S},no\n{S}\n",
    "a cell too many, late": "id,colour,label\n" + "1,red,no\n" * 200_000 + f"1,{S},no,{S}\n",
    "cut off in a record": f"id,colour,label\n1,{S},no\n2,{S}",
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
NO_JSON = {
    "no byte at all": "",
    "empty lines": "\n\n",
    "no JSON": f"{S}\n",
    "no objects": f'["{S}"]\n',
    "a whole document": json.dumps([{"id": S}], indent=1),
    "empty objects": "{}\n",
    "cut off in a record": f'{JSON}{{"id": "{S}", "col',
    "a field that the first lacks": f'{JSON}{{"id": "3", "{S}": "x"}}\n',
    "nested without end": JSON + '{"id": ' + "[" * 100_000 + f'"{S}"',
    "CSV": RAGGED,
    "UTF-16": JSON.encode("utf-16"),
    "no gzip": b"\x1f\x8b" + S.encode(),
    "a cut gzip": gzip.compress((JSON * 1000 + S).encode())[:-20],
}


def refused(path, match=r"^data\.source: .*cannot be used: "):
    """The whole text of the refusal, whose file is named and to which nothing is chained."""
    with pytest.raises(UsageError, match=match) as raised:
        cells(path)
    assert SECRET not in whole_chain(raised.value)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None
    assert path.name in str(raised.value)


@pytest.mark.parametrize("what", UNREADABLE)
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_file_that_is_no_table_is_refused_without_a_word_of_it(tmp_path, what, suffix):
    """pyarrow's own messages print cells: neither they nor the exceptions that carry them may follow (P13)."""
    content = UNREADABLE[what]
    if suffix == ".tsv" and isinstance(content, str):
        content = content.replace(",", "\t")
    refused(write(tmp_path, content, "people" + suffix + (".gz" if "gzip" in what else "")))


@pytest.mark.parametrize("what", NO_JSON)
def test_a_file_of_no_json_lines_is_refused_without_a_word_of_it(tmp_path, what):
    refused(write(tmp_path, NO_JSON[what], "people.jsonl" + (".gz" if "gzip" in what else "")))


def test_a_parquet_file_that_is_none_or_cut_is_refused_without_a_word_of_it(tmp_path):
    path = parquet(tmp_path, {"id": [SECRET] * 1000, "colour": ["red"] * 1000, "label": ["no"] * 1000})
    whole = path.read_bytes()
    for content in (b"", whole[:-100], whole[:50], SECRET.encode(), b"PAR1" + SECRET.encode() + b"PAR1"):
        path.write_bytes(content)
        refused(path)
    path.write_bytes(whole[:4] + bytes(200) + whole[204:])
    refused(path)


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
    ("files", "said"),
    [
        ({}, "holds no file"),
        ({"_SUCCESS": "", ".x": ""}, "holds no file"),
        ({"a.csv": GOOD, "b.jsonl": JSON}, "holds files of several formats"),
        ({"a.csv": GOOD, "notes.txt": SECRET}, "notes.txt is no file of a known format"),
        ({"a.csv": GOOD, "b.csv": "id,colour\n1,red\n"}, "b.csv has not the columns of a.csv"),
        ({"a.csv": GOOD, "b.csv": f"1,{SECRET},no\n"}, "b.csv has not the columns of a.csv"),
        ({"a.csv": GOOD, "b.csv": ""}, "b.csv cannot be used"),
    ],
)
def test_a_folder_holds_files_of_one_table(tmp_path, files, said):
    folder = tmp_path / "people"
    folder.mkdir()
    for name, content in files.items():
        write(folder, content, name)
    with pytest.raises(UsageError, match=rf"^data\.source: .*{said}") as raised:
        cells(folder)
    assert SECRET not in whole_chain(raised.value)
    (folder / "more").mkdir()
    with pytest.raises(UsageError, match=r"^data\.source: "):
        cells(folder)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nowhere.csv", "does not exist"),
        ("hf:adult", "'hf:adult' was given; write a path or a URL"),
        ("gopher://x/y.csv", "cannot be reached"),
        (__file__, "is no file of a known format"),
    ],
)
def test_what_is_no_source_is_named(tmp_path, place, said):
    with pytest.raises(UsageError, match=rf"^data\.source: .*{said}") as raised:
        sources.find(place)
    assert raised.value.__context__ is None


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ("id,color,label", r"data\.features\.colour"),
        ("ident,colour,label", r"data\.features\.id"),
        ("id,colour,labels", r"data\.label\.column"),
    ],
)
def test_a_missing_column_is_named(tmp_path, header, field):
    with pytest.raises(UsageError, match=rf"^{field}: data.source has no column") as raised:
        sources.private(job_of(write(tmp_path, f"{header}\n1,{SECRET},no\n")))
    assert SECRET not in whole_chain(raised.value)
    assert header.split(",")[0] not in str(raised.value), "the first line may be a record"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": "question"}, r"data\.text\.prompt"),
        ({"column": "story"}, r"data\.text\.column"),
        ({"unit": "person"}, r"privacy\.unit"),
        ({"kind": "sequence-classification"}, r"data\.label\.column"),
    ],
)
def test_a_missing_column_of_a_text_is_named(tmp_path, changes, field):
    path = table_of([(SECRET,)], ["note"]).write(tmp_path / "notes.jsonl")
    with pytest.raises(UsageError, match=rf"^{field}: data.source has no column") as raised:
        sources.private(text_job(path, **changes))
    assert SECRET not in whole_chain(raised.value)


def test_a_file_without_a_header_line_does_not_show_its_first_record(tmp_path):
    with pytest.raises(UsageError) as raised:
        sources.private(job_of(write(tmp_path, f"39,{SECRET},no\n40,red,yes\n")))
    assert SECRET not in whole_chain(raised.value)


def test_digits_come_with_scikit_learn():
    source = sources.find(DIGITS)
    assert sum(batch.num_rows for batch in source.batches(0)) == 1797
    assert source.names[-1] == "digit"
