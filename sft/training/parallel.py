"""How a run's work lies on processes and GPUs: which ways are refused, and what a checkpoint of other ones is worth."""

import math
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import ParallelismConfig
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from sft import processes
from sft.model.machine import use_cpu
from sft.recipe import Recipe

ACCUMULATION = "training_args.gradient_accumulation_steps"
# What one process takes of a step's rows, with SFTConfig's defaults.
ROWS_OF_PROCESS = {"training_args.per_device_train_batch_size": 8, ACCUMULATION: 1}


def refuse_layouts(recipe: Recipe, args: TrainingArguments) -> None:
    """Raises: RecipeError: a way to share out the work that would not be done, or would train on something else."""
    sizes = ParallelismConfig() if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG") else None
    if (gpus := context_parallel_gpus()) and recipe.dataset.packing is True:
        raise recipe.error(
            "dataset.packing",
            f"the launcher asks for context parallelism over {gpus} GPUs (PARALLELISM_CONFIG_CP_SIZE), which "
            "lets packed conversations attend to each other; set dataset.packing: false, or take it out there",
        )
    for name, size in (("tensor", sizes.tp_size), ("sequence", sizes.sp_size)) if sizes is not None else ():
        if size > 1:
            raise recipe.error(
                "training_args",
                f"the launcher asks for {name} parallelism over {size} GPUs, which is not done here; shard by FSDP",
            )
    if sharding(recipe) == "FSDP":
        kind = args.distributed_state.distributed_type if args.distributed_state else DistributedType.NO
        where = "a CPU" if use_cpu(recipe) else "one process"
        if kind in (DistributedType.NO, DistributedType.MULTI_CPU):  # accelerate would say nothing, and not shard
            raise recipe.error(
                "training_args.fsdp",
                f"{where} shards nothing; remove it" + ("" if use_cpu(recipe) else ", or start with torchrun"),
            )
    zero = args.deepspeed_plugin.deepspeed_config.get("zero_optimization", {}) if args.deepspeed_plugin else {}
    if zero.get("stage") == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        raise recipe.error(
            "training_args.deepspeed",
            "ZeRO-3 would save no weights; set zero_optimization.stage3_gather_16bit_weights_on_model_save: true there",
        )


def context_parallel_gpus() -> int:
    """Over how many GPUs the launcher splits each row; 0: it splits none."""
    size = ParallelismConfig().cp_size if _is_set("ACCELERATE_USE_PARALLELISM_CONFIG") else 0
    return size if size > 1 else 0


def _is_set(variable: str) -> bool:
    """Whether a launcher's config switched this on."""
    return os.environ.get(variable, "").lower() == "true"


def sharding(recipe: Recipe) -> str | None:
    """What keeps parts of the weights in each process: FSDP, DeepSpeed, or nothing."""
    if recipe.training_args.get("fsdp") or _is_set("ACCELERATE_USE_FSDP"):
        return "FSDP"
    return "DeepSpeed" if recipe.training_args.get("deepspeed") or _is_set("ACCELERATE_USE_DEEPSPEED") else None


def refuse_other_sharding(recipe: Recipe, chosen: Path) -> None:
    """Raises: RecipeError: the checkpoint keeps its weights and optimizer as another kind of run does."""
    had = "FSDP" if list(chosen.glob("pytorch_model_fsdp*")) else None
    had = "DeepSpeed" if list(chosen.glob("global_step*")) else had
    if had != (now := sharding(recipe)) and (chosen / "scheduler.pt").exists():  # not where weights alone were saved
        raise recipe.error(
            "resume_from_checkpoint",
            f"{chosen} was made with {had or 'no sharding'}, and this run has {now or 'none'}; start it as before",
        )


def gpus_line(recipe: Recipe) -> str | None:
    """How to use the GPUs that a run without a launcher leaves alone."""
    seen = 0 if use_cpu(recipe) else torch.cuda.device_count()
    if processes.count() > 1 or seen < 2 or "device_map" in recipe.model_init:
        return None
    return f"{seen} GPUs are here and one is used; all: torchrun --nproc_per_node {seen} run_sft.py {recipe.path}"


def is_read_once(args: TrainingArguments) -> bool:
    """Whether FSDP hands out the weights that the first process of a machine has read."""
    if processes.count() == 1:
        return False
    if args.fsdp:
        return bool((args.fsdp_plugin_args or {}).get("cpu_ram_efficient_loading"))
    return _is_set("ACCELERATE_USE_FSDP") and _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING")


def rows_a_step(recipe: dict[str, Any], count: int) -> int:
    """Rows of an optimizer step, in all processes together. recipe: flat; count: of processes."""
    return count * math.prod(int(recipe.get(key) or default) for key, default in ROWS_OF_PROCESS.items())


def refuse_other_steps(
    recipe: Recipe, chosen: Path, before: tuple[dict[str, Any], int], now: tuple[dict[str, Any], int]
) -> None:
    """Raises: RecipeError: with another number of processes a step would not be what the checkpoint counts in.

    A checkpoint counts optimizer steps, and the Trainer finds its place in the data by them: step x accumulation
    batches into the epoch in each process. So 20 steps of one process are 10 of two, or the place is wrong, and with
    one epoch of 36 steps, 18 of two, even past the end: nothing would be trained. Rows a step must stay the same; then
    epoch, place, learning rate and loss are those of the run that was not interrupted.
    """
    rows_then, rows_now = rows_a_step(*before), rows_a_step(*now)
    order = now[0].get("training_args.train_sampling_strategy") or "random"
    in_parts = sharding(recipe) == "DeepSpeed"
    if rows_then == rows_now and order in ("random", "sequential") and not in_parts:
        return
    had, count = before[1], now[1]
    made = f"{chosen} was made by {had} process{'es' if had > 1 else ''}, and this run has {count}"
    start = f"start it as before (torchrun --nproc_per_node {had})" if had > 1 else "start it without a launcher"
    if order not in ("random", "sequential"):
        raise recipe.error("resume_from_checkpoint", f"{made}; the order of rows by {order} depends on it: {start}")
    if in_parts:
        raise recipe.error(
            "resume_from_checkpoint", f"{made}; DeepSpeed keeps a part of the optimizer in each: {start}"
        )
    each = rows_now // int(now[0].get(ACCUMULATION) or 1)
    if rows_then % each:
        said = f"so {rows_then} rows a step cannot be kept at {each} a batch of all; {start}"
        raise recipe.error("resume_from_checkpoint", f"{made}, {said}, or lower per_device_train_batch_size")
    keep = f"to keep {rows_then} rows a step, set {ACCUMULATION}={rows_then // each}"
    raise recipe.error("resume_from_checkpoint", f"{made}, with {rows_now} rows a step; {keep}, or {start}")
