"""Settings that are right each by itself but not together."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

from sft.recipe.keys import Recipe, Source
from sft.recipe.methods import lora_start, loraplus, quantised_kinds, validation
from sft.recipe.reader import spell

Problem = tuple[str, str]  # a key in the flat layout; what is wrong with it, and what to do

LOAD_IN = ("load_in_4bit", "load_in_8bit")
RENDERED = ("messages", "tools", "documents", "add_generation_prompt")  # what every rendering gives a chat template
OUTPUT_LAYERS = ("lm_head", "output_layer", "embed_out")  # of Qwen and Llama, of ChatGLM, of GPT-NeoX
# Keys of training_args that look at the loss of dataset.validation, and with which values.
NEEDS_VALIDATION = {
    "eval_strategy": ("steps", "epoch"),
    "eval_on_start": (True,),
    "load_best_model_at_end": (True,),
    "save_strategy": ("best",),
    "lr_scheduler_type": ("reduce_lr_on_plateau", "greedy"),
}


def contradictions(recipe: Recipe) -> Iterator[Problem]:
    for rule in _RULES:
        yield from rule(recipe)


def _sources(recipe: Recipe) -> Iterator[tuple[str, int, Source]]:
    """Each source with its split and its place in it."""
    for split in ("train", "validation", "test"):
        sources = getattr(recipe.dataset, split)
        for i, source in enumerate(sources if isinstance(sources, tuple) else ()):
            yield split, i, source


def _quantization(recipe: Recipe) -> Iterator[Problem]:
    quantization = recipe.quantization_config
    if quantization is None:
        return
    if all(quantization.get(flag) for flag in LOAD_IN):
        yield "quantization_config", "asks for 4 bits and for 8 bits; choose one"
    if not any(quantization.get(flag) for flag in LOAD_IN):
        yield "quantization_config", "quantises nothing; add load_in_4bit: true or load_in_8bit: true"
    if recipe.trains_all_weights:
        yield (
            "quantization_config",
            "quantised weights cannot be trained, only LoRA weights beside them; turn LoRA on, or quantisation off",
        )


def _target_modules(recipe: Recipe) -> Iterator[Problem]:
    targets = (recipe.lora_config or {}).get("target_modules", [])
    output_layers = [module for module in OUTPUT_LAYERS if _is_target(module, targets)]
    if isinstance(targets, str) and not _is_pattern(targets):
        yield (
            "lora_config.target_modules",
            f"found {spell(targets)}, a pattern that whole module paths must match; write a list, [{targets}]",
        )
    elif output_layers:
        yield (
            "lora_config.target_modules",
            f"a LoRA on {output_layers[0]} would never be trained: the loss reads its weight directly; take it out, "
            "or train it whole with modules_to_save",
        )


def _is_target(module: str, targets: str | list[str]) -> bool:
    """Whether peft would put a LoRA on an output layer of this name."""
    if isinstance(targets, list):
        return module in targets
    return _is_pattern(targets) and targets != "all-linear" and re.fullmatch(targets, module) is not None


def _is_pattern(targets: str) -> bool:
    """peft reads a text as a pattern over module paths; a single word can match none."""
    try:
        re.compile(targets)
    except re.error:
        return False
    return targets == "all-linear" or re.fullmatch(r"\w+", targets) is None


def _evaluation_during_training(recipe: Recipe) -> Iterator[Problem]:
    training = recipe.training_args
    if recipe.dataset.validation is None:
        for key, values in NEEDS_VALIDATION.items():
            if training.get(key) in values:
                yield (
                    f"training_args.{key}",
                    f"{spell(training[key])} needs dataset.validation; give a file, or a share held out of train",
                )
    elif training.get("load_best_model_at_end"):
        eval_strategy, save_strategy = training.get("eval_strategy", "epoch"), training["save_strategy"]
        if save_strategy not in (eval_strategy, "best"):
            yield (
                "training_args.load_best_model_at_end",
                f"needs eval_strategy ({eval_strategy}) and save_strategy ({save_strategy}) to be equal; change one",
            )
    if training.get("save_strategy") == "best" and not (
        {"metric_for_best_model", "load_best_model_at_end"} & training.keys()
    ):
        yield "training_args.save_strategy", "'best' needs training_args.metric_for_best_model; give eval_loss"


def _evaluated_model(recipe: Recipe) -> Iterator[Problem]:
    if recipe.evaluation.model == "final" and not (recipe.export.merge or recipe.trains_all_weights):
        yield (
            "evaluation.model",
            "final needs export.merge: true, which writes final_model/; set it, or adapter here",
        )


def _push_to_hub(recipe: Recipe) -> Iterator[Problem]:
    name = recipe.export.push_to_hub
    if name is not None and not re.fullmatch(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", name, re.ASCII):
        yield "export.push_to_hub", f"found {spell(name)}; give user/name, of letters, digits, '-', '_' and '.'"


def _splits(recipe: Recipe) -> Iterator[Problem]:
    dataset = recipe.dataset
    shares = {name: share for name in ("validation", "test") if isinstance(share := getattr(dataset, name), float)}
    if sum(shares.values()) >= 1:
        yield "dataset.test", "and dataset.validation are shares that leave nothing to train on; give smaller ones"
    for name, _, source in _sources(recipe):
        if found := re.fullmatch(r"(\d+(?:\.\d+)?) ?%", source.path):
            yield f"dataset.{name}", f"found {spell(source.path)}; a share is written as {float(found[1]) / 100:g}"
    if dataset.streaming:
        if recipe.training_args.get("max_steps", -1) < 1:
            yield "dataset.streaming", "a stream has no known length; set training_args.max_steps"
        for name in shares:
            yield f"dataset.{name}", "a share cannot be held out of a stream; give a file"


def _columns(recipe: Recipe) -> Iterator[Problem]:
    columns = {"dataset.columns": recipe.dataset.columns}
    columns |= {f"dataset.{split}[{i}].columns": source.columns for split, i, source in _sources(recipe)}
    for key, new_names in columns.items():
        names = list((new_names or {}).values())
        if twice := next((name for name in names if names.count(name) > 1), None):
            yield key, f"gives two columns the name {spell(twice)}; keep one of them"


def _templates(recipe: Recipe) -> Iterator[Problem]:
    if recipe.chat.instruction_template is not None and recipe.chat.response_template is None:
        yield "chat.instruction_template", "needs chat.response_template, which starts the answers; give both"


def _date(recipe: Recipe) -> Iterator[Problem]:
    if recipe.chat.date is not None:
        try:
            written = date.fromisoformat(recipe.chat.date).isoformat()
        except ValueError:
            written = ""
        if written != recipe.chat.date:
            yield "chat.date", f"found {spell(recipe.chat.date)}; give a day as 2026-11-25"


def _variables(recipe: Recipe) -> Iterator[Problem]:
    for name, value in recipe.chat.variables.items():
        if name in RENDERED:
            yield f"chat.variables.{name}", "is given to the chat template with each conversation; take it out"
        elif not _is_json([name, value]):
            yield (
                f"chat.variables.{name}",
                "is not JSON: keys must be text, and text whole characters; quote or mend it",
            )


def _is_json(value: Any) -> bool:
    """Of what YAML gives, JSON lacks only keys that are numbers and text with halves of surrogate pairs."""
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and _is_json([*value, *value.values()])
    if isinstance(value, list):
        return all(map(_is_json, value))
    return not isinstance(value, str) or not re.search("[\ud800-\udfff]", value)


def _paths(recipe: Recipe) -> Iterator[Problem]:
    paths = {
        "model_name_or_path": recipe.model_name_or_path,
        "adapter_name_or_path": recipe.adapter_name_or_path,
        "output_dir": str(recipe.output_dir),
        "resume_from_checkpoint": recipe.resume_from_checkpoint,
        "chat.template": recipe.chat.template,
        "evaluation.general": recipe.evaluation.general,
    }
    paths |= {f"dataset.{split}[{i}].path": source.path for split, i, source in _sources(recipe)}
    for key, path in paths.items():
        try:
            if isinstance(path, str):
                os.stat(path)
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES):
                yield key, f"{spell(path)} is no path that can be read: {error.strerror}; give another"


def _output_dir(recipe: Recipe) -> Iterator[Problem]:
    if recipe.output_dir == Path(recipe.model_name_or_path):
        yield "output_dir", "is the model's own folder, which the run would overwrite; give another"


_RULES: tuple[Callable[[Recipe], Iterator[Problem]], ...] = (
    _quantization,
    _target_modules,
    quantised_kinds,
    lora_start,
    loraplus,
    validation,
    _evaluation_during_training,
    _evaluated_model,
    _push_to_hub,
    _splits,
    _columns,
    _templates,
    _date,
    _variables,
    _paths,
    _output_dir,
)
