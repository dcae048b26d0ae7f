"""The rows of several tokenised files counted through as one, and the splits that choose among them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import datasets
import numpy as np

from sft.data.token_cache import TokenFile


@dataclass
class TokenRows:
    """Files one after another: row i of a later file is row i + (rows of the files before it) here.

    A token row is an example. Where one row of the data gave several, they stand together and have one hash.

    weights: of each file, how often its rows are seen in an epoch.
    """

    files: list[TokenFile]
    weights: list[float]

    @cached_property
    def hashes(self) -> np.ndarray:
        """Of each row's ids, or those of all examples of its data row, int64, (rows,)."""
        return np.concatenate([file.rows.data.column("hash").to_numpy() for file in self.files])

    @cached_property
    def firsts(self) -> np.ndarray | None:
        """Indexes of the first example of each data row, int64; None: each data row gave one."""
        if not any("examples" in file.facts for file in self.files):
            return None
        lines = [file.rows.data.column("line").to_numpy() for file in self.files]
        return np.flatnonzero(np.concatenate([np.diff(each, prepend=0) != 0 for each in lines]))  # lines count from 1

    @cached_property
    def dataset(self) -> datasets.Dataset:
        return datasets.concatenate_datasets([file.rows for file in self.files])

    def by_file(self, indexes: Sequence[int] | np.ndarray) -> Iterator[tuple[TokenFile, np.ndarray]]:
        """Each file that holds some of these rows, and their indexes within it."""
        indexes = np.asarray(indexes)
        begin = 0
        for file in self.files:
            inside = indexes[(indexes >= begin) & (indexes < begin + len(file.rows))] - begin
            begin += len(file.rows)
            if len(inside):
                yield file, inside

    def place(self, index: int) -> str:
        """ "file:line" of a row."""
        file, inside = next(self.by_file([index]))
        return f"{file.path}:{file.rows.data.column('line')[int(inside[0])].as_py()}"

    def weight_of_each_row(self) -> np.ndarray:
        """float64, (rows,)."""
        return np.repeat(np.array(self.weights, float), [len(file.rows) for file in self.files])


@dataclass
class Split:
    """A split: its rows among those of its files.

    chosen: indexes into `rows`, int64, in the order of the files; a row may be there several times.
    has_own_files: False for a share held out of the training files.
    """

    name: str
    rows: TokenRows
    chosen: np.ndarray
    has_own_files: bool = True

    def data_rows(self) -> np.ndarray:
        """The chosen rows that are the first, or only, example of their data row."""
        firsts = self.rows.firsts
        return self.chosen if firsts is None else self.chosen[np.isin(self.chosen, firsts)]

    def view(self) -> datasets.Dataset:
        """The chosen rows' input_ids and assistant_mask, not copied."""
        dataset = self.rows.dataset
        if len(self.chosen) != len(dataset) or (self.chosen != np.arange(len(dataset))).any():
            dataset = dataset.select(self.chosen)
        return dataset.select_columns(["input_ids", "assistant_mask"])
