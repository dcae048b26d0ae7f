"""LoRA on a model: the dtype of its weights."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.integrations import deepspeed

from sft.model.lora import add_lora
from sft.recipe import load_recipe


class AskedForZero3:
    """What transformers keeps of a DeepSpeed configuration while a run asks for ZeRO-3."""

    def is_zero3(self):
        return True


@pytest.fixture
def zero3():
    """Transformers holds it by a weak reference, so the run must hold it."""
    configuration = AskedForZero3()
    deepspeed.set_hf_deepspeed_config(configuration)
    yield
    deepspeed.unset_hf_deepspeed_config()
    assert configuration.is_zero3()


def model():
    config = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).bfloat16()


def lora_dtypes(folder, *overrides):
    path = folder / "recipe.yaml"
    path.write_text("{model_name_or_path: m, output_dir: out, dataset: {train: t.jsonl}}", encoding="utf-8")
    adapted = add_lora(model(), load_recipe(path, overrides))
    return adapted, {p.dtype for n, p in adapted.named_parameters() if "lora" in n}


LORA = "lora_config={r: 2, target_modules: [q_proj]}"


def test_lora_weights_beside_a_bfloat16_model_are_float32(tmp_path):
    adapted, dtypes = lora_dtypes(tmp_path, LORA)
    assert dtypes == {torch.float32}
    adapted.save_pretrained(tmp_path / "adapter")
    assert lora_dtypes(tmp_path, f"adapter_name_or_path={tmp_path / 'adapter'}")[1] == {torch.float32}


def test_under_zero_3_lora_weights_have_the_models_dtype(tmp_path, zero3):
    adapted, dtypes = lora_dtypes(tmp_path, LORA)
    assert dtypes == {torch.bfloat16}
    adapted.save_pretrained(tmp_path / "adapter")
    assert lora_dtypes(tmp_path, f"adapter_name_or_path={tmp_path / 'adapter'}")[1] == {torch.bfloat16}
