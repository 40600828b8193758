"""Files that others may read at any moment, and a crash may cut short: whole, or as they were. No Ray, no meaning."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Write a file so that it is there whole and durably, or as it was; returns its path."""
    draft = path.with_name(f".{path.name}")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)
    return path
