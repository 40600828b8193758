"""Measured ratios: both sides of each in one run. Never collected by pytest: a timing is not a test."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable


def main(measure: Callable[[bool], dict[str, float]], description: str | None) -> None:
    """Read a benchmark's command line, measure, and print one object of numbers to four digits."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; ends within four minutes")
    parser.add_argument("--json", action="store_true", help="one line")
    asked = parser.parse_args()
    result = {key: float(f"{value:.4g}") for key, value in measure(asked.quick).items()}
    print(json.dumps(result, indent=None if asked.json else 2))
