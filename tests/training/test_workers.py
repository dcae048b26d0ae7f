"""Worker processes of the data loader, started afresh (spawn) as on Windows and macOS, where all is pickled to them."""

import json

import pytest

from sft.data.splits import prepare
from sft.model.load import load_model
from sft.model.tokenizer import load_tokenizer
from sft.recipe import load_recipe
from sft.training.trainer import make_trainer

RECIPE = """
model_name_or_path: {model}
output_dir: {folder}/out
dataset: {{train: {folder}/train.jsonl, max_length: 192}}
training_args:
  max_steps: 1
  per_device_train_batch_size: 2
  dataloader_num_workers: 1
  dataloader_multiprocessing_context: spawn
"""
ROWS = {
    "packed": ["dataset.packing=true"],
    "unpacked": ["dataset.packing=false"],
    "streamed": ["dataset.packing=false", "dataset.streaming=true"],
    "packed stream": ["dataset.packing=true", "dataset.streaming=true"],
}


@pytest.mark.parametrize("rows", ROWS)
def test_a_worker_that_is_started_afresh_makes_the_batch_of_the_run_itself(small_qwen, tmp_path, rows):
    talks = [[{"human": f"Question {i}?", "assistant": "Yes. " * (i + 1)}] for i in range(6)]
    lines = [json.dumps({"conversation": talk}) + "\n" for talk in talks]
    (tmp_path / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=small_qwen, folder=tmp_path), encoding="utf-8")
    recipe = load_recipe(path, ROWS[rows])
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    trainer = make_trainer(recipe, load_model(recipe), tokenizer, data)
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.multiprocessing_context.get_start_method()) == (1, "spawn")
    batch = next(iter(loader))
    known = {tuple(row["input_ids"]): sum(row["assistant_mask"]) for row in data.train}
    if rows != "streamed":  # two rows one after another, without padding
        assert tuple(batch["input_ids"][0].tolist()) in {first + second for first in known for second in known}
    else:
        for ids, labels, real in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            assert known[tuple(ids[real.bool()].tolist())] == (labels != -100).sum()
    assert (batch["labels"] != -100).any()
