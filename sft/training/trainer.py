"""Training with TRL's SFTTrainer."""

import gc
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard
from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from sft import processes
from sft.data.collator import DataCollatorForCompletionOnlyLM
from sft.data.splits import Data
from sft.errors import UserError
from sft.files import CHECKSUMS
from sft.model.lora import require_trainable, takes_logits_to_keep
from sft.model.lora_init import to_plain_lora
from sft.recipe import Recipe
from sft.training.arguments import pads_rows, training_config
from sft.training.attention import attention_per_conversation, leak_of_packed_rows
from sft.training.checkpoints import CheckpointTrainer
from sft.training.lora_sum import lora_in_one_sum
from sft.training.loss import summed_cross_entropy
from sft.training.progress import TrainingLine
from sft.training.resume import can_be_gone_on_from, checkpoints
from sft.training.stop import GivenUp, RandomStates
from sft.training.triton_probe import why_triton_fails

# What a checkpoint of DeepSpeed has beside the weights and the tokenizer.
NO_WEIGHTS = ("global_step*", "*.pt*", "zero_*", "latest", "trainer_state.json", CHECKSUMS)


# Scores by name of the answers of the model that it is called with; the second is to be called after each batch.
ScoresOfAnswers = Callable[[Any, Callable[[], object]], dict[str, float]]


class RowCountingCollator:
    """The collator, and beside its batch the tokens of each row, since packed rows come out as a single one."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]):
        self.collate = collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.collate(rows), "row_tokens": torch.tensor([len(row["input_ids"]) for row in rows])}


class CompletionTrainer(CheckpointTrainer, SFTTrainer):
    """SFTTrainer with a loss that reads the labels of sft/data/collator.py and projects supervised positions only.

    On a GPU trl's own fused head does that, by Triton. Without Triton (off the GPU, on Windows, without a compiler) it
    projects every position to the vocabulary and takes entropy and top-1 of each, which is most of a step; the loss
    here is the same number without that.
    """

    def __init__(
        self,
        *args: Any,
        is_plain: bool = False,
        scores: ScoresOfAnswers | None = None,
        loraplus_lr_ratio: float | None = None,
        **kwargs: Any,
    ):
        """is_plain: no live line. scores: of answers, logged with each validation loss."""
        super().__init__(*args, **kwargs)
        self._scores, self._loraplus_lr_ratio = scores, loraplus_lr_ratio
        for callback in (PrinterCallback, ProgressCallback):  # which print raw dicts
            self.remove_callback(callback)
        self._tokens_seen = torch.zeros((), dtype=torch.int64)
        self._line = TrainingLine(lambda: int(self._tokens_seen), is_plain)
        self.add_callback(self._line)

    def _takes_trls_loss(self, device_type: str) -> bool:
        return not self._is_plain_loss or (device_type == "cuda" and why_triton_fails() is None)

    @cached_property
    def _is_plain_loss(self) -> bool:
        """Whether the loss is cross-entropy and nothing else, of a model that can project chosen positions only."""
        args: Any = self.args
        return (
            args.loss_type == "nll"
            and not args.label_smoothing_factor
            and not self.aux_loss_enabled
            and takes_logits_to_keep(self.accelerator.unwrap_model(self.model))
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if self._takes_trls_loss(inputs["input_ids"].device.type) or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = dict(inputs)
        labels = inputs.pop("labels")[:, 1:]
        supervised = (labels != -100).any(dim=0).nonzero().squeeze(1)  # positions that predict a label in some row
        with self._logits_as_computed():
            outputs = model(**inputs, use_cache=False, logits_to_keep=supervised)
        labels = labels[:, supervised]
        loss = summed_cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        loss = loss / torch.as_tensor(count, device=loss.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages what num_items_in_batch has summed
        return loss

    @contextmanager
    def _logits_as_computed(self) -> Iterator[None]:
        """Under autocast, without the float32 copy that accelerate makes of what a model gives."""
        model: Any = self.accelerator.unwrap_model(self.model)
        copying, own = (vars(model).get(name) for name in ("forward", "_original_forward"))
        if own is None:
            yield
            return
        model.forward = own
        try:
            with self.accelerator.autocast():
                yield
        finally:
            model.forward = copying

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        return super().get_batch_samples(map(self._counted, epoch_iterator), num_batches, device)

    def _counted(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tokens = batch["row_tokens"].sum()
        self._tokens_seen = self._tokens_seen.to(tokens.device) + tokens  # a number only where it is shown: no waiting
        return self._without_repeats(batch)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        inputs = self._without_repeats(inputs)
        step = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        supervised = (inputs["labels"][:, 1:] != -100).sum()
        if step[0] is not None:
            self._evaluated += torch.stack([step[0] * supervised, supervised]).cpu()
        return step

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The loss over all supervised tokens; transformers' own is a mean of batches, another for each batch size."""
        self._evaluated = torch.zeros(2, dtype=torch.float64)  # sum of the losses, tokens
        output = super().evaluation_loop(*args, **kwargs)
        loss_sum, tokens = (sum(values) for values in zip(*processes.gather(self._evaluated.tolist()), strict=True))
        metrics = output.metrics or {}
        metrics.update({name: loss_sum / tokens for name in metrics if name.endswith("_loss") and tokens})
        if self._scores is not None:
            found = self._scores(self.accelerator.unwrap_model(self.model), self._after_batch_of_answers)
            metrics.update({f"eval_{name}": score for name, score in found.items()})
            self._line.scores = found
        return output

    def _after_batch_of_answers(self) -> None:
        """As after a batch of a validation, which a signal may cut short."""
        self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None and self._loraplus_lr_ratio:
            trained: Any = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            options |= {"loraplus_lr_ratio": self._loraplus_lr_ratio, "loraplus_weight_decay": self.args.weight_decay}
            self.optimizer = create_loraplus_optimizer(trained, kind, **options)
        return super().create_optimizer(model)

    def _without_repeats(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Takes the labels from rows that are in an epoch's last batches a second time.

        accelerate fills these up with the epoch's first rows, so that each process has as many: 5 rows in batches of 2
        are [a b] [c d] for two processes, then [e a] [b c]; of the last four the first one counts. (Its own count of
        them, gradient_state.remainder, is wrong in an epoch that is taken up in its middle: seen with 1.15.)
        """
        row_tokens = batch.pop("row_tokens")
        count, loader = self.accelerator.num_processes, self.accelerator.gradient_state.active_dataloader
        fills_up = count > 1 and isinstance(loader, DataLoaderShard) and not self.args.dataloader_drop_last
        if not fills_up or not loader.end_of_dataloader or self.accelerator.parallelism_config is not None:
            return batch
        labels, rows = batch["labels"], loader.dataset
        if hasattr(rows, "__len__") and (new := len(rows) % (count * len(row_tokens))):
            own = max(0, new - self.accelerator.process_index * len(row_tokens))  # rows of this batch that count
            if "cu_seq_lens_q" in batch:
                labels[:, int(row_tokens[:own].sum()) :] = -100
            else:
                labels[own:] = -100
        return batch

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            raise self._diverged(f"the loss is {loss.item()} in step {self.state.global_step + 1}")
        return loss

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.refuse_broken_weights()
        super()._save_checkpoint(*args, **kwargs)

    def refuse_broken_weights(self) -> None:
        """Every process must call it. Raises: UserError: weights that are no numbers, before they replace good ones."""
        model: Any = self.accelerator.unwrap_model(self.model)
        trained = (weight.detach() for weight in model.parameters() if weight.requires_grad)
        own = (weight.to_local() if hasattr(weight, "to_local") else weight for weight in trained)  # of FSDP: a part
        if processes.highest(int(not all(torch.isfinite(weight).all() for weight in own))):
            raise self._diverged(f"weights are no numbers any more after step {self.state.global_step}")

    def _diverged(self, found: str) -> UserError:
        kept = checkpoints(self.output_dir)
        where = "no checkpoint was saved before it"
        if kept:
            key = "adapter" if hasattr(self.accelerator.unwrap_model(self.model), "peft_config") else "model"
            where = (
                f"{kept[-1]} is from before it: name it as {key}_name_or_path, and another output_dir, to go on with it"
            )
        return UserError(
            f"{found}; {where}\nlower training_args.learning_rate or max_grad_norm, train in bfloat16 and not in "
            "float16, and look at the rows with --check"
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leaves out trl's README.md, which knows neither the base nor the data."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains. A step or a validation that a signal has cut short leaves the checkpoint of the step before it."""
        with self._computing(), self._line:
            try:
                return super().train(*args, **kwargs)
            except GivenUp:
                if self.state.global_step and not processes.decide(lambda: can_be_gone_on_from(self.checkpoint)):
                    self.save_stopped()
                return None

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """The model computes in our ways while it is open."""
        if self.args.torch_compile:  # torch 2.13's compiler fails at the hooks by which the mask is told the batch
            yield
            return
        own_lora = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        with attention_per_conversation(self.model), lora_in_one_sum(self.model) if own_lora else nullcontext():
            yield

    def take_up(self, checkpoint: Path) -> None:
        """The same, where a signal cuts short a validation that is still to be made."""
        with suppress(GivenUp):  # the run says that it was stopped
            super().take_up(checkpoint)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Validates, and puts the random states back: a data loader draws a seed.

        Otherwise a run would part from the one that goes on from its checkpoint and has not validated in between.
        """
        before = RandomStates()
        try:
            with self._computing():
                return super().evaluate(*args, **kwargs)
        finally:
            before.restore()

    def save_whole(self, folder: Path) -> None:
        """Writes the trained weights as one model or adapter. Every process must call it: each adds its part."""
        state: Any = self.accelerator.state
        if self.is_fsdp_enabled:  # by parts, its default, save_model would write nothing
            state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        if self.is_deepspeed_enabled and self.taken_up is not None:
            if processes.is_first():  # there is no engine yet, and the checkpoint has the weights beside its own files
                shutil.copytree(self.taken_up, folder, ignore=shutil.ignore_patterns(*NO_WEIGHTS))
        else:
            self.save_model(str(folder))
        if processes.is_first() and hasattr(model := self.accelerator.unwrap_model(self.model), "lora_start"):
            to_plain_lora(model, folder)
        unset_hf_deepspeed_config()  # of ZeRO-3, by which any model that is read later would be shared out as well

    def free_memory(self, model: bool) -> None:
        """Lets go of the optimizer, whose place scoring can use, and of the model if another is to be read after it."""
        self.accelerator.free_memory()
        for holder in (self, self.callback_handler):
            for name in ("optimizer", "lr_scheduler", *(("model", "model_wrapped") if model else ())):
                setattr(holder, name, None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def make_trainer(
    recipe: Recipe,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    callbacks: list[TrainerCallback] | None = None,
    scores: ScoresOfAnswers | None = None,
) -> CompletionTrainer:
    """The trainer of a recipe, ready to train.

    Args: scores: of answers to the validation split, if the recipe asks for them.
    Raises: RecipeError: rows are packed, and this model would let their conversations see each other.
    """
    require_trainable(model)
    args = training_config(recipe)
    collate = DataCollatorForCompletionOnlyLM(tokenizer=tokenizer, pad_to_multiple_of=args.pad_to_multiple_of)
    early_stopping = [] if recipe.early_stopping is None else [EarlyStoppingCallback(**recipe.early_stopping)]
    trainer = CompletionTrainer(
        model=model,
        args=args,
        data_collator=RowCountingCollator(collate),
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        callbacks=[*(callbacks or []), *early_stopping],
        is_plain=bool(recipe.training_args.get("disable_tqdm")),
        scores=scores,
        loraplus_lr_ratio=recipe.loraplus_lr_ratio,
    )
    if args.fp16 and not trainer.is_deepspeed_enabled:
        # The gradient scaler takes gradients of float32 weights only: of float16 weights it raises, and of the
        # bfloat16 that trl gives LoRA weights beside a quantised model it has no kernel on a GPU.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    # Rows of a batch are put one after another, so that no padding is computed.
    if recipe.dataset.packing or (args.per_device_train_batch_size > 1 and not pads_rows(recipe)):
        # The probe has decided it by a small model (sft/training/packing_probe.py). This is the model that trains: with
        # its adapters, quantised, on several devices, under autocast; and all there is where none could be built small.
        with trainer.accelerator.autocast():
            leak = leak_of_packed_rows(trainer.model, collate, own_attention=not args.torch_compile)
        if leak and recipe.dataset.packing:
            raise recipe.error("dataset.packing", f"{leak}; set dataset.packing: false")
        collate.padding_free = not leak
    return trainer
