"""The splits of a run: files -> train, validation and test; shares held out, weights, packing, the stream."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from sft.data.bad_rows import refuse_losses, refuse_problems
from sft.data.chat import ChatEncoder
from sft.data.conversation import Conversation
from sft.data.general import read_general
from sft.data.ledger import Ledger, make_ledger
from sft.data.packing import pack, pack_stream
from sft.data.row_formats import RowReader
from sft.data.rows import DataFile, expand, read_rows
from sft.data.token_cache import TokenFile, finds_near_copies, refuse_changed, tokenise_file
from sft.data.token_rows import Split, TokenRows
from sft.data.tokens import FileTokeniser
from sft.errors import DataError, ModelError
from sft.recipe import Recipe, Source

SPLITS = ("train", "validation", "test")


@dataclass
class Data:
    """What a run trains and scores on.

    train, validation: rows of input_ids and assistant_mask, and seq_lengths where they are packed.
    splits: which rows of the files each split has chosen.
    test_conversations: ("file:line", its messages and tools) for each row of the test split.
    validation_conversations: the same of the rows of the validation split that are answered while training.
    general: the same of evaluation.general.
    ledger: what data_ledger.json holds.
    """

    encoder: ChatEncoder
    train: datasets.Dataset | datasets.IterableDataset | None
    validation: datasets.Dataset | None = None
    test_conversations: list[tuple[str, Conversation]] = field(default_factory=list)
    validation_conversations: list[tuple[str, Conversation]] = field(default_factory=list)
    general: list[tuple[str, Conversation]] = field(default_factory=list)
    files: list[TokenFile] = field(default_factory=list)
    splits: dict[str, Split] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=lambda: Ledger())

    @property
    def longest(self) -> int:
        """Tokens of the longest row of all files."""
        columns = [file.rows.data.column("input_ids") for file in self.files if len(file.rows)]
        return max((pa.compute.max(pa.compute.list_value_length(ids)).as_py() for ids in columns), default=0)


def prepare(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, scoring_only: bool = False) -> Data:
    """Reads, checks, tokenises, splits and packs the data of a recipe.

    Args: scoring_only: leave out what is not needed for the test split.
    Raises: DataError: bad rows, with file:line, all of them; RecipeError: a file that is not there.
    """
    options = recipe.dataset
    spelled = "text" if options.control_tokens == "text" else "error"
    try:
        encoder = ChatEncoder(tokenizer, spelled, recipe.chat.loss_on == "after_thinking", recipe.chat.date)
    except ModelError as error:  # it lies with the chat template, mostly
        raise recipe.error("chat.template" if recipe.chat.template else "model_name_or_path", str(error)) from None
    only_test = scoring_only and isinstance(options.test, tuple)
    names = ("test",) if only_test else SPLITS
    splits, files = _tokenise_splits(names, encoder, recipe)
    for file in files:
        encoder.stop_ids.update(file.facts.pop("stop_ids"))
    for name in names:
        share = getattr(options, name)
        if isinstance(share, float):
            splits[name] = _hold_out(splits["train"], name, share, recipe)
    data = Data(encoder, None, files=files, splits=splits, ledger=make_ledger(splits, finds_near_copies(recipe)))
    data.general = read_general(recipe)
    if "test" in splits:
        data.test_conversations = _conversations(splits["test"], recipe)
    if "validation" in splits and recipe.evaluation.every:
        validation = splits["validation"]
        answered = validation.data_rows()[: recipe.evaluation.during_samples]
        data.validation_conversations = _conversations(replace(validation, chosen=answered), recipe)
    if "train" in splits and _apply_weights(splits["train"], recipe):
        data.ledger["seen"] = len(splits["train"].data_rows())
    views = {name: split.view() for name, split in splits.items() if name != "test"}
    if options.packing:  # a run has decided what auto is (packing_probe.py); undecided it packs, and the trainer looks
        views = {name: pack(view, options.max_length) for name, view in views.items()}
        data.ledger["packing"] = {name: len(view) for name, view in views.items()}
    data.train, data.validation = views.get("train"), views.get("validation")
    if options.streaming and not scoring_only:
        data.train = _stream(recipe, encoder)
        data.ledger["streamed"] = [source.path for source in options.train]
    return data


def _tokenise_splits(
    names: tuple[str, ...], encoder: ChatEncoder, recipe: Recipe
) -> tuple[dict[str, Split], list[TokenFile]]:
    """The splits that have files of their own, and these files, each once, though it may be in several splits.

    Raises: DataError: rows that the recipe's policies do not let pass.
    """
    files: dict[tuple[str, str, str], TokenFile] = {}
    sources: dict[str, list[tuple[TokenFile, float]]] = {}
    for name in names:
        if not isinstance(getattr(recipe.dataset, name), tuple) or (recipe.dataset.streaming and name == "train"):
            continue
        sources[name] = []
        for source, file in _files(recipe, name):
            key = (str(file), source.format, str(recipe.dataset.columns_of(source)))
            files[key] = files.get(key) or tokenise_file(file, source, encoder, recipe)
            sources[name].append((files[key], source.weight))
    refuse_problems([(str(file.path), file.problems, file.facts["rows"]) for file in files.values()], recipe)
    splits = {}
    for name, entries in sources.items():
        rows = TokenRows([file for file, _ in entries], [weight for _, weight in entries])
        refuse_losses(name, rows.files, recipe)
        splits[name] = Split(name, rows, np.arange(len(rows.hashes)))
    return splits, list(files.values())


def _files(recipe: Recipe, split: str) -> list[tuple[Source, DataFile]]:
    """The files of a split, each with the source that names it. Raises: RecipeError: one is named twice."""
    found: dict[str, tuple[Source, DataFile]] = {}
    for source in getattr(recipe.dataset, split):
        for file in expand(source, recipe, f"dataset.{split}"):
            place = os.path.realpath(file) if isinstance(file, Path) else str(file)
            if place in found:
                raise recipe.error(
                    f"dataset.{split}",
                    f"names {file} twice; give it a weight if its rows are to be seen more often",
                )
            found[place] = (source, file)
    return list(found.values())


def _hold_out(train: Split, name: str, share: float, recipe: Recipe) -> Split:
    """Takes a share of the training rows out of `train`, for a split of their own.

    By a seeded hash of their content, so that equal rows, and all examples of a row, stay on one side.
    Raises: RecipeError: no row, or every row, would be held out.
    """
    hashes, firsts = train.rows.hashes, train.rows.firsts
    count = max(1, round(len(hashes if firsts is None else firsts) * share))
    seed = f"{recipe.seed}:{name}"
    salt = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "little")

    def mixed(chosen: np.ndarray) -> np.ndarray:
        product = (hashes[chosen].astype(np.uint64) ^ np.uint64(salt)) * np.uint64(0x9E3779B97F4A7C15)
        return product ^ (product >> np.uint64(32))  # Fibonacci hashing

    of_rows = mixed(train.data_rows())
    last = min(count, len(of_rows)) - 1
    # `count` rows, and what equals the last of these
    held_out = mixed(train.chosen) <= np.partition(of_rows, last)[last]
    if held_out.all():
        raise recipe.error(f"dataset.{name}", f"a share of {share} holds out every row of {len(of_rows):,}")
    split = Split(name, train.rows, train.chosen[held_out], has_own_files=False)
    train.chosen = train.chosen[~held_out]
    return split


def _apply_weights(train: Split, recipe: Recipe) -> bool:
    """Each row as often as its file's weight says; of a broken part, a seeded choice.

    Returns: whether there are weights.
    Raises: RecipeError: nothing is left.
    """
    weights = train.rows.weight_of_each_row()
    if (weights == 1).all():
        return False
    weights = weights[train.chosen]
    times = np.floor(weights).astype(np.int64)
    rows = train.data_rows()
    drawn = np.random.default_rng(recipe.seed).random(len(rows))
    times += drawn[np.searchsorted(rows, train.chosen, side="right") - 1] < weights - times  # one draw a data row
    train.chosen = np.repeat(train.chosen, times)
    if not len(train.chosen):
        raise recipe.error("dataset.train", "its weights leave no row; raise them")
    return True


def _conversations(split: Split, recipe: Recipe) -> list[tuple[str, Conversation]]:
    """The chosen rows of a split again as messages, for scoring."""
    found: list[tuple[str, Conversation]] = []
    for file, inside in split.rows.by_file(split.chosen):
        found += _read_again(file, set(file.rows.data.column("line").to_numpy()[inside].tolist()), recipe)
        refuse_changed(file.path, str(file.facts["sha256"]))
    return found


def first_conversations(files: Sequence[TokenFile], recipe: Recipe, count: int = 20) -> list[tuple[str, Conversation]]:
    """The first usable rows of each file again as messages."""
    firsts = [(file, set(file.rows.data.column("line")[:count].to_pylist())) for file in files]
    return [found for file, lines in firsts if lines for found in _read_again(file, lines, recipe)]


def kept_from_recipe(recipe: Recipe) -> str:
    """What to say where the command line names other training rows, and the other splits still are the recipe's own."""
    places = {name: recipe.places[key] for name in SPLITS if (key := f"dataset.{name}") in recipe.places}
    kept = {}
    for name in ("validation", "test"):
        if isinstance(sources := getattr(recipe.dataset, name), tuple) and not places[name].is_overridden:
            kept[places[name].key] = ", ".join(source.path for source in sources)
    if not kept or not places["train"].is_overridden:
        return ""
    named = " and ".join(f"{key} ({paths})" for key, paths in kept.items())
    how = " ".join(f"{key}=0.1" for key in kept)
    return (
        f"{places['train'].key} is yours, with {named} of {recipe.path}; to hold out a tenth of your own rows for each "
        f"instead: {how}"
    )


def strange_prompts(data: Data, recipe: Recipe, count: int = 1000) -> str:
    """What to say where no test row has a system prompt of the training rows, by the first `count` of each file."""
    train, test = data.splits.get("train"), data.splits.get("test")
    if train is None or test is None or not test.has_own_files:
        return ""
    trained = {_system_prompt(conversation) for _, conversation in first_conversations(train.rows.files, recipe, count)}
    tested = {_system_prompt(conversation) for _, conversation in data.test_conversations}
    if trained & tested:
        return ""
    return (
        "no row of the test split has a system prompt that training rows have, so the scores are for another prompt "
        "than was trained; give them the same one (dataset.system is for rows that bring none)"
    )


def _system_prompt(conversation: Conversation) -> str | None:
    first = conversation.messages[0]
    return str(first["content"]) if first["role"] in ("system", "developer") else None


def _read_again(file: TokenFile, lines: set[int], recipe: Recipe) -> Iterator[tuple[str, Conversation]]:
    """Some rows of a file, each with its "file:line"."""
    reader, last = RowReader(str(file.facts["format"]), file.columns, recipe.dataset.system), max(lines)
    for line, row in read_rows(file.path):
        if line in lines:
            yield f"{file.path}:{line}", reader.read(row)
        if line >= last:
            return


def _stream(recipe: Recipe, encoder: ChatEncoder) -> datasets.IterableDataset:
    """Rows tokenised as training asks for them, nothing kept on disk; a bad row stops the run when it is reached."""
    files = _files(recipe, "train")
    if any(source.weight != 1 for source, _ in files):
        raise recipe.error("dataset.train", "a stream has no weights; take them out, or set dataset.streaming: false")

    chosen = {"files": tuple(files), "encoder": encoder, "recipe": recipe}  # of a list datasets would make shards
    return datasets.IterableDataset.from_generator(_stream_as_trained, gen_kwargs=chosen)


def _stream_as_trained(
    files: tuple[tuple[Source, DataFile], ...], encoder: ChatEncoder, recipe: Recipe
) -> Iterator[dict[str, Any]]:
    """A function of the module, so that worker processes can be given it."""
    rows = _streamed_rows(files, encoder, recipe)
    return pack_stream(rows, recipe.dataset.max_length, recipe.seed) if recipe.dataset.packing else rows


def _streamed_rows(
    files: tuple[tuple[Source, DataFile], ...], encoder: ChatEncoder, recipe: Recipe
) -> Iterator[dict[str, Any]]:
    given = 0
    for source, file in files:
        tokeniser = FileTokeniser(encoder, recipe, source)
        for batch in tokeniser.batches(read_rows(file), file):
            refuse_problems([(str(file), tokeniser.problems, tokeniser.rows_read)], recipe)
            tokeniser.problems.clear()
            given += len(batch)
            for row in batch.to_pylist():
                yield {"input_ids": row["input_ids"], "assistant_mask": row["assistant_mask"]}
        tokeniser.reader.refuse_unused_columns(file)
        refuse_problems([(str(file), tokeniser.problems, tokeniser.rows_read)], recipe)
    if not given:
        raise DataError("no row of dataset.train is left to use")
