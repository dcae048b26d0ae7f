"""Files -> rows -> messages -> token rows on disk, with a ledger of what became of every row.

Each file is tokenised once and kept, memory-mapped, in a cache whose key is its content, the tokenizer, the template
and the options that matter; the policies of the recipe (error, skip, drop) are applied to what the cache says, so a
change of policy costs nothing. With several processes the first does the work and the others wait for it.
"""

import glob
import hashlib
import importlib
import json
import os
import shutil
import sys
import tempfile
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm.auto import tqdm

from sft.chat import ChatEncoder, Conversation, Encoded
from sft.errors import ControlTokenError, DataError, FormatError
from sft.recipe import Recipe, Source

FORMATS = Path(__file__).resolve().parent.parent / "formats"
SHOWN = 20  # problems printed before a count
BATCH = 1000  # rows tokenised at once
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


# ------------------------------------------------------------------------------------------------------------ formats


class Format(NamedTuple):
    name: str
    fields: dict[str, dict[str, Any]]
    to_messages: Callable[..., list[dict[str, Any]]]


def load_formats() -> dict[str, Format]:
    """Every file of formats/ by its name."""
    root = str(FORMATS.parent)
    if root not in sys.path:
        sys.path.insert(0, root)
    found = {}
    for path in sorted(FORMATS.glob("*.py")):
        if path.stem != "__init__":
            module = importlib.import_module(f"formats.{path.stem}")
            found[path.stem] = Format(path.stem, module.FIELDS, module.to_messages)
    return found


def detect_format(row: Any) -> Format:
    """The format whose required fields a row has; of several, the one that asks for the most.

    Raises: FormatError: no format fits.
    """
    formats = load_formats()
    fits = [f for f in formats.values() if isinstance(row, dict) and all(key in row for key in f.fields["required"])]
    if fits:
        return max(fits, key=lambda f: len(f.fields["required"]))
    wants = "; ".join(f"{f.name}: {', '.join(f.fields['required'])}" for f in formats.values())
    found = f"the fields {', '.join(map(str, row)) or 'none'}" if isinstance(row, dict) else type(row).__name__
    raise FormatError(f"no format fits {found}; the required fields are {wants}")


def to_conversation(row: Any, fmt: Format, system: str | None) -> Conversation:
    """Checks a row's fields and reads it. Raises: FormatError: what is wrong with it."""
    if not isinstance(row, dict):
        raise FormatError(f"the row is {_json_type(row)}, not an object")
    for kind in ("required", "optional"):
        for key, wanted in fmt.fields[kind].items():
            value = row.get(key)
            if value is None:
                if kind == "required":
                    raise FormatError(f"the field {key!r} is {'null' if key in row else 'missing'} (format {fmt.name})")
            elif not isinstance(value, wanted):
                raise FormatError(f"the field {key!r} is {_json_type(value)}, not {_wanted(wanted)}")
    tools = row.get("tools") if "tools" in fmt.fields["optional"] else None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise FormatError(f"the field 'tools' is not JSON: {error}") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise FormatError("the field 'tools' must be a list of JSON schemas")
    return Conversation(fmt.to_messages(row, system), tools or None)


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _wanted(types: type | tuple[type, ...]) -> str:
    names = {str: "text", list: "a list", dict: "an object", int: "a number", float: "a number", bool: "a boolean"}
    return " or ".join(names.get(t, t.__name__) for t in (types if isinstance(types, tuple) else (types,)))


# ------------------------------------------------------------------------------------------------------------ reading


def expand(source: Source, recipe: Recipe, key: str) -> list[Path | str]:
    """The files of a source, or the hub id it is. Raises: RecipeError: neither."""
    path = Path(source.path)
    if path.is_file():
        return [path]
    if path.is_dir():
        raise recipe.error(key, f"{source.path} is a directory; name its files, e.g. {source.path.rstrip('/')}/*.jsonl")
    if any(c in source.path for c in "*?["):
        files = [Path(name) for name in sorted(glob.glob(source.path, recursive=True)) if Path(name).is_file()]
        if files:
            return list(files)
        raise recipe.error(key, f"no file matches {source.path} (working directory: {Path.cwd()})")
    beside = recipe.path.parent / source.path
    hint = f"; {beside} exists: paths are relative to the working directory" if beside.exists() else ""
    if hint or path.suffix or source.path.count("/") != 1 or source.path.startswith((".", "/", "~")):
        raise recipe.error(key, f"there is no file {source.path} (working directory: {Path.cwd()}){hint}")
    return [source.path]


def read_rows(file: Path | str) -> Iterator[tuple[int, Any]]:
    """(line, row) of a JSON lines file, a JSON array or a hub data set; a row that cannot be read is a FormatError.

    Raises: DataError: the file as a whole cannot be read.
    """
    if isinstance(file, str):
        yield from enumerate(_hub_rows(file), start=1)
        return
    try:
        with open(file, "rb") as stream:
            head = stream.read(4)
            if head[:2] in (b"\xff\xfe", b"\xfe\xff") or head[1:2] == b"\0":
                raise DataError(f"{file}: is UTF-16, not UTF-8; save it as UTF-8")
            stream.seek(3 if head[:3] == b"\xef\xbb\xbf" else 0)
            empty = True
            for number, line in enumerate(stream, start=1):
                if line.isspace():
                    continue
                if empty and line.lstrip()[:1] == b"[":
                    yield from _array_rows(file)
                    return
                empty = False
                yield number, _parsed(line)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if empty:
        raise DataError(f"{file}: is empty; one JSON object a line is needed")


def _parsed(line: bytes) -> Any:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        return FormatError(f"is not UTF-8 ({byte}); if the file is GBK or the like, save it as UTF-8")
    except ValueError as error:
        what = getattr(error, "msg", str(error))
        return FormatError(f"is not JSON: {what} at column {getattr(error, 'colno', 1)}")
    except RecursionError:
        return FormatError("is JSON nested too deep to read")
    if b"\\ud" in line or b"\\uD" in line:  # an escaped surrogate: alone, no tokenizer can take it
        try:
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            return FormatError("holds half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return row


def _array_rows(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: begins as a JSON array and is not one: {error}") from None
    if not rows:
        raise DataError(f"{file}: is an empty array")
    yield from enumerate(rows, start=1)


def _hub_rows(name: str) -> Iterable[Any]:
    try:
        return datasets.load_dataset(name, split="train", streaming=True)
    except Exception as error:  # whatever the hub client raises, it is about this name or the network
        raise DataError(f"{name}: is no file here, and the hub does not give it: {error}".splitlines()[0]) from None


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
        """Arrow batches of SCHEMA. While one batch is in the tokenizer's Rust code the next is read."""
        stream = self.conversations(rows)
        with ThreadPoolExecutor(1) as pool:
            pending: Future | None = None
            waiting: list[tuple[int, Conversation]] = []
            while True:
                batch = list(islice(stream, BATCH))
                following = pool.submit(self.encoder.encode_batch, [c for _, c in batch]) if batch else None
                if pending is not None:
                    yield self._to_arrow(waiting, pending.result())
                if following is None:
                    return
                pending, waiting = following, batch

    def _to_arrow(self, batch: list[tuple[int, Conversation]], encoded: list[Encoded | FormatError]) -> pa.RecordBatch:
        ids, masks, lines, hashes = [], [], [], []
        for (line, conversation), row in zip(batch, encoded, strict=True):
            if isinstance(row, ControlTokenError):
                self.problems.append(Problem(line, CONTROL, str(row)))
                continue
            if isinstance(row, FormatError):
                self.problems.append(Problem(line, UNREADABLE, str(row)))
                continue
            if not row.turns:
                self.problems.append(Problem(line, UNREADABLE, "there is no assistant turn to train on"))
                continue
            if len(row.input_ids) > self.options.max_length:
                kept = self._trimmed(conversation, row) if self.options.overlength == "trim" else None
                if kept is None:
                    said = f"{len(row.input_ids):,} tokens, more than dataset.max_length {self.options.max_length:,}"
                    if self.options.overlength == "trim":
                        said += ", and its first answer does not end within it"
                    self.problems.append(Problem(line, OVERLONG, said))
                    continue
                row = kept
                self.trimmed.append(line)
            tokens = np.asarray(row.input_ids, dtype=np.int32)
            mask = np.zeros(len(tokens), dtype=np.int8)
            for start, stop in row.turns[-1:] if self.last_turn else row.turns:
                mask[start:stop] = 1
            ids.append(tokens)
            masks.append(mask)
            lines.append(line)
            hashes.append(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest())
            for note in row.notes:
                self.notes[note] += 1
        offsets = pa.array(np.cumsum([0, *map(len, ids)], dtype=np.int32))
        flat_mask = np.concatenate(masks) if masks else np.zeros(0, np.int8)
        flat_ids = np.concatenate(ids) if ids else np.zeros(0, np.int32)
        self.used += len(ids)
        self.tokens += len(flat_ids)
        self.supervised += int(flat_mask.sum(dtype=np.int64))
        return pa.record_batch(
            [
                pa.ListArray.from_arrays(offsets, pa.array(flat_ids)),
                pa.ListArray.from_arrays(offsets, pa.array(flat_mask)),
                pa.array(lines, pa.int32()),
                pa.array(np.frombuffer(b"".join(hashes), dtype=np.int64)),
            ],
            schema=SCHEMA,
        )

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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "facts.json").is_file():
            # Made beside its place and moved there when whole: a killed run leaves nothing that looks finished.
            partial = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=folder.parent))
            try:
                _write(partial, file, fmt, encoder, recipe)
                shutil.rmtree(folder, ignore_errors=True)
                os.replace(partial, folder)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    kept = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    problems = [Problem(*problem) for problem in kept.pop("problems")]
    rows = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    return TokenFile(str(file), rows, {"sha256": digest, **kept}, problems)


def _write(folder: Path, file: Path | str, fmt: str, encoder: ChatEncoder, recipe: Recipe) -> None:
    tokeniser = _Tokeniser(encoder, recipe, fmt)
    bar = tqdm(desc=f"Tokenising {file}", unit=" rows", disable=None, leave=False)
    with open(folder / "rows.arrow", "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for batch in tokeniser.batches(read_rows(file)):
            writer.write_batch(batch)
            bar.update(tokeniser.read - bar.n)
    bar.close()
    tokeniser.problems.sort()
    facts = {**tokeniser.facts(), "problems": tokeniser.problems}
    (folder / "facts.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _digest_of(file: Path | str) -> str:
    if isinstance(file, str):
        return f"hub:{file}"
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def _fingerprint(encoder: ChatEncoder) -> str:
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items())),
        str(tokenizer.chat_template),
        repr(sorted(tokenizer.special_tokens_map.items())),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _options(recipe: Recipe) -> list[Any]:
    options = recipe.dataset
    trim = options.overlength == "trim"
    return [options.system, options.max_length, trim, options.control_tokens == "text", recipe.chat.loss_on]


def _code_digest(fmt: str) -> str:
    """Of the code that makes the rows: a change of it makes them anew."""
    here = Path(__file__).resolve().parent
    files = [here / "chat.py", here / "dataset.py", *sorted((here / "chatglm3").glob("*.py"))]
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
    names = ("test",) if scoring_only and isinstance(options.test, tuple) else ("train", "validation", "test")
    if options.streaming:
        names = tuple(name for name in names if name != "train")
    splits: dict[str, list[tuple[TokenFile, float]]] = {}
    for name in names:
        sources = getattr(options, name)
        if isinstance(sources, tuple):
            found = [(source, file) for source in sources for file in expand(source, recipe, f"dataset.{name}")]
            splits[name] = [(tokenise_file(file, s.format, encoder, recipe), s.weight) for s, file in found]
    _apply_policies(splits, recipe)
    once = {file.path: file for entries in splits.values() for file, _ in entries}
    for file in once.values():
        encoder.stop_ids.update(file.facts.pop("stop_ids"))
    files = {name: [file for file, _ in entries] for name, entries in splits.items()}
    rows = {name: _all_rows(entries) for name, entries in files.items()}
    hashes = {name: _hashes(entries) for name, entries in files.items()}
    chosen = {name: np.arange(len(value)) for name, value in hashes.items()}
    seed = int(recipe.training_args.get("seed", 42))
    for name in ("validation", "test"):
        share = getattr(options, name)
        if isinstance(share, float):
            held = _held_out(hashes["train"][chosen["train"]], share, f"{seed}:{name}")
            if not held.any() or held.all():
                part = "no row" if not held.any() else "every row"
                raise recipe.error(f"dataset.{name}", f"a share of {share} holds out {part} of {len(held):,}")
            files[name], rows[name], hashes[name] = files["train"], rows["train"], hashes["train"]
            chosen[name], chosen["train"] = chosen["train"][held], chosen["train"][~held]
    ledger = _ledger(files, hashes, chosen, splits)
    conversations = _conversations(files["test"], chosen["test"], recipe) if "test" in chosen else []
    data = Data(encoder, None, None, conversations, list(once.values()), ledger)
    if "train" in chosen:
        weights = np.concatenate([np.full(len(file.rows), weight) for file, weight in splits["train"]])
        chosen["train"] = _weighted(chosen["train"], weights, seed)
    made = {name: _view(rows[name], chosen[name]) for name in chosen}
    if options.packing:
        made = {name: pack(view, options.max_length) for name, view in made.items() if name != "test"}
        ledger["packing"] = {name: len(view) for name, view in made.items()}
    data.train, data.validation = made.get("train"), made.get("validation")
    if options.streaming and not scoring_only:
        data.train = _stream(recipe, encoder)
        ledger["streamed"] = [source.path for source in options.train]
    return data


def _all_rows(files: list[TokenFile]) -> datasets.Dataset:
    return datasets.concatenate_datasets([file.rows for file in files])


def _hashes(files: list[TokenFile]) -> np.ndarray:
    columns = [file.rows.data.column("hash") for file in files]
    return np.concatenate([column.to_numpy() for column in columns])


def _held_out(hashes: np.ndarray, share: float, seed: str) -> np.ndarray:
    """Which rows are held out: by a seeded hash of their content, so that equal rows stay on one side.

    Returns: bool, (rows,); about `share` of them, at least one.
    """
    salt = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "little")
    mixed = (hashes.astype(np.uint64) ^ np.uint64(salt)) * np.uint64(0x9E3779B97F4A7C15)  # Fibonacci hashing
    mixed ^= mixed >> np.uint64(32)
    wanted = max(1, round(len(hashes) * share))
    return mixed <= np.partition(mixed, wanted - 1)[wanted - 1] if len(hashes) else np.zeros(0, dtype=bool)


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


def _apply_policies(splits: dict[str, list[tuple[TokenFile, float]]], recipe: Recipe) -> None:
    """Raises: DataError: bad rows where these are errors, nothing left to use, or more lost than dataset.max_lost."""
    once = {file.path: file for entries in splits.values() for file, _ in entries}
    _refuse_problems([(path, file.problems) for path, file in once.items()], recipe)
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
    wanted, begin = set(chosen.tolist()), 0
    for file in files:
        lines = {line: begin + i for i, line in enumerate(file.rows.data.column("line").to_pylist())}
        begin += len(lines)
        fmt = load_formats()[file.facts["format"]]
        for line, row in read_rows(Path(file.path) if Path(file.path).is_file() else file.path):
            if lines.get(line) in wanted:
                found.append((f"{file.path}:{line}", to_conversation(row, fmt, recipe.dataset.system)))
    return found


def _stream(recipe: Recipe, encoder: ChatEncoder) -> datasets.IterableDataset:
    """Rows tokenised as training asks for them, nothing kept on disk; a bad row stops the run when it is reached."""
    sources = [(source, file) for source in recipe.dataset.train for file in expand(source, recipe, "dataset.train")]

    def rows() -> Iterator[dict[str, Any]]:
        for source, file in sources:
            tokeniser = _Tokeniser(encoder, recipe, source.format)
            for batch in tokeniser.batches(read_rows(file)):
                _refuse_problems([(str(file), tokeniser.problems)], recipe)
                for row in batch.to_pylist():
                    yield {"input_ids": row["input_ids"], "assistant_mask": row["assistant_mask"]}

    return datasets.IterableDataset.from_generator(rows)


# ------------------------------------------------------------------------------------------------------------ packing


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows put into as few bins as best-fit decreasing finds; each list holds the rows of one bin.

    >>> best_fit([3, 5, 2, 4], capacity=7)
    [[1, 2], [3, 0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
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

    def gather(batch: dict[str, list]) -> dict[str, list]:
        made: dict[str, list] = {"input_ids": [], "assistant_mask": [], "seq_lengths": []}
        for members in batch["rows"]:
            picked = rows.select(members, keep_in_memory=True)[:]
            made["seq_lengths"].append([len(ids) for ids in picked["input_ids"]])
            for column in ("input_ids", "assistant_mask"):
                made[column].append([token for row in picked[column] for token in row])
        return made

    return datasets.Dataset.from_dict({"rows": bins}).with_transform(gather)


def _offsets(rows: datasets.Dataset) -> np.ndarray:
    """Cumulated lengths, int64, (rows + 1,)."""
    lengths = [pa.compute.list_value_length(chunk).to_numpy() for chunk in rows.data.column("input_ids").chunks]
    counts = np.concatenate(lengths) if lengths else np.zeros(0, np.int64)
    if rows._indices is not None:
        counts = counts[rows._indices.column(0).to_numpy()]
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


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
        repeated = _repeats(files["train"], hashes["train"])
        ledger["duplicates"] = {"rows": len(repeated), "named": repeated[:SHOWN]}
    if "train" in chosen and "test" in chosen:
        leaked = _leaks(files, hashes, chosen)
        ledger["test_in_train"] = {"rows": len(leaked), "named": leaked[:SHOWN]}
    return ledger


def _place(files: list[TokenFile], index: int) -> str:
    for file in files:
        if index < len(file.rows):
            return f"{file.path}:{file.rows.data.column('line')[index].as_py()}"
        index -= len(file.rows)
    raise IndexError(index)


def _repeats(files: list[TokenFile], hashes: np.ndarray) -> list[str]:
    """Rows that say what an earlier row says, as "later = earlier"."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    pairs = sorted((int(order[i + 1]), int(order[i])) for i in same)
    return [f"{_place(files, later)} = {_place(files, earlier)}" for later, earlier in pairs[:SHOWN]] + [""] * max(
        0, len(pairs) - SHOWN
    )


def _leaks(files: dict, hashes: dict, chosen: dict) -> list[str]:
    train = np.sort(hashes["train"][chosen["train"]])
    rows = chosen["test"]
    if not len(train):
        return []
    at = np.searchsorted(train, hashes["test"][rows])
    inside = train[np.minimum(at, len(train) - 1)] == hashes["test"][rows]
    leaked = rows[inside]
    return [_place(files["test"], int(i)) for i in leaked[:SHOWN]] + [""] * max(0, len(leaked) - SHOWN)


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
