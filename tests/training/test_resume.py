"""Which runs go on from a checkpoint: what would be another run is refused, what is the same is taken up."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from sft import run
from sft.data.splits import Data
from sft.errors import RecipeError, UserError
from sft.training import check
from sft.training.arguments import steps
from tests.test_methods import cut_off, recipe_of, trained

LORA = "lora_config={r: 4, target_modules: [q_proj, v_proj]}"
ALONE = [LORA, "export.merge=false"]


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (["dataset.test=0.25"], ["dataset.test=0.5"], r"dataset.test: 0.25 then, 0.5 now"),
        (["dataset.test=0.25"], [], r"dataset.test: 0.25 then, \["),
        ([], ["model_init.dtype=bfloat16"], "model_init.dtype: 'float32' then, 'bfloat16' now"),
        ([], ["model_init.revision=other"], "model_init.revision: None then, 'other' now"),
    ],
)
def test_what_would_be_another_run_is_not_gone_on_with(small_qwen, tmp_path, before, after, told):
    out, _, _ = trained(small_qwen, tmp_path, *ALONE, *before, scored=False)
    cut_off(out, 2)
    with pytest.raises(RecipeError, match=f"comes from another run .*{told}"):
        trained(small_qwen, tmp_path, *ALONE, *after, scored=False)


def test_a_test_file_and_what_changes_no_weight_may_be_others(small_qwen, tmp_path, capfd):
    out, _, _ = trained(small_qwen, tmp_path, *ALONE, "dataset.test=null", scored=False)
    cut_off(out, 2)
    trained(small_qwen, tmp_path, *ALONE, "model_init.attn_implementation=sdpa", scored=False)
    assert f"going on from {out}/checkpoint-2" in capfd.readouterr().out


def test_weights_without_the_optimizer_are_taken_up_when_finished_and_not_gone_on_from(small_qwen, tmp_path, capfd):
    options = [*ALONE, "training_args.save_only_model=true"]
    out, _, _ = trained(small_qwen, tmp_path, *options, scored=False)
    assert not (out / "checkpoint-4/optimizer.pt").exists()
    trained(small_qwen, tmp_path, *options, scored=False)
    assert f"training is finished: taking up {out}/checkpoint-4" in capfd.readouterr().out
    cut_off(out, 2)
    with pytest.raises(RecipeError, match="checkpoint-2 was saved with training_args.save_only_model, .* adapter_name"):
        trained(small_qwen, tmp_path, *options, scored=False)


BEST = [*ALONE, "training_args.eval_strategy=steps", "training_args.eval_steps=2", "training_args.learning_rate=5"]
BEST += ["training_args.load_best_model_at_end=true"]  # so fast that it grows worse: the first is the best


@pytest.mark.parametrize("until", [2, 4], ids=["unfinished", "finished"])
def test_the_best_checkpoint_is_found_though_the_folder_was_moved(small_qwen, tmp_path, until):
    out, _, _ = trained(small_qwen, tmp_path, *BEST, scored=False)
    state = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["best_global_step"] == 2
    first = load_file(out / "lora_adapter/adapter_model.safetensors")
    cut_off(out, until)
    moved = tmp_path / "moved"
    shutil.move(out, moved)
    trained(small_qwen, tmp_path, *BEST, f"output_dir={moved}", scored=False)
    again = load_file(moved / "lora_adapter/adapter_model.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


def test_a_best_checkpoint_that_is_gone_is_told(small_qwen, tmp_path):
    out, _, _ = trained(small_qwen, tmp_path, *BEST, scored=False)
    shutil.rmtree(out / "checkpoint-2")
    with pytest.raises(UserError, match="checkpoint-2, the best checkpoint, cannot be taken up: it is not there"):
        trained(small_qwen, tmp_path, *BEST, scored=False)


def test_a_run_that_drops_the_last_batch_is_known_as_finished(small_qwen, tmp_path, capfd):
    options = [*ALONE, "training_args.max_steps=-1", "training_args.num_train_epochs=2"]
    options += ["training_args.per_device_train_batch_size=3", "training_args.dataloader_drop_last=true"]
    _, _, trainer = trained(small_qwen, tmp_path, *options, scored=False)
    assert trainer.state.global_step == 4  # of 8 rows 6 an epoch
    trained(small_qwen, tmp_path, *options, scored=False)
    assert "training is finished" in capfd.readouterr().out


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 23, 24, 25])
@pytest.mark.parametrize("drops", ["true", "false"])
def test_steps_are_those_that_the_trainer_makes(tmp_path, rows, drops):
    """As transformers 5.24 counts them: what accumulates is what batches an epoch has."""
    options = ["training_args.max_steps=-1", "training_args.gradient_accumulation_steps=4", LORA]
    recipe = recipe_of("m", tmp_path, *options, f"training_args.dataloader_drop_last={drops}")
    batches = rows // 2 if drops == "true" else -(-rows // 2)
    data: Data = type("Rows", (), {"train": range(rows)})()
    assert steps(recipe, data) == max(1, -(-batches // 4)) * 3


def test_what_a_run_has_written_is_not_asked_for_again(tmp_path, monkeypatch):
    recipe = recipe_of("m", tmp_path, LORA)
    monkeypatch.setattr(check.shutil, "disk_usage", lambda folder: type("Disk", (), {"free": 2**20})())
    with pytest.raises(RecipeError, match=r"GB free; free some, set training_args.save_total_limit, or name"):
        check.check_disk(recipe, weights=10**6, trained=10**5, steps_to_do=4)
    (recipe.output_dir / "checkpoint-2").mkdir(parents=True)
    (recipe.output_dir / "checkpoint-2/optimizer.pt").write_bytes(bytes(6 * 2**20))
    assert check.check_disk(recipe, weights=10**6, trained=10**5, steps_to_do=4).startswith("disk: about 0.0 GB")


def test_steps_are_timed_of_a_schedule_that_goes_by_validations(small_qwen, tmp_path, capfd):
    from sft.verbs import time_steps

    options = [*ALONE, "training_args.lr_scheduler_type=reduce_lr_on_plateau", "training_args.eval_strategy=steps"]
    recipe = recipe_of(small_qwen, tmp_path, *options, "training_args.lr_scheduler_kwargs={factor: 0.5}")
    tokenizer = run.load_tokenizer(recipe)
    time_steps(recipe, tokenizer, run.prepare_data(recipe, tokenizer, ""), 1)
    assert "a step takes" in capfd.readouterr().out
