"""The reference's log-probabilities on disk: fixed-size records, found by a digest of a pair's tokens.

One file holds what one reference gives under one set of numerics; its name is a digest of both. A record is
appended whole under a lock, carries a checksum, and is never changed: any number of processes may read and write at
once, and a file that was cut short or damaged, or written at once where there are no locks, loses the records
concerned, which are computed again.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from dpo_lightning.cache import locked

RECORD = np.dtype([("key", "S16"), ("logps", "<f4", 2), ("check", "<u4")])
_WORDS = RECORD.itemsize // 4 - 1
_ODD = (2 * np.arange(1, _WORDS + 1, dtype=np.uint32) + 1) * np.uint32(2654435761)  # each word counts differently


class ReferenceStore:
    """Pairs of log-probabilities (chosen, rejected), float32, by 16-byte keys."""

    def __init__(self, file: Path):
        self.file = file

    def find(self, keys_N: np.ndarray) -> np.ndarray:
        """Return the log-probabilities of these keys, float32 (N, 2), NaN where the store has none."""
        records = self._records()
        return look_up(keys_N, records["key"], records["logps"])

    def append(self, keys_N: np.ndarray, logps_N2: np.ndarray) -> None:
        """Add records. Raises ValueError for a log-probability that is not finite, which no reference may have."""
        if not np.isfinite(logps_N2).all():
            raise ValueError("the reference gives log-probabilities that are not finite; its weights are damaged")
        records = np.zeros(len(keys_N), RECORD)
        records["key"], records["logps"] = keys_N, logps_N2
        records["check"] = _checksum(records)
        with locked(self.file) as descriptor:
            end = os.fstat(descriptor).st_size
            os.lseek(descriptor, end - end % RECORD.itemsize, os.SEEK_SET)  # over what a killed writer left
            left = memoryview(records.tobytes())
            while left:
                left = left[os.write(descriptor, left) :]

    def _records(self) -> np.ndarray:
        if not self.file.exists():
            return np.empty(0, RECORD)
        data = self.file.read_bytes()
        records = np.frombuffer(data, RECORD, count=len(data) // RECORD.itemsize)
        return records[records["check"] == _checksum(records)]


def look_up(keys_N: np.ndarray, known_K: np.ndarray, logps_K2: np.ndarray) -> np.ndarray:
    """Return the log-probabilities of these keys among known ones, float32 (N, 2), NaN where a key is not known."""
    found_N2 = np.full((len(keys_N), 2), np.nan, np.float32)
    if len(known_K) and len(keys_N):
        order = np.argsort(known_K, kind="stable")
        at = order[np.searchsorted(known_K, keys_N, sorter=order).clip(max=len(known_K) - 1)]
        hit = known_K[at] == keys_N
        found_N2[hit] = logps_K2[at[hit]]
    return found_N2


def _checksum(records: np.ndarray) -> np.ndarray:
    """Return a number that changes with any one word of a record."""
    words = np.ascontiguousarray(records).view(np.uint32).reshape(len(records), _WORDS + 1)[:, :_WORDS]
    return (words * _ODD).sum(1, dtype=np.uint32) ^ np.uint32(0x5DEECE66)
