"""The product as its user has it: where it is, the job that it ships, the command and how it ends."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import purser

REPOSITORY = Path(__file__).resolve().parent.parent
DIGITS = REPOSITORY / "infra" / "jobs" / "digits.yaml"


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The one object that --json prints as the last line of stdout."""
        return json.loads(self.out.strip().splitlines()[-1])


@dataclass(frozen=True)
class Purser:
    """The real command over a home of its own, run from a folder of the user's."""

    home: Path
    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        """What the command sees."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PURSER_", "RAY_", "PYTHONPATH"))}
        return {**kept, "PURSER_HOME": str(self.home), "COLUMNS": "200", **more}

    def __call__(self, *arguments: object, timeout: float = 300, **more: str) -> Ended:
        """Run `purser ARGUMENTS` to its end."""
        command = [str(Path(sys.executable).parent / "purser"), *map(str, arguments)]
        ended = subprocess.run(
            command, cwd=self.folder, env=self.environment(**more), capture_output=True, text=True, timeout=timeout
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def here(self, *arguments: object, **more: str) -> Ended:
        """The same in this process, which has imported what the command needs; for what starts no Ray.

        How Ray authenticates stays as this process has it: Ray reads that once.
        """
        out, err, code = io.StringIO(), io.StringIO(), 0
        seen = {**self.environment(**more), "RAY_AUTH_MODE": os.environ["RAY_AUTH_MODE"]}
        with (
            mock.patch.dict(os.environ, seen, clear=True),
            mock.patch.object(sys, "argv", ["purser", *map(str, arguments)]),
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                purser.main()
            except SystemExit as ended:
                code = ended.code
        return Ended(code, out.getvalue(), err.getvalue())
