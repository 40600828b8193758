"""Measured ratios: both sides of each in one run. Never collected by pytest: a timing is not a test."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any


def main(measure: Callable[[bool], dict[str, Any]], description: str | None) -> None:
    """Read a benchmark's command line, measure, and print one object of numbers to four digits."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; ends within four minutes")
    parser.add_argument("--json", action="store_true", help="one line")
    asked = parser.parse_args()
    print(json.dumps(_short(measure(asked.quick)), indent=None if asked.json else 2))


def _short(value: Any) -> Any:
    """Numbers to four digits; of a table, those in its rows."""
    if isinstance(value, dict):
        return {key: _short(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_short(one) for one in value]
    return value if value is None or isinstance(value, (bool, str)) else float(f"{value:.4g}")
