"""The machine: which device trains, and the dtype that it is fast in."""

import torch

from sft.recipe import Recipe


def has_fast_bf16() -> bool:
    """Whether bfloat16 is worth using here: a GPU that has it, or a CPU with instructions for it."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return True
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()


def use_cpu(recipe: Recipe) -> bool:
    """Whether the run is on the CPU: there is no GPU, or the recipe says so."""
    return recipe.training_args.get("use_cpu", False) or not (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    )


def check_machine(recipe: Recipe) -> None:
    """Refuses what asks for a GPU where there is none. Raises: RecipeError."""
    if not use_cpu(recipe):
        return
    none = "there is no GPU here" if not recipe.training_args.get("use_cpu") else "training_args.use_cpu is true"
    gpu_settings = [
        ("training_args.use_cpu", recipe.training_args.get("use_cpu") is False, "remove the key to train on the CPU"),
        ("training_args.fp16", recipe.training_args.get("fp16"), "use bf16, which a CPU can do"),
        ("training_args.tf32", recipe.training_args.get("tf32"), "remove the key"),
        (
            "model_init.attn_implementation",
            str(recipe.model_init.get("attn_implementation", "")).startswith("flash"),
            "use sdpa, which packs rows as exactly",
        ),
        ("model_init.device_map", "cuda" in str(recipe.model_init.get("device_map", "")), "remove the key"),
    ]
    for key, is_set, advice in gpu_settings:
        if is_set:
            raise recipe.error(key, f"needs a GPU, and {none}; {advice}")


def default_dtype(recipe: Recipe) -> torch.dtype:
    """The recipe's model_init.dtype; without one bfloat16 where the machine is fast in it, else float32."""
    named = recipe.model_init.get("dtype")
    if named in (None, "auto"):
        return torch.bfloat16 if has_fast_bf16() else torch.float32
    return getattr(torch, named)
