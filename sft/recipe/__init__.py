"""What was asked: a YAML file comes in, a checked `Recipe` goes out, or an error that names each mistake with its line.

Every other room may import from here; this one imports no other, and no torch, so that a wrong recipe answers at once.
"""

from sft.recipe.recipe import ChatOptions, DatasetOptions, EvaluationOptions, ExportOptions, Recipe, Source, load_recipe

__all__ = ["ChatOptions", "DatasetOptions", "EvaluationOptions", "ExportOptions", "Recipe", "Source", "load_recipe"]
