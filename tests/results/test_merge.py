"""Merging shard by shard: the same bits as peft's merge of the whole model, in the memory of a shard."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
)

from sft.errors import ModelError, RecipeError, UserError
from sft.model.load import load_model
from sft.model.lora import load_adapter
from sft.recipe import load_recipe
from sft.results import export
from sft.results.merge import NotByShard, ShardMerger, merge_in_memory

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
BASES = {
    "tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "llama": LlamaConfig(**SIZES),
    "phi3": Phi3Config(**SIZES, pad_token_id=0),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS),  # its experts are stacked when it is read
    # Its experts lie stacked in the files; of one head, its sinks are weights of one number.
    "gpt_oss": GptOssConfig(**{**SIZES, "num_attention_heads": 1, "num_key_value_heads": 1}, **EXPERTS, head_dim=16),
}
ALL, Q = {"r": 2, "target_modules": "all-linear"}, {"r": 2, "target_modules": ["q_proj"]}
PATTERNS = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"o_proj": 7}}
STACKED = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def save_base(name, folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(BASES[name])
    for weight in model.parameters():
        weight.data.normal_(0, 0.1)
    model.save_pretrained(folder, max_shard_size=10000)
    return folder


def recipe_of(base, output, *overrides):
    path = output / "recipe.yaml"
    text = f"{{model_name_or_path: {base}, output_dir: {output}, model_init: {{dtype: float32}}, "
    path.write_text(text + "dataset: {train: t.jsonl}, lora_config: {r: 2}}", encoding="utf-8")
    return load_recipe(path, overrides)


def save_adapter(base, folder, options):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    adapted.save_pretrained(folder / "lora_adapter")
    return adapted.eval()


def merged_by_shard(recipe, adapter):
    folder = recipe.output_dir / "shards"
    folder.mkdir()
    merger = ShardMerger(recipe, adapter)
    merger.write(folder)
    return tensors(folder), merger


def tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def by_peft(base, adapter, folder, dtype=torch.float32):
    """What peft makes of the whole model."""
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
    adapted.merge_and_unload(safe_merge=True).save_pretrained(folder)
    return tensors(folder)


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in theirs
    )


CASES = [
    ("tied", ALL),
    ("tied", {**Q, "bias": "all"}),
    ("tied", {**Q, "lora_bias": True}),
    ("tied", {**Q, "modules_to_save": ["lm_head"]}),
    ("tied", {**Q, "trainable_token_indices": [3, 4]}),
    ("llama", {**ALL, "use_dora": True}),
    ("llama", {**ALL, "use_rslora": True, **PATTERNS}),
    ("llama", {**Q, "modules_to_save": ["embed_tokens", "input_layernorm"]}),
    ("llama", {"r": 2, "target_modules": ["embed_tokens", "o_proj"]}),
    ("phi3", ALL),
    ("mixtral", Q),
    ("gpt_oss", {**Q, **STACKED}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{name} {list(o)[-1]}" for name, o in CASES])
def test_every_bit_is_that_of_pefts_merge_of_the_whole_model(tmp_path, name, options):
    base = save_base(name, tmp_path / "base")
    save_adapter(base, tmp_path, options)
    ours, _ = merged_by_shard(recipe_of(base, tmp_path), tmp_path / "lora_adapter")
    assert equal(ours, by_peft(base, tmp_path / "lora_adapter", tmp_path / "peft"))


def test_shards_names_and_index_are_the_bases(tmp_path):
    base = save_base("llama", tmp_path / "base")
    save_adapter(base, tmp_path, Q)
    merged_by_shard(recipe_of(base, tmp_path), tmp_path / "lora_adapter")
    name = "model.safetensors.index.json"
    index, theirs = (json.loads((tmp_path / f / name).read_text(encoding="utf-8")) for f in ("shards", "base"))
    assert index["weight_map"] == theirs["weight_map"]
    assert len(set(index["weight_map"].values())) == 4
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]


def test_lora_on_tied_embeddings_leaves_the_output_embeddings_as_they_were(tmp_path):
    """peft merges it into both, and the model is another one: its logits were off by 17 here."""
    base = save_base("tied", tmp_path / "base")
    adapted = save_adapter(base, tmp_path, {"r": 2, "target_modules": ["embed_tokens"]})
    before = tensors(base)["model.embed_tokens.weight"]
    ours, merger = merged_by_shard(recipe_of(base, tmp_path), tmp_path / "lora_adapter")
    assert merger.is_untied
    assert torch.equal(ours["lm_head.weight"], before)
    in_memory = merge_in_memory(adapted)
    assert in_memory.config.tie_word_embeddings is False
    in_memory.save_pretrained(tmp_path / "memory")
    assert equal(ours, tensors(tmp_path / "memory"))


def test_merged_weights_are_rounded_once_from_the_weights_that_were_trained(tmp_path):
    base = save_base("llama", tmp_path / "base")
    adapted = save_adapter(base, tmp_path, Q)
    ours, _ = merged_by_shard(recipe_of(base, tmp_path, "model_init.dtype=bfloat16"), tmp_path / "lora_adapter")
    name = "model.layers.1.self_attn.q_proj"
    layer = adapted.get_base_model().get_submodule(name)
    exact = layer.base_layer.weight.bfloat16().float() + layer.get_delta_weight("default")
    assert torch.equal(ours[f"{name}.weight"], exact.bfloat16())
    by_bfloat16 = by_peft(base, tmp_path / "lora_adapter", tmp_path / "peft", torch.bfloat16)[f"{name}.weight"]
    assert not torch.equal(ours[f"{name}.weight"], by_bfloat16), "peft rounds the product first, then the sum"


def test_wider_numbers_come_first_so_that_each_lies_at_a_multiple_of_its_width(tmp_path):
    base = save_base("llama", tmp_path / "base")
    save_adapter(base, tmp_path, Q)
    merger = ShardMerger(recipe_of(base, tmp_path, "model_init.dtype=bfloat16"), tmp_path / "lora_adapter")
    merger._dtypes["model.norm.weight"] = torch.float32  # as transformers keeps some weights of some models
    merger.write(tmp_path)
    (file,) = (file for file in tmp_path.glob("*.safetensors") if "model.norm.weight" in load_file(file))
    assert load_file(file)["model.norm.weight"].dtype is torch.float32
    content = file.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["model.norm.weight"]["data_offsets"] == [0, 64]
    assert {entry["dtype"] for name, entry in header.items() if "data_offsets" in entry} == {"F32", "BF16"}


def test_bin_files_are_read_as_weights_only(tmp_path):
    base = save_base("tied", tmp_path / "base")
    state = AutoModelForCausalLM.from_pretrained(base).state_dict()  # both names of the tied weight, as .bin files hold
    names, halves = sorted(state), {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        torch.save({name: state[name] for name in part}, base / f"pytorch_model-0000{number}-of-00002.bin")
        halves |= dict.fromkeys(part, f"pytorch_model-0000{number}-of-00002.bin")
    for file in base.glob("model*"):
        file.unlink()
    index = {"metadata": {}, "weight_map": halves}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    save_adapter(base, tmp_path, ALL)
    recipe = recipe_of(base, tmp_path, "model_init.use_safetensors=false")
    ours, merger = merged_by_shard(recipe, tmp_path / "lora_adapter")
    assert equal(ours, by_peft(base, tmp_path / "lora_adapter", tmp_path / "peft"))
    assert not merger.is_untied and len(list((tmp_path / "shards").glob("model-*"))) == 2
    torch.save({"lm_head.weight": print}, base / halves["lm_head.weight"])
    with pytest.raises(RecipeError, match="would run code; it was read as weights only"):
        ShardMerger(recipe, tmp_path / "lora_adapter")


class Plain:
    """As much of a tokenizer as an export asks for."""

    pad_token_id = 0

    def save_pretrained(self, folder):
        pass


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stacked_experts_are_merged_in_memory_which_is_said(tmp_path, capfd, dtype):
    base = save_base("mixtral", tmp_path / "base")
    save_adapter(base, tmp_path, {**Q, **STACKED})
    recipe = recipe_of(base, tmp_path, f"model_init.dtype={dtype}")
    weight = "model.layers.0.mlp.experts.gate_up_proj"
    with pytest.raises(NotByShard, match=f"{weight} is made of several tensors when the base is read"):
        ShardMerger(recipe, tmp_path / "lora_adapter")
    (tmp_path / "training_config.json").write_text("{}", encoding="utf-8")
    certificate = export.save_merged_model(recipe, Plain(), [3], [[1, 2, 3]])
    assert f"merging in memory, not shard by shard: {weight} is made of several" in capfd.readouterr().out
    assert certificate["merge_error"] < 2e-6
    if dtype == "float32":
        theirs = by_peft(base, tmp_path / "lora_adapter", tmp_path / "peft")
        assert equal(tensors(tmp_path / "final_model"), theirs)


@pytest.mark.parametrize(("config", "key_mapping", "told"), [
    ({"quantization_config": {"quant_method": "fp8"}}, "", "the base's files hold quantised weights"),
    ({}, "model_init.key_mapping={a: b}", "how the base's weights are read is its own code's to say"),
    ({"num_hidden_layers": 3}, "", r"model.layers.2.[a-z_.]+ is in no file of the base"),
])  # fmt: skip
def test_files_that_are_not_simply_the_weights_are_not_merged_by_shard(tmp_path, config, key_mapping, told):
    base = save_base("llama", tmp_path / "base")
    save_adapter(base, tmp_path, Q)
    fields = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps(fields | config), encoding="utf-8")
    with pytest.raises(NotByShard, match=told):
        ShardMerger(recipe_of(base, tmp_path, *filter(None, [key_mapping])), tmp_path / "lora_adapter")


@pytest.mark.parametrize(("options", "edit", "told"), [
    (Q, lambda state: {name: weight / 0 for name, weight in state.items()}, "has values that are no numbers once"),
    ({**Q, "lora_bias": True}, lambda state: state, "cannot be merged: Impossible to merge LoRA with `lora_bias=True`"),
])  # fmt: skip
def test_an_adapter_that_cannot_be_merged_is_the_users_error(tmp_path, options, edit, told):
    base = save_base("llama", tmp_path / "base")
    save_adapter(base, tmp_path, options)
    file = tmp_path / "lora_adapter/adapter_model.safetensors"
    save_file(edit(load_file(file)), file)
    recipe = recipe_of(base, tmp_path)
    with pytest.raises(ModelError, match=rf"model.layers.0.self_attn.q_proj(.weight)? {told}"):
        merged_by_shard(recipe, tmp_path / "lora_adapter")
    with pytest.raises(ModelError, match=rf"model.layers.0.self_attn.q_proj(.weight)? {told}"):
        model = load_model(recipe)
        dtypes = {name: weight.dtype for name, weight in model.state_dict().items()}
        merge_in_memory(load_adapter(model, str(tmp_path / "lora_adapter"), recipe), dtypes)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    base = save_base("llama", tmp_path / "base")
    save_adapter(base, tmp_path, Q)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**4))
    with pytest.raises(UserError, match=r"final_model.partial takes 0.000 GB, and 0.000 GB are free; free some"):
        export.save_merged_model(recipe_of(base, tmp_path), Plain(), [3], [[1, 2, 3]])
    assert not list(tmp_path.glob("*final_model*"))


MERGES_AND_MEASURES = """
import sys, torch
from pathlib import Path
from sft.recipe import load_recipe
from sft.results.merge import ShardMerger

def memory(name):
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

folder = Path(sys.argv[1])
recipe = load_recipe(folder / "recipe.yaml", [])
torch.set_num_threads(1)
Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is the peak
before = memory("VmRSS")
ShardMerger(recipe, folder / "lora_adapter").write(folder / "shards")
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads what the kernel counts")
def test_four_shards_are_merged_in_the_memory_of_one_and_the_adapter(tmp_path):
    """All pages count, also mapped ones. It is 0.7 shards; merged in memory, 5.5."""
    sizes = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 11}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8)).bfloat16()
    model.to_empty(device="cpu")
    for weight in model.parameters():
        weight.data.fill_(0.01)
    model.save_pretrained(tmp_path / "base", max_shard_size=66_000_000)
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **ALL)).save_pretrained(tmp_path / "lora_adapter")
    (tmp_path / "shards").mkdir()
    recipe_of(tmp_path / "base", tmp_path, "model_init.dtype=bfloat16")
    shards = [file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")]
    assert len(shards) == 4
    done = subprocess.run(
        [sys.executable, "-c", MERGES_AND_MEASURES, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1]) - (tmp_path / "lora_adapter/adapter_model.safetensors").stat().st_size
    assert peak / max(shards) < 1.3
