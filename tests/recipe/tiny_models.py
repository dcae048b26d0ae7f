"""The models that recipes/ names, by models.yaml: tiny random ones of their own code, layers and kinds of files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedTokenizerFast

import sft.model.chatglm3  # noqa: F401 - registers ChatGLM3 with the Auto classes
from tests.families import Family, build, spelled_tokens, template

MODELS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("models.yaml").read_text(encoding="utf-8"))
# What a tiny model has instead. Two layers are enough for one of each kind.
SIZES = {
    "depth": 1,
    "full_attention_interval": 2,
    "head_dim": 16,
    "hidden_size": 64,
    "image_size": 28,
    "intermediate_size": 64,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "mm_tokens_per_image": 4,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "out_hidden_size": 64,
    "sliding_window": 16,
    "sliding_window_pattern": 2,
}


def tiny(published: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    """The configuration with small sizes, at every depth."""
    made = {key: tiny(value, vocabulary) if isinstance(value, dict) else value for key, value in published.items()}
    made |= {key: SIZES[key] for key in made.keys() & SIZES.keys() if made[key] is not None}
    return made | {"vocab_size": vocabulary} if "vocab_size" in made else made


def tokenizer_of(model: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A small trained tokenizer with the control tokens and the template of a family; as most real ones it puts the
    bos before any text, and has no pad token."""
    source = model["template"] if "{" in model["template"] else template(model["template"])
    special, added = spelled_tokens(source)
    special += tuple(token for token in map(model.get, ("bos", "eos", "pad")) if token and token not in special)
    family = Family("qwen2_5", "", special, bos=model.get("bos"), eos=model["eos"], added=added)
    tokenizer = build(family, model.get("tokenizer", "bytes"))
    tokenizer.chat_template, tokenizer.pad_token = source, model.get("pad")
    if bos := model.get("bos"):
        processor: Any = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


def make(model: dict[str, Any], folder: Path) -> None:
    """A folder as a hub has it: bfloat16 weights of the class that config.json names, tokenizer, generation config."""
    tokenizer = tokenizer_of(model)
    published = {key: value for key, value in model["config"].items() if key != "quantization_config"}
    config: Any = AutoConfig.for_model(**tiny(published, len(tokenizer)))
    for part in (config, config.get_text_config()):
        part.bos_token_id, part.eos_token_id, part.pad_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id, None
    torch.manual_seed(0)
    made = getattr(transformers, config.architectures[0])(config).bfloat16()
    made.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id], do_sample=True)
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if quantised := model["config"].get("quantization_config"):
        put_in_mxfp4(folder, quantised)
    if "vision_config" in published:
        (folder / "preprocessor_config.json").write_text('{"image_seq_length": 4}', encoding="utf-8")


def put_in_mxfp4(folder: Path, quantised: dict[str, Any]) -> None:
    """Random MXFP4 numbers in the place of the experts: two of 4 bits in a byte, and a scale for 32."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full(shape, 120, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    add_to_config(folder, quantization_config=quantised)


def put_in_fp8(folder: Path) -> None:
    """Linear layers in FP8, with a scale for 16 x 16."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor
        if name.endswith("proj.weight"):
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.ones([-(-size // 16) for size in tensor.shape])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    add_to_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})


def add_to_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | keys), encoding="utf-8")


def published_config(name: str) -> PretrainedConfig:
    return AutoConfig.for_model(**MODELS[name]["config"])


def recipes() -> Iterator[Path]:
    yield from sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))
