"""The ledger: what became of every row, rows that repeat, and rows of the test split that are trained on."""

from collections import defaultdict
from typing import Any, TypedDict

import numpy as np
from rich.cells import cell_len

from sft.data.near_copies import NearCopies, find_near_copies
from sft.data.token_cache import TokenFile
from sft.data.token_rows import Split
from sft.data.tokens import SHORTENED, Facts


class LedgerFile(Facts):
    """A file of a split. dropped: {kind of problem: lines}."""

    split: str
    path: str
    weight: float
    supervised_share: float
    dropped: dict[str, list[int]]


class NamedRows(TypedDict):
    """How many rows, and the first NAMED of them as "file:line"."""

    rows: int
    named: list[str]


class Ledger(TypedDict, total=False):
    """What data_ledger.json holds.

    rows, examples, packing: of each split its conversations, what they give if not one each, and the packed rows.
    seen: conversations of the training split in an epoch, where files have weights.
    packing_probe: why rows are packed, or not, where dataset.packing left it open.
    test_in_train, near_duplicates: rows of the test split that a training row equals, or nearly equals. samples:
    examples with their masks as text. memory: bytes that training keeps from step to step, of weights, adapter,
    gradients and the optimizer's moments. stop_tokens: {token: id} that end answers.
    """

    files: list[LedgerFile]
    rows: dict[str, int]
    seen: int
    examples: dict[str, int]
    duplicates: NamedRows
    test_in_train: NamedRows
    near_duplicates: NamedRows
    packing: dict[str, int]
    packing_probe: str
    streamed: list[str]
    samples: list[dict[str, Any]]
    memory: dict[str, int]
    stop_tokens: dict[str, int]


NAMED = 20


def make_ledger(splits: dict[str, Split], near_copies: bool = False) -> Ledger:
    """The ledger of splits that have been chosen. near_copies: look for these too."""
    ledger: Ledger = {
        "files": [
            _ledger_file(split.name, file, weight)
            for split in splits.values()
            if split.has_own_files
            for file, weight in zip(split.rows.files, split.rows.weights, strict=True)
        ],
        "rows": {name: len(split.data_rows()) for name, split in splits.items()},
    }
    examples = {name: len(split.chosen) for name, split in splits.items()}
    if examples != ledger["rows"]:
        ledger["examples"] = examples
    if "train" in splits:
        ledger["duplicates"] = find_repeats(splits["train"])
    if "train" in splits and "test" in splits:
        train, test = splits["train"], splits["test"]
        rows = test.data_rows()
        is_leaked = _find_leaks(train, test)
        leaked = rows[is_leaked]
        ledger["test_in_train"] = {
            "rows": len(leaked),
            "named": [test.rows.place(int(index)) for index in leaked[:NAMED]],
        }
        if near_copies:
            others = Split(test.name, test.rows, rows[~is_leaked])
            among = Split(train.name, train.rows, train.data_rows())
            ledger["near_duplicates"] = _named(find_near_copies(others, among), test, train)
    return ledger


def _ledger_file(split: str, file: TokenFile, weight: float) -> LedgerFile:
    dropped: dict[str, list[int]] = defaultdict(list)
    for problem in file.problems:
        dropped[problem.kind].append(problem.line)
    facts = file.facts
    share = facts["supervised_tokens"] / facts["tokens"] if facts["tokens"] else 0.0
    return {
        "split": split,
        "path": str(file.path),
        "weight": weight,
        **facts,
        "trimmed": sorted(facts["trimmed"] + dropped.pop(SHORTENED, [])),
        "supervised_share": round(share, 4),
        "dropped": dict(dropped),
    }


def find_repeats(split: Split) -> NamedRows:
    """Rows of the split's files that say what an earlier row says, as "later = earlier"."""
    hashes, firsts = split.rows.hashes, split.rows.firsts
    hashes = hashes if firsts is None else hashes[firsts]
    ordered = np.sort(hashes)  # with `hashes` 16 bytes a row, and no more: hence the slices
    count, values = 0, np.zeros(0, hashes.dtype)
    for begin in range(0, len(ordered), 2**16):
        part = ordered[begin : begin + 2**16 + 1]
        again = part[1:][part[1:] == part[:-1]]
        count += len(again)
        values = np.union1d(values, again)[:NAMED]
    pairs: list[tuple[int, int]] = []
    for value in values:
        places = np.flatnonzero(hashes == value)[: NAMED + 1].tolist()
        pairs += [(later, places[0]) for later in places[1:]]

    def place(index: int) -> str:
        return split.rows.place(index if firsts is None else int(firsts[index]))

    return {"rows": count, "named": [f"{place(later)} = {place(first)}" for later, first in sorted(pairs)[:NAMED]]}


def _find_leaks(train: Split, test: Split) -> np.ndarray:
    """Which of the test split's data rows are in the training split, bool."""
    trained = train.rows.hashes[train.chosen]
    trained.sort()
    hashes = test.rows.hashes[test.data_rows()]
    at = np.searchsorted(trained, hashes)
    return trained[np.minimum(at, len(trained) - 1)] == hashes


def _named(found: NearCopies, test: Split, train: Split) -> NamedRows:
    """The most similar first, as "test row ~ training row (similarity)"."""
    order = np.argsort(-found.similarity, kind="stable")[:NAMED]
    places = [(test.rows.place(int(found.rows[i])), train.rows.place(int(found.copied[i]))) for i in order]
    named = [f"{row} ~ {copied} ({found.similarity[i]:.0%})" for i, (row, copied) in zip(order, places, strict=True)]
    return {"rows": len(found.rows), "named": named}


# ------------------------------------------------------------------------------------------------------- the terminal


def ledger_table(ledger: Ledger) -> str:
    """The ledger as a table for the terminal."""
    head = ("split", "file", "weight", "rows", "used", "dropped", "trimmed", "tokens", "supervised")
    rows = [head, *map(_table_line, ledger["files"])]
    usual = {"weight": {"1"}, "dropped": {"0"}, "trimmed": {"0"}}  # a column that says nothing else is left out
    kept = [i for i, name in enumerate(head) if name not in usual or {row[i] for row in rows[1:]} - usual[name]]
    lines = [[row[i] for i in kept] for row in rows]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    text = []
    for line in lines:
        padding = [" " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        text.append("  ".join(c + p if i < 2 else p + c for i, (c, p) in enumerate(zip(line, padding, strict=True))))
    if ledger["rows"].keys() - {file["split"] for file in ledger["files"]}:  # shares held out of the training files
        text.append("conversations: " + ", ".join(f"{split} {rows:,}" for split, rows in ledger["rows"].items()))
    for file in ledger["files"]:
        path = file["path"]
        for kind, at in file["dropped"].items():
            text.append(f"{path}: dropped {len(at):,} for {kind}: lines {_first(at)}")
        if trimmed := file["trimmed"]:
            text.append(f"{path}: trimmed {len(trimmed):,} to dataset.max_length: lines {_first(trimmed)}")
        text += [f"{path}: {count:,} {note}" for note, count in file["notes"].items()]
        if "examples" in file:
            text.append(f"{path}: {file['used']:,} rows give {file['examples']:,} examples (chat.examples)")
    if "seen" in ledger:
        text.append(f"an epoch sees {ledger['seen']:,} training conversations, by the weights of the files")
    if "packing_probe" in ledger:
        text.append(ledger["packing_probe"])
    if "streamed" in ledger:
        text.append("streamed while training, not counted: " + ", ".join(ledger["streamed"]))
    if (repeats := ledger.get("duplicates")) and repeats["rows"]:
        text.append(f"{repeats['rows']:,} training rows repeat an earlier one: {'; '.join(repeats['named'][:3])}")
    if (leaks := ledger.get("test_in_train")) and leaks["rows"]:
        named = ", ".join(leaks["named"][:5])
        text.append(f"WARNING: {leaks['rows']:,} rows of the test split are in the training split too: {named}")
    if (near := ledger.get("near_duplicates")) and near["rows"]:
        named, other = ", ".join(near["named"][:5]), "other " if leaks and leaks["rows"] else ""
        text.append(f"WARNING: {near['rows']:,} {other}rows of the test split nearly repeat a training row: {named}")
    return "\n".join(text)


def _table_line(file: LedgerFile) -> tuple[str, ...]:
    dropped = sum(map(len, file["dropped"].values()))
    counts = (file["rows"], file["used"], dropped, len(file["trimmed"]), file["tokens"])
    supervised = f"{file['supervised_tokens']:,} ({file['supervised_share']:.0%})"
    return (file["split"], file["path"], f"{file['weight']:g}", *(f"{count:,}" for count in counts), supervised)


def _first(lines: list[int]) -> str:
    return ", ".join(map(str, lines[:10])) + (", ..." if len(lines) > 10 else "")
