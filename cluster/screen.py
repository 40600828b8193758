"""What a person sees: the product's own lines on the terminal; everything else that prints goes to a log file.

Only public numbers may be shown (P13). With --json, stdout carries one object as its last line and progress goes to
stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console


class Screen:
    """The terminal of one command."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self.console = Console(file=sys.stderr if as_json else sys.stdout, highlight=False, soft_wrap=True)

    def say(self, line: object = "", markup: bool = True) -> None:
        """Show a line or a table; without `markup`, brackets in it are brackets."""
        self.console.print(line, markup=markup)

    def result(self, result: dict[str, Any]) -> None:
        """Print the one JSON object, if it was asked for."""
        if self.as_json:
            sys.stdout.write(json.dumps(result, allow_nan=False) + "\n")
            sys.stdout.flush()

    @contextmanager
    def quiet(self, log: Path) -> Iterator[None]:
        """Send file descriptors 1 and 2, of this process and the ones it starts, to `log`; keep our own lines."""
        sys.stdout.flush()
        sys.stderr.flush()
        outer = self.console
        kept = os.dup(2 if self.as_json else 1)
        saved = os.dup(1), os.dup(2)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(target, 1)
        os.dup2(target, 2)
        os.close(target)
        with os.fdopen(kept, "w") as file:
            self.console = Console(file=file, highlight=False, soft_wrap=True)
            try:
                yield
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(saved[0], 1)
                os.dup2(saved[1], 2)
                for descriptor in saved:
                    os.close(descriptor)
                self.console = outer
