"""Files -> rows -> messages -> token rows on disk, with a ledger of what became of every row.

Each file is tokenised once and kept, memory-mapped, in a cache whose key is its content, the tokenizer, the template
and the options that matter; the policies of the recipe (error, skip, drop) are applied to what the cache says, so a
change of policy costs nothing. With several processes the first does the work and the others wait for it.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm.auto import tqdm

from sft.data.chat import ChatEncoder, Conversation, Encoded
from sft.data.packing import best_fit, pack
from sft.data.rows import FORMATS, detect_format, expand, hub_revision, load_formats, read_rows, to_conversation
from sft.errors import ControlTokenError, DataError, FormatError
from sft.files import whole_folder
from sft.recipe import Recipe, Source

__all__ = ["Data", "Problem", "TokenFile", "best_fit", "ledger_table", "pack", "prepare", "tokenise_file"]

SHOWN = 20  # problems printed before a count
BATCH = 1000  # rows tokenised at once, fewer where they are long:
BATCH_CHARACTERS = 2**24  # far below the 2**31 tokens that an Arrow list of a batch can hold
SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("assistant_mask", pa.list_(pa.int8())),
        ("line", pa.int32()),
        ("hash", pa.int64()),
    ]
)
# What can be wrong with a row, the recipe key that says what to do then, and what that key offers.
UNREADABLE, CONTROL, OVERLONG = "bad row", "control token", "over-long"
POLICIES = {
    UNREADABLE: ("dataset.on_error", "skip"),
    CONTROL: ("dataset.control_tokens", "skip, or text to train on it as plain text"),
    OVERLONG: ("dataset.overlength", "trim, or drop"),
}


class Problem(NamedTuple):
    """A row that was not used. kind: one of POLICIES; line: counted from 1."""

    line: int
    kind: str
    message: str


# --------------------------------------------------------------------------------------------------------- tokenising


@dataclass
class TokenFile:
    """One tokenised file: its rows memory-mapped, its part of the ledger."""

    path: str
    rows: datasets.Dataset
    facts: dict[str, Any]
    problems: list[Problem]


class _Tokeniser:
    """Tokenises one file, row by row in order."""

    def __init__(self, encoder: ChatEncoder, recipe: Recipe, format_name: str):
        self.encoder = encoder
        self.options = recipe.dataset
        self.last_turn = recipe.chat.loss_on == "last_turn"
        self.fmt = None if format_name == "auto" else load_formats()[format_name]
        self.problems: list[Problem] = []
        self.trimmed: list[int] = []
        self.notes: dict[str, int] = defaultdict(int)
        self.read = self.used = self.tokens = self.supervised = 0

    def conversations(self, rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Conversation]]:
        """Rows as conversations; those that are none go to `problems`."""
        for line, row in rows:
            self.read += 1
            try:
                if isinstance(row, FormatError):
                    raise row
                if self.fmt is None:
                    self.fmt = detect_format(row)
                yield line, to_conversation(row, self.fmt, self.options.system)
            except FormatError as error:
                self.problems.append(Problem(line, UNREADABLE, str(error)))

    def batches(self, rows: Iterable[tuple[int, Any]]) -> Iterator[pa.RecordBatch]:
        """Arrow batches of SCHEMA. While one batch is in the tokenizer's Rust code the next is read and rendered."""
        stream = self.conversations(rows)
        with ThreadPoolExecutor(1) as pool:
            pending: Future | None = None
            waiting: list[tuple[int, Conversation]] = []
            while True:
                batch = _next_batch(stream)
                rendered = self.encoder.render_batch([conversation for _, conversation in batch])
                following = pool.submit(self.encoder.encode_rendered, rendered) if batch else None
                if pending is not None:
                    yield self._to_arrow(waiting, pending.result())
                if following is None:
                    return
                pending, waiting = following, batch

    def _to_arrow(self, batch: list[tuple[int, Conversation]], encoded: list[Encoded | FormatError]) -> pa.RecordBatch:
        ids: list[np.ndarray] = []
        lines, hashes, starts, stops = [], [], [], []
        begin = 0  # of the row in the batch's tokens
        for (line, conversation), row in zip(batch, encoded, strict=True):
            if isinstance(row, FormatError) or not row.turns or len(row.input_ids) > self.options.max_length:
                kept = self._mended(line, conversation, row)
                if kept is None:
                    continue
                row = kept
            tokens = np.ascontiguousarray(row.input_ids, dtype=np.int32)
            for start, stop in row.turns[-1:] if self.last_turn else row.turns:
                starts.append(begin + start)
                stops.append(begin + stop)
            begin += len(tokens)
            ids.append(tokens)
            lines.append(line)
            hashes.append(hashlib.blake2b(tokens.data, digest_size=8).digest())
            for note in row.notes:
                self.notes[note] += 1
        edges = np.zeros(begin + 1, dtype=np.int8)  # turns are apart and not empty: no place is a start twice
        edges[starts] += 1
        edges[stops] -= 1
        self.used += len(ids)
        self.tokens += begin
        self.supervised += sum(stops) - sum(starts)
        offsets = pa.array(np.cumsum([0, *map(len, ids)], dtype=np.int64)).cast(pa.int32())  # raises past 2**31
        return pa.record_batch(
            [
                pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([np.zeros(0, np.int32), *ids]))),
                pa.ListArray.from_arrays(offsets, pa.array(np.cumsum(edges[:-1], dtype=np.int8))),
                pa.array(lines, pa.int32()),
                pa.array(np.frombuffer(b"".join(hashes), dtype=np.int64)),
            ],
            schema=SCHEMA,
        )

    def _mended(self, line: int, conversation: Conversation, row: Encoded | FormatError) -> Encoded | None:
        """What is kept of a row that cannot be taken as it is; None: nothing, and `problems` says why."""
        trim = self.options.overlength == "trim"
        try:
            if isinstance(row, FormatError):
                raise row
            if not row.turns:
                raise FormatError("there is no assistant turn to train on")
            if trim and (kept := self._trimmed(conversation, row)) is not None:
                self.trimmed.append(line)
                return kept
        except FormatError as error:
            kind = CONTROL if isinstance(error, ControlTokenError) else UNREADABLE
            self.problems.append(Problem(line, kind, str(error)))
            return None
        said = f"{len(row.input_ids):,} tokens, more than dataset.max_length {self.options.max_length:,}"
        said += ", and its first answer does not end within it" if trim else ""
        self.problems.append(Problem(line, OVERLONG, said))
        return None

    def _trimmed(self, conversation: Conversation, row: Encoded) -> Encoded | None:
        """The longest beginning that ends with an answer and fits, encoded as the conversation that it then is."""
        answers = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
        for answer, (_, stop) in reversed(list(zip(answers, row.turns, strict=True))):
            if stop <= self.options.max_length and answer + 1 < len(conversation.messages):
                shorter = self.encoder.encode(conversation.messages[: answer + 1], conversation.tools)
                if len(shorter.input_ids) <= self.options.max_length:
                    return shorter
        return None

    def facts(self) -> dict[str, Any]:
        return {
            "format": self.fmt.name if self.fmt else None,
            "rows": self.read,
            "used": self.used,
            "trimmed": self.trimmed,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "notes": dict(self.notes),
            "stop_ids": sorted(self.encoder.stop_ids),
        }


def _next_batch(stream: Iterator[tuple[int, Conversation]]) -> list[tuple[int, Conversation]]:
    batch, characters = [], 0
    for item in stream:
        batch.append(item)
        for message in item[1].messages:
            characters += len(message.get("content") or "")
        if len(batch) == BATCH or characters > BATCH_CHARACTERS:
            break
    return batch


def cache_folder() -> Path:
    """Where tokenised files are kept: beside the datasets library's own cache."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "sft_token_rows"


def tokenise_file(file: Path | str, fmt: str, encoder: ChatEncoder, recipe: Recipe) -> TokenFile:
    """The tokenised rows of a file, from the cache or made now. Raises: DataError: it cannot be read."""
    digest = _digest_of(file)
    key = hashlib.sha256(
        json.dumps([digest, fmt, _fingerprint(encoder), _options(recipe), _code_digest(fmt)]).encode()
    ).hexdigest()[:32]
    folder = cache_folder() / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "facts.json").is_file():
                with whole_folder(folder) as partial:  # a killed run leaves nothing that looks whole
                    _write(partial, file, fmt, encoder, recipe)
    except OSError as error:
        said = f"{folder.parent}: token rows cannot be kept there ({error.strerror or error})"
        raise DataError(f"{said}; name another folder with the environment variable HF_DATASETS_CACHE") from None
    kept = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    problems = [Problem(*problem) for problem in kept.pop("problems")]
    rows = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    return TokenFile(str(file), rows, {"sha256": digest, **kept}, problems)


def _write(folder: Path, file: Path | str, fmt: str, encoder: ChatEncoder, recipe: Recipe) -> None:
    tokeniser = _Tokeniser(encoder, recipe, fmt)
    with (
        tqdm(desc=f"Tokenising {file}", unit=" rows", disable=None, leave=False) as bar,
        open(folder / "rows.arrow", "wb") as sink,
        pa.ipc.new_stream(sink, SCHEMA) as writer,
    ):
        for batch in tokeniser.batches(read_rows(file)):
            writer.write_batch(batch)
            bar.update(tokeniser.read - bar.n)
    tokeniser.problems.sort()
    facts = {**tokeniser.facts(), "problems": tokeniser.problems}
    (folder / "facts.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _digest_of(file: Path | str) -> str:
    if isinstance(file, str):
        return f"hub:{file}@{hub_revision(file)}"
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def _fingerprint(encoder: ChatEncoder) -> str:
    if encoder in _fingerprints:
        return _fingerprints[encoder]
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items())),
        str(tokenizer.chat_template),
        repr(sorted(tokenizer.special_tokens_map.items())),
    ]
    _fingerprints[encoder] = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return _fingerprints[encoder]


_fingerprints: WeakKeyDictionary[ChatEncoder, str] = WeakKeyDictionary()  # each takes 0.2 s for 150,000 tokens


def _options(recipe: Recipe) -> list[Any]:
    options = recipe.dataset
    trim = options.overlength == "trim"
    return [options.system, options.max_length, trim, options.control_tokens == "text", recipe.chat.loss_on]


def _code_digest(fmt: str) -> str:
    """Of the code that makes the rows: a change of it makes them anew."""
    here = Path(__file__).resolve().parent
    files = [*sorted(here.glob("*.py")), *sorted((here.parent / "model" / "chatglm3").glob("*.py"))]
    files += sorted(FORMATS.glob("*.py")) if fmt == "auto" else [FORMATS / f"{fmt}.py"]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


# --------------------------------------------------------------------------------------------------------- the splits


@dataclass
class Data:
    """What a run trains and scores on.

    train, validation: rows of input_ids and assistant_mask, and seq_lengths where they are packed.
    test_conversations: ("file:line", its messages and tools) for each row of the test split.
    ledger: what data_ledger.json holds.
    """

    encoder: ChatEncoder
    train: datasets.Dataset | datasets.IterableDataset | None
    validation: datasets.Dataset | None = None
    test_conversations: list[tuple[str, Conversation]] = field(default_factory=list)
    files: list[TokenFile] = field(default_factory=list)
    ledger: dict[str, Any] = field(default_factory=dict)


def prepare(recipe: Recipe, tokenizer: Any, scoring_only: bool = False) -> Data:
    """Reads, checks, tokenises, splits and packs the data of a recipe.

    Args: scoring_only: leave out what is not needed for the test split.
    Raises: DataError: bad rows, with file:line, all of them; RecipeError: a file that is not there.
    """
    options = recipe.dataset
    encoder = ChatEncoder(tokenizer, "text" if options.control_tokens == "text" else "error")
    only_test = scoring_only and isinstance(options.test, tuple)
    names = ["test"] if only_test else ["train", "validation", "test"]
    if options.streaming:
        names = [name for name in names if name != "train"]
    made: dict[tuple[str, str], TokenFile] = {}  # a file may be in several splits
    splits: dict[str, list[tuple[TokenFile, float]]] = {}
    for name in names:
        if isinstance(getattr(options, name), tuple):
            splits[name] = []
            for source, file in _files(recipe, name):
                key = (str(file), source.format)
                made[key] = made.get(key) or tokenise_file(file, source.format, encoder, recipe)
                splits[name].append((made[key], source.weight))
    _apply_policies(splits, list(made.values()), recipe)
    for token_file in made.values():
        encoder.stop_ids.update(token_file.facts.pop("stop_ids"))
    files = {name: [file for file, _ in entries] for name, entries in splits.items()}
    rows = {name: _all_rows(entries) for name, entries in files.items()}
    hashes = {name: _hashes(entries) for name, entries in files.items()}
    chosen = {name: np.arange(len(value)) for name, value in hashes.items()}
    seed = int(recipe.training_args.get("seed", 42))
    for name in ("validation", "test"):
        share = getattr(options, name)
        if isinstance(share, float):
            wanted = max(1, round(len(hashes["train"]) * share))
            held = _held_out(hashes["train"][chosen["train"]], wanted, f"{seed}:{name}")
            if not held.any() or held.all():
                part = "no row" if not held.any() else "every row"
                raise recipe.error(f"dataset.{name}", f"a share of {share} holds out {part} of {len(held):,}")
            files[name], rows[name], hashes[name] = files["train"], rows["train"], hashes["train"]
            chosen[name], chosen["train"] = chosen["train"][held], chosen["train"][~held]
    ledger = _ledger(files, hashes, chosen, splits)
    conversations = _conversations(files["test"], chosen["test"], recipe) if "test" in chosen else []
    data = Data(encoder, None, None, conversations, list(made.values()), ledger)
    if "train" in chosen:
        weights = np.concatenate([np.full(len(file.rows), weight) for file, weight in splits["train"]])
        chosen["train"] = _weighted(chosen["train"], weights, seed)
        if not len(chosen["train"]):
            raise recipe.error("dataset.train", "its weights leave no row; raise them")
    views = {name: _view(rows[name], chosen[name]) for name in chosen if name != "test"}
    if options.packing:
        views = {name: pack(view, options.max_length) for name, view in views.items()}
        ledger["packing"] = {name: len(view) for name, view in views.items()}
    data.train, data.validation = views.get("train"), views.get("validation")
    if options.streaming and not scoring_only:
        data.train = _stream(recipe, encoder)
        ledger["streamed"] = [source.path for source in options.train]
    return data


def _files(recipe: Recipe, split: str) -> list[tuple[Source, Path | str]]:
    """The files of a split, each with the source that names it. Raises: RecipeError: one is named twice."""
    found: dict[str, tuple[Source, Path | str]] = {}
    for source in getattr(recipe.dataset, split):
        for file in expand(source, recipe, f"dataset.{split}"):
            place = os.path.realpath(file) if isinstance(file, Path) else file
            if place in found:
                said = f"names {file} twice; give it a weight if its rows are to be seen more often"
                raise recipe.error(f"dataset.{split}", said)
            found[place] = (source, file)
    return list(found.values())


def _all_rows(files: list[TokenFile]) -> datasets.Dataset:
    return datasets.concatenate_datasets([file.rows for file in files])


def _hashes(files: list[TokenFile]) -> np.ndarray:
    columns = [file.rows.data.column("hash") for file in files]
    return np.concatenate([column.to_numpy() for column in columns])


def _held_out(hashes: np.ndarray, wanted: int, seed: str) -> np.ndarray:
    """Which rows are held out: by a seeded hash of their content, so that equal rows stay on one side.

    Returns: bool, (rows,); `wanted` of them, and what equals the last of these.
    """
    salt = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "little")
    mixed = (hashes.astype(np.uint64) ^ np.uint64(salt)) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing
    mixed ^= mixed >> np.uint64(32)
    return mixed <= np.partition(mixed, min(wanted, len(mixed)) - 1)[min(wanted, len(mixed)) - 1]


def _weighted(rows: np.ndarray, weights: np.ndarray, seed: int) -> np.ndarray:
    """Each row as often as its source's weight says; of a broken part, a seeded choice."""
    if (weights == 1).all():
        return rows
    times = np.floor(weights[rows]).astype(np.int64)
    times += np.random.default_rng(seed).random(len(rows)) < weights[rows] - times
    return np.repeat(rows, times)


def _view(rows: datasets.Dataset, chosen: np.ndarray) -> datasets.Dataset:
    if len(chosen) != len(rows) or (chosen != np.arange(len(rows))).any():
        rows = rows.select(chosen)
    return rows.select_columns(["input_ids", "assistant_mask"])


def _refuse_problems(files: Iterable[tuple[str, list[Problem]]], recipe: Recipe) -> None:
    """Raises: DataError: rows that the recipe's policies do not let pass, with file:line, the first SHOWN of them."""
    options = recipe.dataset
    lenient = {
        UNREADABLE: options.on_error == "skip",
        CONTROL: options.control_tokens == "skip",
        OVERLONG: options.overlength != "error",
    }
    refused = [(path, problem) for path, problems in files for problem in problems if not lenient[problem.kind]]
    if refused:
        said = [f"{path}:{problem.line}: {problem.message}" for path, problem in refused[:SHOWN]]
        if len(refused) > SHOWN:
            said.append(f"... and {len(refused) - SHOWN:,} more")
        kinds = sorted({problem.kind for _, problem in refused})
        advice = "; or set ".join(f"{POLICIES[kind][0]}: {POLICIES[kind][1]}" for kind in kinds)
        raise DataError("\n".join([*said, f"mend the {len(refused):,} rows; or set {advice}"]))


def _apply_policies(splits: dict[str, list[tuple[TokenFile, float]]], once: list[TokenFile], recipe: Recipe) -> None:
    """Raises: DataError: bad rows where these are errors, nothing left to use, or more lost than dataset.max_lost."""
    _refuse_problems([(file.path, file.problems) for file in once], recipe)
    for name, entries in splits.items():
        read = sum(file.facts["rows"] for file, _ in entries)
        lost = sum(len(file.problems) + len(file.facts["trimmed"]) for file, _ in entries)
        examples = [f"{file.path}:{p.line}: {p.message}" for file, _ in entries for p in file.problems[:3]]
        if not sum(file.facts["used"] for file, _ in entries):
            raise DataError("\n".join([f"no row of dataset.{name} is left to use", *examples[:SHOWN]]))
        if lost > recipe.dataset.max_lost * read:
            raise DataError(
                "\n".join(
                    [
                        f"{lost:,} of {read:,} rows of dataset.{name} were skipped, dropped or trimmed "
                        f"({lost / read:.1%}), more than dataset.max_lost {recipe.dataset.max_lost:.1%}",
                        *examples[:SHOWN],
                        "mend them, or raise dataset.max_lost (or dataset.max_length, if rows are too long)",
                    ]
                )
            )


def _conversations(files: list[TokenFile], chosen: np.ndarray, recipe: Recipe) -> list[tuple[str, Conversation]]:
    """The chosen rows of the test split again as messages, for scoring."""
    found: list[tuple[str, Conversation]] = []
    begin = 0
    for file in files:
        inside = chosen[(chosen >= begin) & (chosen < begin + len(file.rows))] - begin
        begin += len(file.rows)
        if len(inside):
            wanted = set(file.rows.data.column("line").to_numpy()[inside].tolist())
            fmt = load_formats()[file.facts["format"]]
            for line, row in read_rows(Path(file.path) if Path(file.path).is_file() else file.path):
                if line in wanted:
                    found.append((f"{file.path}:{line}", to_conversation(row, fmt, recipe.dataset.system)))
    return found


def _stream(recipe: Recipe, encoder: ChatEncoder) -> datasets.IterableDataset:
    """Rows tokenised as training asks for them, nothing kept on disk; a bad row stops the run when it is reached."""
    files = _files(recipe, "train")
    if any(source.weight != 1 for source, _ in files):
        raise recipe.error("dataset.train", "a stream has no weights; take them out, or set dataset.streaming: false")

    def rows() -> Iterator[dict[str, Any]]:
        given = 0
        for source, file in files:
            tokeniser = _Tokeniser(encoder, recipe, source.format)
            for batch in tokeniser.batches(read_rows(file)):
                _refuse_problems([(str(file), tokeniser.problems)], recipe)
                tokeniser.problems.clear()
                given += len(batch)
                for row in batch.to_pylist():
                    yield {"input_ids": row["input_ids"], "assistant_mask": row["assistant_mask"]}
            _refuse_problems([(str(file), tokeniser.problems)], recipe)
        if not given:
            raise DataError("no row of dataset.train is left to use")

    return datasets.IterableDataset.from_generator(rows)


# ------------------------------------------------------------------------------------------------------------- ledger


def _ledger(files: dict, hashes: dict, chosen: dict, splits: dict) -> dict[str, Any]:
    entries = []
    for split, entries_of_split in splits.items():
        for file, weight in entries_of_split:
            dropped: dict[str, list[int]] = defaultdict(list)
            for problem in file.problems:
                dropped[problem.kind].append(problem.line)
            facts = dict(file.facts)
            share = facts["supervised_tokens"] / facts["tokens"] if facts["tokens"] else 0.0
            entries.append(
                {"split": split, "path": file.path, "weight": weight, **facts, "supervised_share": round(share, 4)}
                | {"dropped": dict(dropped)}
            )
    ledger: dict[str, Any] = {"files": entries, "rows": {name: len(value) for name, value in chosen.items()}}
    if "train" in chosen:
        count, named = _repeats(files["train"], hashes["train"])
        ledger["duplicates"] = {"rows": count, "named": named}
    if "train" in chosen and "test" in chosen:
        count, named = _leaks(files, hashes, chosen)
        ledger["test_in_train"] = {"rows": count, "named": named}
    return ledger


def _place(files: list[TokenFile], index: int) -> str:
    for file in files:
        if index < len(file.rows):
            return f"{file.path}:{file.rows.data.column('line')[index].as_py()}"
        index -= len(file.rows)
    raise IndexError(index)


def _repeats(files: list[TokenFile], hashes: np.ndarray) -> tuple[int, list[str]]:
    """How many rows say what an earlier row says, and some of them as "later = earlier"."""
    ordered = np.sort(hashes)  # with `hashes` 16 bytes a row, and no more: hence the slices
    count, values = 0, np.zeros(0, hashes.dtype)
    for begin in range(0, len(ordered), 2**16):
        part = ordered[begin : begin + 2**16 + 1]
        again = part[1:][part[1:] == part[:-1]]
        count += len(again)
        values = np.union1d(values, again)[:SHOWN]
    pairs = []
    for value in values:
        places = np.flatnonzero(hashes == value)[: SHOWN + 1].tolist()
        pairs += [(later, places[0]) for later in places[1:]]
    return count, [f"{_place(files, later)} = {_place(files, first)}" for later, first in sorted(pairs)[:SHOWN]]


def _leaks(files: dict, hashes: dict, chosen: dict) -> tuple[int, list[str]]:
    """How many rows of the test split are in the training split, and the first of them."""
    train = hashes["train"][chosen["train"]]
    train.sort()
    rows = chosen["test"]
    at = np.searchsorted(train, hashes["test"][rows])
    leaked = rows[train[np.minimum(at, len(train) - 1)] == hashes["test"][rows]]
    return len(leaked), [_place(files["test"], int(i)) for i in leaked[:SHOWN]]


def ledger_table(ledger: dict[str, Any]) -> str:
    """The ledger as a table for the terminal."""
    head = ("split", "file", "rows", "used", "dropped", "trimmed", "tokens", "supervised")
    lines = [head]
    for file in ledger["files"]:
        lost = sum(len(v) for v in file["dropped"].values())
        supervised = f"{file['supervised_tokens']:,} ({file['supervised_share']:.0%})"
        counts = [f"{file[key]:,}" for key in ("rows", "used")]
        lines.append(
            (
                file["split"],
                file["path"],
                *counts,
                f"{lost:,}",
                f"{len(file['trimmed']):,}",
                f"{file['tokens']:,}",
                supervised,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [
        "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    for file in ledger["files"]:
        for kind, at in file["dropped"].items():
            shown = ", ".join(map(str, at[:10])) + (", ..." if len(at) > 10 else "")
            text.append(f"{file['path']}: dropped {len(at):,} for {kind}: lines {shown}")
        if file["trimmed"]:
            shown = ", ".join(map(str, file["trimmed"][:10])) + (", ..." if len(file["trimmed"]) > 10 else "")
            text.append(f"{file['path']}: trimmed {len(file['trimmed']):,} to dataset.max_length: lines {shown}")
        text += [f"{file['path']}: {count:,} {note}" for note, count in file["notes"].items()]
    if "streamed" in ledger:
        text.append("streamed while training, not counted: " + ", ".join(ledger["streamed"]))
    if ledger.get("duplicates", {}).get("rows"):
        named = "; ".join(ledger["duplicates"]["named"][:3])
        text.append(f"{ledger['duplicates']['rows']:,} training rows repeat an earlier one: {named}")
    if ledger.get("test_in_train", {}).get("rows"):
        leaked = ledger["test_in_train"]
        named = ", ".join(leaked["named"][:5])
        text.append(f"WARNING: {leaked['rows']:,} rows of the test split are in the training split too: {named}")
    return "\n".join(text)
