"""The machine: which device trains, and the dtypes that it is fast in."""

import platform
import sys

import psutil
import torch

from sft.errors import ModelError
from sft.recipe import Recipe


def has_fast_bf16(on_cpu: bool = False) -> bool:
    """Whether bfloat16 is worth using: on a GPU that has it, or a CPU with instructions for it."""
    if torch.cuda.is_available() and not on_cpu:
        return torch.cuda.is_bf16_supported(including_emulation=False)  # not T4 and V100, which emulate it slowly
    if torch.backends.mps.is_available() and not on_cpu:
        return torch.backends.mps.is_macos_or_newer(14, 0)
    # In this order: builds without mkldnn, as for Apple silicon, have none of its operators.
    return torch.cpu._is_avx512_bf16_supported() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def use_cpu(recipe: Recipe) -> bool:
    """Whether the run is on the CPU: there is no GPU, or the recipe says so."""
    return recipe.training_args.get("use_cpu", False) or not (
        torch.cuda.is_available() or torch.backends.mps.is_available()
    )


def local_device(recipe: Recipe) -> str:
    """Where the weights of this process lie; with several processes each has a GPU of its own."""
    if use_cpu(recipe):
        return "cpu"
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "mps"


def device_name(recipe: Recipe) -> str:
    """The GPU's, as its maker names it; "cpu"."""
    if use_cpu(recipe):
        return "cpu"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"Apple's GPU ({platform.machine()})"


def named_dtype(recipe: Recipe) -> torch.dtype | None:
    """model_init.dtype; None: the recipe names none, or leaves it open."""
    name = recipe.model_init.get("dtype")
    return None if name in (None, "auto") else getattr(torch, name)


def fast_dtype(recipe: Recipe) -> torch.dtype:
    """What matrices are best multiplied in: bfloat16 where the machine is fast in it, float16 on a GPU that is not."""
    if has_fast_bf16(use_cpu(recipe)):
        return torch.bfloat16
    return torch.float32 if use_cpu(recipe) or not torch.cuda.is_available() else torch.float16


def default_dtype(recipe: Recipe, training: bool = True) -> torch.dtype:
    """The dtype of the weights: the recipe's model_init.dtype, or by machine and method.

    Weights that all train are float32, under autocast: a step at a learning rate of 2e-5 is smaller than what
    bfloat16 weights can tell apart, and most of it would be lost: 70 % of them had not changed after 20 steps. Frozen
    weights have the machine's fast dtype.
    """
    by_method = torch.float32 if training and recipe.trains_all_weights else fast_dtype(recipe)
    return named_dtype(recipe) or by_method


def autocast_dtype(recipe: Recipe) -> torch.dtype | None:
    """What matrices are multiplied in, by training_args.bf16 or fp16, or by the machine; None: the weights' own."""
    args = recipe.training_args
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if args.get(key):
            return dtype
    fast = fast_dtype(recipe)
    off = {torch.bfloat16: args.get("bf16") is False, torch.float16: args.get("fp16") is False}
    return None if off.get(fast, True) else fast


def check_machine(recipe: Recipe) -> None:
    """Refuses what this machine cannot do, before anything slow. Raises: RecipeError."""
    if use_cpu(recipe):
        _check_driver(recipe)
        _refuse_gpu_settings(recipe)
    elif torch.cuda.is_available():
        _refuse_missing_bf16(recipe)
        _refuse_float16_weights(recipe)
    else:
        _refuse_on_mps(recipe)


def _check_driver(recipe: Recipe) -> None:
    """A driver that is too old leaves torch without its GPU, and says so in a warning only."""
    if recipe.training_args.get("use_cpu") or torch.version.cuda is None or torch.cuda.is_available():
        return
    try:
        torch.cuda.init()
    except RuntimeError as error:
        text = str(error)
        if "driver" in text and "too old" in text:
            found = "".join(c for c in text.partition("found version")[2].partition(")")[0] if c.isdigit())
            version = f"CUDA {int(found) // 1000}.{int(found) % 1000 // 10}" if found else "an older CUDA"
            raise ModelError(
                f"the NVIDIA driver is for {version}, and this torch for CUDA {torch.version.cuda}, so the GPU cannot "
                "be used; update the driver, or train on the CPU with training_args.use_cpu=true"
            ) from None


def _refuse_gpu_settings(recipe: Recipe) -> None:
    args, model_init = recipe.training_args, recipe.model_init
    none = "training_args.use_cpu is true" if args.get("use_cpu") else "there is no GPU here"
    gpu_settings = [
        ("training_args.use_cpu", args.get("use_cpu") is False, "remove the key to train on the CPU"),
        ("training_args.fp16", args.get("fp16"), "use bf16, which a CPU can do"),
        ("training_args.tf32", args.get("tf32"), "remove the key"),
        (
            "model_init.attn_implementation",
            str(model_init.get("attn_implementation", "")).startswith("flash"),
            "use sdpa, which packs rows as exactly",
        ),
        ("model_init.device_map", "cuda" in str(model_init.get("device_map", "")), "remove the key"),
    ]
    for key, is_set, advice in gpu_settings:
        if is_set:
            raise recipe.error(key, f"needs a GPU, and {none}; {advice}")


def _refuse_missing_bf16(recipe: Recipe) -> None:
    """A GPU before Ampere (T4, V100) trains in float16."""
    if has_fast_bf16():
        return
    settings = [
        ("training_args.bf16", recipe.training_args.get("bf16"), "remove it"),
        ("model_init.dtype", recipe.model_init.get("dtype") == "bfloat16", "set float16"),
        (
            "quantization_config.bnb_4bit_compute_dtype",
            (recipe.quantization_config or {}).get("bnb_4bit_compute_dtype") == "bfloat16",
            "set float16",
        ),
    ]
    for key, is_set, advice in settings:
        if is_set:
            raise recipe.error(key, f"asks for bfloat16, which {torch.cuda.get_device_name()} has not; {advice}")


def _refuse_float16_weights(recipe: Recipe) -> None:
    """In float16 a loss is scaled, and the scaler takes gradients of float32 weights only."""
    if recipe.trains_all_weights and named_dtype(recipe) is autocast_dtype(recipe) is torch.float16:
        raise recipe.error("model_init.dtype", "float16 weights cannot be trained in float16; remove it, for float32")


def _refuse_on_mps(recipe: Recipe) -> None:
    """Apple's GPUs: no bfloat16 before macOS 14, and none of bitsandbytes' optimizers."""
    optimizer = str(recipe.training_args.get("optim", ""))
    if any(word in optimizer for word in ("8bit", "paged", "bnb", "lion", "ademamix")):
        raise recipe.error("training_args.optim", f"{optimizer} does not run on Apple's GPUs; set adamw_torch")
    if recipe.training_args.get("fp16"):
        raise recipe.error("training_args.fp16", "does not train on Apple's GPUs; remove it")
    settings = [
        ("training_args.bf16", recipe.training_args.get("bf16")),
        ("model_init.dtype", named_dtype(recipe) is torch.bfloat16),
    ]
    for key, is_set in settings:
        if is_set and not has_fast_bf16():
            raise recipe.error(key, "bfloat16 needs macOS 14 on Apple's GPUs; remove it, or update macOS")


def peak_memory_bytes() -> int:
    """The most memory that this process held at once."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
