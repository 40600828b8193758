"""`purser report`: a release's statement as a page, and compared with the ledger by the command; what is no statement
of the run is refused in a sentence, and nothing heavy is imported for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from records import JOB, RUN, books_at, said_of

from training.release import write_release, write_statement
from training.statement import read
from tuning.config import SweepJob

TRAIN, VALIDATION = JOB.accounts


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    return books_at(tmp_path_factory.mktemp("books") / "ledger.db")


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A home with a run's release in it, made over its own ledger."""
    home = tmp_path_factory.mktemp("home")
    books = books_at(home / "ledger.db")
    release = home / "runs" / RUN / "release"
    release.mkdir(parents=True)
    (home / "runs" / RUN / "job.json").write_text(JOB.model_dump_json())
    write_statement(release, said_of(books))
    return home


@pytest.fixture
def at_home(purser, shared):
    return replace(purser, home=shared)


def test_a_report_is_a_page_in_the_run_s_folder(at_home, shared):
    ended = at_home.here("report", RUN, "--json")
    assert ended.code == 0, ended.err
    release = shared / "runs" / RUN / "release"
    assert ended.json == {"statement": str(release / "statement.json"), "report": str(release.parent / "report.html")}
    assert (release.parent / "report.html").read_text() == (release / "statement.html").read_text()
    told = at_home.here("report", release)
    assert told.code == 0
    assert "Each person of the dataset people is protected by (3, 0.0001)-differential privacy" in told.out
    assert "accuracy 0.765 ± 0.021 (95 % of the noise)" in told.out
    assert f"Next: purser report {release} --verify {release / 'statement.json'}" in told.out


def test_a_sweep_s_own_report_is_left_as_it_is(at_home, shared, books):
    sweep = shared / "runs" / "sweep-1"
    (sweep / "release").mkdir(parents=True)
    write_statement(sweep / "release", said_of(books))
    (sweep / "job.json").write_text(SweepJob.model_validate(JOB.model_dump(mode="json")).model_dump_json())
    (sweep / "report.html").write_text("of all trials")
    ended = at_home.here("report", "sweep-1", "--json")
    assert ended.json["report"] == str(sweep / "report.html")
    assert (sweep / "report.html").read_text() == "of all trials"


def test_a_release_that_was_carried_away_has_its_page_with_it(at_home, shared, tmp_path):
    shutil.copytree(shared / "runs" / RUN / "release", tmp_path / "given")
    ended = at_home.here("report", tmp_path / "given", "--json")
    assert ended.json["report"] == str(tmp_path / "given" / "statement.html")
    assert {path.name for path in tmp_path.iterdir()} >= {"given"}
    assert not (tmp_path / "report.html").exists()
    assert at_home.here("report", tmp_path / "given", "--verify", tmp_path / "given" / "statement.json").code == 0
    assert at_home.here("report", RUN, "--verify", tmp_path / "given" / "statement.json").code == 0


def test_a_statement_is_verified_by_the_command(at_home, shared, tmp_path):
    path = shared / "runs" / RUN / "release" / "statement.json"
    ended = at_home("report", RUN, "--verify", path, "--json")
    assert ended.code == 0, ended.err
    assert set(ended.json) == {"statement", "report", "valid", "checks", "not_in_ledger"}
    assert (ended.json["statement"], ended.json["report"], ended.json["valid"]) == (str(path), None, True)
    assert all(set(check) == {"check", "holds", "statement", "ledger"} for check in ended.json["checks"])
    assert "The statement holds." in ended.err
    assert "Ledger sqlite" in ended.err
    edited = json.loads(path.read_text())
    edited["partitions"][0]["cost_of_run"] += 1
    (tmp_path / "edited.json").write_text(json.dumps(edited))
    ended = at_home.here("report", RUN, "--verify", tmp_path / "edited.json")
    assert ended.code == 1
    assert "The statement does not hold in 1 of" in ended.out
    assert f"{TRAIN}: cost_of_run" in ended.out
    assert "nobody can derive from it: made_at, setting" in ended.out


def test_a_model_that_is_not_the_statement_s_is_found(at_home, shared, tmp_path):
    """Only where it lies beside the statement; a name that leads elsewhere is none."""
    release = write_release(
        tmp_path, shared / "ledger.db", read(shared / "runs" / RUN / "release" / "statement.json", "")
    )
    path = release / "statement.json"
    assert at_home.here("report", RUN, "--verify", path).code == 0
    (release / "weights.safetensors").write_bytes(b"of another run")
    ended = at_home.here("report", RUN, "--verify", path, "--json")
    assert ended.code == 1
    assert [one["check"] for one in ended.json["checks"] if not one["holds"]] == [
        "released: weights.safetensors, the file beside it"
    ]
    (release / "weights.safetensors").unlink()
    assert at_home.here("report", RUN, "--verify", path).code == 0
    said = json.loads(path.read_text())
    said["released"]["sha256"] = {"../../secret": "0" * 64}
    path.write_text(json.dumps(said))
    assert at_home.here("report", RUN, "--verify", path).code == 1


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (None, "cannot be read"),
        ("{", "it is no JSON"),
        ({"schema": "purser.privacy-statement/1"}, "purser.privacy-statement/1"),
        ({"run": "somebody-else"}, "is of somebody-else, and RUN released"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_what_is_no_statement_of_the_run_is_refused(at_home, shared, tmp_path, edit, words):
    file = tmp_path / "given.json"
    if isinstance(edit, dict):
        said = json.loads((shared / "runs" / RUN / "release" / "statement.json").read_text())
        file.write_text(json.dumps({**said, **edit}))
    elif edit is not None:
        file.write_text(edit)
    ended = at_home.here("report", RUN, "--verify", file)
    assert ended.code == 2
    (sentence,) = [line for line in ended.err.splitlines() if line]
    assert sentence.startswith("purser: --verify: ")
    assert words in sentence


def test_who_has_released_nothing_has_no_report(at_home):
    for run in ("never-was", "../x"):
        ended = at_home.here("report", run)
        assert (ended.code, ended.err[:13]) == (2, "purser: RUN: ")


def test_a_report_needs_neither_torch_nor_ray(at_home, shared):
    """Nor does its verification; whoever checks a statement needs no training machine."""
    code = (
        "import sys, purser\n"
        "try:\n    purser.main()\nexcept SystemExit as ended:\n    assert not ended.code\n"
        "sys.exit(' '.join(name for name in ('torch', 'ray', 'opacus', 'pyarrow', 'numpy') if name in sys.modules))\n"
    )
    statement = str(shared / "runs" / RUN / "release" / "statement.json")
    for arguments in (["report", RUN], ["report", RUN, "--verify", statement]):
        ended = subprocess.run(
            [sys.executable, "-c", code, *arguments], env=at_home.environment(), capture_output=True, text=True
        )
        assert ended.stderr.strip() == "", ended.stderr
