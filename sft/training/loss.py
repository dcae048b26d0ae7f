"""Cross-entropy beside which no float32 copy of the logits is kept: at a large vocabulary most of a step's memory."""

from typing import Any

import torch

ENTRIES = 2**20  # of the logits are float32 at a time, so many that they stay in a CPU core's cache


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ctx.rows = max(1, ENTRIES // logits.shape[1])
        logsums = torch.cat([part.float().logsumexp(-1) for part in logits.split(ctx.rows)])
        ctx.save_for_backward(logits, labels, logsums)
        chosen = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        return ((logsums - chosen) * (labels >= 0)).sum()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        logits, labels, logsums = ctx.saved_tensors
        of_logits = torch.empty_like(logits)
        parts = (whole.split(ctx.rows) for whole in (logits, labels, logsums, of_logits))
        for part, label, logsum, out in zip(*parts, strict=True):
            chances = part.float().sub_(logsum[:, None]).exp_()
            chances.scatter_add_(1, label.clamp(min=0)[:, None], -torch.ones_like(logsum)[:, None])
            out.copy_(chances.mul_((label >= 0)[:, None] * grad))
        return of_logits, None


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of -log p(label): value and gradient of the same with logits made float32.

    Args: logits: (positions, vocabulary), of any dtype. labels: (positions,), below 0 where there is none.
    """
    return _SummedCrossEntropy.apply(logits, labels)
