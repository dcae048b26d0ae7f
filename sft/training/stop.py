"""Signals during training: a checkpoint is saved within the seconds that a scheduler gives, and the run stops."""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft import faults, processes
from sft.errors import UserError
from sft.training.resume import checkpoints

STEP_SECONDS = 12  # a step that has not ended by then, counted from the signal, is given up after its batch
ECHO_SECONDS = 1  # `timeout` sends its signal to the run, and again to the group that the run is in
KILL_SECONDS = 30  # between SIGTERM and SIGKILL, as SLURM's KillWait and Kubernetes have it


class Stopped(UserError):
    """The run was stopped by a signal, as the user wished."""

    exit_code = 130


class RandomStates:
    """The states of the random generators, which decide what dropout takes out, as they are now."""

    def __init__(self) -> None:
        self._states: list[tuple[Callable[[Any], Any], Any]] = [
            (random.setstate, random.getstate()),
            (np.random.set_state, np.random.get_state()),
            (torch.set_rng_state, torch.get_rng_state()),
        ]
        if torch.cuda.is_available():
            self._states.append((torch.cuda.set_rng_state, torch.cuda.get_rng_state()))

    def restore(self) -> None:
        for set_state, state in self._states:
            set_state(state)


class GivenUp(Exception):
    """A step or a validation that is not waited for; CompletionTrainer.train saves what there was before it."""


class StopAtSignal(TrainerCallback):
    """On Ctrl-C, SIGTERM or SIGHUP ends the step at hand, saves a checkpoint and stops; a second one stops at once.

    A step of many batches that takes too long for a scheduler's patience is given up, and so is a validation; both are
    done anew when the run goes on. A signal may reach one process of several, and a checkpoint takes all of them: so
    they ask each other every step, and every batch.
    """

    def __init__(self) -> None:
        self.caught: int | None = None  # the signal that came here
        self.agreed: int | None = None  # the signal that came anywhere, once all know
        self._caught_at = 0.0
        self._random = RandomStates()  # before the step at hand
        self._open = ExitStack()

    def __enter__(self) -> "StopAtSignal":
        self._open.enter_context(faults.on_signals(self._handle))
        return self

    def __exit__(self, *_: Any) -> None:
        self._open.close()

    def _handle(self, number: int, frame: Any) -> None:
        if self.caught is not None:
            if time.monotonic() - self._caught_at > ECHO_SECONDS:
                raise faults.Interrupt(number)
            return
        self.caught, self._caught_at = number, time.monotonic()
        _tell("Stopping after this step; once more to stop at once.")
        late = threading.Timer(KILL_SECONDS - 5, self._tell_why_late)
        late.daemon = True
        late.start()
        self._open.callback(late.cancel)

    def _tell_why_late(self) -> None:
        _tell(
            f"no checkpoint yet {KILL_SECONDS - 5} s after {signal.Signals(self.caught or 0).name}: a single batch, or "
            "the saving, takes longer. If the run is killed now, it goes on from the checkpoint before; to be given "
            "more time, e.g. 5 minutes by SLURM: #SBATCH --signal=TERM@300"
        )

    def agree(self) -> bool:
        """Whether a signal came to any process; every process must ask."""
        self.agreed = processes.highest(self.caught or 0) or None
        return self.agreed is not None

    def stopped(self, output_dir: Path) -> Stopped:
        """What ends the run, and what to tell the user."""
        number = signal.Signals(self.agreed or signal.SIGINT)
        saved = checkpoints(output_dir)
        where = f"{saved[-1]} is saved; the same command goes on from there" if saved else "nothing was saved yet"
        error = Stopped(f"stopped by {number.name}: {where}")
        error.exit_code = faults.exit_code(number)
        return error

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.note_random_states()

    def note_random_states(self) -> None:
        """Those from which the step at hand can be done anew."""
        self._random = RandomStates()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not float(state.epoch or 0).is_integer():  # an epoch's first is from before the order of rows was drawn
            self.note_random_states()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After each batch of a step but the last."""
        overdue = self.caught is not None and time.monotonic() - self._caught_at > STEP_SECONDS
        if args.deepspeed_plugin is None and processes.highest(int(overdue)):  # DeepSpeed's checkpoint counts batches
            self._random.restore()
            raise GivenUp

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.agree():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = control.should_evaluate and _chooses_by(args)
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A signal that came while a checkpoint was being written needs no other, unless that has the weights alone."""
        if not args.save_only_model and self.agree():
            control.should_training_stop = True

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.agree() and not _chooses_by(args):
            raise GivenUp


def _chooses_by(args: TrainingArguments) -> bool:
    """Whether the best checkpoint is chosen by validation, so that none may be left out."""
    return args.metric_for_best_model is not None


def _tell(text: str) -> None:
    """From a handler, or beside the run: print() may be at work already, and raises where nobody reads any more."""
    if processes.is_first():
        with suppress(OSError):
            os.write(2, f"\n{text}\n".encode())
