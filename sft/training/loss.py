"""Cross-entropy that makes of the logits, most of a step's memory at a large vocabulary, no float32 copy."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

# So many entries of the logits are float32 at a time: on a CPU such as its cache holds, else enough for few kernels.
ENTRIES_ON_CPU, ENTRIES = 2**20, 2**24


def entries_at_a_time(on_cpu: bool) -> int:
    return ENTRIES_ON_CPU if on_cpu else ENTRIES


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ctx.rows = max(1, entries_at_a_time(logits.device.type == "cpu") // logits.shape[1])
        logsums = torch.cat([part.float().logsumexp(-1) for part in logits.split(ctx.rows)])
        ctx.save_for_backward(logits, labels, logsums)
        losses = logsums - logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        return losses.masked_fill(labels < 0, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        logits, labels, logsums = ctx.saved_tensors
        of_logits = torch.empty_like(logits)
        parts = (whole.split(ctx.rows) for whole in (logits, labels, logsums, of_logits))
        for part, label, logsum, out in zip(*parts, strict=True):
            chances = (part - logsum[:, None]).exp_()
            chances.scatter_add_(1, label.clamp(min=0)[:, None], -torch.ones_like(logsum)[:, None])
            out.copy_(chances.mul_(grad).masked_fill_((label < 0)[:, None], 0))
            del chances  # before the next are made
        return of_logits, None


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label): value and gradient of the same with logits made float32.

    Args: logits: (positions, vocabulary), float32 or less exact. labels: (positions,), below 0 where there is none.
    """
    return _SummedCrossEntropy.apply(logits, labels)
