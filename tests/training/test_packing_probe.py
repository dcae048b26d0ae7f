"""Rows are packed only where a small model of the recipe's own make gives packed conversations what they get apart."""

import inspect
import json

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    RecurrentGemmaConfig,
)
from transformers.models.qwen3_5 import modeling_qwen3_5

import run_sft
from benchmarks.packing import SHIPPED, collator, configuration
from sft.errors import UserError
from sft.recipe import load_recipe
from sft.training import packing_probe
from sft.training.packing_probe import Finding, decide, narrowed, probe, small_model
from tests.families import FAMILIES, build
from tests.training.test_attention import LINEAR

RECIPE = """
model_name_or_path: {model}
output_dir: {folder}/out
dataset: {{train: {folder}/train.jsonl, max_length: 256}}
model_init: {{dtype: float32}}
lora_config: {{r: 2, target_modules: [q_proj]}}
training_args: {{max_steps: 1, per_device_train_batch_size: 2, bf16: false, save_steps: 1, disable_tqdm: true}}
export: {{merge: false}}
"""
NO_KERNEL = "takes no packed rows here: `causal_conv1d_fn` can't keep packed sequences apart without `causal_conv1d`"
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def hybrid_config(**options):
    return Qwen3_5TextConfig(num_hidden_layers=2, **SMALL, **LINEAR, **options)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A recipe without dataset.packing for a random Qwen3.5 of one linear and one full attention layer."""
    folder = tmp_path_factory.mktemp("hybrid")
    tokenizer = build(FAMILIES["qwen2_5"], "bytes")
    Qwen3_5ForCausalLM(hybrid_config(vocab_size=len(tokenizer))).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    (folder / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 2, encoding="utf-8")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=folder / "model", folder=folder), encoding="utf-8")
    return path


@pytest.fixture
def qwen(tiny_qwen, tmp_path):
    def make(*overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(RECIPE.format(model=tiny_qwen, folder=tmp_path), encoding="utf-8")
        return load_recipe(path, overrides), collator().tokenizer

    return make


# ------------------------------------------------------------------------------------------------------------ in a run


def test_auto_packs_qwen2_and_says_so_and_false_asks_nothing(qwen, monkeypatch):
    said = "rows are packed: conversations share a row, which changes no result (tried in a small Qwen2ForCausalLM)"
    assert qwen()[0].dataset.packing == "auto"
    assert decide(*qwen()) == decide(*qwen("dataset.packing=true")) == (True, said)
    monkeypatch.setattr(packing_probe, "probe", None)
    assert decide(*qwen("dataset.packing=false")) == (False, "")


def test_auto_does_not_pack_a_hybrid_and_log_ledger_and_resolved_recipe_say_so_and_it_resumes(
    hybrid, monkeypatch, capfd
):
    """Where another machine decides otherwise (kernels were installed), rows and steps would be others: refused."""
    line = f"rows are not packed: Qwen3_5ForCausalLM {NO_KERNEL}"
    assert run_sft.main([str(hybrid)]) == 0
    assert line in capfd.readouterr().out
    output = hybrid.parent / "out"
    ledger = json.loads((output / "data_ledger.json").read_text(encoding="utf-8"))
    assert line in ledger["packing_probe"] and "packing" not in ledger
    config = json.loads((output / "training_config.json").read_text(encoding="utf-8"))
    assert config["recipe"]["dataset"]["packing"] is False
    assert run_sft.main([str(hybrid)]) == 0
    assert f"training is finished: taking up {output / 'checkpoint-1'}" in capfd.readouterr().out
    monkeypatch.setattr(packing_probe, "probe", lambda *asked: Finding(True, "with kernels"))
    assert run_sft.main([str(hybrid)]) == 2
    assert "dataset.packing: False then, True now" in capfd.readouterr().err


def test_check_of_a_hybrid_says_that_it_is_not_packed_and_refuses_true(hybrid, capfd):
    assert run_sft.main([str(hybrid), "--check"]) == 0
    assert f"rows are not packed: Qwen3_5ForCausalLM {NO_KERNEL}" in capfd.readouterr().out
    assert run_sft.main([str(hybrid), "dataset.packing=true", "--check"]) == 2
    said = capfd.readouterr().err
    assert f"override dataset.packing=true: is true, but Qwen3_5ForCausalLM {NO_KERNEL}" in said
    assert said.endswith("set it to auto or false\n")


def test_where_no_small_model_is_built_auto_does_not_pack_and_true_leaves_it_to_the_model_itself(qwen, monkeypatch):
    def fails(*asked):
        raise RuntimeError("no such width")

    monkeypatch.setattr(packing_probe, "small_model", fails)
    why = "no small model of type qwen2 could be made to try it (no such width)"
    assert decide(*qwen()) == (False, f"rows are not packed: {why}")
    said = "rows are packed if the model itself lets them, which is tried before it trains"
    assert decide(*qwen("dataset.packing=true")) == (True, f"{said}: {why}")


def test_auto_does_not_pack_under_context_parallelism(qwen, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    said = "rows are not packed: context parallelism over 2 GPUs lets conversations see each other"
    assert decide(*qwen()) == (False, said)


def test_the_recipes_own_attention_is_tried(qwen, monkeypatch):
    asked = []
    monkeypatch.setattr(packing_probe, "probe", lambda *given: asked.append(given[2:]) or Finding(False, "no"))
    decide(*qwen("model_init.attn_implementation=flex_attention"))
    assert asked == [("cpu", {"attn_implementation": "flex_attention"})]
    with pytest.raises(UserError, match="override dataset.packing=true: is true, but no; set it to auto or false"):
        decide(*qwen("dataset.packing=true"))


# ----------------------------------------------------------------------------------------------------- what it finds

SAME = "conversations share a row, which changes no result (tried in a small "
LEAKS, POSITIONS = (
    "lets the conversations of a packed row see each other",
    "does not count the positions of each packed",
)


@pytest.mark.parametrize(
    ("name", "exact", "said"),
    [
        ("llama", True, f"{SAME}LlamaForCausalLM)"),
        ("gemma3_text", True, f"{SAME}Gemma3ForCausalLM)"),
        ("gpt_oss", True, f"{SAME}GptOssForCausalLM)"),
        ("jamba", False, f"JambaForCausalLM {LEAKS}"),
        ("mamba", False, f"MambaForCausalLM {LEAKS}"),
        ("bloom", False, f"BloomForCausalLM {LEAKS}"),
        ("roberta", False, f"RobertaForCausalLM {POSITIONS}"),
        ("qwen3_next", False, f"Qwen3NextForCausalLM {NO_KERNEL}"),
        ("lfm2", False, f"Lfm2ForCausalLM {NO_KERNEL}"),
    ],
)
def test_rows_of_the_table_in_docs_packing(name, exact, said):
    found = probe(configuration(name), collator())
    assert found.exact is exact and found.text.startswith(said)
    assert found.off is None or (found.off < 1e-5 if exact else found.off > 0.1), "ten times from the tolerance"


@pytest.mark.parametrize("name", SHIPPED)
def test_the_models_of_the_shipped_recipes_are_packed(name):
    found = probe(SHIPPED[name](), collator())
    assert found.exact and found.off < 1e-5


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_other_attentions_are_tried_without_compiling(attention):
    counters.clear()
    found = probe(LlamaConfig(**SMALL), collator(), options={"attn_implementation": attention})
    assert not counters["stats"], "no graph was compiled"
    assert found.exact and 0 < found.off < 1e-5, "not bit for bit what sdpa gives"


def test_a_leak_is_seen_at_a_tiny_initializer_range_too():
    config = BloomConfig(vocab_size=100, hidden_size=32, n_head=4, n_layer=2, initializer_range=1e-6)
    assert probe(config, collator()).text == f"BloomForCausalLM {LEAKS}"


def test_a_model_that_does_not_look_back_shows_nothing(monkeypatch):
    def blind(*asked):
        model = small_model(*asked)
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        return model

    monkeypatch.setattr(packing_probe, "small_model", blind)
    found = probe(Qwen2Config(**SMALL), collator())
    assert (found.exact, found.text) == (
        None,
        "a small Qwen2ForCausalLM that is to show it does not look at earlier tokens",
    )


def test_linear_attention_is_packed_where_its_kernels_are(monkeypatch):
    """Stand-ins for the kernels: the plain functions, conversation by conversation, as cu_seqlens and seq_idx say."""
    asked = []
    conv, rule = (
        inspect.unwrap(getattr(modeling_qwen3_5, name)) for name in ("causal_conv1d_fn", "torch_chunk_gated_delta_rule")
    )

    def conv_kernel(states, *weights, seq_idx=None, activation=None, **_):
        lengths = [states.shape[2]] if seq_idx is None else seq_idx[0].bincount().tolist()
        asked.append(lengths)
        return torch.cat([conv(part, *weights, activation=activation) for part in states.split(lengths, dim=2)], dim=2)

    def rule_kernel(*states, g, beta, cu_seqlens=None, **options):
        lengths = [g.shape[1]] if cu_seqlens is None else cu_seqlens.diff().tolist()
        asked.append(lengths)
        parts = zip(*(each.split(lengths, dim=1) for each in (*states, g, beta)), strict=True)
        given = {key: options[key] for key in ("use_qk_l2norm_in_kernel", "output_final_state")}
        outputs = [rule(*part[:3], g=part[3], beta=part[4], initial_state=None, **given)[0] for part in parts]
        return torch.cat(outputs, dim=1), None

    monkeypatch.setattr(modeling_qwen3_5, "causal_conv1d_fn", conv_kernel)
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", rule_kernel)
    found = probe(hybrid_config(vocab_size=100), collator())
    assert found.exact and found.off < 1e-5
    assert asked[-2:] == [[10, 10], [10, 10]], "the collator's seq_idx and cu_seq_lens reach the layer"


# ------------------------------------------------------------------------------------------------- the small model


def test_widths_and_vocabulary_are_divided_and_what_decides_the_mask_stays():
    config = Gemma3TextConfig(sliding_window=512, attention_dropout=0.1, pad_token_id=5, eos_token_id=[1, 106])
    small = narrowed(config, 16)
    assert (small.hidden_size, small.intermediate_size, small.head_dim, small.vocab_size) == (144, 576, 16, 128)
    assert (small.sliding_window, small.num_attention_heads, small.num_key_value_heads) == (512, 8, 4)
    assert (small.attention_dropout, small.pad_token_id, small.eos_token_id) == (0.0, 0, 0)
    assert small.layer_types == config.layer_types and config.hidden_size == 2304
    assert narrowed(RecurrentGemmaConfig(attention_window_size=2048), 16).attention_window_size == 2048
    assert narrowed(Llama4TextConfig(attention_chunk_size=8192), 16).attention_chunk_size == 8192
    assert narrowed(Mamba2Config(chunk_size=256), 16).chunk_size == 16  # no mask: how its plain code shares out work


def test_a_factor_for_each_frequency_is_left_for_each_that_stays():
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
    config = Phi3Config(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors}, pad_token_id=0)
    assert len(narrowed(config, 16).rope_parameters["long_factor"]) == 3  # of a head_dim of 96 / 16
    assert probe(config, collator()).exact


@pytest.mark.parametrize(
    ("config", "by", "layers"),
    [
        (LlamaConfig(**SMALL, num_hidden_layers=9), 1, 2),
        (Gemma3TextConfig(**SMALL, num_hidden_layers=12), 1, 6),  # five with a window, then a full one
        (JambaConfig(num_hidden_layers=16, num_experts=4), 32, 5),  # the first attention layer is the fifth
    ],
    ids=["llama", "gemma3", "jamba"],
)
def test_layers_that_repeat_others_are_left_out_and_every_kind_is_in(config, by, layers):
    assert len(small_model(config, by, True, {}).model.layers) == layers


def test_the_small_model_is_large_in_nothing_and_the_same_each_time_and_leaves_the_seed_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one, two = (small_model(SHIPPED["Qwen/Qwen2.5-7B-Instruct"](), 32, True, {}) for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    assert sum(p.numel() for p in one.parameters()) == 484_688 and one.dtype == torch.float32
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    with pytest.raises(ValueError, match="it would have 467,036,672 weights"):
        small_model(SHIPPED["Qwen/Qwen2.5-7B-Instruct"](), 1, True, {})
