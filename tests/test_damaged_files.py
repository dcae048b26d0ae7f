"""Files that a start or a resume reads, truncated, with one byte flipped, or gone: it goes on and says so, or says what
to do; exit code 2, no traceback, and nothing that was there before is lost."""

import json
import os
import shutil
from itertools import product

import datasets
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import run_sft
from sft.data import token_cache
from sft.data.chat import ChatEncoder
from sft.data.rows import read_rows
from sft.data.splits import prepare
from sft.data.token_cache import tokenise_file
from sft.files import CHECKSUMS, damage, open_seal, write_json_lines
from sft.model.load import load_model
from sft.model.lora import add_lora
from sft.model.tokenizer import load_tokenizer
from sft.recipe import Source, load_recipe
from sft.results.answers import _answer_lines
from sft.training.resume import checkpoints, end_checkpoint
from sft.training.trainer import make_trainer
from tests.families import FAMILIES, build

RECIPE = """
model_name_or_path: model
output_dir: out
dataset: {train: train.jsonl, validation: test.jsonl, test: test.jsonl, max_length: 128, packing: false}
model_init: {dtype: float32}
lora_config: {r: 4, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}
training_args: {max_steps: 4, save_steps: 2, logging_steps: 3, per_device_train_batch_size: 4, learning_rate: 1.0e-2}
evaluation: {metrics: [chrf], generation: {max_new_tokens: 4}}
export: {merge: false}
"""
CHECKPOINT_FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    CHECKSUMS,
)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def flip(path):
    """One bit of a byte near the end, where the formats with a header have their content."""
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a model of a small vocabulary, data, a recipe, and what its run left."""
    folder = tmp_path_factory.mktemp("finished")
    tokenizer = build(FAMILIES["qwen2_5"], "bytes")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, count in (("train", 8), ("test", 2)):
        rows = [{"instruction": f"Say {name} {i}.", "output": f"Here is {name} {i}, aye."} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_sft.main(["recipe.yaml"]) == 0
    return folder


@pytest.fixture
def run_folder(finished, tmp_path, monkeypatch):
    """A copy of it, in which the test stands."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def told(capfd):
    """Runs the recipe in the working directory, and gives the one message that it ends with."""

    def run(*arguments):
        capfd.readouterr()
        assert run_sft.main(["recipe.yaml", *arguments]) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: ") and "Traceback" not in error and error.count("\n") <= 2, error
        return error

    return run


def log(folder):
    """What a training says of itself, without its durations and the last entry, which is of the process."""
    history = json.loads((folder / "out/trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    entries = [entry for entry in history if "train_runtime" not in entry]
    return [
        {k: v for k, v in entry.items() if not k.endswith(("_runtime", "_per_second", "_time"))} for entry in entries
    ]


def weights(folder):
    return (folder / "out/lora_adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", CHECKPOINT_FILES)
@pytest.mark.parametrize("harm", [truncate, flip, remove])
def test_a_checkpoint_tells_each_file_that_is_not_as_it_was_written(harm, name, run_folder):
    checkpoint = run_folder / "out/checkpoint-4"
    assert damage(checkpoint) is None
    harm(checkpoint / name)
    if (harm, name) == (remove, CHECKSUMS):  # as of another version of this repository, which wrote none
        assert damage(checkpoint) is None
    elif harm is remove:
        assert damage(checkpoint) == f"{name} is missing"
    elif name == CHECKSUMS:
        assert damage(checkpoint) is not None
    else:
        assert damage(checkpoint) == f"{name} is damaged"


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(run_folder, capfd):
    before = weights(run_folder), log(run_folder)
    shutil.rmtree("out/lora_adapter")
    truncate(run_folder / "out/checkpoint-4/optimizer.pt")
    assert run_sft.main(["recipe.yaml"]) == 0
    said = capfd.readouterr().out
    assert "left out: out/checkpoint-4, where optimizer.pt is damaged\n" in said
    assert "going on from out/checkpoint-2\n" in said
    assert (weights(run_folder), log(run_folder)) == before
    assert [(entry["step"], set(entry) & {"loss", "eval_loss"}) for entry in log(run_folder)] == [
        (0, {"eval_loss"}),
        (2, {"eval_loss"}),  # made after checkpoint-2 was saved, and not anew before the first step
        (3, {"loss"}),  # of three steps, of which one was trained now
        (4, {"eval_loss"}),
    ]
    assert damage(run_folder / "out/checkpoint-4") is None


def test_a_run_that_was_killed_after_its_last_checkpoint_makes_up_for_the_validation_there(run_folder):
    before = log(run_folder)
    (run_folder / "out/trainer_state.json").unlink()
    open_seal(run_folder / "out/checkpoint-2")  # and while it was deleting this one
    assert run_sft.main(["recipe.yaml"]) == 0
    assert log(run_folder) == before and before[-1]["eval_loss"] > 0
    assert [path.name for path in (run_folder / "out").glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_finished_run_is_taken_up_with_the_special_tokens_that_training_gave_the_model(run_folder):
    recipe = load_recipe("recipe.yaml")
    tokenizer = load_tokenizer(recipe)
    trainer = make_trainer(recipe, add_lora(load_model(recipe), recipe), tokenizer, prepare(recipe, tokenizer))
    assert trainer.model.config.pad_token_id is None
    trainer.take_up(run_folder / "out/checkpoint-4")
    assert trainer.model.config.pad_token_id == tokenizer.pad_token_id == 562


def test_a_finished_run_is_taken_up_with_its_best_checkpoint(run_folder):
    best = ["load_best_model_at_end=true", "metric_for_best_model=eval_loss", "greater_is_better=true"]
    arguments = ["recipe.yaml", "output_dir=best", "dataset.test=null", "training_args.save_strategy=epoch"]
    arguments += [f"training_args.{each}" for each in best]
    assert run_sft.main(arguments) == 0
    adapter = run_folder / "best/lora_adapter/adapter_model.safetensors"
    before = adapter.read_bytes()
    assert before == (run_folder / "best/checkpoint-2/adapter_model.safetensors").read_bytes()
    assert run_sft.main(arguments) == 0
    assert adapter.read_bytes() == before


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_unasked(run_folder, told):
    before = weights(run_folder)
    flip(run_folder / "out/checkpoint-4/rng_state.pth")
    (run_folder / "out/checkpoint-2/scheduler.pt").unlink()
    error = told()
    assert "out/checkpoint-4, where rng_state.pth is damaged; out/checkpoint-2, where scheduler.pt is missing" in error
    assert "remove out/checkpoint-* to train from the start" in error
    assert weights(run_folder) == before and len(checkpoints(run_folder / "out")) == 2


def test_a_damaged_checkpoint_that_is_named_is_refused(run_folder, told):
    flip(run_folder / "out/checkpoint-4/adapter_model.safetensors")
    error = told("resume_from_checkpoint=out/checkpoint-4")
    assert "out/checkpoint-4 cannot be gone on from: adapter_model.safetensors is damaged; name another" in error


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "adapter_model.safetensors"])
def test_a_truncated_file_is_seen_in_a_checkpoint_without_checksums_too(name, run_folder):
    (run_folder / "out/checkpoint-4" / CHECKSUMS).unlink()
    truncate(run_folder / "out/checkpoint-4" / name)
    assert damage(run_folder / "out/checkpoint-4") == f"{name} is damaged"


def test_a_checkpoint_that_was_being_written_or_deleted_is_none(run_folder):
    whole = run_folder / "out/checkpoint-2"
    open_seal(run_folder / "out/checkpoint-4")
    assert checkpoints(run_folder / "out") == [whole]


def test_checkpoints_are_kept_and_taken_by_their_step_whatever_the_clock_says(tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text('{"global_step": 1}', encoding="utf-8")
        os.utime(tmp_path / f"checkpoint-{step}", (10**9 - step, 10**9 - step))  # the clock was set back
    end_checkpoint(tmp_path / "checkpoint-6", limit=2, best=None)  # a run that went on from checkpoint-4
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-4", tmp_path / "checkpoint-6"]
    end_checkpoint(tmp_path / "checkpoint-6", limit=1, best=str(tmp_path / "checkpoint-4"))
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-4", tmp_path / "checkpoint-6"]
    end_checkpoint(tmp_path / "checkpoint-6", limit=1, best=None)
    assert checkpoints(tmp_path) == [tmp_path / "checkpoint-6"]


@pytest.mark.parametrize("verb", ["--score", "--export"])
@pytest.mark.parametrize("harm", [truncate, flip])
def test_damaged_weights_of_an_adapter_are_named(harm, verb, run_folder, told):
    harm(run_folder / "out/lora_adapter/adapter_model.safetensors")
    assert "out/lora_adapter does not load: adapter_model.safetensors is damaged" in told(verb)
    assert not (run_folder / "out/final_model").exists()


def test_a_truncated_adapter_without_checksums_is_named(run_folder, told):
    (run_folder / "out/lora_adapter" / CHECKSUMS).unlink()
    truncate(run_folder / "out/lora_adapter/adapter_model.safetensors")
    assert "out/lora_adapter does not load: adapter_model.safetensors is damaged" in told("--score")


def test_truncated_settings_of_an_adapter_are_named(run_folder, told):
    truncate(run_folder / "out/lora_adapter/adapter_config.json")
    assert "out/lora_adapter" in told("--score")


@pytest.mark.parametrize("verb", [[], ["--score"], ["--export"]], ids=["train", "score", "export"])
def test_a_truncated_file_of_the_model_is_named(verb, run_folder, told):
    truncate(run_folder / "model/model.safetensors")
    shutil.rmtree("out/checkpoint-4")
    before = weights(run_folder)
    assert "model does not load: model.safetensors is damaged" in told(*verb)
    assert weights(run_folder) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
def test_a_truncated_json_of_the_model_is_named(name, run_folder, told):
    truncate(run_folder / "model" / name)
    assert "model_name_or_path" in told()


@pytest.mark.parametrize("verb", [[], ["--score"], ["--export"]], ids=["train", "score", "export"])
def test_a_truncated_description_of_the_run_is_named(verb, run_folder, told):
    truncate(run_folder / "out/training_config.json")
    assert "out/training_config.json is not JSON" in told(*verb)
    assert not (run_folder / "out/final_model").exists()


@pytest.mark.parametrize("harm", [truncate, flip])
def test_a_damaged_recipe_is_refused_or_another_recipe(harm, run_folder, told):
    content = (run_folder / "recipe.yaml").read_bytes()
    if harm is truncate:
        (run_folder / "recipe.yaml").write_bytes(content[:300])
    else:
        (run_folder / "recipe.yaml").write_bytes(content.replace(b"chrf", b"ch\xf2f"))
    assert "recipe.yaml" in told()


@pytest.mark.parametrize("harm", [truncate, flip])
def test_damaged_scores_are_made_anew(harm, run_folder):
    before = (run_folder / "out/scores.json").read_bytes()
    harm(run_folder / "out/scores.json")
    harm(run_folder / "out/predictions.jsonl")
    assert run_sft.main(["recipe.yaml", "--score"]) == 0
    assert (run_folder / "out/scores.json").read_bytes() == before


def test_a_line_that_is_no_answer_any_more_ends_what_is_taken_up(tmp_path):
    answers = [{"model": "base", "key": f"a:{i}", "text": "Aye.", "finished": True} for i in range(3)]
    path = tmp_path / "predictions.partial.jsonl"
    write_json_lines(path, [{"stops": [1]}, *answers])
    path.write_bytes(
        path.read_bytes().replace(
            b'"text": "Aye.", "finished": true}\n{"model": "base", "key": "a:2"',
            b'"tex|": "Aye.", "finished": true}\n{"model": "base", "key": "a:2"',
        )
    )
    assert _answer_lines(path, {"stops": [1]}) == answers[:1]


def test_damaged_token_rows_are_made_again_and_that_is_said(run_folder, monkeypatch, capfd):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", run_folder / "cache")
    recipe = load_recipe(run_folder / "recipe.yaml")
    encoder, file = ChatEncoder(load_tokenizer(recipe)), run_folder / "train.jsonl"
    rows = tokenise_file(file, Source("x"), encoder, recipe).rows[:]
    kept = next((run_folder / "cache").rglob("rows.arrow")).parent
    for harm, name in product([truncate, flip, remove], ["rows.arrow", "facts.json", CHECKSUMS]):
        capfd.readouterr()
        harm(kept / name)
        assert tokenise_file(file, Source("x"), encoder, recipe).rows[:] == rows, (harm, name)
        if (harm, name) != (remove, CHECKSUMS):
            assert f"{file} is tokenised again: of the kept rows in {kept} " in capfd.readouterr().out, (harm, name)
        assert damage(kept) is None


def test_a_data_file_that_changes_while_it_is_read_is_named_and_not_kept(run_folder, monkeypatch, told):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", run_folder / "cache")

    def growing(file):
        for line, row in read_rows(file):
            yield line, row
            with open(file, "a", encoding="utf-8") as stream:
                stream.write("\n")

    with monkeypatch.context() as patch:
        patch.setattr(token_cache, "read_rows", growing)
        assert "train.jsonl: changed while it was read; run again when nothing writes to it" in told()
    assert not list((run_folder / "cache").rglob("rows.arrow"))
    assert run_sft.main(["recipe.yaml", "--check"]) == 0
