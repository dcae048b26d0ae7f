"""LoRA's sum, base + scaling * B A x, as one operation with its own gradients.

peft computes it in steps. Under autocast, where LoRA's weights are float32 beside a base of bfloat16, those are

    x -> float32 -> bfloat16 -> A x -> B A x -> scaling * ... -> base + ...

Both casts of the input are for nothing, and the adapter's term is rounded three times before it is added. Here

    low = A x                       # (tokens, r)
    base + scaling * (B low)        # one product of matrices that adds: float32 inside, rounded once

and backward is four products. That is plain LoRA whatever the base layer is: linear, or quantised to 4 or 8 bits.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch.autograd.function import once_differentiable

LAYERS = (
    "Linear",
    "Linear4bit",
    "Linear8bitLt",
)  # of peft.tuners.lora; bitsandbytes' two are there where it is installed


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, base: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """base: (tokens, out) and x: (tokens, in), of the dtype to compute in; a: (r, in) and b: (out, r)."""
        low = x @ a.T.to(x.dtype)
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        return torch.addmm(base, low, b.T.to(x.dtype), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, low, a, b = ctx.saved_tensors
        of_low = grad @ (b * ctx.scaling).to(x.dtype)
        of_x = of_low @ a.to(x.dtype) if ctx.needs_input_grad[1] else None
        of_a = (of_low.T @ x).to(a.dtype)
        of_b = (grad.T @ (low * ctx.scaling)).to(b.dtype)
        return grad, of_x, of_a, of_b, None


class _SumVariant(LoraVariant):
    """Where peft lets a layer compute its sum in another way."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        else:
            dtype = torch.promote_types(a.dtype, result.dtype)
        x = module.lora_dropout[active_adapter](x.to(dtype))
        # Shapes are changed out here: a model may write into a layer's output (OLMo clamps it), but not into a view
        # that an autograd function made.
        flat = _Sum.apply(result.to(dtype).flatten(0, -2), x.flatten(0, -2), a, b, module.scaling[active_adapter])
        return flat.view_as(result).to(result.dtype)


@contextmanager
def lora_in_one_sum(model: Any) -> Iterator[int]:
    """While it is open, plain LoRA layers of a model compute as above; afterwards they are as they were.

    Not for weights that are spread over processes (FSDP, DeepSpeed's ZeRO-3), which are whole in peft's own steps only.

    Yields: how many layers do.
    """
    plain = [
        layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and type(layer).__name__ in LAYERS
        if not layer.lora_variant and not any(layer.lora_bias.values())
    ]
    before = [layer.cast_input_dtype_enabled for layer in plain]
    for layer in plain:
        layer.lora_variant.update(dict.fromkeys(layer.lora_A, _SumVariant()))
        layer.cast_input_dtype_enabled = False  # of the input, to LoRA's float32
    try:
        yield len(plain)
    finally:
        for layer, cast in zip(plain, before, strict=True):
            layer.lora_variant.clear()
            layer.cast_input_dtype_enabled = cast
