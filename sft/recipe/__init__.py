"""What was asked: a YAML file comes in, a checked `Recipe` goes out, or an error that names each mistake with its line.

Every other room may import from here; this one imports no other, and no torch, so that a wrong recipe answers at once.
In the order of their imports: reader.py (YAML -> items that know their place), keys.py (the keys, one dataclass a
section), schema.py (what is wrong with a key or value), layouts.py (flat and nested), rules.py (what does not go
together), load.py. `python -m sft.recipe.generate` writes schema.json and docs/recipe.md.
"""

from sft.recipe.keys import (
    PEFT_TYPES,
    ChatOptions,
    DatasetOptions,
    EvaluationOptions,
    ExportOptions,
    Recipe,
    Source,
)
from sft.recipe.load import load_recipe

__all__ = [
    "PEFT_TYPES",
    "ChatOptions",
    "DatasetOptions",
    "EvaluationOptions",
    "ExportOptions",
    "Recipe",
    "Source",
    "load_recipe",
]
