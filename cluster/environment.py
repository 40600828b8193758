"""Names and places: every `PURSER_*` variable, the home folder, run folders, and the hash of our own code.

No Ray, no torch: this is read by commands that must answer in half a second.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import secrets
import time
from pathlib import Path

from cluster.errors import UsageError

HOME = "PURSER_HOME"
LEDGER = "PURSER_LEDGER"
CPUS = "PURSER_CPUS_PER_WORKER"
ADDRESS = "RAY_ADDRESS"  # Ray's own
NAMESPACE = "purser"
ACCOUNTANT = "accountant"

ROOTS = ("purser", "tuning", "training", "cluster")


def home() -> Path:
    """The folder that holds the embedded ledger and the runs: `$PURSER_HOME`, by default `~/.purser`."""
    said = os.environ.get(HOME) or "~/.purser"
    try:
        folder = Path(said).expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: ~somebody who is not there
        why = getattr(error, "strerror", None) or "there is no such user"
        raise UsageError(f"{HOME}: {said} cannot be made ({why}); set {HOME} to a folder you can write to.") from None
    if "?" in str(folder):
        raise UsageError(f"{HOME}: {folder} was given; a '?' begins options in a database URL, choose another name.")
    return folder


def secure_ray() -> None:
    """Turn token authentication on for whatever Ray this process starts, unless its owner said otherwise.

    Must run before Ray is imported: Ray reads the mode then, and on a machine without a token yet a later setting
    reaches its servers but not the code that makes the token.
    """
    address = os.environ.get(ADDRESS, "local")
    if address == "local" or "://" in address:  # a cluster that is joined has its own mode
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def cluster_address() -> str | None:
    """The Ray cluster that this command is to work on: `$RAY_ADDRESS`, which Ray sets for every job; None for a Ray of
    its own.

    Raises:
        UsageError: it is the address of a server, which takes jobs but cannot be joined.
    """
    address = os.environ.get(ADDRESS) or "local"
    if "://" in address:
        raise UsageError(
            f"{ADDRESS}: {address} is a server that takes jobs; hand yours over with `purser submit JOB --address "
            f"http://HEAD:8265`, or unset {ADDRESS}."
        )
    return None if address == "local" else address


def going_on(command: str, name: str) -> str:
    """What a person types to go on with the run or sweep called `name`, here or on a cluster."""
    if cluster_address() is None:
        return f"purser {command} --resume {name}"
    return f"purser submit --as {command} --resume {name} --address http://HEAD:8265"


def ledger_url() -> str:
    """The ledger every command works on: `$PURSER_LEDGER`, by default SQLite in the home folder."""
    return os.environ.get(LEDGER) or f"sqlite:///{home() / 'ledger.db'}"


def ledger_file() -> Path | None:
    """The file of an embedded ledger; None where the ledger is on a server."""
    from sqlalchemy import make_url

    url = make_url(ledger_url())
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def new_name(account: str) -> str:
    """A name for a run or sweep: readable, sortable, never used twice (a Ray Train run name is its identity)."""
    return f"{account}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def run_folder(name: str, *, new: bool = False, again: bool = False) -> Path:
    """The folder of the run or sweep called `name`, owner-only.

    Args:
        new: it is made; with `again`, it may be there.

    Raises:
        UsageError: `name` is no plain name, or (unless `new`) no such run is there.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UsageError(f"RUN: {name!r} is no run name; use the name that `purser train` or `purser tune` printed.")
    folder = home() / "runs" / name
    if new:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=again)
        except OSError as error:
            raise UsageError(f"RUN: {folder} cannot be made ({error.strerror}); check the disk and {HOME}.") from None
    elif not folder.is_dir():
        raise UsageError(f"RUN: {name} is not in {folder.parent}; use the name that `purser train` or `tune` printed.")
    return folder


def _holder(name: str) -> Path:
    """The lock file of the command called `name`: beside an embedded ledger, which every command on it can see."""
    file = ledger_file()
    folder = (file.parent if file else home()) / "holders"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / name


class Alive:
    """A lock held for as long as a command lives; the kernel lets go of it when the process dies, however it dies.

    An embedded ledger knows by it that the holder of a lease is dead, and may release what was reserved at once.

    Raises:
        UsageError: another process is running under this name.
    """

    def __init__(self, name: str) -> None:
        self._file = open(_holder(name), "w")  # noqa: SIM115 (held open on purpose)
        for _ in range(50):  # whoever asks `is_alive` holds the lock for a moment
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
        else:
            self._file.close()
            raise UsageError(f"RUN: {name} is still running in another process; wait for it to end.") from None

    def release(self) -> None:
        """Let go before the process ends."""
        self._file.close()


def is_alive(name: str) -> bool:
    """Whether the command that holds leases as `name` still lives on this machine."""
    try:
        with open(_holder(name)) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@functools.cache
def code_hash() -> str:
    """SHA-256 over our own Python files, as this process would import them.

    Driver and workers compare it before any charge: a `training.py` in the user's folder, or another version on
    another node, must never be imported in place of ours.
    """
    digest = hashlib.sha256()
    for root in ROOTS:
        spec = importlib.util.find_spec(root)
        if spec is None or spec.origin is None:
            raise UsageError(f"import: {root} is not installed here; install purser on every node.")
        origin = Path(spec.origin)
        files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
        for file in files:
            digest.update(f"{root}/{file.relative_to(origin.parent).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()
