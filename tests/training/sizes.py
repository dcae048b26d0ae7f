"""Recipes and models of the tests of what --check says."""

import json
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from sft.model.chatglm3 import ChatGLMConfig, ChatGLMForCausalLM
from sft.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]
QWEN_7B = {
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


def recipe_of(name: str, folder: Path, *overrides: str):
    return load_recipe(
        ROOT / f"recipes/{name}.yaml",
        [f"model_name_or_path={folder}", f"output_dir={folder}/out", "model_init.dtype=bfloat16", *overrides],
    )


def chatglm_6b(folder: Path) -> Path:
    (folder / "config.json").write_text('{"model_type": "chatglm", "torch_dtype": "float16"}', encoding="utf-8")
    return folder


def qwen_7b(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **QWEN_7B}), encoding="utf-8")
    return folder


def small_model(kind: str):
    """Sizes whose weights fill whole blocks of 64 x 256. kind: chatglm, qwen, or tied: mostly a head."""
    torch.manual_seed(0)
    if kind == "chatglm":
        config = ChatGLMConfig(
            padded_vocab_size=128, hidden_size=256, ffn_hidden_size=512, num_layers=4, num_attention_heads=4,
            kv_channels=64,
        )  # fmt: skip
        return ChatGLMForCausalLM(config).bfloat16()
    config = Qwen2Config(
        vocab_size=20_000 if kind == "tied" else 128, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=kind == "tied",
    )  # fmt: skip
    return Qwen2ForCausalLM(config).bfloat16()
