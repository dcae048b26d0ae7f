"""One file -> token rows on disk, with a ledger of what became of every row.

Each file is tokenised once and kept, memory-mapped, in a cache whose key is its content, the tokenizer, the template
and the options that matter; the policies of the recipe (error, skip, drop) are applied to what the cache says
(bad_rows.py), so a change of policy costs nothing. With several processes the first does the work and the others wait.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypedDict
from weakref import WeakKeyDictionary

import datasets
import numpy as np
import pyarrow as pa
from filelock import FileLock
from tqdm.auto import tqdm

from sft.data.chat import ChatEncoder, Encoded
from sft.data.conversation import Conversation, assistant_turns
from sft.data.row_formats import FORMATS, RowReader
from sft.data.rows import DataFile, HubDataset, dataset_digest, file_type, read_rows
from sft.data.signatures import SIGNATURE_BYTES, signatures, text_of
from sft.data.turn_reader import Turn
from sft.errors import ControlTokenError, DataError, FormatError
from sft.files import whole_folder
from sft.recipe import Recipe

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
UNTRAINED = "answers that their rows take out of the loss"
UNREADABLE, CONTROL, OVERLONG = "bad row", "control token", "over-long"


class Problem(NamedTuple):
    """A row that was not used. line: counted from 1; kind: UNREADABLE, CONTROL or OVERLONG."""

    line: int
    kind: str
    message: str


class TokenRow(NamedTuple):
    """A conversation in tokens. input_ids: int32; turns: the ranges of these that carry loss."""

    line: int
    input_ids: np.ndarray
    turns: list[Turn]
    trimmed: bool
    notes: tuple[str, ...]


class Facts(TypedDict, total=False):
    """A file's part of the ledger. trimmed: lines; stop_ids: token ids that end an answer in this file."""

    sha256: str
    format: str | None
    rows: int
    used: int
    trimmed: list[int]
    tokens: int
    supervised_tokens: int
    notes: dict[str, int]
    stop_ids: list[int]


@dataclass
class TokenFile:
    """One tokenised file: its rows memory-mapped, its part of the ledger.

    signatures: of each row, uint8, (rows, SIGNATURE_BYTES), memory-mapped; none where near copies are not looked for.
    """

    path: DataFile
    rows: datasets.Dataset
    facts: Facts
    problems: list[Problem]
    signatures: np.ndarray = field(default_factory=partial(np.zeros, (0, SIGNATURE_BYTES), np.uint8))


# --------------------------------------------------------------------------------------------------------- tokenising


class Tokeniser:
    """A conversation in, a row or a problem out."""

    def __init__(self, encoder: ChatEncoder, recipe: Recipe):
        self._encoder = encoder
        self._max_length = recipe.dataset.max_length
        self._trims = recipe.dataset.overlength == "trim"
        self._last_turn_only = recipe.chat.loss_on == "last_turn"

    def tokenise(self, line: int, conversation: Conversation, encoded: Encoded | FormatError) -> TokenRow | Problem:
        """encoded: what the encoder made of the conversation, in a batch with others."""
        trimmed = False
        try:
            if isinstance(encoded, FormatError):
                raise encoded
            if not self._trained_turns(conversation, encoded):
                raise FormatError("there is no assistant turn to train on")
            if len(encoded.input_ids) > self._max_length:
                shorter = self._trimmed(conversation, encoded) if self._trims else None
                if shorter is None or not self._trained_turns(conversation, shorter):
                    return self._overlong(line, len(encoded.input_ids))
                encoded, trimmed = shorter, True
        except FormatError as error:
            return Problem(line, CONTROL if isinstance(error, ControlTokenError) else UNREADABLE, str(error))
        input_ids = np.ascontiguousarray(encoded.input_ids, dtype=np.int32)
        answers = assistant_turns(conversation.messages)[: len(encoded.turns)] if conversation.untrained else []
        taken_out = (UNTRAINED,) * len(conversation.untrained.intersection(answers))
        turns = self._trained_turns(conversation, encoded)
        return TokenRow(line, input_ids, turns, trimmed, (*encoded.notes, *taken_out))

    def _trained_turns(self, conversation: Conversation, encoded: Encoded) -> list[Turn]:
        """The turns that carry loss, of the conversation or of a beginning of it."""
        turns = list(encoded.turns)
        if conversation.untrained:
            answers = zip(assistant_turns(conversation.messages), turns, strict=False)
            turns = [turn for answer, turn in answers if answer not in conversation.untrained]
        return [turn for turn in turns if turn == encoded.turns[-1]] if self._last_turn_only else turns

    def _trimmed(self, conversation: Conversation, encoded: Encoded) -> Encoded | None:
        """The longest beginning that ends with an answer and fits, encoded as the conversation that it then is."""
        messages, tools, _ = conversation
        for answer, (_, stop) in reversed(list(zip(assistant_turns(messages), encoded.turns, strict=True))):
            if stop <= self._max_length and answer + 1 < len(messages):
                shorter = self._encoder.encode(messages[: answer + 1], tools)
                if len(shorter.input_ids) <= self._max_length:
                    return shorter
        return None

    def _overlong(self, line: int, length: int) -> Problem:
        message = f"{length:,} tokens, more than dataset.max_length {self._max_length:,}"
        message += ", and its first answer does not end within it" if self._trims else ""
        return Problem(line, OVERLONG, message)


class FileTokeniser:
    """Tokenises one file, row by row in order, and counts what became of the rows.

    problems: of the rows so far, not in order. format_name: a file of formats/, or "auto". signatures: where those of
    the rows are written, if they are to be.
    """

    def __init__(self, encoder: ChatEncoder, recipe: Recipe, format_name: str, signatures: BinaryIO | None = None):
        self.problems: list[Problem] = []
        self.rows_read = 0
        self._encoder, self._tokeniser = encoder, Tokeniser(encoder, recipe)
        self.reader = RowReader(format_name, recipe.dataset.columns, recipe.dataset.system)
        self._signatures = signatures
        self._trimmed: list[int] = []
        self._notes: dict[str, int] = defaultdict(int)
        self._used = self._tokens = self._supervised = 0

    def batches(self, rows: Iterable[tuple[int, Any]]) -> Iterator[pa.RecordBatch]:
        """Arrow batches of SCHEMA. While one batch is in the tokenizer's Rust code the next is read and rendered."""
        stream = self._conversations(rows)
        with ThreadPoolExecutor(1) as pool:
            pending: Future[list[Encoded | FormatError]] | None = None
            waiting: list[tuple[int, Conversation]] = []
            while True:
                batch = _next_batch(stream)
                rendered = self._encoder.render_batch([conversation for _, conversation in batch])
                following = pool.submit(self._encoder.encode_rendered, rendered) if batch else None
                if pending is not None:
                    yield self._to_arrow(waiting, pending.result())
                if following is None:
                    return
                pending, waiting = following, batch

    def facts(self) -> Facts:
        return {
            "format": self.reader.format.name if self.reader.format else None,
            "rows": self.rows_read,
            "used": self._used,
            "trimmed": self._trimmed,
            "tokens": self._tokens,
            "supervised_tokens": self._supervised,
            "notes": dict(self._notes),
            "stop_ids": sorted(self._encoder.stop_ids),
        }

    def _conversations(self, rows: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Conversation]]:
        """Rows as conversations; those that are none go to `problems`."""
        for line, row in rows:
            self.rows_read += 1
            try:
                if isinstance(row, FormatError):
                    raise row
                yield line, self.reader.read(row)
            except FormatError as error:
                self.problems.append(Problem(line, UNREADABLE, str(error)))

    def _to_arrow(self, batch: list[tuple[int, Conversation]], encoded: list[Encoded | FormatError]) -> pa.RecordBatch:
        rows: list[TokenRow] = []
        said: list[str] = []
        for (line, conversation), result in zip(batch, encoded, strict=True):
            row = self._tokeniser.tokenise(line, conversation, result)
            if isinstance(row, Problem):
                self.problems.append(row)
            else:
                rows.append(row)
                self._count(row)
                if self._signatures:
                    said.append(text_of(conversation.messages))
        if self._signatures:
            self._signatures.write(signatures(said).tobytes())
        lengths = [len(row.input_ids) for row in rows]
        offsets = np.cumsum([0, *lengths], dtype=np.int64)
        # +1 where a turn starts, -1 where it stops; summed up that is the mask. Turns are apart and not empty.
        edges = np.zeros(offsets[-1] + 1, dtype=np.int8)
        begins = list(zip(offsets.tolist(), rows, strict=False))
        edges[[begin + start for begin, row in begins for start, _ in row.turns]] += 1
        edges[[begin + stop for begin, row in begins for _, stop in row.turns]] -= 1
        hashes = b"".join(hashlib.blake2b(row.input_ids.data, digest_size=8).digest() for row in rows)
        list_offsets = pa.array(offsets).cast(pa.int32())  # raises past 2**31
        ids = np.concatenate([np.zeros(0, np.int32), *(row.input_ids for row in rows)])
        return pa.record_batch(
            [
                pa.ListArray.from_arrays(list_offsets, pa.array(ids)),
                pa.ListArray.from_arrays(list_offsets, pa.array(np.cumsum(edges[:-1], dtype=np.int8))),
                pa.array([row.line for row in rows], pa.int32()),
                pa.array(np.frombuffer(hashes, dtype=np.int64)),
            ],
            schema=SCHEMA,
        )

    def _count(self, row: TokenRow) -> None:
        self._used += 1
        self._tokens += len(row.input_ids)
        self._supervised += sum(stop - start for start, stop in row.turns)
        if row.trimmed:
            self._trimmed.append(row.line)
        for note in row.notes:
            self._notes[note] += 1


def _next_batch(stream: Iterator[tuple[int, Conversation]]) -> list[tuple[int, Conversation]]:
    batch: list[tuple[int, Conversation]] = []
    characters = 0
    for item in stream:
        batch.append(item)
        for message in item[1].messages:
            characters += len(message.get("content") or "")
        if len(batch) == BATCH or characters > BATCH_CHARACTERS:
            break
    return batch


# -------------------------------------------------------------------------------------------------------------- cache


def cache_folder() -> Path:
    """Where tokenised files are kept: beside the datasets library's own cache."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "sft_token_rows"


def tokenise_file(file: DataFile, fmt: str, encoder: ChatEncoder, recipe: Recipe) -> TokenFile:
    """The tokenised rows of a file, from the cache or made now. Raises: DataError: it cannot be read."""
    digest = _digest_of(file)
    key = hashlib.sha256(
        json.dumps([digest, file_type(file), fmt, _fingerprint(encoder), _options(recipe), _code_digest(fmt)]).encode()
    ).hexdigest()[:32]
    folder = cache_folder() / key
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not (folder / "facts.json").is_file():
                with whole_folder(folder) as partial:
                    _write(partial, file, fmt, encoder, recipe)
    except OSError as error:
        raise DataError(
            f"{folder.parent}: token rows cannot be kept there ({error.strerror or error}); name another folder with "
            "the environment variable HF_DATASETS_CACHE"
        ) from None
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    problems = [Problem(*problem) for problem in facts.pop("problems")]
    rows = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    tokens = TokenFile(file, rows, {"sha256": digest, **facts}, problems)
    if finds_near_copies(recipe) and len(rows):  # no system maps an empty file
        tokens.signatures = np.memmap(folder / "signatures", np.uint8, "r", shape=(len(rows), SIGNATURE_BYTES))
    return tokens


def finds_near_copies(recipe: Recipe) -> bool:
    """Whether rows of the test split are looked up among those of the training split."""
    options = recipe.dataset
    return options.near_duplicates == "report" and options.test is not None and not options.streaming


def _write(folder: Path, file: DataFile, fmt: str, encoder: ChatEncoder, recipe: Recipe) -> None:
    with (
        tqdm(desc=f"Tokenising {file}", unit=" rows", disable=None, leave=False) as bar,
        open(folder / "rows.arrow", "wb") as sink,
        open(folder / "signatures", "wb") as signatures_file,
        pa.ipc.new_stream(sink, SCHEMA) as writer,
    ):
        tokeniser = FileTokeniser(encoder, recipe, fmt, signatures_file if finds_near_copies(recipe) else None)
        for batch in tokeniser.batches(read_rows(file)):
            writer.write_batch(batch)
            bar.update(tokeniser.rows_read - bar.n)
    tokeniser.reader.refuse_unused_columns(file)
    tokeniser.problems.sort()
    facts = {**tokeniser.facts(), "problems": tokeniser.problems}
    (folder / "facts.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def _digest_of(file: DataFile) -> str:
    if isinstance(file, HubDataset):
        return f"hub:{file}@{dataset_digest(file)}"
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
    control_as_text = options.control_tokens == "text"
    rows = [options.system, options.columns, options.max_length, trim, control_as_text, recipe.chat.loss_on]
    return [*rows, finds_near_copies(recipe)]


def _code_digest(fmt: str) -> str:
    """Of the code that makes the rows: a change of it makes them anew."""
    here = Path(__file__).resolve().parent
    files = [*sorted(here.glob("*.py")), *sorted((here.parent / "model" / "chatglm3").glob("*.py"))]
    files += sorted(FORMATS.glob("*.py")) if fmt == "auto" else [FORMATS / f"{fmt}.py"]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
