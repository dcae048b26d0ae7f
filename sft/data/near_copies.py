"""Rows of one split that nearly repeat a row of another, found by their signatures.

Two rows are compared where they share a band: four bytes of their signatures in the same place. Of pairs with a
similarity of 0.7 that is 98.8 %, of 0.8 nearly all. The time is linear in the rows. The memory is below 64 bytes for a
row that is looked up, and constant for those it is looked up among, for signatures lie on disk.
"""

from typing import NamedTuple

import numpy as np

from sft.data.signatures import SIGNATURE_BYTES, similarity
from sft.data.token_rows import Split, TokenRows

SIMILAR = 0.7
BAND = 4  # bytes
COMPARED = 4  # rows that one with the same band is compared with; where more have it, it is of a phrase that many share
SLICE = 2**14  # rows whose signatures are in memory at once


class NearCopies(NamedTuple):
    """rows: of the one split, ascending; copied: of the other, the most similar found; similarity: of the two."""

    rows: np.ndarray
    copied: np.ndarray
    similarity: np.ndarray


def find_near_copies(split: Split, among: Split) -> NearCopies:
    """The chosen rows of a split that nearly repeat a chosen row of another."""
    best = np.zeros(len(split.chosen), np.uint8)  # bytes alike
    copied = np.zeros(len(split.chosen), np.int32)
    for band in range(0, SIGNATURE_BYTES, BAND) if len(best) else ():
        keys = np.unique(_band(split, band))
        firsts = _first_rows(keys, among, band)
        for begin in range(0, len(split.chosen), SLICE):
            here = slice(begin, begin + SLICE)
            own = _signatures(split.rows, split.chosen[here])
            for rows in firsts[np.searchsorted(keys, _keys(own, band))].T:
                alike = (own == _signatures(among.rows, np.maximum(rows, 0))).sum(axis=1, dtype=np.uint8)
                better = (rows >= 0) & (alike > best[here])
                best[here][better] = alike[better]
                copied[here][better] = rows[better]
    enough = np.argmax(similarity(np.arange(SIGNATURE_BYTES + 1)) >= SIMILAR)
    near = np.flatnonzero(best >= enough)
    return NearCopies(split.chosen[near], copied[near], similarity(best[near]))


def _first_rows(keys: np.ndarray, among: Split, band: int) -> np.ndarray:
    """For each key the first rows with it in this band, int32, (keys, COMPARED); -1 where there are fewer.

    keys 3, 7 and rows with 7, 5, 7, 3 -> [3, -1, ...] and [0, 2, ...]
    """
    firsts = np.full((len(keys), COMPARED), -1, np.int32)
    counts = np.zeros(len(keys), np.uint8)
    for begin in range(0, len(among.chosen), SLICE):
        rows = among.chosen[begin : begin + SLICE]
        found = _keys(_signatures(among.rows, rows), band)
        slots = np.minimum(np.searchsorted(keys, found), len(keys) - 1)
        hit = np.flatnonzero(keys[slots] == found)
        hit = hit[np.argsort(slots[hit], kind="stable")]
        slots = slots[hit]
        rank = np.arange(len(slots)) - np.searchsorted(slots, slots) + counts[slots]  # among all rows of this key
        kept = rank < COMPARED
        firsts[slots[kept], rank[kept]] = rows[hit[kept]]
        counts[slots[kept]] = rank[kept] + 1  # of a key's several the last, and highest, stays
    return firsts


def _band(split: Split, band: int) -> np.ndarray:
    """The keys of all chosen rows in one band, uint32."""
    keys = np.empty(len(split.chosen), np.uint32)
    for begin in range(0, len(keys), SLICE):
        rows = split.chosen[begin : begin + SLICE]
        keys[begin : begin + SLICE] = _keys(_signatures(split.rows, rows), band)
    return keys


def _keys(signatures: np.ndarray, band: int) -> np.ndarray:
    return np.ascontiguousarray(signatures[:, band : band + BAND]).view(np.uint32)[:, 0]


def _signatures(rows: TokenRows, indexes: np.ndarray) -> np.ndarray:
    """Of these rows, uint8, (indexes, SIGNATURE_BYTES)."""
    found = np.empty((len(indexes), SIGNATURE_BYTES), np.uint8)
    begin = 0
    for file in rows.files:
        here = (indexes >= begin) & (indexes < begin + len(file.rows))
        found[here] = file.signatures[indexes[here] - begin]
        begin += len(file.rows)
    return found
