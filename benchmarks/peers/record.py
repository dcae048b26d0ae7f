"""Runs a program that trains by transformers' Trainer, and writes down what each of its steps trains on.

    python record.py STEPS.jsonl PROGRAM [argument ...]

PROGRAM is a file or a module. It runs as it would alone; the class Trainer, from which all that are compared here are
made, is told to note each batch and each step. Imports nothing of ours: it runs in the environments of other tools.

A line for each batch, {"loss", "tokens", "supervised", "places"}, and one for each optimizer step,
{"step", "time"}: seconds since the epoch at its end.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def real_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a batch without padding.

    A mask of four dimensions, which keeps packed conversations apart, holds for a token whether it sees itself: True,
    or a score of 0; padding sees nothing. Without a mask there is no padding.
    """
    mask = inputs.get("attention_mask")
    if mask is None or not hasattr(mask, "dim"):
        return int(inputs["input_ids"].numel())
    if mask.dim() == 4:
        itself = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return int((itself == 0 if itself.is_floating_point() else itself).sum())
    return int((mask != 0).sum())


def supervised_tokens(inputs: dict[str, Any]) -> int:
    """Labels that a loss is taken on: the first of a row is predicted by nothing."""
    return int((inputs["labels"][:, 1:] != -100).sum())


def install(path: Path) -> None:
    """Makes every Trainer of this process write to `path`."""
    from transformers import Trainer
    from transformers.trainer_callback import CallbackHandler

    stream = open(path, "w", encoding="utf-8", buffering=1)
    own_step, own_end = Trainer.training_step, CallbackHandler.on_step_end

    def training_step(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        counts = {"tokens": real_tokens(inputs), "supervised": supervised_tokens(inputs)}
        places = int(inputs["input_ids"].numel())
        loss = own_step(self, model, inputs, *args, **kwargs)
        stream.write(json.dumps({"loss": float(loss), **counts, "places": places}) + "\n")
        return loss

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        stream.write(json.dumps({"step": state.global_step, "time": time.time()}) + "\n")
        return own_end(self, args, state, control, **kwargs)

    Trainer.training_step = training_step  # type: ignore[method-assign]
    CallbackHandler.on_step_end = on_step_end  # type: ignore[method-assign]


def main(steps: str, program: str, *arguments: str) -> None:
    install(Path(steps))
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, os.path.dirname(os.path.abspath(program)))
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules are none of the program's
    main(*sys.argv[1:])
