"""Several conversations in a row of `max_length` tokens, by best fit."""

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

PACKED_TOGETHER = 2**20  # rows, whose packing holds 38 bytes each
STREAM_BUFFER = (
    1000  # rows of a stream that are packed together: of lognormal lengths 99.6 % full, of all rows at once 99.9 %
)


def best_fit(lengths: np.ndarray, capacity: int) -> pa.ListArray:
    """Rows put into as few bins as best-fit decreasing finds; each list holds the rows of one bin.

    Rows of one length are placed together, into all bins with the same room: a bin takes as many of these rows as fit,
    since what is left in it then is less than any other room that would do. So the time is that of sorting the lengths,
    and nothing is kept in Python for a row or a bin.

    Args: lengths: int64, (rows,), none above the capacity.

    >>> best_fit(np.array([3, 5, 2, 4]), capacity=7).to_pylist()
    [[1, 2], [3, 0]]
    """
    order = np.argsort(-lengths, kind="stable")
    bins, rooms, begin, opened = np.empty(len(order), np.int64), _Rooms(), 0, 0  # the bin of each row, in that order
    longest_first, counts = (values[::-1] for values in np.unique(lengths, return_counts=True))
    for length, count in zip(longest_first.tolist(), counts.tolist(), strict=True):
        end = begin + count
        while begin < end:
            room = rooms.least_of(length) or capacity
            each, left = room // length, end - begin
            if rooms.has(room):
                chosen = rooms.take(room, -(-left // each))
            else:
                chosen = np.arange(opened, opened + -(-left // each))
                opened += len(chosen)
            placed = min(left, len(chosen) * each)
            bins[begin : begin + placed] = np.repeat(chosen, each)[:placed]
            begin += placed
            full, rest = divmod(placed, each)
            rooms.put(room - each * length, chosen[:full])
            rooms.put(room - rest * length, chosen[full:])
    members = order[np.argsort(bins, kind="stable")]
    ends = np.cumsum(np.bincount(bins, minlength=opened))
    return pa.LargeListArray.from_arrays(np.concatenate([[0], ends]), members)


class _Rooms:
    """Bins by the room that they have left; those of one room as a stack of arrays, the last put in taken first."""

    def __init__(self) -> None:
        self._sizes: list[int] = []  # ascending
        self._stacks: dict[int, list[np.ndarray]] = {}

    def least_of(self, length: int) -> int | None:
        """The least room that takes a row of this length; None: there is none."""
        at = bisect_left(self._sizes, length)
        return self._sizes[at] if at < len(self._sizes) else None

    def has(self, room: int) -> bool:
        return room in self._stacks

    def put(self, room: int, bins: np.ndarray) -> None:
        if room > 0 and len(bins):
            if room not in self._stacks:
                insort(self._sizes, room)
            self._stacks.setdefault(room, []).append(bins)

    def take(self, room: int, count: int) -> np.ndarray:
        """At most so many bins of a room."""
        stack, taken = self._stacks[room], []
        while stack and count:
            top = stack.pop()
            if len(top) > count:
                stack.append(top[:-count])
            taken.append(top[-count:][::-1])
            count -= len(taken[-1])
        if not stack:
            del self._stacks[room]
            self._sizes.remove(room)
        return np.concatenate(taken)


def pack(rows: datasets.Dataset, max_length: int) -> datasets.Dataset:
    """Puts whole conversations together up to `max_length` tokens, without copying them.

    Returns: rows of input_ids, assistant_mask and seq_lengths (tokens of each conversation in it). The collator gives
    each conversation its own positions, by which no token attends to another conversation.
    """
    lengths = token_counts(rows)
    capacity = max(max_length, int(lengths.max()))
    bins = [_bins_from(begin, lengths, capacity) for begin in range(0, len(lengths), PACKED_TOGETHER)]
    table = pa.table({"rows": pa.chunked_array(bins)})
    name = f"{rows._fingerprint}_packed_{capacity}"  # else all would be read to make one
    packed = datasets.Dataset(table, fingerprint=name)
    packed.set_transform(partial(_gather, rows))
    return packed


def _bins_from(begin: int, lengths: np.ndarray, capacity: int) -> pa.ListArray:
    """The bins of the PACKED_TOGETHER rows from `begin` on, of indexes that count from the first row of all."""
    bins = best_fit(lengths[begin : begin + PACKED_TOGETHER], capacity)
    kind = pa.int32() if len(lengths) < 2**31 else pa.int64()
    return pa.LargeListArray.from_arrays(bins.offsets, pa.compute.add(bins.values, begin).cast(kind))


def pack_stream(rows: Iterator[dict[str, Any]], max_length: int, seed: int) -> Iterator[dict[str, Any]]:
    """Packs a stream: best fit within STREAM_BUFFER rows at a time, whose bins come in a seeded order."""
    for number in itertools.count():
        buffer = list(itertools.islice(rows, STREAM_BUFFER))
        if not buffer:
            return
        lengths = np.array([len(row["input_ids"]) for row in buffer])
        bins = best_fit(lengths, max(max_length, int(lengths.max()))).to_pylist()
        np.random.default_rng((seed, number)).shuffle(bins)  # they come with the longest rows first
        for members in bins:
            columns = {name: [buffer[row][name] for row in members] for name in ("input_ids", "assistant_mask")}
            yield {key: value[0] for key, value in _joined([columns]).items()}


def _gather(rows: datasets.Dataset, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """The rows of each bin, one after another. A function of the module, so that worker processes can be given it."""
    return _joined(rows[members] for members in batch["rows"])


def _joined(bins: Iterable[dict[str, list[list[int]]]]) -> dict[str, list[Any]]:
    """One row a bin, of the columns of its conversations."""
    joined: dict[str, list[Any]] = {"input_ids": [], "assistant_mask": [], "seq_lengths": []}
    for columns in bins:
        joined["seq_lengths"].append([len(ids) for ids in columns["input_ids"]])
        for name in ("input_ids", "assistant_mask"):
            joined[name].append(list(itertools.chain.from_iterable(columns[name])))
    return joined


def token_counts(rows: datasets.Dataset) -> np.ndarray:
    """Tokens of each row, int32, (rows,)."""
    chunks = [pa.compute.list_value_length(chunk).to_numpy() for chunk in rows.data.column("input_ids").chunks]
    lengths = np.concatenate([np.zeros(0, np.int32), *chunks])
    return lengths if rows._indices is None else lengths[rows._indices.column(0).to_numpy()]
