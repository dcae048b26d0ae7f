"""Settings of methods that do not go together, and what one of their keys sets besides."""

from collections.abc import Iterator
from typing import Any

from sft.recipe.keys import PEFT_TYPES, Recipe
from sft.recipe.reader import spell

Problem = tuple[str, str]  # a key in the flat layout; what is wrong with it, and what to do

START = "lora_config.init_lora_weights"
FROM_DATA = ("eva", "corda", "lora_ga")  # started from what the data gives in the base's layers
LOSSES = ("loss", "eval_loss")
# Kinds that compute with the base's own weights: over 4 or 8 bits their first step fails, or, of HRA over 8 bits, the
# model that starts is another than the base (peft 0.21).
UNQUANTISED = ("C3A", "DELORA", "HRA", "LOHA", "LOKR")


def with_what_follows(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a recipe with the training_args that evaluation.every, early_stopping and the best checkpoint ask
    for, where these leave them open: transformers refuses, or silently compares, what was not saved when validated."""
    args, every = dict(values.get("training_args") or {}), (values.get("evaluation") or {}).get("every")
    if every:
        args = {"eval_strategy": "steps", "eval_steps": every} | args
    if values.get("early_stopping") is not None:
        args = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"} | args
    if args.get("load_best_model_at_end") and "save_strategy" not in args:
        args["save_strategy"] = args.get("eval_strategy", "epoch")  # which is the default with dataset.validation
        if args["save_strategy"] == "steps" and "eval_steps" in args:
            args.setdefault("save_steps", args["eval_steps"])
    return values | {"training_args": args}


def kind_of_adapter(recipe: Recipe) -> str:
    return str((recipe.lora_config or {}).get("peft_type", PEFT_TYPES[0]))


def quantised_kinds(recipe: Recipe) -> Iterator[Problem]:
    if recipe.quantization_config and kind_of_adapter(recipe) in UNQUANTISED:
        yield (
            "lora_config.peft_type",
            f"{kind_of_adapter(recipe)} computes with the base's own weights, and these are quantised; choose LORA, "
            "OFT, IA3, VERA or RANDLORA, or remove quantization_config",
        )


def lora_start(recipe: Recipe) -> Iterator[Problem]:
    lora, quantised = recipe.lora_config or {}, recipe.quantization_config or {}
    init = lora.get("init_lora_weights")
    if init in FROM_DATA:
        yield START, f"{init} starts from a pass over the data, which is not made here; choose pissa, olora, orthogonal"
    elif isinstance(init, str) and init.startswith(("pissa", "olora")):
        if quantised:
            yield START, f"{init} takes a part out of the base's weights, and these are quantised; choose loftq"
        if lora.get("target_parameters"):
            yield START, f"{init} knows no target_parameters; name target_modules only"
    elif init == "loftq":
        if not quantised.get("load_in_4bit"):
            yield START, "loftq makes good for 4-bit weights; set quantization_config.load_in_4bit: true"
        elif recipe.export.merge:
            yield (
                START,
                "a loftq adapter belongs to the 4-bit base, and would be wrong on the unquantised one; set "
                "export.merge: false, and serve lora_adapter/ on the 4-bit base",
            )


def loraplus(recipe: Recipe) -> Iterator[Problem]:
    if recipe.loraplus_lr_ratio is None:
        return
    if recipe.trains_all_weights:
        yield "loraplus_lr_ratio", "is for LoRA, and all weights are trained; give lora_config, or take it out"
    elif kind_of_adapter(recipe) != "LORA":
        yield "loraplus_lr_ratio", f"is for LoRA; {kind_of_adapter(recipe)} has no matrices A and B; take it out"


def validation(recipe: Recipe) -> Iterator[Problem]:
    args, every = recipe.training_args, recipe.evaluation.every
    for key, value in (("evaluation.every", every), ("early_stopping", recipe.early_stopping)):
        if value is not None and recipe.dataset.validation is None:
            yield key, "needs dataset.validation; give a file, or a share held out of train"
    if every is not None:
        for key, wanted in (("eval_strategy", "steps"), ("eval_steps", every)):
            if args.get(key) != wanted:
                yield f"training_args.{key}", f"is {spell(args[key])}, and evaluation.every sets {wanted}; take one out"
    chooses = recipe.early_stopping is not None or args.get("load_best_model_at_end")
    if chooses and args.get("eval_strategy") == "no":
        yield "training_args.eval_strategy", "'no' validates nothing to choose a checkpoint by; give steps or epoch"
    best = args.get("metric_for_best_model")
    if best is not None and best not in LOSSES and every is None:
        yield (
            "training_args.metric_for_best_model",
            f"{spell(best)} is a score of answers, which are given while training with evaluation.every; set it, or "
            "choose eval_loss",
        )
