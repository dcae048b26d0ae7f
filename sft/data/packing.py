"""Several conversations in a row of `max_length` tokens, by best fit."""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows put into as few bins as best-fit decreasing finds; each list holds the rows of one bin.

    >>> best_fit([3, 5, 2, 4], capacity=7)
    [[1, 2], [3, 0]]
    """
    order = np.argsort(-np.asarray(lengths), kind="stable").tolist()
    room: list[int] = []  # capacities that some open bin still has, ascending
    open_bins: dict[int, list[int]] = defaultdict(list)
    bins: list[list[int]] = []
    for row in order:
        at = bisect_left(room, lengths[row])
        if at == len(room):
            bins.append([row])
            left, chosen = capacity - lengths[row], len(bins) - 1
        else:
            size = room[at]
            chosen = open_bins[size].pop()
            if not open_bins[size]:
                room.pop(at)
            bins[chosen].append(row)
            left = size - lengths[row]
        if left > 0:
            if not open_bins[left]:
                insort(room, left)
            open_bins[left].append(chosen)
    return bins


def pack(rows: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Puts whole conversations together up to `max_length` tokens, without copying them.

    Returns: rows of input_ids, assistant_mask and seq_lengths (tokens of each conversation in it). The collator gives
    each conversation its own positions, by which no token attends to another conversation.
    """
    lengths = np.diff(_offsets(rows)).tolist()
    bins = best_fit(lengths, max(max_length, max(lengths)))
    return datasets.Dataset.from_dict({"rows": bins}).with_transform(partial(_gather, rows))


def _gather(rows: datasets.Dataset, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The rows of each bin, one after another. A function of the module, so that worker processes can be given it."""
    gathered: dict[str, list[Any]] = {"input_ids": [], "assistant_mask": [], "seq_lengths": []}
    for members in batch["rows"]:
        picked = rows[members]
        gathered["seq_lengths"].append([len(ids) for ids in picked["input_ids"]])
        for column in ("input_ids", "assistant_mask"):
            gathered[column].append([token for row in picked[column] for token in row])
    return gathered


def _offsets(rows: datasets.Dataset) -> np.ndarray:
    """Cumulated lengths, int64, (rows + 1,)."""
    lengths = [pa.compute.list_value_length(chunk).to_numpy() for chunk in rows.data.column("input_ids").chunks]
    counts = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    if rows._indices is not None:
        counts = counts[rows._indices.column(0).to_numpy()]
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
