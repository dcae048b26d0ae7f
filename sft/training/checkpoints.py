"""What a Trainer saves and takes up: checkpoints that are whole or left out, and the log as if there had been no stop.

transformers 5.24 goes on with the same weights, optimizer and random numbers. Not so with the log: the losses since the
last entry are lost, a checkpoint that is saved at an epoch's end is saved before the validation there, which is then
never made, and `eval_on_start` is made again. It deletes old checkpoints by the clock.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import EarlyStoppingCallback, Trainer, TrainerState
from transformers.trainer_utils import align_special_tokens

from sft import processes
from sft.errors import UserError
from sft.files import damage, write_text, writing
from sft.model.lora import missing_weights
from sft.model.source import first_line
from sft.training.resume import begin_checkpoint, end_checkpoint, is_whole, validations_without_gain
from sft.training.stop import StopAtSignal

LOSS = "loss_since_log"  # in TrainerState.stateful_callbacks


class CheckpointTrainer(Trainer):
    """To be put before the Trainer that trains."""

    taken_up: Path | None = None  # the checkpoint of a finished run
    _saved: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # transformers would delete by the clock, and at the end with a limit of 1 all but the best
        self._limit, self.args.save_total_limit = self.args.save_total_limit, None

    @property
    def output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    @property
    def checkpoint(self) -> Path:
        """Where the weights of the last step that has ended are saved, or will be."""
        return self.output_dir / f"checkpoint-{self.state.global_step}"

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder, state = self.checkpoint, self.state
        if self._saved == folder:
            return  # a step that is saved at its own end and at the epoch's: the first may be the only one
        losses = processes.gather(self._tr_loss.item())
        kept: Any = state.stateful_callbacks
        kept[LOSS] = {"sum": sum(losses) / len(losses), "logged_step": self._globalstep_last_logged}
        only_model = self.args.save_only_model
        self.args.save_only_model = only_model and not any(stop.agreed for stop in self._stops())
        try:
            with writing(folder):
                processes.decide(lambda: begin_checkpoint(folder))
                super()._save_checkpoint(*args, **kwargs)
                processes.wait()  # until each has written its part
                processes.decide(lambda: end_checkpoint(folder, self._limit, state.best_model_checkpoint))
        finally:
            self.args.save_only_model = only_model
            if processes.is_first() and not is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)  # on a full disk its place is needed
        self._saved = folder

    def _stops(self) -> list[StopAtSignal]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, StopAtSignal)]

    def save_stopped(self) -> None:
        """The last step that has ended, with all that a run goes on from. Every process must call it."""
        for stop in self._stops():
            stop.agree()
        self._saved = None
        self._save_checkpoint(self.model, trial=None)

    def save_state(self) -> None:
        """trainer_state.json as transformers writes it, but whole or not at all."""
        if processes.is_first():
            text = json.dumps(dataclasses.asdict(self.state), indent=2, sort_keys=True) + "\n"
            write_text(self.output_dir / "trainer_state.json", text)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the weights only."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        """Keeps each weight's dtype: peft reads an adapter as float32, and trl trains it in bfloat16 over 4 bits."""
        model: Any = self.model
        before = {name: parameter.dtype for name, parameter in model.named_parameters()}
        with _readable(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)
            if isinstance(model, PeftModel) and not self.is_sharded:
                if missing := missing_weights(model, Path(resume_from_checkpoint)):
                    raise UserError(f"{resume_from_checkpoint} is another model's: it lacks {missing}; name another")
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(before[name])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Once in a run that goes on, just before its first step: there the log is taken up as well."""
        with _readable(checkpoint):
            super()._load_rng_state(checkpoint)
        for stop in self._stops():
            stop.note_random_states()
        kept: Any = self.state.stateful_callbacks
        if (losses := kept.get(LOSS)) is not None:
            self._tr_loss += losses["sum"]
            self._total_loss_scalar -= losses["sum"]  # train_loss is of this process's steps
            self._globalstep_last_logged = losses["logged_step"]
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                callback.early_stopping_patience_counter = validations_without_gain(self.state)
        if best := self._best(Path(str(checkpoint))):
            self.state.best_model_checkpoint = str(best)  # transformers forgets it where the folder was moved
        if self._owes_validation():
            self._evaluate(None, None)

    def _best(self, checkpoint: Path) -> Path | None:
        """The best checkpoint by this one's log, where that is to be taken at the end: it lies beside this one, though
        both were moved. Raises: UserError: it is not there, or damaged."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if not (self.args.load_best_model_at_end and state.best_model_checkpoint):
            return None
        beside = checkpoint.parent / re.split(r"[\\/]", state.best_model_checkpoint)[-1]
        best = beside if beside.is_dir() else Path(state.best_model_checkpoint)
        found = processes.decide(lambda: damage(best) if best.is_dir() else "it is not there")
        if found:
            raise UserError(
                f"{best}, the best checkpoint, cannot be taken up: {found}; restore it, or take the last: "
                "training_args.load_best_model_at_end: false"
            )
        return best

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        is_on_start = skip_scheduler  # which says so nowhere else
        if is_on_start and self.state.global_step:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _owes_validation(self) -> bool:
        """Whether the checkpoint lacks the validation at its step, or at its epoch's end or the end of training."""
        args, state = self.args, self.state
        epoch, step = float(state.epoch or 0), state.global_step
        is_due = args.eval_strategy == "epoch" and (epoch.is_integer() or step >= state.max_steps)
        is_due &= epoch >= args.eval_delay
        if args.eval_strategy == "steps":
            is_due = step > 0 and step % state.eval_steps == 0 and step >= args.eval_delay
        if not is_due:
            return False
        return not any("eval_loss" in entry and entry["step"] == step for entry in state.log_history)

    def take_up(self, checkpoint: Path) -> None:
        """Weights and log of a finished run, without training. Raises: UserError: the best checkpoint is damaged."""
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        self.taken_up = self._best(checkpoint) or checkpoint
        align_special_tokens(self.model, self.processing_class)  # as train() does; generation stops by them
        if not self.is_deepspeed_enabled:
            self._load_from_checkpoint(str(self.taken_up))
        if self._owes_validation():
            self._evaluate(None, None)


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Raises: UserError: a file of the checkpoint is not what it should be."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the libraries make of such a file
        raise UserError(f"{checkpoint} does not load: {first_line(error)}; name another checkpoint") from None
