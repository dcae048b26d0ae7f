"""LoRA that starts from the base's own weights: PiSSA and OLoRA, which take from them what they start from, and LoftQ.

PiSSA and OLoRA split a weight W into W' + B0 A0, train B and A from B0 and A0, and leave W' in the model's place. That
adapter is wrong on W. What is saved at the end is plain LoRA of twice the rank, which is right there:

    W' + B A = W + B A - B0 A0 = W + [B, -B0] [A; A0]

A checkpoint holds B and A, since W', B0 and A0 come out the same when the run starts again.

LoftQ starts with B A next to what quantisation has taken from W; its adapter belongs to the quantised base.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from sft.model.load import load_model
from sft.recipe import Recipe

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def changes_base(config: Any) -> bool:
    """Whether peft changes the base's weights when it makes this adapter. config: peft's, or a recipe's lora_config."""
    init = config.get("init_lora_weights") if isinstance(config, dict) else getattr(config, "init_lora_weights", None)
    return isinstance(init, str) and init.lower().startswith(("pissa", "olora"))


def note_start(adapted: Any) -> None:
    """Keeps what the adapter starts from, by which `to_plain_lora` knows what the base lacks. adapted: a PeftModel."""
    start = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    adapted.lora_start = {name: w.detach().cpu().clone() for name, w in start.items() if _rank_dim(name) is not None}


def _rank_dim(name: str) -> int | None:
    """The dimension of a LoRA matrix that is its rank; None: it is no such matrix."""
    found = re.search(r"\.lora_(?:embedding_)?([AB])\b", name)
    return None if found is None else "AB".index(found[1])


def to_plain_lora(adapted: Any, folder: Path) -> None:
    """Rewrites an adapter that `adapted` has saved in `folder` so that it is right on the base as it was."""
    weights = load_file(folder / WEIGHTS)
    for name, start in adapted.lora_start.items():
        dim = _rank_dim(name) or 0
        added = -start if dim else start  # of B, and of A
        weights[name] = torch.cat([weights[name], added.to(weights[name].dtype)], dim=dim)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    alpha_factor = 2**0.5 if config["use_rslora"] else 2  # alpha / sqrt(r), or alpha / r, stays
    config |= {"init_lora_weights": True, "r": 2 * config["r"], "lora_alpha": alpha_factor * config["lora_alpha"]}
    for key, factor in (("rank_pattern", 2), ("alpha_pattern", alpha_factor)):
        config[key] = {pattern: factor * value for pattern, value in (config[key] or {}).items()}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


@torch.no_grad()
def start_from_quantisation_error(adapted: PeftModel, recipe: Recipe) -> None:
    """LoftQ, one iteration: B A becomes the best approximation of the weights minus the quantised weights.

    peft's replace_lora_weights_loftq does it on a GPU only, and as if lora_alpha were r (0.21).
    """
    whole = load_model(recipe, quantised=False)
    layers: Any = adapted.get_base_model().named_modules()
    for path, layer in layers:
        quantised: Any = getattr(layer, "weight", None) if isinstance(layer, LoraLayer) else None
        if not hasattr(quantised, "quant_state"):
            continue
        ((name, a),) = layer.lora_A.items()
        b, rank = layer.lora_B[name], layer.r[name]
        kept = dequantize_4bit(quantised.data, quantised.quant_state).float()
        u, s, vh = torch.linalg.svd(whole.get_parameter(f"{path}.weight").to(kept) - kept, full_matrices=False)
        root = (s[:rank] / layer.scaling[name]).sqrt()
        a.weight.copy_(root[:, None] * vh[:rank])
        b.weight.copy_(u[:, :rank] * root)
