"""What a training step must compute for a token, by which its speed is a share of the machine's."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Weights:
    """Counts of what a step multiplies by: linear layers, LoRA beside them, the head."""

    linear: int
    lora: int
    head: int

    def flops_a_token(self, supervised: float, lora: bool) -> float:
        """On average; what activation checkpointing computes twice, and attention, is left out.

        Forward, and backward to the inputs: 2 and 2 for a weight, 2 more for the gradient of one that is trained. The
        head works on tokens with a label only. supervised: their share.
        """
        if lora:
            return 4 * self.linear + 6 * self.lora + 4 * self.head * supervised
        return 6 * self.linear + 6 * self.head * supervised


def linear_layers(model: Any) -> list[Any]:
    """All but the head."""
    import torch

    head = model.get_output_embeddings()
    return [part for part in model.modules() if isinstance(part, torch.nn.Linear) and part is not head]
