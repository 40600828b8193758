"""Sources: which files hold a job's records, and a stream of those records as text. Inside the boundary; no Ray.

A source is a file, a folder of files of one format, or a URL of a filesystem that pyarrow knows; CSV or TSV with a
header line, JSON lines, or Parquet; CSV, TSV and JSON lines may be gzipped. Every cell becomes text: in CSV as it is
written, from other formats as pyarrow or the file writes it. What a cell is gives no error, which would tell of it
(P13): bytes that are no UTF-8 become U+FFFD, and a null is a null. What is no table at all, or ends too early, is one
sentence that names the file; columns are named where a job names them, cells never.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import pyarrow as pa

from cluster.errors import UsageError
from training.config import Job
from training.data import DIGIT, DIGITS, PIXELS, columns_read

FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
ROWS, BYTES = 16_384, 2**20  # of a batch, at most; of long records it holds one in any case
BLOCK = 16 * 2**20  # bytes of CSV that are parsed at once; no record may be longer


@dataclass(frozen=True)
class File:
    """One file of a source: its path in the source's filesystem, format, size in bytes and time of change in ns."""

    path: str
    format: str
    size: int
    changed: int

    @property
    def name(self) -> str:
        """What it is called in errors."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """The files that hold the records, and the columns that all of them have, in the first file's order.

    `field`: of the job, which names the source, for errors.
    """

    field: str
    place: str
    files: tuple[File, ...]
    names: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """In bytes, as stored."""
        return sum(file.size for file in self.files)

    @property
    def bundled(self) -> bool:
        """Whether it is a file without a header line that comes with a library."""
        return self.place == DIGITS

    def batches(self, number: int) -> Iterator[pa.RecordBatch]:
        """The records of file `number`, in its order, as batches of string columns `names`.

        Raises:
            UsageError: the file is missing, is no table, or ends too early.
        """
        file = self.files[number]
        for batch in _guarded(lambda: _READERS[file.format](self, file), self.field, file.name):
            most = max(1, min(ROWS, batch.num_rows * BYTES // max(1, batch.nbytes)))
            for start in range(0, batch.num_rows, most):
                yield batch.slice(start, most)

    def check_columns(self, wanted: Mapping[str, str]) -> None:
        """See that it has the columns that the job names: field → column.

        Raises:
            UsageError: one of them is not there.
        """
        for field, column in wanted.items():
            if column not in self.names:  # those that it has are not said: a file's first line may be a record
                raise UsageError(
                    f"{field}: {self.field} has no column {column!r}; check the header line or the schema of "
                    f"{self.files[0].name}."
                )

    def check_records(self, count: int) -> None:
        """See that a public file has records at all; of a private one nobody may ask.

        Raises:
            UsageError: it has none.
        """
        if not count:
            raise UsageError(f"{self.field}: {self.files[0].name} holds no records; name a file with some.")


def private(job: Job) -> Source:
    """The source of the job's private records, after checking its columns.

    Raises:
        UsageError: it cannot be read, or lacks a column that the job names.
    """
    source, wanted = find(job.data.source), columns_read(job)
    if job.privacy.unit != "row":
        wanted["privacy.unit"] = job.privacy.unit
    if job.evaluation.on == "validation":
        wanted |= _groups(job)
    source.check_columns(wanted)
    return source


def public(job: Job, section: str = "evaluation") -> Source:
    """The file that the job declares public in `section`: it is judged on it, or has its canaries from there
    (`audit`). After checking its columns.

    Raises:
        UsageError: it cannot be read, or lacks a column that the job names.
    """
    judged = section == "evaluation"
    place = job.evaluation.source if judged else job.audit.source
    assert place is not None
    source = find(place, f"{section}.source")
    source.check_columns(columns_read(job) | (_groups(job) if judged else {}))
    return source


def _groups(job: Job) -> dict[str, str]:
    groups = job.evaluation.groups
    return {} if groups is None else {"evaluation.groups.column": groups.column}


def find(place: str, field: str = "data.source") -> Source:
    """The files at `place`, and their columns; no record is kept.

    Raises:
        UsageError: nothing is there, or it is no table, or the files of a folder do not belong together.
    """
    if place == DIGITS:
        package = importlib.util.find_spec("sklearn")  # found, not imported: the import takes a second
        if package is None or package.origin is None:
            raise UsageError(f"{field}: {DIGITS} comes with scikit-learn; run pip install scikit-learn.")
        path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
        facts = path.stat()
        file = File(str(path), "csv", facts.st_size, facts.st_mtime_ns)
        return Source(field, place, (file,), (*PIXELS, DIGIT.column))
    source = Source(field, place if "://" in place else str(Path(place).absolute()), _files(place, field))
    first: tuple[str, ...] = ()
    for file in source.files:
        names = next(_guarded(lambda: iter([_names(source, file)]), field, file.name))  # noqa: B023
        if len(set(names)) != len(names):
            raise UsageError(f"{field}: {file.name} cannot be used: two of its columns have one name.")
        if first and set(names) != set(first):
            raise UsageError(
                f"{field}: {file.name} has not the columns of {source.files[0].name}; all files of a folder must have "
                "the same."
            )
        first = first or names
    return Source(field, source.place, source.files, first)


def _files(place: str, field: str) -> tuple[File, ...]:
    """Of a file itself, of a folder what lies in it, by name; names that begin with a dot or _ are passed over."""
    from pyarrow.fs import FileSelector, FileType

    unknown = f"{field}: {place!r} was given; write a path or a URL such as s3://bucket/folder, or {DIGITS}."
    if ":" in place and "://" not in place:
        raise UsageError(unknown)
    found = None
    try:
        filesystem, path = _filesystem(place)
        here = filesystem.get_file_info(path)
        found = filesystem.get_file_info(FileSelector(path)) if here.type == FileType.Directory else [here]
    except (pa.ArrowException, OSError, ValueError):
        unknown = f"{field}: {place} cannot be reached; check the path or URL, and the rights to read it."
    if found is None:
        raise UsageError(unknown)
    if [info.type for info in found] == [FileType.NotFound]:
        raise UsageError(f"{field}: {place} does not exist; name a file or a folder of files ({', '.join(FORMATS)}).")
    files = []
    for info in sorted(found, key=lambda info: info.path):
        if len(found) > 1 and info.base_name.startswith((".", "_")):
            continue
        suffix = Path(info.base_name.removesuffix(".gz")).suffix
        if info.type != FileType.File or suffix not in FORMATS:
            raise UsageError(
                f"{field}: {info.base_name} is no file of a known format; a source is one file, or a folder of nothing "
                f"but files: {', '.join(FORMATS)}, or .csv.gz and the like."
            )
        files.append(File(info.path, FORMATS[suffix], info.size, info.mtime_ns or 0))
    if len({file.format for file in files}) != 1:
        what = "files of several formats" if files else "no file"
        raise UsageError(f"{field}: {place} holds {what}; a folder must hold files, all of one format.")
    return tuple(files)


def _filesystem(place: str) -> tuple[Any, str]:
    from pyarrow.fs import FileSystem, LocalFileSystem

    if "://" in place:
        filesystem, path = FileSystem.from_uri(place)
        return filesystem, path
    return LocalFileSystem(), str(Path(place).absolute())


def _guarded(read: Callable[[], Iterator[Any]], field: str, name: str) -> Iterator[Any]:
    """What `read` gives. Errors are raised outside the `except` block, so that a library's own message, which prints
    cells, is not even chained to them."""
    inner: Iterator[Any] | None = None
    while True:
        bad = ""
        try:
            inner = read() if inner is None else inner
            value = next(inner)
        except StopIteration:
            return
        except Exception:  # noqa: BLE001 (a dozen libraries read files; whatever they say may hold a cell)
            bad = (
                "it is no whole table: CSV or TSV with a header line and as many cells in every row, JSON lines with "
                "no field that the first lacks, or Parquet"
            )
        if bad:
            raise UsageError(f"{field}: {name} cannot be used: {bad}; if it was cut off, write it anew.")
        yield value


# -- formats --


def _stream(source: Source, file: File) -> Any:
    place = file.path if source.bundled else source.place
    return _filesystem(place)[0].open_input_stream(file.path, compression="detect")


def _names(source: Source, file: File) -> tuple[str, ...]:
    """The columns of a file, from its header line, first object or schema."""
    if file.format == "parquet":
        return tuple(_parquet_file(source, file).schema_arrow.names)
    with _stream(source, file) as stream:
        if file.format == "jsonl":
            return tuple(next(_objects(stream), {}) or _no_table())
        import pyarrow.csv as pacsv

        how = pacsv.ReadOptions(block_size=BLOCK)
        return tuple(pacsv.open_csv(stream, read_options=how, parse_options=_parse(file)).schema.names)


def _no_table() -> NoReturn:
    raise ValueError  # without a word: who reads a source makes the sentence


def _parse(file: File) -> Any:
    import pyarrow.csv as pacsv

    return pacsv.ParseOptions(delimiter="\t" if file.format == "tsv" else ",", newlines_in_values=True)


def _read_csv(source: Source, file: File) -> Iterator[pa.RecordBatch]:
    """Cells as they are written: no type is guessed, no word means null."""
    import pyarrow.csv as pacsv

    as_bytes = pacsv.ConvertOptions(
        column_types=dict.fromkeys(source.names, pa.binary()), strings_can_be_null=False, null_values=[]
    )
    how = pacsv.ReadOptions(column_names=list(source.names) if source.bundled else None, block_size=BLOCK)
    with _stream(source, file) as stream:
        for batch in pacsv.open_csv(stream, read_options=how, parse_options=_parse(file), convert_options=as_bytes):
            yield _text_batch(source, {name: batch.column(name) for name in source.names})


def _read_parquet(source: Source, file: File) -> Iterator[pa.RecordBatch]:
    for batch in _parquet_file(source, file).iter_batches(ROWS):
        yield _text_batch(source, {name: _as_text(batch.column(name)) for name in source.names})


def _parquet_file(source: Source, file: File) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(_filesystem(source.place)[0].open_input_file(file.path))


def _read_jsonl(source: Source, file: File) -> Iterator[pa.RecordBatch]:
    """A field that an object lacks is null; one that the first object of the source lacks is no table."""
    known = set(source.names)
    with _stream(source, file) as stream:
        columns: list[list[str | None]] = [[] for _ in source.names]
        size = 0
        for record in _objects(stream):
            if not record.keys() <= known:
                _no_table()
            for name, column in zip(source.names, columns, strict=True):
                cell = record.get(name)
                column.append(cell if cell is None or isinstance(cell, str) else _dumped(cell))
                size += len(column[-1] or "")
            if len(columns[0]) == ROWS or size > BLOCK:
                yield _text_batch(source, {n: _strings(c) for n, c in zip(source.names, columns, strict=True)})
                columns, size = [[] for _ in source.names], 0
        if columns[0]:
            yield _text_batch(source, {n: _strings(c) for n, c in zip(source.names, columns, strict=True)})


def _objects(stream: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of a stream of JSON lines; numbers as they are written."""
    for number, line in enumerate(_lines(stream)):
        text = line.decode("utf-8-sig" if number == 0 else "utf-8", errors="replace")
        if text.strip():
            record = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
            if not isinstance(record, dict) or not record:
                _no_table()
            yield record


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    while block := stream.read(BLOCK // 4):
        *lines, last = block.split(b"\n")
        if lines:
            lines[0] = b"".join([*rest, lines[0]])
            rest = []
            yield from lines
        rest.append(last)
    yield b"".join(rest)


_READERS = {"csv": _read_csv, "tsv": _read_csv, "parquet": _read_parquet, "jsonl": _read_jsonl}


# -- cells --


def _text_batch(source: Source, columns: Mapping[str, pa.Array]) -> pa.RecordBatch:
    arrays = [_utf8(columns[name]) for name in source.names]
    return pa.RecordBatch.from_arrays(arrays, names=list(source.names))


def _as_text(column: pa.Array) -> pa.Array:
    """A column of any type as text, or as bytes that should be text."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return column.cast(pa.binary())  # nobody has checked yet that it is UTF-8
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return column.cast(pa.binary())
    if pa.types.is_nested(kind):
        return _strings([None if cell is None else _dumped(cell) for cell in column.to_pylist()])
    return column.cast(pa.string())


def _dumped(cell: Any) -> str:
    """A cell of JSON that is no string, or a nested one, as text."""
    return json.dumps(cell, ensure_ascii=False, sort_keys=True, default=str)


def _strings(cells: list[str | None]) -> pa.Array:
    return pa.array([None if cell is None else cell.encode("utf-8", "surrogatepass") for cell in cells], pa.binary())


def _utf8(column: pa.Array) -> pa.Array:
    """As strings; bytes that are no UTF-8 become U+FFFD."""
    try:
        whole = column.cast(pa.string())
    except pa.ArrowInvalid:
        cells = column.cast(pa.binary()).to_pylist()
        whole = pa.array([None if cell is None else cell.decode("utf-8", "replace") for cell in cells], pa.string())
    return whole
