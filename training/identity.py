"""What a record is to the books: canonical bytes, and hashes of them. Inside the boundary; no Ray.

By these a source is known whatever its files and their order, equal rows are told apart, and a unit has its place.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from training.sources import Source

NULL = "-"  # stands where a cell's length would


def rows_of(batch: pa.RecordBatch) -> list[bytes]:
    """Each record as canonical bytes: its cells in the source's column order, each after its length; a null has none.

    No two different records have the same bytes; a record's are its identity where it is a unit.
    """
    parts: list[Any] = []
    for column in batch.columns:
        length = pc.binary_length(column).cast(pa.string())
        parts += [pc.fill_null(length, NULL), pa.scalar(":"), pc.fill_null(column, "")]
    rows: list[bytes] = pc.binary_join_element_wise(*parts, "").cast(pa.binary()).to_pylist()
    return rows


def digests_of(batch: pa.RecordBatch) -> np.ndarray:
    """SHA-256 of each record. Array: uint8 [records, 32]."""
    joined = b"".join(hashlib.sha256(row).digest() for row in rows_of(batch))
    return np.frombuffer(joined, np.uint8).reshape(-1, 32)


def digests(source: Source) -> np.ndarray:
    """Of every record of the source. Array: uint8 [records, 32]."""
    found = [np.zeros((0, 32), np.uint8)]
    for number in range(len(source.files)):
        found += [digests_of(batch) for batch in source.batches(number)]
    return np.concatenate(found)


def in_order(found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order in which digests are sorted, and of each the number of equal ones before it. Arrays: int64."""
    words = found.view(">u8").astype(np.uint64)
    order = np.lexsort(words.T[::-1])
    ranked = words[order]
    place = np.arange(len(order))
    begins = np.ones(len(order), bool)
    begins[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    ordinals = np.empty(len(order), np.int64)
    ordinals[order] = place - np.maximum.accumulate(np.where(begins, place, 0))
    return order, ordinals


def fingerprint(found: np.ndarray, order: np.ndarray, key: str) -> str:
    """HMAC of the source's records under the ledger's hidden key, whatever their order. Hexadecimal.

    Keyed, so that who reads the ledger cannot test guesses of the content.
    """
    mac = hmac.new(bytes.fromhex(key), b"source\0", hashlib.sha256)
    mac.update(found[order].tobytes())
    return mac.hexdigest()


def keyed_hashes(secret: bytes, purpose: bytes, contents: Sequence[bytes]) -> np.ndarray:
    """The first 16 bytes of an HMAC of each, as two big-endian numbers. Array: uint64 [contents, 2]."""
    begun, found = hmac.new(secret, purpose + b"\0", hashlib.sha256), []
    for content in contents:
        mac = begun.copy()
        mac.update(content)
        found.append(mac.digest()[:16])
    return np.frombuffer(b"".join(found), ">u8").reshape(-1, 2).astype(np.uint64)
