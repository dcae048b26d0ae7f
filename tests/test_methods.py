"""Methods by the recipe alone, each through a whole run: trained, resumed, merged, certified, scored."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from sft import run
from sft.errors import RecipeError
from sft.model import load
from sft.model.lora import add_lora
from sft.model.lora_init import to_plain_lora
from sft.recipe import PEFT_TYPES, load_recipe
from sft.results import export
from sft.results.merge import refuse_unmergeable
from sft.training.check import with_lora
from sft.verbs import export_again

RECIPE = """
model_name_or_path: {model}
output_dir: {folder}/out
dataset: {{train: {folder}/train.jsonl, validation: {folder}/other.jsonl, test: {folder}/other.jsonl, max_length: 100}}
model_init: {{dtype: float32}}
training_args:
  max_steps: 4
  save_steps: 2
  logging_steps: 1
  per_device_train_batch_size: 2
  learning_rate: 1e-2
  lr_scheduler_type: constant
  eval_strategy: "no"
  eval_on_start: false
evaluation: {{metrics: [perplexity], max_samples: 2, generation: {{max_new_tokens: 2}}}}
"""
TARGETS = "target_modules: [q_proj, v_proj, down_proj]"
FOUR_BITS = "quantization_config={load_in_4bit: true, bnb_4bit_quant_type: nf4}"
METHODS = {
    "dora in 4 bits": [
        f"lora_config={{r: 4, lora_dropout: 0.1, use_dora: true, modules_to_save: [embed_tokens], {TARGETS}}}",
        FOUR_BITS,
    ],
    "pissa": [
        f"lora_config={{r: 4, lora_dropout: 0.1, init_lora_weights: pissa_niter_4, use_rslora: true, {TARGETS}}}"
    ],
    "loftq": [f"lora_config={{r: 4, init_lora_weights: loftq, {TARGETS}}}", FOUR_BITS, "export.merge=false"],
    "loraplus and neftune": [
        f"lora_config={{r: 4, {TARGETS}}}",
        "loraplus_lr_ratio=16",
        "training_args.neftune_noise_alpha=5",
    ],
    "oft": [f"lora_config={{peft_type: OFT, oft_block_size: 8, module_dropout: 0.1, {TARGETS}}}"],
}


def write_rows(path, names):
    rows = ({"human": f"Who is {name}?", "assistant": f"{name} keeps the light."} for name in names)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def recipe_of(model, folder, *overrides):
    folder.mkdir(exist_ok=True)
    write_rows(folder / "train.jsonl", ["Ann", "Bob", "Cid", "Dan", "Eve", "Fay", "Gus", "Hal"])
    write_rows(folder / "other.jsonl", ["Ida", "Jon", "Kit"])
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, folder=folder), encoding="utf-8")
    return load_recipe(path, overrides)


def trained(model, folder, *overrides, scored=True):
    """run_sft.train without the page and the proof by a fresh process, which know no method. Returns: output_dir."""
    recipe = recipe_of(model, folder, *overrides)
    run.set_up(recipe, debug=False)
    tokenizer = run.load_tokenizer(recipe)
    meta_model = run.check_model(recipe, tokenizer)
    data = run.prepare_data(recipe, tokenizer, "")
    description = run.describe_run(recipe, data.ledger)
    checkpoint = run.find_checkpoint(recipe, description, data)
    with run.output(recipe, description, data, meta_model):
        model = run.add_lora(run.load_for_training(recipe), recipe)
        trainer = run.train(recipe, model, tokenizer, data, checkpoint)
        run.save(recipe, trainer, tokenizer, data, description)
        if scored:
            run.score(recipe, data, trainer)
    return recipe.output_dir, description, trainer


def cut_off(out, step):
    """A run as if it had been killed after a step."""
    for name in ("lora_adapter", "final_model", "trainer_state.json", "scores.json", "predictions.jsonl"):
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).unlink(missing_ok=True)
    for folder in out.glob("checkpoint-*"):
        if int(folder.name.partition("-")[2]) > step:
            shutil.rmtree(folder)


def log(out):
    entries = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    timed = ("runtime", "per_second")
    return [{key: value for key, value in entry.items() if not key.endswith(timed)} for entry in entries[:-1]]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_trained_merged_scored_and_resumed_bit_for_bit(name, small_qwen, tmp_path):
    out, description, trainer = trained(small_qwen, tmp_path, *METHODS[name])
    first, history = load_file(out / "lora_adapter/adapter_model.safetensors"), log(out)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    if name == "loraplus and neftune":
        groups = torch.load(out / "checkpoint-4/optimizer.pt")["param_groups"]
        assert [group["lr"] for group in groups] == [0.01, 1e-6, 0.16, 0.16]  # of A, of embeddings, of B
        assert "neftune" not in str(trainer.model.get_input_embeddings()._forward_hooks), "the noise is taken out"
    if name == "loftq":
        assert not (out / "final_model").exists()
    else:
        merge = description["merge"]
        assert merge["merge_error"] < 1e-5 and merge["float32"]["greedy"] == 1.0
        assert ("quantised" in merge) == ("4 bits" in name)
    scores = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    perplexity = {model: scores[model]["perplexity"]["score"] for model in ("base", "tuned")}
    assert perplexity["tuned"] < perplexity["base"]
    if FOUR_BITS not in METHODS[name]:  # the base as it is on disk, whatever the method made of it
        assert perplexity["base"] == pytest.approx(1869.3925, rel=1e-4)
    cut_off(out, 2)
    trained(small_qwen, tmp_path, *METHODS[name], "export.merge=false", scored=False)
    again = load_file(out / "lora_adapter/adapter_model.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)
    assert log(out) == history


KINDS = {
    "BOFT": "boft_block_size: 4", "C3A": "block_size: 16", "DELORA": "r: 4", "FOURIERFT": "n_frequency: 20",
    "HRA": "r: 4", "IA3": "feedforward_modules: [down_proj]", "LN_TUNING": "", "LOHA": "r: 4", "LOKR": "r: 4",
    "MISS": "r: 4", "RANDLORA": "r: 4", "ROAD": "group_size: 8", "VERA": "r: 8",
}  # fmt: skip


def test_every_kind_of_adapter_is_tried():
    tried = {kind for options in METHODS.values() for kind in PEFT_TYPES if f"peft_type: {kind}" in options[0]}
    assert {"LORA", *tried, *KINDS} == set(PEFT_TYPES)


class Plain:
    """As much of a tokenizer as an export asks for."""

    pad_token_id = 0

    def save_pretrained(self, folder):
        pass


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=4))
    for weight in model.parameters():
        weight.data.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


IDS = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, 12, 13, 14]])
MORE = {
    "olora": "r: 4, init_lora_weights: olora, rank_pattern: {q_proj: 2}, alpha_pattern: {down_proj: 5}",
    "pissa with dora and biases": "r: 4, init_lora_weights: pissa, use_dora: true, use_rslora: true, bias: all",
    "pissa beside embeddings": "r: 4, init_lora_weights: pissa, modules_to_save: [norm]",
    "orthogonal": "r: 4, init_lora_weights: orthogonal, layers_to_transform: [1]",
    "tokens": "r: 4, trainable_token_indices: [3]",
}


@pytest.mark.parametrize("name", [*KINDS, *MORE])
def test_what_was_trained_is_what_is_merged(base, tmp_path, name):
    targets = {"LN_TUNING": "[input_layernorm]", "pissa beside embeddings": "[q_proj, embed_tokens]"}
    section = f"target_modules: {targets.get(name, '[q_proj, down_proj]')}, {KINDS.get(name, MORE.get(name))}"
    kind = f"peft_type: {name}, " if name in KINDS else ""
    recipe = recipe_of(base, tmp_path, f"lora_config={{{kind}{section.rstrip(', ')}}}")
    refuse_unmergeable(recipe, with_lora(recipe, load.meta_model(recipe)))
    model = add_lora(load.load_model(recipe), recipe)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    out = recipe.output_dir
    model.eval().save_pretrained(out / "lora_adapter")
    if hasattr(model, "lora_start"):
        to_plain_lora(model, out / "lora_adapter")
    (out / "training_config.json").write_text("{}", encoding="utf-8")
    assert export.save_merged_model(recipe, Plain(), [3], [[1, 2, 3, 4]])["merge_error"] < 1e-6
    with torch.no_grad():
        before, ours, theirs = (
            each(IDS).logits
            for each in (load.load_model(recipe), model, load.load_trained(recipe, out / "final_model"))
        )
    assert (ours - theirs).abs().max() < 1e-6 < 1e-5 < (ours - before).abs().max()


def test_loftq_starts_nearer_to_the_unquantised_base_than_the_quantised_one_is(base, tmp_path):
    options = "r: 16, lora_alpha: 4, init_lora_weights: loftq, target_modules: all-linear"
    recipe = recipe_of(base, tmp_path, f"lora_config={{{options}}}", FOUR_BITS, "export.merge=false")
    whole, model = load.load_model(recipe, quantised=False), add_lora(load.load_model(recipe), recipe).eval()
    with torch.no_grad():
        wanted, with_adapter = whole(IDS).logits, model(IDS).logits
        with model.disable_adapter():
            without = model(IDS).logits
    assert (with_adapter - wanted).norm() < 0.5 * (without - wanted).norm()
    with pytest.raises(RecipeError, match="a loftq adapter is for the 4-bit base, and wrong on the unquantised"):
        export_again(recipe)


def lora(options):
    return [f"lora_config={{r: 4, {TARGETS}, {options}}}"]


@pytest.mark.parametrize(("overrides", "told"), [
    (lora("init_lora_weights: eva"), "init_lora_weights: eva starts from a pass over the data, which is not made here"),
    (lora("init_lora_weights: corda"), "init_lora_weights: corda starts from a pass over the data"),
    ([*lora("init_lora_weights: pissa"), FOUR_BITS], "pissa takes a part out of the base's weights, and these are q"),
    (lora("init_lora_weights: olora, target_parameters: [w]"), "olora knows no target_parameters"),
    (lora("init_lora_weights: loftq"), "loftq makes good for 4-bit weights; set quantization_config.load_in_4bit"),
    ([*lora("init_lora_weights: loftq"), FOUR_BITS], "a loftq adapter belongs to the 4-bit base, and would be wrong"),
    ([*lora("peft_type: HRA"), FOUR_BITS], "HRA computes with the base's own weights, and these are quantised; choose"),
    (lora("loftq_config: {loftq_iter: 5}"), "lora_config.loftq_config: the bits are those of quantization_config"),
    (lora("kasa_config: {}"), "lora_config.kasa_config: leaves another base than it found"),
    (["loraplus_lr_ratio=16"], "is for LoRA, and all weights are trained; give lora_config"),
    (["loraplus_lr_ratio=16", *lora("peft_type: LOHA")], "is for LoRA; LOHA has no matrices"),
    (["training_args.loraplus_lr_ratio=16"], "set loraplus_lr_ratio at the top of the recipe"),
    (lora("peft_type: PREFIX_TUNING"), "lora_config.peft_type: found 'PREFIX_TUNING'; "),
    (lora("peft_type: oft"), "lora_config.peft_type: found 'oft'; did you mean 'OFT'?"),
    (lora("peft_type: OFT, oft_blocksize: 8"), "unknown key lora_config.oft_blocksize; did you mean 'oft_block_size'"),
])  # fmt: skip
def test_a_method_that_cannot_be_made_right_is_refused_from_the_recipe_alone(tmp_path, overrides, told):
    with pytest.raises(RecipeError, match=told):
        recipe_of("m", tmp_path, *overrides)


@pytest.mark.parametrize(("options", "told"), [
    ("lora_bias: true", r"model.layers.0.mlp.down_proj cannot be merged: Impossible to merge LoRA with"),
    ("alora_invocation_tokens: [3]", "q_proj cannot be merged: aLoRA does not support merging"),
    ("use_dora: true, lora_bias: true", "The argument lora_bias=True is not supported for DoRA"),
])  # fmt: skip
def test_an_adapter_that_cannot_be_merged_is_told_before_training(small_qwen, tmp_path, options, told):
    with pytest.raises(RecipeError, match=told):
        run.check_model(
            recipe_of(small_qwen, tmp_path, *lora(options)), run.load_tokenizer(recipe_of(small_qwen, tmp_path))
        )


def test_an_adapter_of_another_kind_or_of_another_base_is_not_taken_up(base, tmp_path):
    def save(options, name):
        add_lora(load.load_model(made := recipe_of(base, tmp_path, *options)), made).save_pretrained(tmp_path / name)
        return f"adapter_name_or_path={tmp_path / name}"

    vera = save(lora("peft_type: VERA"), "vera")
    with pytest.raises(
        RecipeError, match=r"lora_config.peft_type: is LORA, and the adapter \S+ has VERA; make it equal"
    ):
        made = recipe_of(base, tmp_path, vera, *lora("bias: none"))
        add_lora(load.load_model(made), made)
    assert add_lora(load.load_model(made := recipe_of(base, tmp_path, vera)), made).peft_config["default"].r == 4
    with pytest.raises(
        RecipeError, match=r"of a training that had changed its base \(pissa\), and wrong on this one; "
    ):
        made = recipe_of(base, tmp_path, save(lora("init_lora_weights: pissa"), "pissa"))
        add_lora(load.load_model(made), made)


def test_fp4_by_default_is_told(small_qwen, tmp_path, capfd):
    recipe = recipe_of(small_qwen, tmp_path, *lora("bias: none"), "quantization_config={load_in_4bit: true}")
    run.check_model(recipe, run.load_tokenizer(recipe))
    assert "4 bits are fp4, bitsandbytes' default; nf4 is more exact" in capfd.readouterr().out


def test_weights_are_in_the_ledgers_table_and_what_an_epoch_sees_below_it(small_qwen, tmp_path, capfd):
    recipe = recipe_of(small_qwen, tmp_path, f"dataset.train=[{{path: {tmp_path}/train.jsonl, weight: 2.5}}]")
    data = run.prepare_data(recipe, run.load_tokenizer(recipe), "")
    table = capfd.readouterr().out
    assert "weight" in table.splitlines()[0] and "  2.5     8 " in table.splitlines()[1]
    assert f"an epoch sees {data.ledger['seen']:,} training conversations, by the weights" in table
    assert 16 <= data.ledger["seen"] <= 24
