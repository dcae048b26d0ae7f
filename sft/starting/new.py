"""`python run_sft.py --new recipes/mine.yaml MODEL DATA [DATA ...]`: a recipe from looking at a model and data."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sft.data.tokens import CONTROL, UNREADABLE
from sft.errors import UserError
from sft.model.load import meta_model
from sft.model.machine import check_machine, use_cpu
from sft.model.tokenizer import load_tokenizer
from sft.recipe import Recipe
from sft.starting.draft import Draft, refuse_existing, spelled, split_overrides, without_lines, write_new
from sft.starting.measure import Measured, linear_layers, measure
from sft.training import packing_probe
from sft.training.check import trained_weights
from sft.training.memory import free_bytes, needs

# By a word in their names files are taken for the splits that are not trained on.
SPLIT_NAMES = {"test": ("test", "eval"), "validation": ("validation", "valid", "val", "dev")}
LENGTHS = (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)
HELD = 0.99  # of the rows that dataset.max_length must hold whole
EVERYTHING = 10**6  # tokens, of no row
FEW_ROWS, SPLIT_ROWS = 100, 200  # below the first nothing is held out; of more a split has this many, or a tenth
FEW_STEPS = 100  # in fewer the learning rate hardly rises and falls
RATES = ((0.5e9, 1e-3), (2e9, 5e-4), (20e9, 2e-4), (float("inf"), 1e-4))  # weights below which a LoRA takes this rate
FULL_SHARE = 0.1  # of it when all weights train
METHODS = {
    "LoRA": ["quantization_config=null"],
    "QLoRA": [],
    "full": ["quantization_config=null", "lora_config=null", "training_args.optim=adamw_torch_fused"],
}
NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_use_double_quant": True,
}


def write_recipe(path: Path, words: Sequence[str]) -> None:
    """Writes the recipe and tells what it was made from. words: model, data, and key.path=value that stand as given.

    Raises: UserError: model or data are not there, or cannot be used; nothing is written then.
    """
    refuse_existing(path)
    names, overrides = split_overrides(words)
    has_data = any(word.startswith("dataset.train=") for word in overrides)
    if len(names) < (1 if has_data else 2):
        raise UserError(
            "--new takes a recipe, a model and data, e.g. python run_sft.py --new recipes/mine.yaml "
            "models/SmolLM2-135M-Instruct mine.jsonl"
        )
    try:
        draft, found = draft_of(path, names[0], names[1:], overrides)
    except UserError as error:
        raise UserError(without_lines(error, path)) from None
    write_new(path, draft.text(path))
    print(*found, *draft.tail, f"{path} is written", sep="\n")


def draft_of(path: Path, model_name: str, files: Sequence[str], overrides: Sequence[str]) -> tuple[Draft, list[str]]:
    """The recipe, and what was found, in lines for the terminal."""
    draft = Draft()
    draft.set("model_name_or_path", model_name)
    draft.set("output_dir", f"output/{path.stem}")
    _name_splits(draft, files)
    for override in overrides:
        draft.override(override)
    recipe = draft.recipe(path)
    check_machine(recipe)
    tokenizer, model = load_tokenizer(recipe), meta_model(recipe)
    lenient = [f"dataset.max_length={EVERYTHING}", "dataset.packing=false", "dataset.on_error=skip"]
    lenient += ["dataset.control_tokens=skip", "dataset.max_lost=1", "dataset.near_duplicates=off"]
    measured = measure(draft.recipe(path, lenient), tokenizer)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or EVERYTHING
    _set_data(draft, measured, context)
    _set_lora(draft, linear_layers(model), type(model).__name__)
    weights = sum(p.numel() for p in model.parameters())
    _set_training(draft, weights)
    if draft.value("dataset.test") is not None:
        _set_generation(draft, measured)
    for override in overrides:
        draft.override(override)
    method = _choose_method(draft, path, measured, overrides)
    recipe = draft.recipe(path)
    packs, _ = packing_probe.decide(recipe, tokenizer)
    _set_steps(draft, measured, packs, recipe)
    for override in overrides:
        draft.override(override)
    if draft.value("lora_config.r"):
        trained = trained_weights(draft.recipe(path), model)
        draft.set("lora_config.r", draft.value("lora_config.r"), f"the adapter's size: {_count(trained)} weights")
    context_words = f", context of {context:,} tokens" if context < EVERYTHING else ""
    found = [f"model: {type(model).__name__}, {_count(weights)} weights{context_words}"]
    formats = ", ".join(sorted({str(file.facts["format"]) for file in measured.files}))
    found.append(
        f"data: {measured.rows:,} rows to train on (format {formats}), {int(measured.lengths.sum()):,} tokens, the "
        f"longest row {measured.longest:,}"
    )
    draft.head = [*found, *method]
    return draft, draft.head


def _count(weights: int) -> str:
    return f"{weights / 1e9:.1f} billion" if weights >= 1e9 else f"{weights / 1e6:.1f} million"


def _name_splits(draft: Draft, files: Sequence[str]) -> None:
    """Each file to the split that its name tells."""
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for file in files:
        words = re.split(r"[^a-z]+", Path(file).name.lower())
        split = next((name for name, known in SPLIT_NAMES.items() if set(words) & set(known)), "train")
        splits[split].append(file)
    if files and not splits["train"]:
        raise UserError(f"{files[0]}: by its name it is to be tested on; name a file to train on besides, or rename it")
    for name, entries in splits.items():
        if entries:
            comment = "by its name" if name != "train" else ""
            draft.set(f"dataset.{name}", entries[0] if len(entries) == 1 else entries, comment)


def _set_data(draft: Draft, measured: Measured, context: int) -> None:
    rows = measured.rows
    train = draft.value("dataset.train")
    draft.set("dataset.train", train, f"{rows:,} rows")
    if rows >= FEW_ROWS:
        for name, part in (("validation", 20), ("test", 10)):
            if draft.value(f"dataset.{name}") is None and (name == "test" or rows >= SPLIT_ROWS):
                share = float(f"{min(max(1 / part, 20 / rows), SPLIT_ROWS / rows):.1g}")
                comment = f"about {round(share * rows):,} rows held out"
                draft.set(f"dataset.{name}", share, comment + (", scored before and after" if name == "test" else ""))
    elif draft.value("dataset.test") is None:
        draft.tail += [f"No row of {rows:,} is held out, so no answer is scored; dataset.test: 0.2 holds a fifth out."]
    longest = int(measured.lengths.max())
    enough = next((n for n in LENGTHS if np.mean(measured.lengths <= n) >= HELD), LENGTHS[-1])
    enough = min(enough, context)
    held = np.mean(measured.lengths <= enough)
    words = "all rows" if held == 1 else f"{np.floor(held * 1000) / 10:.1f} % of the rows"
    draft.set("dataset.max_length", enough, f"holds {words}; the longest has {longest:,} tokens")
    if (lost := 1 - held) > 0.05:
        draft.set("dataset.max_lost", min(1.0, float(np.ceil(lost * 100 + 1) / 100)), "for the rows that are longer")
    if bad := measured.problems[UNREADABLE]:
        draft.set("dataset.on_error", "skip", f"{len(bad):,} rows cannot be read, the first {bad[0]}")
    if spelled := measured.problems[CONTROL]:
        draft.set("dataset.control_tokens", "text", f"{len(spelled):,} rows spell one, the first {spelled[0]}")


def _set_lora(draft: Draft, layers: list[str], model_class: str) -> None:
    for key, value in NF4.items():
        draft.set(f"quantization_config.{key}", value)
    draft.set("lora_config.r", 16)
    draft.set("lora_config.lora_alpha", 32, "twice r")
    draft.set("lora_config.lora_dropout", 0.05)
    draft.set("lora_config.target_modules", layers or "all-linear", f"every linear layer of {model_class}")


def _set_training(draft: Draft, weights: int) -> None:
    rate = next(rate for below, rate in RATES if weights < below)
    draft.set("training_args.learning_rate", rate, "for LoRA on a model of this size")
    draft.set("training_args.lr_scheduler_type", "cosine")
    draft.set("training_args.warmup_steps", 0.05, "a share of all steps")
    draft.set("training_args.per_device_train_batch_size", 1)
    draft.set("training_args.save_strategy", "epoch")
    draft.set("training_args.save_total_limit", 2, "checkpoints kept")


def _set_generation(draft: Draft, measured: Measured) -> None:
    """Room for the answers: half as much again as 99 % of them have."""
    usual = int(np.quantile(measured.answers, 0.99))
    draft.set(
        "evaluation.generation",
        {"max_new_tokens": int(np.ceil(usual * 1.5 / 16) * 16)},
        f"99 % of the answers have at most {usual:,} tokens",
    )


def _choose_method(draft: Draft, path: Path, measured: Measured, overrides: Sequence[str]) -> list[str]:
    """LoRA where it fits, else QLoRA; what each takes, in lines for the terminal."""
    if any(re.match(r"lora_config=|quantization_config|adapter_name", word) for word in overrides):
        return _keep_what_was_asked(draft, overrides)
    on_cpu = use_cpu(draft.recipe(path))
    free, sizes = free_bytes(on_cpu), {}
    for name, changes in METHODS.items():
        recipe = draft.recipe(path, changes)
        sizes[name] = needs(recipe, meta_model(recipe), on_cpu, measured.longest).most
    chosen = "LoRA" if sizes["LoRA"] <= free else "QLoRA"
    comparison = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in sizes.items())
    where = "memory" if on_cpu else "GPU memory"
    line = f"{where}, GB: {comparison}; {free / 1e9:.1f} are free: {chosen}"
    if chosen == "LoRA":
        draft.drop("quantization_config.")
        draft.set("lora_config.r", 16)
        faster = draft.recipe(path, ["training_args.activation_checkpointing=false"])
        if needs(faster, meta_model(faster), on_cpu, measured.longest).most <= free / 2:
            draft.set("training_args.activation_checkpointing", False, "there is memory enough, and it is faster")
    else:
        draft.set("quantization_config.load_in_4bit", True, f"QLoRA: unquantised it takes {sizes['LoRA'] / 1e9:.1f} GB")
        if torch.cuda.is_available():  # elsewhere bitsandbytes has no paged optimizer
            draft.set("training_args.optim", "paged_adamw_8bit")
    if sizes["full"] <= free:
        rate = draft.value("training_args.learning_rate") * FULL_SHARE
        draft.tail.append(
            f"Full fine-tuning fits too: without lora_config, and at a learning_rate of about {spelled(rate)}."
        )
    return [line] if sizes[chosen] <= free else [f"{line}, which may not fit; see --check"]


def _keep_what_was_asked(draft: Draft, overrides: Sequence[str]) -> list[str]:
    """The method that the command line says, and nothing of another one."""
    names = [word.partition("=")[0] for word in overrides]
    if not any(name.startswith("quantization_config") and draft.value(name) is not None for name in names):
        draft.drop("quantization_config.")
    if "lora_config=null" in overrides:
        rate = draft.value("training_args.learning_rate") * FULL_SHARE
        draft.set("training_args.learning_rate", rate, "for full fine-tuning of a model of this size")
    if draft.value("adapter_name_or_path"):
        draft.drop("lora_config.")
    return []


def _set_steps(draft: Draft, measured: Measured, packs: bool, recipe: Recipe) -> None:
    """Epochs, and rows a step: as many, up to 16, as leave FEW_STEPS steps."""
    epochs = 3 if measured.rows < 10_000 else 2 if measured.rows < 100_000 else 1
    draft.set("training_args.num_train_epochs", epochs, "fewer where there is more data")
    examples = len(measured.lengths) * (1 - sum(_share(draft, name) for name in ("validation", "test")))
    if packs:
        examples = min(examples, examples * float(measured.lengths.mean()) / recipe.dataset.max_length * 1.05)
    rows_in_all = examples * epochs
    each = next((n for n in (16, 8, 4, 2) if rows_in_all / n >= FEW_STEPS), 1)
    steps = max(1, round(rows_in_all / each))
    what = "packed rows" if packs else "conversations"
    draft.set("training_args.gradient_accumulation_steps", each, f"{what} a step: about {steps:,} steps")
    draft.set("training_args.logging_steps", max(1, min(10, steps // 20)))
    draft.set("training_args.per_device_train_batch_size", 1, f"{what} at a time")


def _share(draft: Draft, split: str) -> float:
    value = draft.value(f"dataset.{split}")
    return value if isinstance(value, float) else 0.0
