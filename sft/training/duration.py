"""How long training will take: its FLOPs by the rate of this machine's matrix products, or by real steps."""

import time
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft import processes
from sft.data.packing import token_counts
from sft.data.splits import Data
from sft.model.machine import autocast_dtype, local_device
from sft.plain_text import duration
from sft.recipe import Recipe
from sft.training.arguments import rows_a_step, steps
from sft.training.memory import Needs

# What a run's share of that rate is, from the slowest to the fastest machine and recipe that was measured.
SHARES = (0.35, 0.85)


def run_tokens(recipe: Recipe, data: Data) -> float:
    """Tokens that the whole run trains on, by the steps that it makes."""
    rows: Any = data.train
    epochs = steps(recipe, data) * rows_a_step(recipe) / len(rows)
    return float(token_counts(data.splits["train"].view()).sum()) * epochs


def time_line(recipe: Recipe, data: Data, model: PreTrainedModel, needed: Needs) -> str:
    """The time of training by its FLOPs, without a step made. model: without weights."""
    if recipe.dataset.streaming:
        return "time: not known of a stream; --check --steps 3 times real steps"
    if needed.flops is None:
        return f"time: not known without steps ({needed.unknown}); --check --steps 3 times real ones"
    rate = matmul_rate(local_device(recipe), autocast_dtype(recipe) or model.dtype) * processes.count()
    seconds = run_tokens(recipe, data) * needed.flops / rate
    fast, slow = (duration(seconds / share) for share in reversed(SHARES))
    return (
        f"time: {fast} to {slow} of training for {steps(recipe, data):,} steps, if {SHARES[1]:.0%} to {SHARES[0]:.0%} "
        f"is reached of the {rate / 1e12:.2g} TFLOP/s of a matrix product; --check --steps 3 times real steps"
    )


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a product of two square matrices: the best of five."""
    size = 1024 if device == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


class StepClock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begun)
