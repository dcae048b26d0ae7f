"""One file -> token rows on disk, made once and kept.

They are memory-mapped from a cache whose key is the file's content, the tokenizer, the template and the options that
matter; the policies of the recipe (error, skip, drop) are applied to what the cache says (bad_rows.py), so a change of
policy costs nothing. With several processes the first does the work and the others wait.
"""

import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import datasets
import numpy as np
import pyarrow as pa

from sft.data import cache
from sft.data.chat import ChatEncoder
from sft.data.row_formats import FORMATS
from sft.data.rows import DataFile, HubDataset, count_rows, dataset_digest, file_type, read_rows
from sft.data.signatures import SIGNATURE_BYTES
from sft.data.tokens import SCHEMA, Facts, FileTokeniser, Problem
from sft.errors import DataError
from sft.plain_text import plain_text
from sft.recipe import Recipe, Source
from sft.terminal import bar, is_watched


@dataclass
class TokenFile:
    """One tokenised file: its rows memory-mapped, its part of the ledger.

    signatures: of each row, uint8, (rows, SIGNATURE_BYTES), memory-mapped; none where near copies are not looked for.
    columns: how the keys of its rows were renamed.
    """

    path: DataFile
    rows: datasets.Dataset
    facts: Facts
    problems: list[Problem]
    signatures: np.ndarray = field(default_factory=partial(np.zeros, (0, SIGNATURE_BYTES), np.uint8))
    columns: dict[str, str] | None = None


def tokenise_file(file: DataFile, source: Source, encoder: ChatEncoder, recipe: Recipe) -> TokenFile:
    """The tokenised rows of a file, from the cache or made now. Raises: DataError: it cannot be read."""
    digest = _digest_of(file)
    code = _code_digest(source.format)
    parts = [digest, _ending(file), source.format, _fingerprint(encoder), _options(recipe, source), code]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def make(partial: Path) -> None:
        _write(partial, file, source, encoder, recipe)
        refuse_changed(file, digest)

    try:
        folder = cache.use(key, str(file), make)
        cache.shrink(recipe.dataset.cache_gb * 1e9)
    except OSError as error:
        raise DataError(
            f"{cache.cache_folder()}: token rows cannot be kept there ({error.strerror or error}); name another folder "
            "with the environment variable HF_DATASETS_CACHE"
        ) from None
    facts = json.loads((folder / cache.DONE).read_text(encoding="utf-8"))
    del facts["source"]
    problems = [Problem(*problem) for problem in facts.pop("problems")]
    rows = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    tokens = TokenFile(file, rows, {"sha256": digest, **facts}, problems, columns=recipe.dataset.columns_of(source))
    if finds_near_copies(recipe) and len(rows):  # no system maps an empty file
        tokens.signatures = np.memmap(folder / "signatures", np.uint8, "r", shape=(len(rows), SIGNATURE_BYTES))
    return tokens


def finds_near_copies(recipe: Recipe) -> bool:
    """Whether rows of the test split are looked up among those of the training split."""
    options = recipe.dataset
    return options.near_duplicates == "report" and options.test is not None and not options.streaming


@contextmanager
def _frozen_heap() -> Iterator[None]:
    """Keeps the garbage collector from going over all that the libraries hold again and again: 8 % of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _write(folder: Path, file: DataFile, source: Source, encoder: ChatEncoder, recipe: Recipe) -> None:
    with (
        _frozen_heap(),
        bar(f"tokenising {plain_text(file)}", count_rows(file) if is_watched() else None) as advance,
        open(folder / "rows.arrow", "wb") as sink,
        open(folder / "signatures", "wb") as signatures_file,
        pa.ipc.new_stream(sink, SCHEMA) as writer,
    ):
        tokeniser = FileTokeniser(encoder, recipe, source, signatures_file if finds_near_copies(recipe) else None)
        read = 0
        for batch in tokeniser.batches(read_rows(file), file):
            writer.write_batch(batch)
            advance(tokeniser.rows_read - read)
            read = tokeniser.rows_read
    tokeniser.reader.refuse_unused_columns(file)
    tokeniser.problems.sort()
    facts = {**tokeniser.facts(), "problems": tokeniser.problems, "source": str(file)}
    (folder / cache.DONE).write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")


def refuse_changed(file: DataFile, digest: str) -> None:
    """Raises: DataError: a file is another one than when its digest was taken."""
    if isinstance(file, Path) and _digest_of(file) != digest:
        raise DataError(f"{file}: changed while it was read; run again when nothing writes to it any more")


def _digest_of(file: DataFile) -> str:
    if isinstance(file, HubDataset):
        return f"hub:{file}@{dataset_digest(file)}"
    try:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None


def _ending(file: DataFile) -> str | None:
    """What says how a file is read: .jsonl and .jsonl.gz of the same bytes are two files."""
    return None if isinstance(file, HubDataset) else f"{file_type(file)} {file.suffix.lower()}"


def _fingerprint(encoder: ChatEncoder) -> str:
    if encoder in _fingerprints:
        return _fingerprints[encoder]
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items())),
        str(tokenizer.chat_template),
        str(encoder.day),
        repr(sorted(tokenizer.special_tokens_map.items())),
    ]
    _fingerprints[encoder] = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return _fingerprints[encoder]


_fingerprints: WeakKeyDictionary[ChatEncoder, str] = WeakKeyDictionary()  # each takes 0.2 s for 150,000 tokens


def _options(recipe: Recipe, source: Source) -> list[Any]:
    options = recipe.dataset
    columns = options.columns_of(source)
    chat, trim, control_as_text = recipe.chat, options.overlength == "trim", options.control_tokens == "text"
    rows = [options.system, columns, options.max_length, trim, control_as_text, chat.examples, chat.loss_on]
    return [*rows, finds_near_copies(recipe)]


def _code_digest(fmt: str) -> str:
    """Of the code that makes the rows: a change of it makes them anew."""
    here = Path(__file__).resolve().parent
    files = [*sorted(here.glob("*.py")), *sorted((here.parent / "model" / "chatglm3").glob("*.py"))]
    files += sorted(FORMATS.glob("*.py")) if fmt == "auto" else [FORMATS / f"{fmt}.py"]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
