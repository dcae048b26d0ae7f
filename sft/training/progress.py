"""How training goes, for the person who waits: a live line at a terminal, elsewhere a plain line a logging step."""

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psutil
import torch
from rich.progress import Progress, TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft import processes
from sft.processes import say
from sft.terminal import is_watched, live_line


class TrainingLine(TrainerCallback):
    """Step, losses, learning rate, tokens a second, memory and time left. Open it around training, so that it closes.

    Args:
        tokens_seen: gives the tokens that this process has trained on so far.
        is_plain: plain lines at a terminal too.
    """

    def __init__(self, tokens_seen: Callable[[], int], is_plain: bool = False):
        self._tokens_seen, self._is_plain = tokens_seen, is_plain
        self._values: dict[str, str] = {}
        self.scores: dict[str, float] = {}  # of the answers of the validation that is logged next
        self._progress: Progress | None = None
        self._training = TaskID(0)
        self._validation: TaskID | None = None
        self._begun, self._first_step = 0.0, 0

    def __enter__(self) -> None:
        if is_watched() and not self._is_plain:
            self._progress = live_line()
            self._training = self._progress.add_task("step", total=None, values="")
            self._progress.start()

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun, self._first_step = time.perf_counter(), state.global_step
        self._update(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        tokens = self._tokens_seen() * processes.count() / (time.perf_counter() - self._begun)
        self._values["tok/s"] = f"{tokens:,.0f}"
        used = torch.cuda.memory_reserved() if args.device.type == "cuda" else psutil.Process().memory_info().rss
        self._values["GB"] = f"{used / 1e9:.1f}"
        self._update(state)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A batch of the validation split, which has a line of its own."""
        if self._progress is None:
            return
        if self._validation is None:
            self._progress.update(self._training, visible=False)
            total, values = len(kwargs["eval_dataloader"]), self._words()
            self._validation = self._progress.add_task("validating", total=total, values=values)
        self._progress.update(self._validation, advance=1, refresh=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if self._progress is not None and self._validation is not None:
            self._progress.remove_task(self._validation)
            self._progress.update(self._training, visible=True)
            self._validation = None
        if "eval_loss" in logs:
            self._values["val"] = f"{logs['eval_loss']:.3g}"
            scores = "".join(f", {name} {score:.4g}" for name, score in self.scores.items())
            say(f"step {state.global_step:,}: validation loss {logs['eval_loss']:.4g}{scores}")
        if "loss" not in logs:
            return
        self._values |= {"loss": f"{logs['loss']:.3g}", "lr": f"{logs.get('learning_rate', 0):.2g}"}
        self._update(state)
        if self._progress is None:
            say(self._plain_line(state))

    def _update(self, state: TrainerState) -> None:
        if self._progress is not None:
            total, done = state.max_steps or None, state.global_step
            self._progress.update(self._training, total=total, completed=done, values=self._words(), refresh=True)

    def _words(self) -> str:
        before = [f"{name} {self._values[name]}" for name in ("loss", "val", "lr") if name in self._values]
        behind = [f"{self._values[name]} {name}" for name in ("tok/s", "GB") if name in self._values]
        return " ".join(before + behind)

    def _plain_line(self, state: TrainerState) -> str:
        seconds = (time.perf_counter() - self._begun) / max(1, state.global_step - self._first_step)
        left = timedelta(seconds=round(seconds * (state.max_steps - state.global_step)))
        return f"step {state.global_step:,} of {state.max_steps:,}  {self._words()}  {left} left"
