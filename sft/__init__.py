"""Supervised fine-tuning of chat models from one YAML recipe; see README.md."""

from typing import Any

__all__ = ["DataCollatorForCompletionOnlyLM"]  # noqa: F822 - __getattr__ below gives it


def __getattr__(name: str) -> Any:
    # Lazy, so that reading a recipe or printing --help never waits for torch.
    if name == "DataCollatorForCompletionOnlyLM":
        from sft.data.collator import DataCollatorForCompletionOnlyLM

        return DataCollatorForCompletionOnlyLM
    raise AttributeError(f"module 'sft' has no attribute {name!r}")
