"""Ctrl-C and SIGTERM: the step at hand ends, a checkpoint is saved, and the run stops."""

import signal
import threading
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft import processes
from sft.errors import UserError
from sft.recipe import Recipe
from sft.training.resume import checkpoints


class Stopped(UserError):
    """The run was stopped by a signal, as the user wished."""

    exit_code = 130


class StopAtSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM ends the step at hand, saves a checkpoint and stops; a second one stops at once.

    A signal may reach one process of several, and a checkpoint takes all of them: so they ask each other every step.
    """

    def __init__(self) -> None:
        self.caught: int | None = None  # the signal that came here
        self.agreed: int | None = None  # the signal that came anywhere, once all know
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
        processes.say("\nStopping after this step; once more to stop at once.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.agreed = processes.highest(self.caught or 0) or None
        if self.agreed is not None:
            control.should_save = control.should_training_stop = True
        return control


def interrupted(signal_number: int, recipe: Recipe) -> UserError:
    """What to tell the user after a run was stopped."""
    saved = checkpoints(recipe.output_dir)
    where = f"{saved[-1]} is saved; the same command goes on from there" if saved else "nothing was saved yet"
    return UserError(f"stopped by {signal.Signals(signal_number).name}: {where}")
