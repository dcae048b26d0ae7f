"""How long training will take: its FLOPs by the rate of this machine's matrix products, or by real steps."""

import time
from typing import Any

import pyarrow as pa
import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft import processes
from sft.data.splits import Data
from sft.model.machine import autocast_dtype, local_device
from sft.model.source import first_line
from sft.plain_text import duration
from sft.recipe import Recipe
from sft.training.arguments import steps
from sft.training.memory import batch_flops

# What a run's share of that rate is, from the slowest to the fastest machine and recipe that was measured.
SHARES = (0.35, 0.85)


def run_tokens(recipe: Recipe, data: Data) -> float:
    """Tokens that the whole run trains on, by the steps that it makes."""
    rows: Any = data.train
    split, args = data.splits["train"], recipe.training_args
    lengths = pa.compute.list_value_length(split.rows.dataset.data.column("input_ids")).to_numpy()
    each = int(args.get("per_device_train_batch_size", 8)) * int(args.get("gradient_accumulation_steps", 1))
    epochs = steps(recipe, data) * each * processes.count() / len(rows)
    return float(lengths[split.chosen].sum()) * epochs


def time_line(recipe: Recipe, data: Data, model: PreTrainedModel, own_loss: bool) -> str:
    """The time of training by its FLOPs, without a step made. model: without weights."""
    if recipe.dataset.streaming:
        return "time: not known of a stream; --check --steps 3 times real steps"
    try:
        flops, of_tokens = batch_flops(recipe, model, own_loss)
    except Exception as error:  # whatever the code of a model's class says when it is given no contents
        return f"time: not known without steps ({first_line(error)}); --check --steps 3 times real ones"
    rate = matmul_rate(local_device(recipe), autocast_dtype(recipe) or model.dtype) * processes.count()
    seconds = run_tokens(recipe, data) * flops / of_tokens / rate
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
