"""What can be told before training: the masks as a person sees them, the stop token, the disk a run will ask for."""

import copy
import math
import shutil
import tempfile
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft.data.splits import Data
from sft.errors import ModelError
from sft.model.load import load_config
from sft.model.lora import adapter_config, read_adapter_config
from sft.model.source import first_line
from sft.plain_text import plain_text
from sft.recipe import Recipe

Pieces = list[tuple[str, bool]]  # (text, does it carry loss), in order


def mask_pieces(tokenizer: PreTrainedTokenizerBase, input_ids: list[int], mask: list[int]) -> Pieces:
    """A row as text, split where the loss begins and ends."""
    pieces: Pieces = []
    begin = 0
    for i in range(1, len(input_ids) + 1):
        if i == len(input_ids) or mask[i] != mask[begin]:
            text = tokenizer.decode(input_ids[begin:i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            pieces.append((str(text), bool(mask[begin])))
            begin = i
    return pieces


def render_pieces(pieces: Pieces, colour: bool) -> str:
    """For the terminal: green is trained on; without colour it stands between [[ and ]]."""
    on, off = ("\033[32m", "\033[0m") if colour else ("[[", "]]")
    shown = [(plain_text(text), trained) for text, trained in pieces]
    return "".join(f"{on}{text}{off}" if trained else text for text, trained in shown)


def stop_token_line(data: Data, tokenizer: PreTrainedTokenizerBase) -> str:
    """Proof that the token at which generation stops is trained on, over the first rows of each file.

    Raises: ModelError: an answer whose last trained token is no stop token.
    """
    stops, counted = data.encoder.stop_ids, 0
    for file in data.files:
        for row in file.rows.select(range(min(200, len(file.rows)))):
            mask = row["assistant_mask"] + [0]
            for i, token in enumerate(row["input_ids"]):
                if mask[i] and not mask[i + 1]:
                    counted += 1
                    if token not in stops:
                        raise ModelError(f"{file.path}:{row['line']}: an answer ends in {token}, which stops nothing")
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(stop)} ({stop})" for stop in sorted(stops))
    return f"stop token {names}: trained on in each of {counted:,} answers looked at"


def trained_weights(recipe: Recipe, model: PreTrainedModel) -> int:
    """How many weights are trained: all, or what peft puts on a copy of the model without weights.

    Raises: RecipeError: peft refuses lora_config for this model.
    """
    return sum(p.numel() for p in with_lora(recipe, model).parameters() if p.requires_grad)


def with_lora(recipe: Recipe, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
    """A copy of the model without weights that has the recipe's LoRA; the model itself in full fine-tuning.

    Raises: RecipeError: peft refuses lora_config for this model.
    """
    key = "adapter_name_or_path" if recipe.adapter_name_or_path else "lora_config"
    if recipe.trains_all_weights:
        return model
    try:
        config: PeftConfig
        if recipe.adapter_name_or_path:
            config = read_adapter_config(recipe.adapter_name_or_path, recipe)
            config.inference_mode = False
        else:
            config = adapter_config(recipe.lora_config or {})
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = False  # there is nothing to compute them from
        return get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise recipe.error(key, first_line(error)) from None


def refuse_unknown_ids(recipe: Recipe, data: Data) -> None:
    """Raises: RecipeError: rows hold ids that the model has no embedding for."""
    vocabulary = getattr(load_config(recipe).get_text_config(), "vocab_size", None)
    columns = [file.rows.data.column("input_ids") for file in data.files if len(file.rows)]
    highest = max((pa.compute.max(pa.compute.list_flatten(ids)).as_py() for ids in columns), default=0)
    if vocabulary is not None and highest >= vocabulary:
        raise recipe.error(
            "model_name_or_path",
            f"its tokenizer gives the id {highest:,}, and the model's vocabulary has {vocabulary:,}; these do not fit",
        )


def samples(data: Data, tokenizer: PreTrainedTokenizerBase, count: int = 2) -> list[dict[str, Any]]:
    """The first examples of each file with their masks, for --check and the report; none of a share held out of it."""
    found = []
    for split in data.splits.values():
        for file, inside in split.rows.by_file(split.chosen) if split.has_own_files else ():
            inside = inside[np.diff(inside, prepend=-1) != 0]  # a weight repeats its rows
            lines = file.rows.data.column("line").to_numpy()[inside[: count + 1]].tolist()
            for i, row in enumerate(file.rows.select(inside[:count])):
                pieces = mask_pieces(tokenizer, row["input_ids"], row["assistant_mask"])
                place, number = f"{file.path}:{row['line']}", lines[: i + 1].count(row["line"])
                if lines.count(row["line"]) > 1:
                    place += f", example {number}"
                found.append({"split": split.name, "place": place, "pieces": pieces})
    return found


def check_disk(recipe: Recipe, weights: int, trained: int, steps_to_do: int) -> str:
    """Estimates what the run will write and compares it with what the disk has.

    Args: weights, trained: how many the model has, and how many of them (or beside them, with LoRA) are trained.
    Returns: a line for the terminal.
    Raises: RecipeError: it does not fit.
    """
    args = recipe.training_args
    each = trained * (4 if args.get("save_only_model") else 12)  # float32, and two moments of AdamW in float32
    every = float(args.get("save_steps", 500))
    every = max(1, round(every * steps_to_do) if every < 1 else int(every))
    strategy = args.get("save_strategy", "steps")
    count = {"no": 0, "epoch": math.ceil(float(args.get("num_train_epochs", 3)))}.get(
        strategy, steps_to_do // every + 1
    )
    if limit := args.get("save_total_limit"):
        count = min(count, limit + 1)  # a new one is written before the oldest goes
    lora = 0 if recipe.trains_all_weights else trained * 4
    need = each * count + lora + (weights * 2 if recipe.export.merge or not lora else 0)
    folder = next(p for p in [recipe.output_dir, *recipe.output_dir.absolute().parents] if p.exists())
    if not folder.is_dir():
        raise recipe.error("output_dir", f"{folder} is a file; name a folder")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise recipe.error(
            "output_dir", f"{folder} cannot be written: {error.strerror}; make it writable, or name another folder"
        ) from None
    free = shutil.disk_usage(folder).free
    there = (path for name in ("checkpoint-*", "lora_adapter", "final_model") for path in recipe.output_dir.glob(name))
    written = 0
    with suppress(FileNotFoundError):  # another run may be writing there, which is told later
        written = sum(file.stat().st_size for path in there for file in path.rglob("*") if file.is_file())
    of_checkpoints = f"{count} x {each / 1e9:.2f} GB of checkpoints"
    line = f"disk: about {need / 1e9:.1f} GB to be written ({of_checkpoints}), {free / 1e9:.1f} GB free"
    if need > free + written:  # a run that goes on, or is made again, has written a part of it
        raise recipe.error("output_dir", f"{line}; free some, set training_args.save_total_limit, or name another disk")
    return line
