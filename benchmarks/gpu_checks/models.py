"""Random models on disk, in the layout of released ones, and the recipes that train them."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast, Qwen2Config

from benchmarks.gpu_checks.machine import ON_GPU
from sft.model.chatglm3 import ChatGLMConfig
from sft.recipe import Recipe, load_recipe
from tests.families import FAMILIES, build
from tests.model.test_chatglm3_run import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHARD_WEIGHTS = 2e9

# The released config.json of Qwen2.5-7B-Instruct; a ChatGLMConfig's defaults are those of ChatGLM3-6B.
QWEN_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
# What stands for a small model: the sizes of Qwen2.5-0.5B, less deep. On a CPU as tiny as can be.
QWEN_SMALL = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 8,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
QWEN_TINY = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CHATGLM_TINY = {
    "padded_vocab_size": 1088,
    "hidden_size": 64,
    "ffn_hidden_size": 128,
    "num_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 16,
}


def small_qwen(folder: Path) -> Path:
    """A folder with a small Qwen2, made when it is first asked for."""
    if not (folder / "small_qwen").is_dir():
        _write(folder / "small_qwen", Qwen2Config(**QWEN_SMALL if ON_GPU else QWEN_TINY))
        qwen_tokenizer().save_pretrained(folder / "small_qwen")
    return folder / "small_qwen"


def full_size(recipe_name: str, folder: Path) -> Path:
    """A folder with the model of recipes/NAME.yaml at its released size, on a CPU a tiny one."""
    if recipe_name == "chatglm3_4bit":
        importlib.import_module("sentencepiece")  # without it train_tokenizer would skip a test
        _write(folder, ChatGLMConfig(**{} if ON_GPU else CHATGLM_TINY))
        train_tokenizer(folder)
        named = {"name_or_path": "THUDM/chatglm3-6b", "tokenizer_class": "ChatGLMTokenizer"}
        (folder / "tokenizer_config.json").write_text(json.dumps(named), encoding="utf-8")
    else:
        _write(folder, Qwen2Config(**QWEN_7B if ON_GPU else QWEN_TINY))
        qwen_tokenizer().save_pretrained(folder)
    return folder


def recipe_for(model: Path, *overrides: str, name: str = "qwen_qlora") -> Recipe:
    """recipes/NAME.yaml for a model of ours: the demo data, its output beside the model."""
    return load_recipe(ROOT / f"recipes/{name}.yaml", overrides_for(model, *overrides))


def overrides_for(model: Path, *overrides: str) -> list[str]:
    demo = ROOT / "data/demo"
    often = "weight: 6"  # so that there are rows enough for every step
    train = ", ".join(f"{{path: '{demo}/{name}.jsonl', {often}}}" for name in ("train", "train_instruction"))
    return [
        f"model_name_or_path={model}",
        f"output_dir={model.parent / 'out'}",
        f"dataset.train=[{train}]",
        f"dataset.validation={demo}/validation.jsonl",
        f"dataset.test={demo}/test.jsonl",
        "dataset.max_lost=1",  # tiny rows trim most conversations
        *([] if ON_GPU else ["training_args.use_cpu=true"]),
        *overrides,
    ]


def _write(folder: Path, config: PreTrainedConfig) -> None:
    """The configuration and bfloat16 weights in shards, as a release has them."""
    folder.mkdir(parents=True)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in AutoModelForCausalLM.from_config(config).state_dict().items()}
    shards: list[dict[str, torch.Size]] = [{}]
    for name, shape in shapes.items():
        if sum(held.numel() for held in shards[-1].values()) > SHARD_WEIGHTS:
            shards.append({})
        shards[-1][name] = shape
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / file, shard, seed=number)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_shard(path: Path, shapes: dict[str, torch.Size], seed: int) -> None:
    """Random matrices, norms of ones, biases of zeros.

    The numbers are drawn once and written again and again: to draw 7e9, or to hold them, would take a minute.
    Source of the layout: huggingface.co/docs/safetensors (length of the header, header, numbers).
    """
    drawn = torch.randn(2**24 if ON_GPU else 2**16, generator=torch.Generator().manual_seed(seed)) * 0.02
    numbers = memoryview(drawn.bfloat16().view(torch.uint8).numpy())
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for number, (name, shape) in enumerate(shapes.items()):
            left = 2 * shape.numel()
            if len(shape) == 1:
                one = b"\x80\x3f"  # 1 in bfloat16, little endian
                stream.write((b"\0\0" if name.endswith("bias") else one) * shape.numel())
                continue
            begin = 2 * 7919 * number % len(numbers)  # elsewhere, or all matrices of a size would be one
            while left:
                piece = numbers[begin : begin + left]
                stream.write(piece)
                left, begin = left - len(piece), 0


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2.5's template and control tokens on the small vocabulary of the tests, whose ids every size here holds."""
    return build(FAMILIES["qwen2_5"], "bytes")
