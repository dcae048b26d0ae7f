"""The two recipes for a GPU with models of their real size: speed, memory, and trl's own trainer beside ours."""

import gc
import math
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer, TrainerCallback, TrainerState
from trl import SFTTrainer

from benchmarks.flops import Weights, linear_layers
from benchmarks.gpu_checks.line import Line, judged, not_here
from benchmarks.gpu_checks.machine import ON_GPU, peak_flops, sync
from benchmarks.gpu_checks.models import full_size, recipe_for
from benchmarks.gpu_checks.shares import Shares, shares_of_work
from sft.data.splits import Data, prepare
from sft.model.load import load_model, meta_model
from sft.model.lora import add_lora
from sft.model.tokenizer import load_tokenizer
from sft.recipe import Recipe
from sft.training import arguments, check, trainer
from sft.training.memory import estimate_memory

LENGTHS = (2048, 8192) if ON_GPU else (512, 1024)
STEPS = 6  # the first compiles kernels, the last is profiled, and those between are timed
# Steps of one batch each, with nothing between them.
ALONE = [
    "dataset.validation=null",
    "dataset.test=null",
    f"training_args.max_steps={STEPS}",
    "training_args.gradient_accumulation_steps=1",
    "training_args.save_strategy=no",
    "training_args.logging_steps=1",
    "training_args.logging_nan_inf_filter=false",
    "training_args.disable_tqdm=true",
]
DISK_BYTES = 17e9 if ON_GPU else 1e8
MEMORY_LIMIT = 0.15  # how far --check's estimate may be off
SLOWER_THAN_TRL = 0.9  # what we add to trl's trainer may not cost more than the noise of four steps


def qwen_qlora(folder: Path) -> Iterator[Line]:
    return _full_size("qwen_qlora", folder)


def chatglm3_4bit(folder: Path) -> Iterator[Line]:
    return _full_size("chatglm3_4bit", folder)


def _full_size(name: str, folder: Path) -> Iterator[Line]:
    """Six steps of recipes/NAME.yaml at each length, without accumulation and evaluation, ours and then trl's."""
    if (free := shutil.disk_usage(folder).free) < DISK_BYTES:
        yield not_here("", f"{folder} has {free / 1e9:.0f} GB free, and the model takes {DISK_BYTES / 1e9:.0f}")
        return
    _free_memory()
    held_before = torch.cuda.memory_allocated() if ON_GPU else 0
    try:
        begun = time.perf_counter()
        model_folder = full_size(name, folder / name)
        written = time.perf_counter()
        recipes = [_recipe(name, model_folder, length) for length in LENGTHS]
        model = add_lora(load_model(recipes[0]), recipes[0])
        weights = sum(p.numel() for p in meta_model(recipes[0]).parameters())
        seconds = f"written in {written - begun:.1f} s, loaded in {time.perf_counter() - written:.1f} s"
        yield judged("model", True, f"{weights:,} weights, {seconds}", weights=weights)
        for recipe in recipes:
            yield from _both_trainers(recipe, model, held_before)
    finally:
        shutil.rmtree(folder / name, ignore_errors=True)
        model = None
        _free_memory()


def _free_memory() -> None:
    """Of trainers that hold themselves, and for the processes of other checks."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def _recipe(name: str, model_folder: Path, length: int) -> Recipe:
    return recipe_for(model_folder, f"dataset.max_length={length}", *ALONE, name=name)


def _both_trainers(recipe: Recipe, model: Any, held_before: int) -> Iterator[Line]:
    length, tokenizer = recipe.dataset.max_length, load_tokenizer(recipe)
    rows = prepare(recipe, tokenizer).train
    rows = rows.select(range(STEPS * int(recipe.training_args["per_device_train_batch_size"])))  # what the steps see
    meta = meta_model(recipe)

    ours = timed(trainer.make_trainer(recipe, model, tokenizer, Data(None, rows)))
    labels = [labels_of(row) for row in rows]
    peak, source = peak_flops()
    share = ours.tokens_a_second * flops_a_token(recipe, meta, labels) / peak
    of_peak = f"{share:.1%} of {peak / 1e12:,.2f} TFLOP/s ({source})"
    figure = f"{ours.tokens_a_second:,.0f} tokens/s, {of_peak}, loss {ours.losses[-1]:.2f}"
    finite = len(ours.losses) == STEPS and all(map(math.isfinite, ours.losses))
    numbers = {"tokens_a_second": ours.tokens_a_second, "share_of_peak": share, "losses": ours.losses}
    yield judged(f"{length} tokens, speed", finite, figure, step_seconds=ours.seconds, **numbers)
    yield _profile(f"{length} tokens, time", ours)
    yield _memory(recipe, meta, ours.peak_bytes - held_before)

    args = arguments.training_config(recipe)
    args.padding_free, args.max_length = True, None  # how trl keeps packed rows apart; they are cut already
    packed = rows[:]
    same = datasets.Dataset.from_dict({key: packed[key] for key in ("input_ids", "seq_lengths")} | {"labels": labels})
    trls = timed(SFTTrainer(model=model, args=args, train_dataset=same, processing_class=tokenizer))
    ratio = ours.tokens_a_second / trls.tokens_a_second
    figure = f"{ratio:.2f} times the {trls.tokens_a_second:,.0f} tokens/s of trl's SFTTrainer (padding-free, sdpa)"
    numbers = {"ratio": ratio, "tokens_a_second": trls.tokens_a_second, "peak_bytes": trls.peak_bytes - held_before}
    yield judged(f"{length} tokens, beside trl", not ON_GPU or ratio > SLOWER_THAN_TRL, figure, **numbers)


def _profile(part: str, steps: "_Steps") -> Line:
    """Shares of the last step, which the profiler makes longer: what is neither in a kernel is waiting for one."""
    wall = steps.seconds[-1]
    kinds = {kind: seconds / wall for kind, seconds in steps.work.kinds.most_common()}
    idle = max(0.0, 1 - sum(kinds.values()))
    figure = ", ".join(f"{kind} {share:.0%}" for kind, share in kinds.items()) + f", between kernels {idle:.0%}"
    longest = {name[:120]: seconds / wall for name, seconds in steps.work.names.most_common(12)}
    return judged(part, True, figure, shares={**kinds, "between kernels": idle}, longest=longest)


def labels_of(row: dict[str, Any]) -> list[int]:
    return [token if kept else -100 for token, kept in zip(row["input_ids"], row["assistant_mask"], strict=True)]


def _memory(recipe: Recipe, meta: Any, peak_bytes: int) -> Line:
    """What torch held at most during the steps against what --check says of them."""
    part = f"{recipe.dataset.max_length} tokens, memory"
    parts = estimate_memory(recipe, meta, own_loss=not ON_GPU)
    estimate = sum(parts.values())
    if not ON_GPU:
        return not_here(part, f"only a GPU's memory is counted; --check says {estimate / 1e9:.2f} GB")
    off = estimate / peak_bytes - 1
    figure = (
        f"{peak_bytes / 1e9:.2f} GB at most; --check says {estimate / 1e9:.2f}, {off:+.0%} (limit {MEMORY_LIMIT:.0%})"
    )
    return judged(part, abs(off) <= MEMORY_LIMIT, figure, peak_bytes=peak_bytes, estimate=parts)


def flops_a_token(recipe: Recipe, meta: Any, labels: list[list[int]]) -> float:
    """What a step must compute for a token, on average. labels: of each row."""
    linear = sum(part.weight.numel() for part in linear_layers(meta))
    lora = 0 if recipe.trains_all_weights else check.trained_weights(recipe, meta)
    supervised = sum(label != -100 for row in labels for label in row) / sum(map(len, labels))
    weights = Weights(linear, lora, meta.get_output_embeddings().weight.numel())
    return weights.flops_a_token(supervised, lora=not recipe.trains_all_weights)


class _Steps(TrainerCallback):
    """Seconds and tokens of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []
        self.peak_bytes = 0
        self.work = Shares()
        self._profiler = ExitStack()
        self._begun = 0.0

    @property
    def tokens_a_second(self) -> float:
        """Without the first step, in which kernels are compiled, and the last, which is profiled."""
        return sum(self.tokens[1:-1]) / sum(self.seconds[1:-1])

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        sync()
        if state.global_step == STEPS - 1:
            self.work = self._profiler.enter_context(shares_of_work())
        self._begun = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        sync()
        self.seconds.append(time.perf_counter() - self._begun)
        self._profiler.close()

    def count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tokens.append(kwargs["input_ids"].numel())


def timed(made: Trainer) -> _Steps:
    """Trains, and measures it."""
    _free_memory()
    steps = _Steps()
    made.add_callback(steps)
    hook = made.model.register_forward_pre_hook(steps.count, with_kwargs=True)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    made.train()
    hook.remove()
    steps.losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    steps.peak_bytes = torch.cuda.max_memory_allocated() if ON_GPU else 0
    return steps
