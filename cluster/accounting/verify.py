"""Checking a chain from outside: was any entry altered, removed or reordered, and do the totals follow (P5)?

Reads only. A chain that was rewritten from some entry on is whole in itself: only a head kept elsewhere finds that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cluster.accounting.schema import GENESIS, entry_hash
from cluster.errors import UsageError

SHORT = 13  # as many hexadecimal digits of a hash as a metric, which is a double, holds exactly

# kind → what an entry's cost does to (spent, reserved)
EFFECTS: Mapping[str, tuple[int, int]] = {
    "account": (0, 0),
    "source": (0, 0),
    "reserve": (0, 1),
    "open": (0, 1),
    "authorise": (1, -1),
    "settle": (0, -1),
    "release": (0, -1),
    "expire": (0, -1),
    "refuse": (0, 0),
}


@dataclass(frozen=True)
class Verdict:
    """`first_bad_seq` is the sequence number where the chain first breaks, or None; `head` the last entry read."""

    account: str
    valid: bool
    first_bad_seq: int | None
    head: dict[str, Any] | None
    why: str


def parse_head(text: str) -> tuple[int, str]:
    """A head kept outside, written SEQ:HASH, as every statement and `budget show` prints it; of a hash that was kept by
    Prometheus there are the first digits only. They are 52 bits: enough for an alarm, but whoever rewrites a ledger
    could search for an entry that begins so (2^52 hashes); a whole hash is evidence."""
    seq, colon, digest = text.partition(":")
    if not colon or not (seq.isascii() and seq.isdigit()) or len(digest) not in (SHORT, 64):
        raise UsageError(
            f"--head: {text!r} was given; write it as SEQ:HASH, as `purser budget show` printed it, or with the first "
            f"{SHORT} digits of the hash."
        )
    return int(seq), digest.lower()


def verify(account: str, rows: Iterable[Mapping[str, Any]], head: tuple[int, str] | None = None) -> Verdict:
    """Walk the entries of `account` in order; with `head`, also ask that the chain still holds that very entry."""
    previous, count, spent, reserved, budget = GENESIS, 0, 0, 0, 0
    held: dict[str, int] = {}
    seen_head = head is None
    last: dict[str, Any] | None = None

    def bad(seq: int, why: str) -> Verdict:
        return Verdict(account, False, seq, last, why)

    for row in rows:
        count += 1
        if row["seq"] != count:
            return bad(count, f"entry {count} is missing")
        if row["prev_hash"] != previous:
            return bad(count, f"entry {count} does not follow entry {count - 1}")
        if not _genuine(row):
            return bad(count, f"entry {count} was altered")
        if row["kind"] not in EFFECTS:
            return bad(count, f"entry {count} is of the unknown kind {row['kind']}")
        if count == 1:
            budget = _budget(row["body"])
        to_spent, to_reserved = EFFECTS[row["kind"]]
        spent, reserved = spent + to_spent * row["cost"], reserved + to_reserved * row["cost"]
        lease_held = held.get(row["lease"] or "", 0) + to_reserved * row["cost"]
        if row["lease"]:
            held[row["lease"]] = lease_held
        totals = (row["spent_after"], row["reserved_after"], row["lease_reserved_after"])
        if totals != (spent, reserved, lease_held) or row["cost"] < 0 or lease_held < 0:
            return bad(count, f"the totals of entry {count} do not follow from the entries before it")
        if spent + reserved > budget:
            return bad(count, f"entry {count} goes over the budget")
        previous = row["hash"]
        last = {"seq": count, "hash": row["hash"]}
        if head and count == head[0]:
            if not row["hash"].startswith(head[1]):
                return bad(count, f"entry {count} is not the one whose hash was kept")
            seen_head = True
    if last is None:
        return bad(1, "there are no entries")
    if not seen_head:
        return bad(count + 1, f"the chain ends at entry {count}, before the head that was kept")
    return Verdict(account, True, None, last, "every entry follows from the one before it")


def _genuine(row: Mapping[str, Any]) -> bool:
    """Whether a row hashes to what it says, and its money is whole numbers."""
    try:
        if entry_hash(row) != row["hash"]:
            return False
    except (TypeError, ValueError):  # bytes or infinities, which no entry of ours holds
        return False
    return all(type(row[name]) is int for name in ("cost", "spent_after", "reserved_after", "lease_reserved_after"))


def _budget(body: str) -> int:
    try:
        made = json.loads(body)
        return int(made.get("budget_cost", 0))
    except (AttributeError, TypeError, ValueError):
        return 0
