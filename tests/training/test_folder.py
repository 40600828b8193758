"""The folder of a run: bound to one job, gone on with under its name, and found to be another one elsewhere (P4)."""

from __future__ import annotations

import shutil

import pytest
from product import DIGITS

from cluster.errors import UsageError
from training.folder import check_shared, marked, opened, resumed
from training.jobfile import load
from tuning.config import SweepJob


def test_the_same_job_under_the_same_name_goes_on_and_another_job_does_not(home):
    job = load(SweepJob, DIGITS)
    name, folder = opened(job, None, None)
    other, _ = opened(job, None, None)
    assert name.startswith("digits-")
    assert name != other
    assert opened(job, None, "mine") == opened(job, None, "mine") == opened(job, "mine", None)
    assert resumed(SweepJob, "mine") == resumed(SweepJob, name) == job
    before = (folder.parent / "mine" / "job.json").read_bytes()
    with pytest.raises(UsageError, match="another job has begun as mine"):
        opened(load(SweepJob, DIGITS, ["training.steps=81"]), None, "mine")
    assert (folder.parent / "mine" / "job.json").read_bytes() == before
    with pytest.raises(UsageError, match="yours is not in"):
        opened(job, "yours", None)


def test_a_folder_that_is_not_shared_is_found(tmp_path):
    """Not there, there without a mark, with the mark of an earlier command, or of a node that had a copy."""
    folder = tmp_path / "run"
    folder.mkdir()
    place, mark = marked(folder)
    check_shared(place, mark)
    shutil.copytree(folder, tmp_path / "copy")
    _, newer = marked(folder)
    assert newer != mark
    check_shared(place, newer)
    (tmp_path / "bare").mkdir()
    for elsewhere in (tmp_path / "nowhere", tmp_path / "bare", tmp_path / "copy"):
        with pytest.raises(UsageError, match="PURSER_HOME on storage that all of them share"):
            check_shared(str(elsewhere), newer)
