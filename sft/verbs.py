"""What can be done besides a run: --score and --export, again with its folder, and --check --steps before it."""

import dataclasses
import tempfile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from sft import processes, settle
from sft.data.splits import Data, prepare
from sft.faults import memory_advice
from sft.model.lora import add_lora
from sft.model.machine import check_machine, peak_memory_bytes
from sft.model.tokenizer import load_tokenizer
from sft.plain_text import duration
from sft.processes import say
from sft.recipe import Recipe
from sft.results import hub, page
from sft.results.evaluation import evaluate_models, models_on_disk
from sft.results.run_folder import read_file
from sft.results.scores import Scores
from sft.results.sole_writer import sole_writer
from sft.results.summary import run_summary, score_lines
from sft.run import MERGE_ADVICE, SCORE_ADVICE, check_parity, join_processes, load_for_training, merge
from sft.training import arguments
from sft.training.duration import StepClock
from sft.training.trainer import make_trainer


def score_again(recipe: Recipe) -> int:
    """--score: the run's own adapter or model, or the one that an override names, on dataset.test."""
    if recipe.dataset.test is None:
        raise recipe.error("dataset", "--score needs dataset.test")
    join_processes(recipe)
    tokenizer = load_tokenizer(recipe)
    recipe = settle.day(recipe, tokenizer)
    check_machine(recipe)
    data = processes.agree(lambda: prepare(recipe, tokenizer, scoring_only=True))
    key = recipe.places.get("dataset.test")
    if key is not None and key.is_overridden and (recipe.output_dir / "scores.json").is_file():
        say(f"the scores and replies in {recipe.output_dir} are replaced; name another output_dir to keep them")
    with sole_writer(recipe), memory_advice(SCORE_ADVICE):
        models = models_on_disk(recipe)
        if len(models) == 1:
            say(f"{recipe.output_dir} holds no run: scoring {recipe.model_name_or_path} alone")
        scores = evaluate_models(recipe, data.encoder, data.test_conversations, models, data.general)
        if processes.is_first():
            _tell(recipe, scores)
    return 0


def _tell(recipe: Recipe, scores: Scores) -> None:
    """The page of the run anew, and its summary on the terminal; of a model without a run its scores."""
    if (recipe.output_dir / "training_config.json").is_file():
        page.write_report(recipe.output_dir)
        say(run_summary(recipe.output_dir))
    else:  # no run, so no page of it
        say("\n".join(score_lines(scores)))


def export_again(recipe: Recipe) -> int:
    """--export: final_model/ from lora_adapter/, the page and the model cards, and the upload, once more."""
    adapter, start = recipe.output_dir / "lora_adapter", "init_lora_weights"
    if (recipe.lora_config or {}).get(start) == "loftq":
        raise recipe.error(
            f"lora_config.{start}", "a loftq adapter is for the 4-bit base, and wrong on the unquantised"
        )
    if not adapter.is_dir():
        if recipe.trains_all_weights and (recipe.output_dir / "final_model").is_dir():
            raise recipe.error("output_dir", f"{recipe.output_dir}/final_model is what was trained; nothing is merged")
        raise recipe.error("output_dir", f"there is no {adapter} to merge; train first")
    if not processes.is_first():
        return 0  # merging is work for one
    description = read_file(recipe.output_dir / "training_config.json")
    if description is None:
        raise recipe.error(
            "output_dir", f"there is no training_config.json in {recipe.output_dir}; run the recipe again"
        )
    hub.check_upload(recipe, is_made=True)
    tokenizer = load_tokenizer(recipe)
    recipe = settle.day(recipe, tokenizer)
    data = prepare(recipe, tokenizer)
    with sole_writer(recipe), memory_advice(MERGE_ADVICE):
        merge(recipe, tokenizer, data, description)
        check_parity(recipe, description, data)
        page.write_report(recipe.output_dir)
        hub.upload(recipe)
    return 0


def time_steps(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, data: Data, count: int) -> None:
    """--check --steps: the run's first steps, in a folder that is removed, and what they say of the whole."""
    total, args = arguments.steps(recipe, data), recipe.training_args
    with tempfile.TemporaryDirectory() as folder:
        off = {"max_steps": count, "save_strategy": "no", "eval_strategy": "no", "eval_on_start": False}
        if args.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"):  # which go by validations
            off |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None}
        off |= {"load_best_model_at_end": False, "report_to": "none", "logging_steps": 1}
        short = dataclasses.replace(recipe, output_dir=Path(folder), training_args={**args, **off}, early_stopping=None)
        clock = StepClock()
        model = add_lora(load_for_training(short), short)
        make_trainer(short, model, tokenizer, data, [clock]).train()
    first, *others = clock.seconds
    each = sum(others) / len(others) if others else first
    say(
        f"a step takes {each:.2g} s (the first {first:.2g} s): {duration(each * total)} for {total:,} steps, without "
        f"validation and scores; the process held {peak_memory_bytes() / 1e9:.1f} GB at its peak"
    )
