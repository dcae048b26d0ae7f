"""The merge certificate: what is judged, what is told, and what a failed one leaves behind."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from sft.errors import ModelError
from sft.results import certificate, export
from sft.results.certificate import Difference, certify
from sft.results.words import merge_line
from tests.results.test_merge import ALL, Plain, recipe_of, save_adapter, save_base

PROMPTS = [[1, 2, 3, 4, 5], [9, 8, 7], []]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A base of several shards in float32 and an adapter: what lies there when a run is about to merge."""
    folder = tmp_path_factory.mktemp("run")
    save_adapter(save_base("llama", folder / "base"), folder, ALL)
    (folder / "training_config.json").write_text("{}", encoding="utf-8")
    return folder


def export_of(run, *overrides, prompts=PROMPTS):
    return export.save_merged_model(recipe_of(run / "base", run, *overrides), Plain(), [3], prompts)


def edit_weights(monkeypatch, edit):
    """What is merged from here on is edited before it is compared."""
    merge = export._merge

    def merged_and_edited(recipe, tokenizer, stop_ids, folder):
        merge(recipe, tokenizer, stop_ids, folder)
        for file in folder.glob("*.safetensors"):
            save_file({name: edit(name, weight) for name, weight in load_file(file).items()}, file, {"format": "pt"})

    monkeypatch.setattr(export, "_merge", merged_and_edited)


def unmerged(run, weight):
    """An edit that puts back one weight of the base."""
    before = {n: w for file in (run / "base").glob("*.safetensors") for n, w in load_file(file).items()}
    return lambda name, merged: before[name].to(merged.dtype) if name == weight else merged


def test_float32_is_equal_to_a_ten_thousandth_and_nothing_else_is_told(run):
    found = export_of(run)
    assert found.keys() == {"prompts", "positions", "dtype", "export", "float32", "merge_error", "bound"}
    assert (found["prompts"], found["positions"], found["dtype"]) == (2, 8, "float32")
    assert found["merge_error"] < 2e-6 < 1e-4 <= found["bound"] < 1e-3
    assert found["float32"] == found["export"]
    assert found["float32"]["greedy"] == 1.0


def test_of_a_bfloat16_export_the_rounding_is_told_and_not_judged(run):
    found = export_of(run, "model_init.dtype=bfloat16")
    assert found["merge_error"] < 2e-6
    assert 5e-5 < found["float32"]["logits"] < found["export"]["logits"] < 0.1
    assert "before they are rounded to bfloat16" in merge_line(found) and "; in bfloat16: logits to" in merge_line(
        found
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_weight_that_was_not_merged_fails_the_export_which_keeps_what_was_there(run, monkeypatch, dtype):
    (run / "final_model").mkdir(exist_ok=True)
    (run / "final_model/older").touch()
    edit_weights(monkeypatch, unmerged(run, "model.layers.1.self_attn.o_proj.weight"))
    with pytest.raises(ModelError, match=r"in float32 a logit differs by 0.\d+, rounding left out, and 0.00\d+ is the"):
        export_of(run, f"model_init.dtype={dtype}")
    assert (run / "final_model/older").exists() and (run / "lora_adapter/adapter_model.safetensors").exists()
    assert not list(run.glob(".*"))


def test_weights_that_are_no_numbers_fail_the_export(run, monkeypatch):
    edit_weights(monkeypatch, lambda name, weight: weight * (math.nan if "norm" in name else 1))
    with pytest.raises(ModelError, match="final_model/ gives logits that are no numbers in torch.float32"):
        export_of(run)


def test_what_was_trained_on_4_bit_weights_is_told_apart_from_what_is_shipped(run):
    found = export_of(run, "quantization_config={load_in_4bit: true, bnb_4bit_quant_type: nf4}")
    assert found["merge_error"] < 2e-6 < found["quantised"]["logits"]
    assert "; against the quantised base and adapter that were trained: logits to" in merge_line(found)


def test_without_a_prompt_or_the_memory_for_it_nothing_is_compared_which_is_said(run, monkeypatch):
    assert merge_line(export_of(run, prompts=[])).endswith("adapter; there is no prompt to compare on")
    size = sum(file.stat().st_size for file in (run / "final_model").glob("*.safetensors"))

    def free(factor):
        memory = SimpleNamespace(available=factor * size)
        monkeypatch.setattr(certificate.psutil, "virtual_memory", lambda: memory)

    free(1)  # enough for 16 bits a weight and a fifth more, not for 32
    assert export_of(run) == {"not_checked": "the model takes 0.0 GB, more memory than is free"}
    found = export_of(run, "model_init.dtype=bfloat16")
    assert found["not_judged"] == "float32 takes 0.0 GB, more memory than is free"
    assert "is not judged against base and adapter, since float32 takes 0.0 GB" in merge_line(found)


def test_experts_that_float32_chooses_otherwise_in_one_prompt_are_no_fault_of_the_merge(run, monkeypatch):
    """As by a last bit, here by hand: after a prompt that differs, base+adapter and final_model/ part."""
    logits, calls = certificate._logits, []

    def parted(model, prompts):
        calls.append(model)
        return logits(model, prompts) + (torch.arange(8)[:, None] >= 5) * (0.1 if len(calls) == 1 else 0.0)

    monkeypatch.setattr(certificate, "_logits", parted)  # of the 8 positions 5 are of the first prompt
    with pytest.raises(ModelError, match="in float32 a logit differs by 0.1, rounding left out"):
        export_of(run)
    calls.clear()
    in_experts = certificate._base_and_adapter
    monkeypatch.setattr(certificate, "_base_and_adapter", lambda *args: (*in_experts(*args)[:2], True))
    assert export_of(run)["merge_error"] < 2e-6


def test_differences_are_the_largest_the_mean_and_the_share():
    ours, theirs = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    halves = math.log(2) - (math.log1p(math.exp(-2)) + 2 / (1 + math.exp(2)))  # KL to a coin from odds of e^2
    odds = math.e / (1 + math.e) - 1 / (1 + math.e)  # KL between odds of e and of 1/e
    found = certificate._difference(ours, theirs)
    assert found == Difference(logits=2.0, kl=pytest.approx((halves + odds) / 2), greedy=0.5)


def test_attention_that_only_a_gpu_has_is_left_out_where_it_is_compared(run):
    recipe = recipe_of(run / "base", run, "model_init.attn_implementation=flash_attention_2")
    export_of(run)
    assert certify(recipe, run / "final_model", PROMPTS)["merge_error"] < 2e-6
