"""What --check says of time: FLOPs against numbers made by hand, tokens of a run, real steps."""

import pytest

import run_sft
from sft.data.splits import prepare
from sft.model.load import meta_model
from sft.model.tokenizer import load_tokenizer
from sft.recipe import load_recipe
from sft.training.duration import matmul_rate, run_tokens
from sft.training.memory import batch_tokens, training_step
from tests.training.sizes import recipe_of, small_model

FULL = ["quantization_config=null", "lora_config=null", "training_args.optim=adamw_torch"]
# A layer of small_model("qwen"): q and o 256 x 256, k and v 256 x 128, gate, up and down 256 x 512.
LAYERS = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)
DOWN, HEAD = 4 * 256 * 512, 128 * 256
ATTENTION = 4 * 3 * 2 * (2 * 64 * 64 * 256)  # forward, in 4 layers: two products for each of 3 rows of 64 tokens


@pytest.mark.parametrize(("checkpointing", "done_again"), [("false", 0), ("true", LAYERS - DOWN)])
def test_flops_are_forward_backward_and_what_is_done_again(tmp_path, checkpointing, done_again):
    small_model("qwen").save_pretrained(tmp_path)
    sizes = ["dataset.max_length=64", "dataset.packing=false", "training_args.per_device_train_batch_size=3"]
    sizes += ["training_args.bf16=true"]  # which decides how attention is computed on a CPU
    recipe = recipe_of("qwen_qlora", tmp_path, *FULL, *sizes, f"training_args.activation_checkpointing={checkpointing}")
    flops, tokens = training_step(recipe, meta_model(recipe), own_loss=True).flops, batch_tokens(recipe)
    assert tokens == 192
    # The head: of half the tokens, never done again; nor is what only a layer's output needs. Backward is two forwards.
    attention = ATTENTION * (4 if done_again else 3)
    assert flops == 2 * 192 * (3 * LAYERS + done_again) + 2 * 96 * 3 * HEAD + attention


def test_tokens_of_a_run_are_those_of_its_epochs_or_of_its_steps(tiny_qwen, tmp_path):
    rows = ['{"human": "one two", "assistant": "%s"}\n' % ("three " * n) for n in (1, 2, 3, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    sizes = ["training_args.per_device_train_batch_size=2", "training_args.gradient_accumulation_steps=1"]
    sizes += [f"dataset.train={tmp_path}/rows.jsonl", "dataset.validation=null", "dataset.test=null"]

    def tokens(*overrides):
        recipe = recipe_of("qwen_qlora", tiny_qwen, *sizes, "dataset.packing=false", *overrides)
        data = prepare(recipe, load_tokenizer(recipe))
        return run_tokens(recipe, data), sum(map(len, data.train["input_ids"]))

    epochs, once = tokens("training_args.num_train_epochs=3")
    assert epochs == 3 * once
    assert tokens("training_args.max_steps=1")[0] == once / 2
    assert tokens("training_args.max_steps=20")[0] == 10 * once


def test_a_matrix_product_has_a_rate():
    import torch

    assert 1e8 < matmul_rate("cpu", torch.float32) < 1e14


def test_check_with_steps_times_them_and_leaves_nothing(tiny_qwen, tmp_path, capfd):
    rows = [f'{{"human": "{number}", "assistant": "two"}}\n' for number in range(10)]
    (tmp_path / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model_name_or_path: {tiny_qwen}\noutput_dir: {tmp_path}/out\ndataset_path: {tmp_path}/rows.jsonl\n"
        "dataset: {validation: 0.2, packing: false}\nlora_config: {r: 2, target_modules: [q_proj]}\n"
        "training_args: {per_device_train_batch_size: 2, num_train_epochs: 5, eval_on_start: true}\n",
        encoding="utf-8",
    )
    before = sorted(tmp_path.iterdir())
    assert run_sft.main([str(recipe), "--check", "--steps", "2"]) == 0
    said = capfd.readouterr().out
    assert "step 2 of 2  loss " in said
    assert "a step takes " in said and " for 20 steps, without validation and scores; the process held " in said
    assert "validation loss" not in said
    assert sorted(tmp_path.iterdir()) == before
    assert load_recipe(recipe).output_dir == tmp_path / "out"


def test_steps_are_of_check_alone(capsys):
    with pytest.raises(SystemExit) as ended:
        run_sft.main(["recipes/smollm2_cpu.yaml", "--steps", "3"])
    assert ended.value.code == 2
    assert "--steps N times N steps with --check" in capsys.readouterr().err
