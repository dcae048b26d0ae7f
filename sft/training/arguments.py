"""training_args as TRL's SFTConfig: what is given, what this machine asks for, and what is refused before it runs."""

import importlib.util
import math
from typing import Any

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils.import_utils import KERNELS_MAX_VERSION, KERNELS_MIN_VERSION, is_kernels_available
from trl import SFTConfig, SFTTrainer

from sft import processes
from sft.data.splits import Data
from sft.model.machine import autocast_dtype, use_cpu
from sft.model.source import first_line
from sft.recipe import Recipe
from sft.training import parallel

# report_to: the module that each of them needs. tensorboard and the others are optional installs.
REPORTERS = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "trackio": "trackio",
    "swanlab": "swanlab",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "clearml": "clearml",
    "neptune": "neptune",
    "dvclive": "dvclive",
    "codecarbon": "codecarbon",
}


def pads_rows(recipe: Recipe) -> bool:
    """Whether rows of a batch must lie side by side, padded to the longest, and not one after another.

    NEFTune's noise goes by the length of its row, context parallelism keeps no conversations apart, and batches of a
    stream are cut by rows for processes.
    """
    is_neftune = bool(recipe.training_args.get("neftune_noise_alpha"))
    return is_neftune or bool(parallel.context_parallel_gpus()) or recipe.dataset.streaming


def training_config(recipe: Recipe) -> SFTConfig:
    """The recipe's training_args as SFTConfig, with what this machine and our data path ask for.

    Raises: RecipeError: values that SFTConfig refuses, or a reporter that is not installed.
    """
    given = dict(recipe.training_args)
    on_cpu = use_cpu(recipe)
    given.setdefault("report_to", "none")
    given.setdefault("activation_checkpointing", True)  # trl's default, by the name that is not deprecated
    _check_optional_packages(recipe)
    autocast = autocast_dtype(recipe)
    given |= {"bf16": autocast is torch.bfloat16, "fp16": autocast is torch.float16}
    if recipe.dataset.validation is not None:
        given.setdefault("eval_strategy", "epoch")
        given.setdefault("eval_on_start", True)
    given.setdefault("logging_nan_inf_filter", False)  # CompletionTrainer stops at such a loss: nothing to hide
    given.setdefault("per_device_eval_batch_size", given.get("per_device_train_batch_size", 8))
    if not recipe.trains_all_weights:  # every LoRA weight is in every step's graph
        given.setdefault("ddp_find_unused_parameters", False)
    if given.get("fsdp") and isinstance(given.setdefault("fsdp_config", {}), dict):
        options = {name.removeprefix("fsdp_"): value for name, value in given["fsdp_config"].items()}
        if options.get("version", 2) == 2:
            options.setdefault("cpu_ram_efficient_loading", True)
        given["fsdp_config"] = options
    given["use_cpu"] = on_cpu
    if on_cpu:
        given.setdefault("dataloader_pin_memory", False)
    try:
        args = SFTConfig(
            output_dir=str(recipe.output_dir),
            max_length=recipe.dataset.max_length,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,  # or assistant_mask would vanish silently (trl 1.16)
            **given,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise recipe.error("training_args", str(error).splitlines()[0]) from None
    parallel.refuse_layouts(recipe, args)
    if args.n_gpu > 1 and "device_map" not in recipe.model_init:
        args._n_gpu = 1  # as transformers itself does for a model on several GPUs; trl refuses nn.DataParallel
    return args


def check_training_config(recipe: Recipe) -> SFTConfig:
    """The same before a model is to be trained: ZeRO-3, which would share out any other too, stays off."""
    config = training_config(recipe)
    unset_hf_deepspeed_config()
    return config


def _check_optional_packages(recipe: Recipe) -> None:
    """Raises: RecipeError: a setting needs a package that is not installed."""
    args = recipe.training_args
    reporters = args.get("report_to") or []
    needed = [
        ("training_args.report_to", name, REPORTERS[name], '"swanlab<0.8"' if name == "swanlab" else REPORTERS[name])
        for name in ([reporters] if isinstance(reporters, str) else reporters)  # swanlab 0.10 fails in transformers 5
        if name in REPORTERS
    ]
    if args.get("use_liger_kernel"):
        needed.append(("training_args.use_liger_kernel", "liger", "liger_kernel", "liger-kernel"))
    if args.get("deepspeed"):
        needed.append(("training_args.deepspeed", "deepspeed", "deepspeed", "deepspeed"))
    for key, name, module, package in needed:
        if importlib.util.find_spec(module) is None:
            raise recipe.error(key, f"{name} is not installed; run: pip install {package}")
    from_hub = "/" in str(recipe.model_init.get("attn_implementation", ""))  # e.g. kernels-community/flash-attn
    for key, asks in (("use_kernels", recipe.model_init.get("use_kernels")), ("attn_implementation", from_hub)):
        if asks and not is_kernels_available():
            package = f'"kernels>={KERNELS_MIN_VERSION},<{KERNELS_MAX_VERSION}"'
            raise recipe.error(f"model_init.{key}", f"needs the package kernels; run: pip install {package}")


def check_optimizer(recipe: Recipe, config: SFTConfig, model: Any) -> None:
    """Args: model: as it will be trained, without weights.
    Raises: RecipeError: training_args.optim needs a package or an argument that is not there.
    """
    try:
        SFTTrainer.get_optimizer_cls_and_kwargs(config, model)
    except (ImportError, ValueError) as error:
        raise recipe.error("training_args.optim", first_line(error)) from None


def steps(recipe: Recipe, data: Data) -> int:
    """Optimizer steps of the whole run."""
    args = recipe.training_args
    if int(args.get("max_steps", -1)) > 0:
        return int(args["max_steps"])
    rows: Any = data.train
    count, a_step = len(rows), rows_a_step(recipe)
    if args.get("dataloader_drop_last"):  # a batch that is not full; a step takes what batches there are
        batch = a_step // int(args.get("gradient_accumulation_steps", 1))
        count -= count % batch
        if not count:
            raise recipe.error(
                "training_args.dataloader_drop_last", f"drops all of {len(rows):,} rows, as a batch takes {batch:,}"
            )
    return math.ceil(math.ceil(count / a_step) * float(args.get("num_train_epochs", 3)))


def rows_a_step(recipe: Recipe) -> int:
    """Rows of an optimizer step, in all processes together; a packed row is one."""
    flat = {f"training_args.{key}": value for key, value in recipe.training_args.items()}
    return parallel.rows_a_step(flat, processes.count())
