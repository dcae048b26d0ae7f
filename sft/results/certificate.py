"""The merge certificate: what base and adapter say to the same prompts as final_model/, compared logit by logit.

An adapter beside its base, as it was trained, is computed otherwise than one that is merged, and final_model/ is read
from disk: so a module that was not merged, a wrong scale or a wrong name shows in the logits.

Merged weights are rounded to the dtype of the export, and that moves the logits of a bfloat16 model about as much as a
module that was not merged: those of SmolLM2-135M by up to 0.35, and by 0.43 where one q_proj is missing. So what is
judged, in float32, leaves the rounding out: it takes from the difference what rounding does to the same weights merged
in memory. What is left is within BOUND, or the export fails. Of a model with routed experts the prompt counts that has
least left: by a last bit of float32 a token may go to another expert, while a fault of the merge is in all prompts.

The whole difference is told and not judged, in float32 and in the dtype of the export; and, of an adapter that was
trained on quantised weights, the difference between what was trained and what is shipped, the price of quantisation.
"""

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

import psutil
import torch
from transformers.utils import enable_tf32

from sft.errors import ModelError
from sft.model.load import load_model, load_trained
from sft.model.lora import load_adapter, takes_logits_to_keep
from sft.model.machine import default_dtype, local_device
from sft.recipe import Recipe
from sft.results.merge import merge_in_memory

PROMPT_TOKENS = 64  # the last of each prompt
POSITIONS = 32  # the last of these, whose logits are compared: with 8 prompts and 152,000 tokens a copy has 156 MB
BOUND = 1e-4  # of the largest logit, or of 1 if that is larger
HEADROOM = 1.2  # memory beside the weights, as a factor

Logits = torch.Tensor  # (positions of all prompts, vocabulary), float32, on the CPU


class Difference(TypedDict):
    """logits: the largest difference; kl: nats, the mean over positions; greedy: share of positions of equal argmax."""

    logits: float
    kl: float
    greedy: float


class Certificate(TypedDict, total=False):
    """What training_config.json holds of the comparison of base and adapter with final_model/.

    merge_error: the largest difference of logits in float32 that is not the rounding of merged weights; at most bound.
    float32, export: with that rounding, in float32 and in the dtype of the export. quantised: of the quantised base
    with its adapter, as trained, from final_model/. not_judged: why float32 is missing. not_checked: why all is.
    """

    prompts: int
    positions: int
    merge_error: float
    bound: float
    dtype: str
    float32: Difference
    export: Difference
    quantised: Difference
    not_judged: str
    not_checked: str


def certify(recipe: Recipe, final_model: Path, prompts: Sequence[list[int]]) -> Certificate:
    """Compares final_model/ with its base and adapter. prompts: token ids.

    Raises: ModelError: past the bound, or logits that are no numbers.
    """
    prompts = [prompt[-PROMPT_TOKENS:] for prompt in prompts if prompt]
    if not prompts:
        return {"not_checked": "there is no prompt to compare on"}
    if recipe.training_args.get("tf32"):
        enable_tf32(False)  # which would round float32 to 10 bits
    recipe = _placed_by_us(recipe)
    dtype = default_dtype(recipe)
    weights = sum(file.stat().st_size for file in final_model.glob("*.safetensors")) // dtype.itemsize
    devices = {each: _device(recipe, weights * each.itemsize) for each in (dtype, torch.float32)}
    if devices[dtype] is None:
        return {"not_checked": f"the model takes {weights * dtype.itemsize / 1e9:.1f} GB, more memory than is free"}
    places = {each: device for each, device in devices.items() if device is not None}
    ours, rounding, is_routed = _base_and_adapter(recipe, places, prompts)
    gc.collect()  # peft's modules hold each other, and two models may not fit
    theirs = dict(_in_each_dtype(load_trained(recipe, final_model), places, prompts))
    if not theirs[dtype].isfinite().all():
        raise ModelError(f"final_model/ gives logits that are no numbers in {dtype}; set another model_init.dtype")
    certificate = Certificate(
        prompts=len(prompts),
        positions=len(ours[dtype]),
        dtype=str(dtype).removeprefix("torch."),
        export=_difference(ours[dtype], theirs[dtype]),
    )
    if torch.float32 in places:
        sizes = [min(len(prompt), POSITIONS) for prompt in prompts]
        left = (ours[torch.float32] - theirs[torch.float32] - rounding).abs().split(sizes)
        errors = torch.stack([prompt.max() for prompt in left])
        error = errors.min() if is_routed else errors.max()
        certificate |= _judged(error.item(), ours[torch.float32], theirs[torch.float32])
    else:
        certificate["not_judged"] = f"float32 takes {weights * 4 / 1e9:.1f} GB, more memory than is free"
    if recipe.quantization_config and _device(recipe, weights * 2) == local_device(recipe):
        trained = load_adapter(load_model(recipe, training=False), _adapter(recipe), recipe, key="output_dir")
        certificate["quantised"] = _difference(_logits(trained, prompts), theirs[dtype])
    return certificate


def _judged(error: float, ours: Logits, theirs: Logits) -> Certificate:
    """Raises: ModelError: past the bound."""
    bound = BOUND * max(1.0, ours.abs().max().item())
    difference = _difference(ours, theirs)
    if not error <= bound:  # so that NaN is past it
        raise ModelError(
            f"final_model/ is not base and adapter: in float32 a logit differs by {error:.2g}, rounding left out, and "
            f"{bound:.2g} is the most allowed (KL {difference['kl']:.2g}, {difference['greedy']:.1%} of greedy tokens "
            "agree); it is not kept, lora_adapter/ is; serve that on its base, and report this"
        )
    return {"merge_error": error, "bound": bound, "float32": difference}


def _adapter(recipe: Recipe) -> str:
    return str(recipe.output_dir / "lora_adapter")


def _base_and_adapter(
    recipe: Recipe, places: Mapping[torch.dtype, str], prompts: Sequence[list[int]]
) -> tuple[dict[torch.dtype, Logits], Logits | float, bool]:
    """Returns: their logits, what rounding merged weights takes from those, and whether there are routed experts."""
    base = load_model(recipe, quantised=False)
    dtypes = {name: weight.dtype for name, weight in base.state_dict().items()}
    is_routed = any("expert" in name for name in dtypes)
    adapted = load_adapter(base, _adapter(recipe), recipe, key="output_dir")
    ours = dict(_in_each_dtype(adapted, places, prompts))
    if torch.float32 not in places or set(dtypes.values()) == {torch.float32}:
        return ours, 0.0, is_routed
    merged = merge_in_memory(adapted)
    exact = _logits(merged, prompts)
    with torch.no_grad():
        for name, weight in merged.state_dict().items():
            weight.copy_(weight.to(dtypes[name]))
    return ours, exact - _logits(merged, prompts), is_routed


def _in_each_dtype(
    model: Any, places: Mapping[torch.dtype, str], prompts: Sequence[list[int]]
) -> Iterator[tuple[torch.dtype, Logits]]:
    """The logits in the dtype of the export, then in float32, in which the model is left."""
    for dtype, device in places.items():
        model.to(device)
        if dtype is torch.float32:
            model.float()
        yield dtype, _logits(model, prompts)


@torch.inference_mode()
def _logits(model: Any, prompts: Sequence[list[int]]) -> Logits:
    """Of the last positions of each prompt, one prompt at a time, so that there is no padding."""
    model.eval()
    options: dict[str, Any] = {"logits_to_keep": POSITIONS} if takes_logits_to_keep(model) else {}
    rows = [torch.tensor([prompt], device=model.device) for prompt in prompts]
    found = [model(input_ids=row, use_cache=False, **options).logits[0, -POSITIONS:].float().cpu() for row in rows]
    return torch.cat(found)


def _difference(ours: Logits, theirs: Logits) -> Difference:
    p, q = ours.log_softmax(-1), theirs.log_softmax(-1)
    return Difference(
        logits=(ours - theirs).abs().max().item(),
        kl=(p.exp() * (p - q)).sum(-1).mean().item(),
        greedy=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    )


def _device(recipe: Recipe, size: int) -> str | None:
    """Where so many bytes of weights fit now; None: nowhere."""
    device = local_device(recipe)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        if size * HEADROOM < torch.cuda.mem_get_info()[0]:
            return device
    return "cpu" if size * HEADROOM < psutil.virtual_memory().available else None


def _placed_by_us(recipe: Recipe) -> Recipe:
    """The recipe with the library's own attention, which any dtype and device can do, and no device map."""
    own = ("attn_implementation", "experts_implementation", "use_kernels", "device_map", "max_memory")
    return replace(recipe, model_init={key: value for key, value in recipe.model_init.items() if key not in own})
