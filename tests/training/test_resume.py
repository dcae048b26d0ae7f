"""Which runs go on from a checkpoint: what would be another run is refused, what is the same is taken up."""

import json
import shutil

import datasets
import pytest
import torch
from safetensors.torch import load_file

from sft import run
from sft.errors import RecipeError, UserError
from sft.files import seal
from sft.model.load import load_model
from sft.model.lora import add_lora
from sft.training import check
from sft.training.arguments import steps
from sft.training.trainer import make_trainer
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


@pytest.mark.parametrize("name", ["lora_adapter", "final_model", "report.html"])
def test_results_that_no_run_wrote_are_not_written_over(small_qwen, tmp_path, name):
    file = tmp_path / "out" / name / ("notes.txt" if "." not in name else "")
    file.parent.mkdir(parents=True)
    file.write_text("mine", encoding="utf-8")
    (tmp_path / "out/thesis.txt").write_text("mine too", encoding="utf-8")
    with pytest.raises(RecipeError, match=f"out holds {name}, and no training_config.json of a run that wrote them; n"):
        trained(small_qwen, tmp_path, *ALONE, scored=False)
    assert file.read_text(encoding="utf-8") == "mine" and len(list((tmp_path / "out").iterdir())) == 2


def test_another_run_is_not_written_over_though_it_has_no_checkpoints(small_qwen, tmp_path):
    options = [*ALONE, "training_args.save_strategy=no"]
    out, _, _ = trained(small_qwen, tmp_path, *options, scored=False)
    first = (out / "lora_adapter/adapter_model.safetensors").read_bytes()
    with pytest.raises(RecipeError, match="comes from another run .training_args.learning_rate: 0.01 then, 0.02 now"):
        trained(small_qwen, tmp_path, *options, "training_args.learning_rate=0.02", scored=False)
    trained(small_qwen, tmp_path, *options, scored=False)  # the same is made again
    assert (out / "lora_adapter/adapter_model.safetensors").read_bytes() == first


@pytest.mark.parametrize("is_file", [True, False])
def test_a_folder_that_cannot_be_written_is_told_by_the_estimate_of_the_disk(tmp_path, monkeypatch, is_file):
    place = tmp_path / "place"
    if is_file:
        place.write_text("", encoding="utf-8")
    else:
        place.mkdir()

        def refuses(dir):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(check.tempfile, "TemporaryFile", refuses)
    recipe = recipe_of("m", tmp_path, LORA, f"output_dir={place}{'' if is_file else '/run'}")
    told = (
        "is a file; name a folder" if is_file else "cannot be written: Operation not permitted; make it writable, or n"
    )
    with pytest.raises(RecipeError, match=f"output_dir.*: {place} {told}"):
        check.check_disk(recipe, weights=1, trained=1, steps_to_do=1)


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
    told = "save_only_model left out the optimizer.*; in another output_dir train on from its weights .adapter_name_or"
    with pytest.raises(RecipeError, match=told):
        trained(small_qwen, tmp_path, *options, scored=False)
    with pytest.raises(RecipeError, match=r"checkpoint-2 cannot be gone on from: .*save_only_model.*; name another"):
        trained(small_qwen, tmp_path, *options, f"resume_from_checkpoint={out}/checkpoint-2", scored=False)


def test_weights_alone_are_passed_over_for_an_older_checkpoint_with_its_optimizer(small_qwen, tmp_path, capfd):
    out, _, _ = trained(small_qwen, tmp_path, *ALONE, "training_args.save_steps=1", scored=False)
    first = load_file(out / "lora_adapter/adapter_model.safetensors")
    cut_off(out, 3)
    for file in (*out.glob("checkpoint-3/rng_state*"), out / "checkpoint-3/optimizer.pt"):
        file.unlink()
    seal(out / "checkpoint-3")
    capfd.readouterr()
    trained(small_qwen, tmp_path, *ALONE, "training_args.save_steps=1", scored=False)
    said = capfd.readouterr().out
    assert f"left out: {out}/checkpoint-3, where training_args.save_only_model" in said
    assert f"going on from {out}/checkpoint-2" in said
    again = load_file(out / "lora_adapter/adapter_model.safetensors")
    assert all(torch.equal(first[key], again[key]) for key in first)


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


def test_a_best_checkpoint_that_is_gone_is_told_with_the_way_out(small_qwen, tmp_path, capfd):
    out, _, _ = trained(small_qwen, tmp_path, *BEST, scored=False)
    shutil.rmtree(out / "checkpoint-2")
    with pytest.raises(UserError, match="checkpoint-2, the best checkpoint, cannot be taken up: it is not there; .*"):
        trained(small_qwen, tmp_path, *BEST, scored=False)
    trained(small_qwen, tmp_path, *BEST[:-1], "training_args.load_best_model_at_end=false", scored=False)
    assert f"training is finished: taking up {out}/checkpoint-4" in capfd.readouterr().out


def test_the_best_checkpoint_of_another_folder_stays_the_best(small_qwen, tmp_path):
    """transformers looks for it where the run was, and else deletes what is not the best."""
    out, _, _ = trained(small_qwen, tmp_path, *BEST, scored=False)
    first = load_file(out / "lora_adapter/adapter_model.safetensors")
    cut_off(out, 2)
    shutil.move(out, tmp_path / "moved")
    options = [*BEST, f"output_dir={tmp_path}/new", f"resume_from_checkpoint={tmp_path}/moved/checkpoint-2"]
    options += ["training_args.save_total_limit=2", "training_args.max_steps=6"]
    new, _, _ = trained(small_qwen, tmp_path, *options, scored=False)
    again = load_file(new / "lora_adapter/adapter_model.safetensors")
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert {path.name for path in new.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.parametrize("option", ["training_args.save_only_model=true", "training_args.logging_steps=1"])
def test_of_one_checkpoint_and_the_best_a_finished_run_is_known_as_finished(small_qwen, tmp_path, capfd, option):
    options = [*BEST, option, "training_args.save_total_limit=1"]
    out, _, _ = trained(small_qwen, tmp_path, *options, scored=False)
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    capfd.readouterr()
    trained(small_qwen, tmp_path, *options, scored=False)
    assert f"training is finished: taking up {out}/checkpoint-4" in capfd.readouterr().out


def test_a_run_that_stops_early_by_itself_keeps_weights_alone(small_qwen, tmp_path):
    options = [*BEST, "training_args.save_only_model=true", "early_stopping={early_stopping_patience: 1}"]
    out, _, _ = trained(small_qwen, tmp_path, *options, "training_args.max_steps=10", scored=False)
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert not list(out.glob("checkpoint-*/optimizer.pt"))


def test_a_run_that_drops_the_last_batch_is_known_as_finished(small_qwen, tmp_path, capfd):
    options = [*ALONE, "training_args.max_steps=-1", "training_args.num_train_epochs=2"]
    options += ["training_args.per_device_train_batch_size=3", "training_args.dataloader_drop_last=true"]
    _, _, trainer = trained(small_qwen, tmp_path, *options, scored=False)
    assert trainer.state.global_step == 4  # of 8 rows 6 an epoch
    trained(small_qwen, tmp_path, *options, scored=False)
    assert "training is finished" in capfd.readouterr().out


@pytest.mark.parametrize("drops", ["true", "false"])
def test_steps_are_those_that_the_trainer_makes(small_qwen, tmp_path, drops):
    options = [*ALONE, "training_args.max_steps=-1", "training_args.gradient_accumulation_steps=4"]
    recipe = recipe_of(small_qwen, tmp_path, *options, f"training_args.dataloader_drop_last={drops}")
    tokenizer = run.load_tokenizer(recipe)
    data = run.prepare_data(recipe, tokenizer, "")
    trainer = make_trainer(recipe, add_lora(load_model(recipe), recipe), tokenizer, data)
    loaders = []
    for count in (2, 7, 8, 9, 23, 24, 25):
        trainer.train_dataset = data.train = datasets.concatenate_datasets([data.train] * 4).select(range(count))
        loaders.append(trainer.get_train_dataloader())
        *_, made = trainer.set_initial_training_values(trainer.args, loaders[-1])
        assert steps(recipe, data) == made, count
    trainer.train_dataset = data.train = data.train.select(range(1))
    if drops == "true":
        with pytest.raises(RecipeError, match="drops all of 1 rows, as a batch takes 2"):
            steps(recipe, data)


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
