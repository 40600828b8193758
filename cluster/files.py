"""Files that others may read at any moment, and a crash may cut short: whole, or as they were. No Ray, no meaning."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file so that it is there whole and durably, or as it was; returns its path. Whoever else writes it at the
    same moment has a draft of their own, and the last one's stays."""
    draft = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    with draft.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    return path


def put_whole(draft: Path, path: Path) -> Path:
    """Let the file or folder `draft`, which lies beside `path`, take its place, whole; returns `path`. Of a folder that
    was there before there is a moment without either."""
    if path.is_dir():
        before = path.with_name(f".{path.name}-before")
        shutil.rmtree(before, ignore_errors=True)
        os.replace(path, before)
        os.replace(draft, path)
        shutil.rmtree(before)
    else:
        os.replace(draft, path)
    return path


def copy_whole(source: Path, path: Path) -> Path:
    """Copy a file or folder so that it is there whole, or as it was; returns `path`."""
    draft = path.with_name(f".{path.name}")
    if source.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
        shutil.copytree(source, draft)
    else:
        shutil.copyfile(source, draft)
    return put_whole(draft, path)


def sha256(path: Path) -> str:
    """Of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
