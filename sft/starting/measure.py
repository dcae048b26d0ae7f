"""What is to be known of a model and of data before a recipe can be written: lengths in tokens, layers, memory."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft.data.packing import token_counts
from sft.data.splits import prepare
from sft.data.token_cache import TokenFile
from sft.data.tokens import CONTROL, UNREADABLE
from sft.recipe import Recipe

ROUTERS = ("gate", "router", "shared_expert_gate")  # of experts: they choose, and LoRA leaves them alone


@dataclass
class Measured:
    """Of the rows of dataset.train, but for `longest` and `problems`, which are of all files.

    lengths: tokens of each example; answers: tokens of each answer that carries loss; rows: that can be used.
    problems: {kind: places} of rows that cannot be used as they are.
    """

    files: list[TokenFile]
    rows: int
    lengths: np.ndarray
    answers: np.ndarray
    longest: int
    problems: dict[str, list[str]]


def measure(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Measured:
    """Tokenises all data; the recipe must take every row, however long, and leave out what it cannot read.

    Raises: UserError: there is no data, or none of it can be used.
    """
    data = prepare(recipe, tokenizer)
    by_path = {str(file.path): file for file in data.files}
    train = [by_path[entry["path"]] for entry in data.ledger["files"] if entry["split"] == "train"]
    lengths = np.concatenate([token_counts(file.rows) for file in train])
    problems: dict[str, list[str]] = {UNREADABLE: [], CONTROL: []}
    for file in data.files:
        for problem in file.problems:
            problems.setdefault(problem.kind, []).append(f"{file.path}:{problem.line}")
    answers = np.concatenate([_answers(file) for file in train])
    return Measured(train, sum(file.facts["used"] for file in train), lengths, answers, data.longest, problems)


def _answers(file: TokenFile) -> np.ndarray:
    """Lengths of the runs of 1 in assistant_mask, none across two rows.

    masks 0 1 1 | 1 0, of which the second begins at 3: edges at 1, 3, 4 -> runs of 2 and 1
    """
    masks: Any = file.rows.data.column("assistant_mask").combine_chunks()
    flat, starts = masks.flatten().to_numpy(), masks.offsets.to_numpy()[:-1]
    flat = np.concatenate([flat, [0]])
    is_first = np.zeros(len(flat), bool)
    is_first[starts] = True
    before = np.concatenate([[0], flat[:-1]])
    begins = np.flatnonzero((flat == 1) & ((before == 0) | is_first))
    ends = np.flatnonzero((before == 1) & ((flat == 0) | is_first))
    return ends - begins


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers for LoRA, in the model's order: all but the output layer and the routers."""
    head = model.get_output_embeddings()
    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
    names = dict.fromkeys(name.rpartition(".")[2] for name, _ in modules)
    return [name for name in names if name not in ROUTERS]
