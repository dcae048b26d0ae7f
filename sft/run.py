"""The steps of a run, as run_sft.py tells them in order."""

import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import datasets
import psutil
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft.data.chat import ChatEncoder
from sft.data.dataset import Data, ledger_table, prepare
from sft.errors import UserError
from sft.files import write_json
from sft.model.load import (
    add_lora,
    check_machine,
    check_targets,
    find_model,
    load_adapter,
    load_model,
    load_tokenizer,
    meta_model,
    use_cpu,
)
from sft.recipe import Recipe
from sft.results import export, page
from sft.results.evaluation import EvaluatedModel, evaluate_models
from sft.results.export import describe_run
from sft.results.summary import run_summary
from sft.training import check
from sft.training import trainer as training
from sft.training.trainer import find_checkpoint

__all__ = ["add_lora", "describe_run", "find_checkpoint", "load_model", "load_tokenizer"]


class Stopped(UserError):
    """The run was stopped by a signal, as the user wished."""

    exit_code = 130


class Clock:
    """Seconds of each part of the run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._begun = round(now - self._begun, 1), now


def is_first_process() -> bool:
    """Whether this is the only process of the run, or the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    if is_first_process():
        print(text, flush=True)


def set_up(recipe: Recipe, debug: bool) -> None:
    """How much the libraries say, and the seed."""
    for library in (transformers.logging, datasets.logging):
        (library.set_verbosity_debug if debug else library.set_verbosity_error)()
    if not debug:
        warnings.filterwarnings("ignore")
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    if recipe.dataset.num_proc:
        os.environ["RAYON_NUM_THREADS"] = str(recipe.dataset.num_proc)  # read when the tokenizer first uses threads
    transformers.set_seed(int(recipe.training_args.get("seed", 42)))


def check_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Refuses early what would fail late: a missing GPU, target modules that are not there, arguments that clash.

    Returns: the model without weights, by which disk and memory are estimated.
    """
    check_machine(recipe)
    training.training_config(recipe)
    bare = meta_model(recipe)
    if bare.config.model_type == "chatglm" and not hasattr(tokenizer, "encode_conversation"):
        raise recipe.error("model_name_or_path", "is of ChatGLM's family but not ChatGLM3; use its -hf release")
    check_targets(recipe, bare)
    if recipe.adapter_name_or_path:
        find_model(recipe.adapter_name_or_path, recipe, "adapter_name_or_path", "adapter_config.json")
    return bare


def prepare_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The data of a recipe, and its ledger on the terminal."""
    data = prepare(recipe, tokenizer)
    data.ledger["samples"] = check.samples(data, tokenizer)
    say(ledger_table(data.ledger))
    if recipe.dataset.test is None:
        say("no dataset.test: nothing will be scored")
    return data


def begin_output(recipe: Recipe, description: dict[str, Any], data: Data, bare: PreTrainedModel) -> None:
    """Makes output_dir and writes what the run is. Raises: UserError: it cannot be written."""
    if not is_first_process():
        return
    say(disk_line(recipe, bare, data))
    try:
        recipe.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise recipe.error("output_dir", f"{recipe.output_dir} cannot be made: {error.strerror}") from None
    write_json(recipe.output_dir / "training_config.json", description)
    write_json(recipe.output_dir / "data_ledger.json", data.ledger)


def disk_line(recipe: Recipe, bare: PreTrainedModel, data: Data) -> str:
    """Raises: RecipeError: the disk is too small for what the run will write."""
    weights = sum(p.numel() for p in bare.parameters())
    return training.check_disk(recipe, weights, check.trained_weights(recipe, bare), training.steps(recipe, data))


@contextmanager
def _memory_advice() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory ran out: {str(error).splitlines()[0]}\n"
            "lower training_args.per_device_train_batch_size (and raise gradient_accumulation_steps), set "
            "training_args.gradient_checkpointing: true, lower dataset.max_length, or quantise with load_in_4bit: true"
        ) from None


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "the GPU"


def train(
    recipe: Recipe, model: Any, tokenizer: PreTrainedTokenizerBase, data: Data, checkpoint: Path | None
) -> training.CompletionTrainer:
    """Trains to the end. Raises: Stopped: a signal came, and a checkpoint was saved."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"training {trained:,} weights on {'the CPU' if use_cpu(recipe) else _device_name()}")
    finished = checkpoint if checkpoint and training.is_finished(checkpoint, recipe, data) else None
    if checkpoint is not None:
        say(f"training is finished: taking up {checkpoint}" if finished else f"going on from {checkpoint}")
    with training.StopAtSignal() as stop, _memory_advice():
        trainer = training.make_trainer(recipe, model, tokenizer, data, [stop])
        if finished:
            trainer.take_up(finished)
            return trainer
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if stop.caught is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(str(training.interrupted(stop.caught, recipe)))
    trainer.save_state()
    return trainer


def save(
    recipe: Recipe, trainer: training.CompletionTrainer, tokenizer: PreTrainedTokenizerBase, encoder: ChatEncoder
) -> None:
    """lora_adapter/ and final_model/."""
    lora = hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")
    if not trainer.is_world_process_zero():
        return
    if lora:
        say(f"saved {export.save_adapter(recipe, trainer.save_model)}")
        if recipe.export.merge:
            say(f"saved {export.save_final_model(recipe, tokenizer, encoder.stop_ids)}")
    else:
        tuned = cast(PreTrainedModel, trainer.model)
        say(f"saved {export.save_final_model(recipe, tokenizer, encoder.stop_ids, tuned)}")


def score(recipe: Recipe, data: Data, trainer: training.CompletionTrainer) -> None:
    """Scores base and tuned on the test split, if there is one."""
    if not data.test_conversations or not is_first_process():
        return
    # Without the autocast that training put around forward: --score, later, has none.
    model: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    digest = export.weights_digest(recipe)
    with _memory_advice():
        if hasattr(model, "disable_adapter"):
            base, adapter_on = model, False
        else:
            base, adapter_on = load_model(recipe), True
            base.to(model.device)
        models = [
            EvaluatedModel("base", base, adapter_on, recipe.model_name_or_path),
            EvaluatedModel("tuned", model, True, digest),
        ]
        evaluate_models(recipe, data.encoder, data.test_conversations, models)


def finish(recipe: Recipe, description: dict[str, Any], clock: Clock) -> None:
    """The page, and the summary on the terminal."""
    if not is_first_process():
        return
    memory = {"peak_memory_bytes": peak_memory_bytes(), "peak_gpu_memory_bytes": None}
    if torch.cuda.is_available():
        memory["peak_gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
    config = {**description, "resources": {"seconds": clock.seconds, **memory}}
    write_json(recipe.output_dir / "training_config.json", config)
    page.write_report(recipe.output_dir)
    say(run_summary(recipe.output_dir))


def peak_memory_bytes() -> int:
    """The most memory that this process held at once."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# -------------------------------------------------------------------------------------------------- the other verbs


def report_check(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Data, bare: PreTrainedModel) -> int:
    """What --check prints after the ledger: masks, stop token, memory, disk."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    legend = "green" if colour else "between [[ and ]]"
    for sample in data.ledger["samples"]:
        say(f"\n{sample['place']} (trained on: {legend})\n{check.render_pieces(sample['pieces'], colour)}")
    say("\n" + check.stop_token_line(data, tokenizer))
    line, fits = check.memory_line(recipe, bare, use_cpu(recipe))
    say(line)
    say(disk_line(recipe, bare, data))
    say("the recipe can be run" if fits else "the recipe may not fit; see the memory line")
    return 0


def score_again(recipe: Recipe) -> int:
    """--score: the run's own adapter or model, or the one that an override names, on dataset.test."""
    if recipe.dataset.test is None:
        raise recipe.error("dataset", "--score needs dataset.test")
    tokenizer = load_tokenizer(recipe)
    check_machine(recipe)
    data = prepare(recipe, tokenizer, scoring_only=True)
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    adapter, final = recipe.output_dir / "lora_adapter", recipe.output_dir / "final_model"
    device = "cpu" if use_cpu(recipe) else torch.device("cuda" if torch.cuda.is_available() else "mps")
    base: Any = load_model(recipe)
    if not recipe.quantization_config:
        base.to(device)
    origin = recipe.model_name_or_path
    chosen = recipe.adapter_name_or_path
    if adapter.is_dir() and chosen in (None, _begun_from(recipe)):
        chosen = str(adapter)  # the run's own, also where it went on from another
    if chosen:
        model = load_adapter(base, chosen, recipe, key="adapter_name_or_path")
        digest = export.weights_digest(recipe, Path(chosen))
        models = [EvaluatedModel("base", model, False, origin), EvaluatedModel("tuned", model, True, digest)]
    elif final.is_dir() and recipe.lora_config is None:
        tuned: Any = transformers.AutoModelForCausalLM.from_pretrained(final, dtype=base.dtype)
        tuned.to(device)
        digest = export.weights_digest(recipe, final)
        models = [EvaluatedModel("base", base, True, origin), EvaluatedModel("tuned", tuned, True, digest)]
    else:
        say(f"{recipe.output_dir} holds no run: scoring {origin} alone")
        models = [EvaluatedModel("base", base, True, origin)]
    scores = evaluate_models(recipe, data.encoder, data.test_conversations, models)
    if (recipe.output_dir / "training_config.json").is_file():
        page.write_report(recipe.output_dir)
        say(run_summary(recipe.output_dir))
    else:  # no run, so no page of it
        for model_name, entries in (("base", scores.get("base", {})), ("tuned", scores.get("tuned", {}))):
            for name, entry in entries.items():
                shown = entry.get("reason") or round(entry["score"] or 0.0, 2)
                say(f"{f'{model_name} {name}':<24}{shown}")
    return 0


def _begun_from(recipe: Recipe) -> str | None:
    """The adapter that the run in output_dir went on from."""
    config = recipe.output_dir / "training_config.json"
    if not config.is_file():
        return None
    return json.loads(config.read_text(encoding="utf-8"))["recipe"]["adapter_name_or_path"]


def export_again(recipe: Recipe) -> int:
    """--export: final_model/ from lora_adapter/, once more."""
    adapter = recipe.output_dir / "lora_adapter"
    if not adapter.is_dir():
        raise recipe.error("output_dir", f"there is no {adapter} to merge; train first")
    tokenizer = load_tokenizer(recipe)
    data = prepare(recipe, tokenizer)
    say(f"saved {export.save_final_model(recipe, tokenizer, data.encoder.stop_ids)}")
    return 0
