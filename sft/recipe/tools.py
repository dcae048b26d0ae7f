"""Recipes of other tools, told apart by keys that ours does not have; `--from` writes ours from them."""

import re
from typing import Any

# In this order: the first tool of which a key is there. alignment-handbook's script takes all keys of trl's.
SIGNS = {
    "LLaMA-Factory": ("finetuning_type", "stage", "cutoff_len", "lora_target", "dataset_dir", "train_dataset"),
    "ms-swift": (
        "tuner_type",
        "train_type",
        "sft_type",
        "rlhf_type",
        "split_dataset_ratio",
        "quant_bits",
        "model_author",
        "model",
    ),
    "Axolotl": ("base_model", "micro_batch_size", "sequence_len"),
    "alignment-handbook": ("dataset_mixer", "dataset_mixture", "dataset_splits"),
    "trl": ("dataset_name", "use_peft", "dataset_train_split", "dataset_text_field", "assistant_only_loss"),
}
# The command that starts a tool, before its arguments.
COMMANDS = {
    "LLaMA-Factory": r"llamafactory-cli\s+train|src/train(?:_bash)?\.py",
    "Axolotl": r"axolotl\s+(?:train|preprocess)|axolotl\.cli\.train",
    "ms-swift": r"(?:swift|megatron)\s+(?:sft|pt|rlhf|infer|deploy|export|sample|rollout|eval)|swift/cli/\w+\.py",
    "trl": r"\btrl\s+[a-z]+|\bsft\w*\.py|scripts/\w+\.py",
}


def tool_of(values: dict[Any, Any]) -> str | None:
    """The tool that a recipe with these top-level keys (and their values) is of; None: ours, or unknown.

    >>> tool_of({"base_model": "m", "datasets": []}), tool_of({"model_name_or_path": "m", "dataset": {"train": "a"}})
    ('Axolotl', None)
    """
    if isinstance(values.get("dataset"), dict) or "dataset_path" in values or isinstance(values.get("model"), dict):
        return None
    if "chat_template" in values and "model_name_or_path" in values:  # inline, which trl's own script does not take
        return "alignment-handbook"
    return next((tool for tool, keys in SIGNS.items() if any(key in values for key in keys)), None)


def tool_of_command(text: str) -> str | None:
    """The tool that a shell script starts."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return next((tool for tool, command in COMMANDS.items() if re.search(command, "\n".join(lines))), None)
