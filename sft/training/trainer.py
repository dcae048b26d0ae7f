"""Training with TRL's SFTTrainer; the only file that knows it."""

import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import signal
import threading
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState
from trl import SFTConfig, SFTTrainer

from sft.data.collator import DataCollatorForCompletionOnlyLM
from sft.data.splits import Data
from sft.errors import UserError
from sft.model.load import has_fast_bf16, require, use_cpu
from sft.recipe import Recipe

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
# A checkpoint may be resumed under other values of these; anything else would make it another run.
FREE_ON_RESUME = re.compile(
    r"training_args\.(logging_|save_|eval_|report_to|run_name|disable_tqdm|num_train_epochs|max_steps|dataloader_|log_)"
    r"|evaluation|export|resume_from_checkpoint|output_dir|dataset\.(test|num_proc|max_lost)|model_init"
)


class CompletionTrainer(SFTTrainer):
    """SFTTrainer with a loss that reads the labels of sft/data/collator.py and projects supervised positions only.

    On a GPU trl's own fused head does that. Off the GPU it projects every position to the vocabulary and takes entropy
    and top-1 of each, which is most of a step; the loss here is the same number without that.
    """

    @cached_property
    def _is_plain_loss(self) -> bool:
        """Whether the loss is cross-entropy and nothing else, of a model that can project chosen positions only."""
        args: Any = self.args
        inner: Any = self.accelerator.unwrap_model(self.model)
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        return (
            args.loss_type == "nll"
            and not args.label_smoothing_factor
            and not self.aux_loss_enabled
            and "logits_to_keep" in inspect.signature(type(inner).forward).parameters
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if inputs["input_ids"].device.type == "cuda" or not self._is_plain_loss or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        kept = (labels != -100).any(dim=0).nonzero().squeeze(1)  # positions that predict a label in some row
        outputs = model(**inputs, use_cache=False, logits_to_keep=kept)
        labels = labels[:, kept]
        loss = cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(count, device=loss.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages what num_items_in_batch has summed
        return loss

    def _load_from_checkpoint(self, *args, **kwargs):
        """Keeps each weight's dtype: peft reads an adapter as float32, and trl trains it in bfloat16 over 4 bits."""
        model: Any = self.model
        before = {name: parameter.dtype for name, parameter in model.named_parameters()}
        super()._load_from_checkpoint(*args, **kwargs)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(before[name])

    def take_up(self, checkpoint: Path) -> None:
        """Weights and log of a finished run, without training."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


class StopAtSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM ends the step at hand, saves a checkpoint and stops; a second one stops at once."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopAtSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.caught is not None:
            raise KeyboardInterrupt
        self.caught = number
        print("\nStopping after this step; once more to stop at once.", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.caught is not None:
            control.should_save = control.should_training_stop = True
        return control


def training_config(recipe: Recipe) -> SFTConfig:
    """The recipe's training_args as SFTConfig, with what this machine and our data path ask for.

    Raises: RecipeError: values that SFTConfig refuses, or a reporter that is not installed.
    """
    given = dict(recipe.training_args)
    on_cpu = use_cpu(recipe)
    wanted = given.setdefault("report_to", "none")
    for name in [wanted] if isinstance(wanted, str) else wanted or []:
        if name in REPORTERS and importlib.util.find_spec(REPORTERS[name]) is None:
            package = '"swanlab<0.8"' if name == "swanlab" else REPORTERS[name]  # 0.10 fails in transformers 5.23
            raise recipe.error("training_args.report_to", f"{name} is not installed; run: pip install {package}")
    if not given.get("fp16"):
        given.setdefault("bf16", has_fast_bf16())
    if recipe.dataset.validation is not None:
        given.setdefault("eval_strategy", "epoch")
        given.setdefault("eval_on_start", True)
    given.setdefault("per_device_eval_batch_size", given.get("per_device_train_batch_size", 8))
    given["use_cpu"] = on_cpu
    if on_cpu:
        given.setdefault("dataloader_pin_memory", False)
    try:
        return SFTConfig(
            output_dir=str(recipe.output_dir),
            max_length=recipe.dataset.max_length,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,  # or assistant_mask would vanish silently (trl 1.16)
            **given,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise recipe.error("training_args", str(error).splitlines()[0]) from None


def make_trainer(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    callbacks: list[TrainerCallback] | None = None,
) -> CompletionTrainer:
    """The trainer of a recipe, ready to train."""
    require(model)
    args = training_config(recipe)
    return CompletionTrainer(
        model=model,
        args=args,
        data_collator=DataCollatorForCompletionOnlyLM(tokenizer=tokenizer, pad_to_multiple_of=args.pad_to_multiple_of),
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def steps(recipe: Recipe, data: Data) -> int:
    """Optimizer steps of the whole run."""
    args = recipe.training_args
    if int(args.get("max_steps", -1)) > 0:
        return int(args["max_steps"])
    rows: Any = data.train
    each = int(args.get("per_device_train_batch_size", 8)) * int(args.get("gradient_accumulation_steps", 1))
    each *= int(os.environ.get("WORLD_SIZE", "1"))
    return math.ceil(math.ceil(len(rows) / each) * float(args.get("num_train_epochs", 3)))


# ------------------------------------------------------------------------------------------------------------- resume


def checkpoints(output_dir: Path) -> list[Path]:
    """Whole checkpoints, oldest first; one that was being written when the run was killed is left out."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if step.isdigit() and _is_whole(folder):
            found.append((int(step), folder))
    return [folder for _, folder in sorted(found)]


def is_finished(checkpoint: Path, recipe: Recipe, data: Data) -> bool:
    """Whether nothing is left to train after this checkpoint; the Trainer would train one step more."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state.global_step >= state.max_steps >= steps(recipe, data)


def _is_whole(folder: Path) -> bool:
    """trainer_state.json is what the Trainer writes last."""
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def find_checkpoint(recipe: Recipe, description: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from, as resume_from_checkpoint says.

    Args: description: this run's training_config.json, compared with the one that the checkpoint's run left.
    Raises: RecipeError: there is none where one is named; output_dir holds something else; another recipe made it.
    """
    choice, output = recipe.resume_from_checkpoint, recipe.output_dir
    if choice is False:
        if output.exists() and any(output.iterdir()):
            raise recipe.error(
                "resume_from_checkpoint",
                f"is false, so output_dir must be empty, and {output} is not; empty it, or name another",
            )
        return None
    if choice is True:
        whole = checkpoints(output)
        if not whole:
            return None
        chosen = whole[-1]
    else:
        chosen = Path(str(choice))
        if not chosen.is_dir():
            near = ", ".join(str(folder) for folder in checkpoints(output)) or "none"
            raise recipe.error("resume_from_checkpoint", f"there is no checkpoint {chosen}; there is {near}")
        if not _is_whole(chosen):
            raise recipe.error("resume_from_checkpoint", f"{chosen} is not a whole checkpoint (no trainer_state.json)")
    _refuse_other_run(recipe, description, chosen)
    return chosen


def _refuse_other_run(recipe: Recipe, description: dict[str, Any], chosen: Path) -> None:
    left = chosen.parent / "training_config.json"
    if not left.is_file():
        return
    try:
        before = json.loads(left.read_text(encoding="utf-8"))
    except ValueError:
        raise recipe.error(
            "resume_from_checkpoint", f"{left} cannot be read; it should say what made {chosen}"
        ) from None
    old, new = _flat(before.get("recipe", {})), _flat(description["recipe"])
    changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k) and not FREE_ON_RESUME.match(k))
    said = [f"{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in changed]
    if not changed and before.get("data") != description["data"]:
        said = ["the training data has another content"]
    if said:
        raise recipe.error(
            "resume_from_checkpoint",
            f"{chosen} comes from another run ({'; '.join(said[:5])}); choose another output_dir, or restore these",
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: value}


# --------------------------------------------------------------------------------------------------------------- disk


def check_disk(recipe: Recipe, weights: int, trained: int, steps_to_do: int) -> str:
    """Estimates what the run will write and compares it with what the disk has.

    Args: weights, trained: how many the model has, and how many of them (or beside them, with LoRA) are trained.
    Returns: a line for the terminal.
    Raises: RecipeError: it does not fit.
    """
    args = recipe.training_args
    each = trained * (4 if args.get("save_only_model") else 12)  # float32, and two moments of AdamW in float32
    every = float(args.get("save_steps", 500))
    every = max(1, round(every * steps_to_do) if every < 1 else int(every))
    strategy = args.get("save_strategy", "steps")
    count = {"no": 0, "epoch": math.ceil(float(args.get("num_train_epochs", 3)))}.get(
        strategy, steps_to_do // every + 1
    )
    if limit := args.get("save_total_limit"):
        count = min(count, limit + 1)  # a new one is written before the oldest goes
    lora = trained * 4 if recipe.lora_config or recipe.adapter_name_or_path else 0
    need = each * count + lora + (weights * 2 if recipe.export.merge or not lora else 0)
    folder = next(p for p in [recipe.output_dir, *recipe.output_dir.absolute().parents] if p.exists())
    free = shutil.disk_usage(folder).free
    of_checkpoints = f"{count} x {each / 1e9:.2f} GB of checkpoints"
    line = f"disk: about {need / 1e9:.1f} GB to be written ({of_checkpoints}), {free / 1e9:.1f} GB free"
    if need > free:
        raise recipe.error(
            "output_dir",
            f"{line}; free some, set training_args.save_total_limit or save_only_model, or name another disk",
        )
    return line


def interrupted(signal_number: int, recipe: Recipe) -> UserError:
    """What to tell the user after a run was stopped."""
    saved = checkpoints(recipe.output_dir)
    where = f"{saved[-1]} is saved; the same command goes on from there" if saved else "nothing was saved yet"
    return UserError(f"stopped by {signal.Signals(signal_number).name}: {where}")
