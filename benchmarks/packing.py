"""Tries in which classes of the installed transformers packed conversations come out as they do apart.

python benchmarks/packing.py [model type ...]

Each class that AutoModelForCausalLM knows goes through the probe that a run makes (sft/training/packing_probe.py), with
its default configuration, or with what CONFIGURATIONS says where that builds no model or lacks some kind of its layers.
Before these come the models of the shipped recipes. Prints what docs/packing.md has; each finding goes to stderr.
"""

import os
import sys
import time
import warnings
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import CONFIG_MAPPING, LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.data.collator import DataCollatorForCompletionOnlyLM
from sft.model.chatglm3 import ChatGLMConfig
from sft.training.packing_probe import Finding, probe

# As the config.json of each repository has them.
SHIPPED = {
    "Qwen/Qwen2.5-7B-Instruct": lambda: Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        max_window_layers=28,
        sliding_window=131072,
        use_sliding_window=False,
        rope_theta=1e6,
        bos_token_id=151643,
        eos_token_id=151645,
    ),
    "THUDM/chatglm3-6b": ChatGLMConfig,
    "HuggingFaceTB/SmolLM2-135M-Instruct": lambda: LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_theta=100000,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    ),
}
LINEAR, FULL = "linear_attention", "full_attention"
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "num_hidden_layers": 4},
    "deepseek_v2": {"num_experts_per_tok": 6, "moe_intermediate_size": 1408},
    "dots1": {"n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 4096},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL], "num_hidden_layers": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"layer_types": ["conv", FULL], "num_hidden_layers": 2},
    "lfm2_moe": {"layer_types": ["conv", FULL], "num_hidden_layers": 2, "num_dense_layers": 0},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 48},
    "xmod": {"default_language": "en_XX"},
}


def collator() -> DataCollatorForCompletionOnlyLM:
    backend = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    return DataCollatorForCompletionOnlyLM(tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="a"))


def configuration(model_type: str) -> PretrainedConfig:
    config = CONFIG_MAPPING[model_type](**CONFIGURATIONS.get(model_type, {}))
    if hasattr(config, "is_decoder"):
        config.is_decoder = True  # BERT and the like see both ways without it
    return config


def tried(make: Any) -> Finding:
    begun = time.perf_counter()
    try:
        return probe(make(), collator())
    except Exception as error:  # a default configuration that its own class refuses
        text = str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
        return Finding(None, text, None, time.perf_counter() - begun)


def tables(found: dict[str, Finding]) -> str:
    """What docs/packing.md says of them: those that are exact, those that are not by what is wrong, and the rest."""
    exact = [name for name, each in found.items() if each.exact]
    rest = {name: each for name, each in found.items() if each.exact is None}
    worst = max((found[name].off or 0.0 for name in exact), default=0.0)
    wrong: dict[str, list[str]] = defaultdict(list)
    for name, each in found.items():
        if each.exact is False:
            off = "" if each.off is None else f" {each.off:.1f}"
            wrong[each.text.partition(" ")[2]].append(f"`{name}`{off}")
    return "\n".join(
        [
            f"Exact, {len(exact)} of {len(found)} (off by {worst:.0e} at most): {', '.join(exact)}",
            "",
            "| the class | of model type, off by |",
            "|---|---|",
            *(f"| {what} | {len(names)}: {', '.join(names)} |" for what, names in wrong.items()),
            "",
            "No model could be built small of:",
            "",
            *(f"- `{name}`: {each.text.partition('to try it ')[2] or each.text}" for name, each in rest.items()),
        ]
    )


def main(names: list[str]) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    for name, make in {} if names else SHIPPED.items():
        found = tried(make)
        print(f"{name}: {found.text} (off by {found.off:.0e}), {found.seconds:.1f} s", flush=True)
    classes = {}
    for name in names or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        classes[name] = tried(partial(configuration, name))
        print(f"{name}: {classes[name]}", file=sys.stderr, flush=True)
    slowest = max(classes, key=lambda name: classes[name].seconds)
    total = sum(each.seconds for each in classes.values())
    print(f"\n{tables(classes)}\n\n{total:.0f} s in all, {slowest} {classes[slowest].seconds:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
