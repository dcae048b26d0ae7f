"""LoRA's sum as one operation gives what peft's steps give, and more exactly where they round."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from sft.training.lora_sum import lora_in_one_sum

LLAMA = LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, attention_bias=True,
)  # fmt: skip
GPT2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64)  # layers are Conv1D there
ATTENTION_AND_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(base, dtype=torch.float32, targets=ATTENTION_AND_MLP, **options):
    """LoRA whose B is not zero, as after some training."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM", **options)
    model = get_peft_model(base.to(dtype) if dtype else base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def llama(**options):
    torch.manual_seed(0)
    return adapted(LlamaForCausalLM(copy.deepcopy(LLAMA)), **options)


def gpt2():
    torch.manual_seed(0)
    return adapted(GPT2LMHeadModel(GPT2).eval(), targets=["c_attn", "c_proj", "c_fc"]).eval()


def in_4_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    LlamaForCausalLM(LLAMA).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=quantised, dtype=torch.float32)
    return adapted(base, dtype=None)


def results(model, in_one_sum, autocast=None):
    """Logits and the gradient of each LoRA weight; how many layers sum in one."""
    model.zero_grad()
    ids = torch.arange(60).view(2, 30) % 64
    with lora_in_one_sum(model) if in_one_sum else nullcontext(0) as layers:
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            logits = model(input_ids=ids).logits
        torch.manual_seed(1)
        (logits.float() * torch.randn(logits.shape)).sum().backward()
    return layers, [logits.detach().float(), *(p.grad.float() for p in model.parameters() if p.grad is not None)]


def assert_close(ours, theirs, within):
    assert len(ours) == len(theirs) > 4
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() <= within * other.norm() and other.norm() > 0


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"exclude_modules": ["k_proj"]}])
def test_in_float32_logits_and_gradients_are_pefts(options):
    model = llama(**options)
    layers, ours = results(model, True)
    assert layers == (12 if "exclude_modules" in options else 14)
    assert_close(ours, results(model, False)[1], 1e-5)


def test_with_conv1d_and_on_4_bits_too(tmp_path):
    for model, count in ((gpt2(), 8), (in_4_bits(tmp_path), 14)):
        layers, ours = results(model, True)
        assert layers == count
        assert_close(ours, results(model, False)[1], 1e-5)


def test_input_gradients_flow_through_checkpointed_layers():
    model = llama()
    expected = results(model, False)[1]
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    assert_close(results(model, True)[1], expected, 1e-5)


def test_under_autocast_it_is_nearer_to_float32_than_pefts_steps():
    model = llama(dtype=torch.bfloat16)
    rounded = llama()  # whose base has the same weights as that one
    rounded.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    exact = results(rounded, False)[1]
    ours, theirs = (results(model, in_one_sum, torch.bfloat16)[1] for in_one_sum in (True, False))
    assert_close(ours, exact, 0.03)
    errors = [sum((a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)) for found in (ours, theirs)]
    assert errors[0] < errors[1]


def test_without_autocast_it_computes_in_the_finer_of_the_two_dtypes(tmp_path):
    model = llama(dtype=torch.bfloat16)
    rounded = llama()
    rounded.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    exact = results(rounded, False)[1]
    ours, theirs = (results(model, in_one_sum)[1] for in_one_sum in (True, False))
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert (mine - right).norm() <= 1.1 * (other - right).norm()
    quantised = in_4_bits(tmp_path)
    for name, parameter in quantised.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.bfloat16()  # as trl has them beside quantised weights
    assert results(quantised, True)[0] == 14
    # Only the weights of LoRA are rounded, and their gradients; peft rounds the input of A as well.
    assert_close(results(quantised, True)[1], results(quantised, False)[1], 0.02)


def test_models_may_write_into_a_layers_output():
    torch.manual_seed(0)
    config = OlmoConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    config.clip_qkv = 0.5
    model = adapted(OlmoForCausalLM(config))
    assert_close(results(model, True)[1], results(model, False)[1], 1e-5)


def test_it_may_be_opened_twice():
    model = llama()
    expected = results(model, False)[1]
    with lora_in_one_sum(model) as outer:
        with lora_in_one_sum(model) as inner:
            pass
        assert (outer, inner) == (14, 0)
        layers = [module for module in model.modules() if getattr(module, "lora_variant", None)]
        assert len(layers) == 14
        assert_close(results(model, False)[1], expected, 1e-5)


def test_dropout_falls_on_loras_input_only():
    model = llama(lora_dropout=1.0 - 1e-9)
    with lora_in_one_sum(model):
        dropped = model(input_ids=torch.arange(9)[None]).logits
    with model.disable_adapter():
        assert torch.allclose(dropped, model(input_ids=torch.arange(9)[None]).logits, atol=1e-5)


def test_other_kinds_of_lora_compute_as_before():
    for options in ({"use_dora": True}, {"lora_bias": True}):
        model = llama(**options)
        layers, found = results(model, True)
        assert layers == 0
        assert_close(found, results(model, False)[1], 0)


def test_afterwards_the_layers_are_as_they_were_even_after_an_error():
    model = llama()
    before = [(m.cast_input_dtype_enabled, dict(m.lora_variant)) for m in model.modules() if hasattr(m, "lora_variant")]
    with pytest.raises(RuntimeError, match="stop"), lora_in_one_sum(model) as layers:
        assert layers == 14
        raise RuntimeError("stop")
    after = [(m.cast_input_dtype_enabled, dict(m.lora_variant)) for m in model.modules() if hasattr(m, "lora_variant")]
    assert before == after and before[0] == (True, {})
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
