"""Names and places: folders that cannot be used are refused in one sentence, names cannot leave the home folder, a
holder's lock lives as long as its process (P3), the code hash sees what would be imported, errors carry no content
(P13)."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from cluster import environment, session
from cluster.environment import HOME, LEDGER, Alive, home, is_alive, ledger_url, new_name, run_folder
from cluster.errors import PurserError, Refused, Unreachable, UsageError, without_content

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(HOME, str(tmp_path / "home"))
    monkeypatch.delenv(LEDGER, raising=False)
    return tmp_path / "home"


def test_home_is_made_for_the_owner_alone(place):
    assert home() == place
    assert stat.S_IMODE(place.stat().st_mode) & 0o077 == 0
    assert home() == place


def test_home_is_absolute_whatever_was_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(HOME, "relative")
    assert home() == tmp_path / "relative"
    monkeypatch.setenv("HOME", str(tmp_path))
    for unset in ("", "~/.purser"):
        monkeypatch.setenv(HOME, unset)
        assert home() == tmp_path / ".purser"


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
def test_a_home_that_cannot_be_made_is_refused(kind, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    where = {"a file": file, "below a file": file / "home", "read-only": tmp_path / "locked" / "home"}[kind]
    if kind == "read-only":
        (tmp_path / "locked").mkdir(mode=0o500)
        if os.access(tmp_path / "locked", os.W_OK):  # root may write everywhere, but not here
            where = Path("/proc/purser")
    monkeypatch.setenv(HOME, str(where))
    with pytest.raises(UsageError, match=HOME) as raised:
        home()
    assert raised.value.exit_code == 2
    assert raised.value.__cause__ is None


def test_a_home_of_nobody_is_refused(monkeypatch):
    monkeypatch.setenv(HOME, "~nobody-of-this-name/purser")
    with pytest.raises(UsageError, match=HOME):
        home()


def test_the_ledger_is_in_the_home_unless_said_otherwise(place, monkeypatch):
    assert ledger_url() == f"sqlite:///{place}/ledger.db"
    monkeypatch.setenv(LEDGER, "sqlite:////elsewhere/books.db")
    assert ledger_url() == "sqlite:////elsewhere/books.db"


def test_a_home_that_a_database_url_cannot_name_is_refused(tmp_path, monkeypatch):
    """After '?' a path would be read as options, and the ledger would lie elsewhere, shared by other homes."""
    monkeypatch.setenv(HOME, str(tmp_path / "what?" / "home"))
    with pytest.raises(UsageError, match=HOME):
        ledger_url()


TRICKS = [
    "",
    ".",
    "..",
    "../runs",
    "a/b",
    "/etc",
    "a/../../x",
    "..\\x",
    "~",
    "~root",
    ".hidden",
    "-rf",
    "a b",
    "a\n",
    "a\0b",
    "ä",
    "$HOME",
    "a:b",
    "*",
]


@pytest.mark.parametrize("name", TRICKS)
@pytest.mark.parametrize("new", [True, False])
def test_names_that_could_lead_elsewhere_are_refused(place, name, new):
    with pytest.raises(UsageError, match="RUN"):
        run_folder(name, new=new)
    assert not (place / "runs").exists()


def test_a_run_folder_is_made_once_for_the_owner_alone(place):
    folder = run_folder("digits-1", new=True)
    assert folder == place / "runs" / "digits-1"
    assert stat.S_IMODE(folder.stat().st_mode) & 0o077 == 0
    assert run_folder("digits-1") == folder
    with pytest.raises(UsageError, match=r"RUN: digits-2"):
        run_folder("digits-2")


@pytest.mark.parametrize("case", ["twice", "too long", "home is read-only"])
def test_a_run_folder_that_cannot_be_made_is_refused(place, case, monkeypatch):
    name = "a" * 300 if case == "too long" else "digits-1"
    if case == "twice":
        run_folder(name, new=True)
    if case == "home is read-only":
        home()
        (place / "runs").write_text("")
    with pytest.raises(PurserError):
        run_folder(name, new=True)


def test_new_names_are_names_and_differ(place):
    names = {new_name("digits") for _ in range(50)}
    assert len(names) > 1
    assert all(run_folder(name, new=True).name.startswith("digits-") for name in names)


HOLDER = """
import sys, time
from cluster.environment import Alive
alive = Alive("digits-1")
print("holding", flush=True)
time.sleep(60)
"""


def test_a_run_is_alive_until_its_process_is_killed(place):
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert not is_alive("digits-1")
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True, env=variables) as holder:
        try:
            assert holder.stdout.readline() == "holding\n"
            assert is_alive("digits-1")
            with pytest.raises(UsageError, match="digits-1 is still running"):
                Alive("digits-1")
            assert not is_alive("digits-2")
            assert is_alive("digits-1"), "a refused second command must not end the first one's lock"
        finally:
            holder.send_signal(signal.SIGKILL)
            holder.wait(60)
    assert not is_alive("digits-1")
    Alive("digits-1").release()


def test_release_lets_go(place):
    held = Alive("digits-1")
    assert is_alive("digits-1")
    held.release()
    assert not is_alive("digits-1")
    again = Alive("digits-1")
    assert is_alive("digits-1")
    again.release()


def test_a_run_of_another_machine_or_none_is_not_alive(place):
    assert not is_alive("never-made")


def test_commands_on_one_ledger_see_each_other_whatever_their_home(tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv(LEDGER, f"sqlite:///{tmp_path}/shared/ledger.db")
    monkeypatch.setenv(HOME, str(tmp_path / "mine"))
    held = Alive("digits-1")
    monkeypatch.setenv(HOME, str(tmp_path / "theirs"))
    assert is_alive("digits-1")
    monkeypatch.setenv(LEDGER, f"sqlite:///{tmp_path}/other.db")
    assert not is_alive("digits-1")
    held.release()


@pytest.mark.parametrize("form", ["sqlite+pysqlite:///{}"])
def test_locks_lie_beside_the_ledger_however_its_url_is_written(form, tmp_path, monkeypatch):
    """Else the accountant, in another folder, finds no lock and expires the leases of the living."""
    from cluster.accounting.ledger import Ledger

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv(LEDGER, form.format(tmp_path / "ledger.db"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SQLAlchemy's word on the option that it does not know
        Ledger(ledger_url())
    assert (tmp_path / "ledger.db").is_file()
    Alive("digits-1").release()
    assert (tmp_path / "holders" / "digits-1").is_file()


def test_asking_whether_a_run_lives_does_not_stop_it_from_starting(place):
    """Whoever asks holds the lock for a moment; a run that starts in that moment waits for it."""
    Alive("digits-1").release()
    with open(place / "holders" / "digits-1") as asker:
        fcntl.flock(asker, fcntl.LOCK_SH)
        done = threading.Timer(0.1, fcntl.flock, (asker, fcntl.LOCK_UN))
        done.start()
        held = Alive("digits-1")
        done.join()
    assert is_alive("digits-1")
    held.release()


def code_hash_of(root, folder, monkeypatch):
    monkeypatch.setattr(environment, "ROOTS", (root,))
    monkeypatch.syspath_prepend(str(folder))
    return environment.code_hash.__wrapped__()


def test_the_code_hash_sees_every_file_and_what_shadows_a_package(tmp_path, monkeypatch):
    """A `training.py` in the user's folder would be imported in place of the package: its hash must differ."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    (ours / "someroom" / "deep").mkdir(parents=True)
    for file in ("__init__.py", "deep/__init__.py", "deep/code.py"):
        (ours / "someroom" / file).write_text(f"# {file}\n")
    first = code_hash_of("someroom", ours, monkeypatch)
    assert code_hash_of("someroom", ours, monkeypatch) == first
    (ours / "someroom" / "notes.txt").write_text("not code")
    assert code_hash_of("someroom", ours, monkeypatch) == first
    seen = {first}
    (ours / "someroom" / "deep" / "code.py").write_text("# changed\n")
    seen.add(code_hash_of("someroom", ours, monkeypatch))
    (ours / "someroom" / "deep" / "code.py").rename(ours / "someroom" / "deep" / "kode.py")
    seen.add(code_hash_of("someroom", ours, monkeypatch))
    theirs.mkdir()
    (theirs / "someroom.py").write_text((ours / "someroom" / "__init__.py").read_text())
    seen.add(code_hash_of("someroom", theirs, monkeypatch))
    assert len(seen) == 4


def test_a_missing_package_is_refused(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="no_such_room"):
        code_hash_of("no_such_room", tmp_path, monkeypatch)
    (tmp_path / "empty_room").mkdir()
    with pytest.raises(UsageError, match="empty_room"):
        code_hash_of("empty_room", tmp_path, monkeypatch)


def test_exit_codes_are_those_of_the_contract():
    assert (PurserError.exit_code, UsageError.exit_code, Refused.exit_code, Unreachable.exit_code) == (1, 2, 3, 1)


def test_what_crosses_the_boundary_of_an_error_is_its_type_and_place():
    """Messages, arguments, notes and chained errors may hold cell values; none may come through."""
    secret = "age=42 diagnosis=secret"
    try:
        try:
            raise KeyError(secret)
        except KeyError as inner:
            error = ValueError(secret, {"row": secret})
            error.add_note(secret)
            raise error from inner
    except ValueError as caught:
        said = without_content(caught)
    assert said.startswith("ValueError")
    assert "test_environment.py" in said
    assert "secret" not in said
    assert "42 " not in said
    assert without_content(OSError(secret)) == "OSError"


def test_a_worker_asks_for_a_core_of_a_cluster_and_half_of_one_here(monkeypatch):
    for name in ("RAY_ADDRESS", "PURSER_CPUS_PER_WORKER"):
        monkeypatch.delenv(name, raising=False)
    assert session.cpus_per_worker() == 0.5
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert session.cpus_per_worker() == 1
    monkeypatch.setenv("PURSER_CPUS_PER_WORKER", "2.5")  # as it reaches those who start workers anywhere
    assert session.cpus_per_worker() == 2.5
    assert session.environment()["PURSER_CPUS_PER_WORKER"] == "2.5"
    for wrong in ("0", "-1", "nan", "a few", "1e3"):
        monkeypatch.setenv("PURSER_CPUS_PER_WORKER", wrong)
        with pytest.raises(UsageError, match="PURSER_CPUS_PER_WORKER"):
            session.cpus_per_worker()


def test_a_gpu_that_is_not_there_is_missed_here_and_waited_for_on_a_cluster(monkeypatch):
    class Ray:
        def cluster_resources(self):
            return {"CPU": 9.0, "GPU": 2.0}

        def available_resources(self):
            return {"CPU": 8.0, "GPU": 2.0}

    monkeypatch.setitem(sys.modules, "ray", Ray())
    monkeypatch.setenv("PURSER_CPUS_PER_WORKER", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert session.groups_at_once(1, "gpu") == 2
    with pytest.raises(UsageError, match=r"training\.device: 3 workers need a GPU each, this machine has 2"):
        session.groups_at_once(3, "gpu")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert session.groups_at_once(2, "cpu") == 4
    assert session.groups_at_once(2, "gpu") == session.groups_at_once(3, "gpu") == 1
