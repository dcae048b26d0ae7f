"""A run's data, prepared from the files that a test writes into its own folder."""

import json
from pathlib import Path

import datasets
import pytest

from sft.data.splits import prepare
from sft.recipe import load_recipe
from tests.families import FAMILIES, build

RECIPE = """
model_name_or_path: unused
output_dir: out
dataset:
  train: train.jsonl
  system: S
  packing: false
"""


def talk(*texts):
    """A row of turns: question, answer, question, answer, ..."""
    return {"conversation": [{"human": q, "assistant": a} for q, a in zip(texts[::2], texts[1::2], strict=True)]}


def write(name, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    Path(name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def texts(tokenizer, rows):
    """The words of each row without the template's."""
    said = [tokenizer.decode(row["input_ids"]) for row in rows]
    return [" ".join(part.split("\n")[1] for part in text.split("<|im_start|>")[1:]) for text in said]


@pytest.fixture(scope="module")
def tokenizer():
    return build(FAMILIES["qwen2_5"], "bytes")


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """A working directory and a cache for this test alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(tokenizer, empty_folder):
    def prepared(*overrides, tokenizer=tokenizer, **options):
        Path("recipe.yaml").write_text(RECIPE, encoding="utf-8")
        return prepare(load_recipe("recipe.yaml", overrides), tokenizer, **options)

    return prepared
